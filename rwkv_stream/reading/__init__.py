"""A document through a model into a store."""
