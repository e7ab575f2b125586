"""Rows out of documents, written as Parquet and JSON Lines, and search in them."""
