"""Compression methods, one file each, readable beside its paper."""

from hcache.methods import fullkv, heterocache, snapkv, streaming_llm
from hcache.methods.base import EvictionMethod, Method
from hcache.methods.registry import METHODS, load_entry_points, load_file, make, register

load_entry_points()

__all__ = [
    "METHODS",
    "EvictionMethod",
    "Method",
    "fullkv",
    "heterocache",
    "load_file",
    "make",
    "register",
    "snapkv",
    "streaming_llm",
]
