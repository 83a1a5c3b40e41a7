"""Long-context LLM inference with a compressed KV cache.

    cache = hcache.KVCache(model, method="snapkv", budget=0.25)
    model.generate(input_ids, past_key_values=cache)

Names are imported when first used, so that `import hcache` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Budget": "hcache.budget",
    "InfeasibleBudget": "hcache.budget",
    "Geometry": "hcache.geometry",
    "KVCache": "hcache.kv_cache",
    "Generator": "hcache.engine",
    "Generation": "hcache.engine",
    "Method": "hcache.methods",
    "EvictionMethod": "hcache.methods",
    "METHODS": "hcache.methods",
    "register": "hcache.methods",
    "HeadProfile": "hcache.profiling",
    "profile_heads": "hcache.profiling",
}

__all__ = [*_HOME, "__version__", "benchmarks"]


def __getattr__(name: str) -> Any:
    if name == "benchmarks":
        return import_module("hcache.benchmarks")
    if name not in _HOME:
        raise AttributeError(f"module 'hcache' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
