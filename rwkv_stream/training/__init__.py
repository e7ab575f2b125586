"""A model from text, by a recipe."""
