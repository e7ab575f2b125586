"""A model from text."""
