"""Documents as bytes, bytes as tokens, tokens as chunks and units; knows no torch and no model."""
