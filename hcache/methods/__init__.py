"""Compression methods, one file each, readable beside its paper."""

from hcache.methods import (
    cake,
    fullkv,
    h2o,
    heterocache,
    omnikv,
    pyramidkv,
    quest,
    random,
    shadowkv,
    snapkv,
    streaming_llm,
)
from hcache.methods.base import Method, Usage
from hcache.methods.eviction import EvictionMethod
from hcache.methods.registry import METHODS, load_entry_points, load_file, make, register

load_entry_points()

__all__ = [
    "METHODS",
    "EvictionMethod",
    "Method",
    "Usage",
    "cake",
    "fullkv",
    "h2o",
    "heterocache",
    "load_file",
    "make",
    "omnikv",
    "pyramidkv",
    "quest",
    "random",
    "register",
    "shadowkv",
    "snapkv",
    "streaming_llm",
]
