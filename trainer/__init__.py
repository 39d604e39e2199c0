"""How models are made and judged. Imports `models`, and of `streams` only the wire types."""
