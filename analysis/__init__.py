"""Reads what runs left in outputs/; never runs a model and knows only files."""

import importlib.util

if importlib.util.find_spec("pandas") is None:
    raise ImportError("analysis needs pandas, which is not installed: pip install 'hcache[analysis]'")
