"""Reads what runs left in outputs/; never runs a model and knows only files."""
