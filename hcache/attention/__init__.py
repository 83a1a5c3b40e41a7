"""Attention over what is kept: backends behind one signature, and the function transformers calls."""
