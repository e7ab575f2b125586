"""A snapshot and a question: the answer."""
