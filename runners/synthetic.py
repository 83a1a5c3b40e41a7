"""A head profile for weights that have none of their own.

Random weights have no roles. Where no profile is given they get one made up, with the role proportions that
HeteroCache's authors published for Llama-3.1-8B-Instruct; given profiles are taken for their roles alone.
Nothing here says how attention really goes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hcache.geometry import Geometry
from hcache.models import ModelSpec
from hcache.profiling import Graph, HeadProfile, load_profile

NOTE = (
    "synthetic profile: made-up roles in the proportions published for Llama-3.1-8B (10 anchors, 17 volatile "
    "heads, 33 pivots and 196 satellites of 256)"
)
_HEADS, _ANCHORS, _VOLATILE, _PIVOTS = 256, 10, 17, 33
"""Counts in the published profile (arXiv 2601.13684, topk 1024, both thresholds 0.5)."""


def synthetic_profile(geometry: Geometry) -> HeadProfile:
    """Made-up scores whose roles have the published proportions; the same for the same geometry."""
    layers, heads = geometry.layers, geometry.kv_heads
    # Every layer's clusters need two heads each; what is left over may stand alone.
    pivots = max(1, round(heads * _PIVOTS / _HEADS)) if heads > 1 else 0
    lone_heads = round(layers * heads * (_ANCHORS + _VOLATILE) / _HEADS)
    stability = torch.full((layers, heads), 0.5, dtype=torch.float64)
    similarity = torch.full((layers, heads, heads), 0.2, dtype=torch.float64)
    met = 0
    for layer in range(layers):
        alone = min(_share(layer, lone_heads, layers), heads - 2 * pivots)
        order = [(layer + step) % heads for step in range(heads)]
        for head in order[:alone]:
            is_anchor = _share(met, _ANCHORS, _ANCHORS + _VOLATILE) > 0
            stability[layer, head] = 0.7 if is_anchor else 0.3
            met += 1
        clustered = order[alone:]
        for cluster in (clustered[start::pivots] for start in range(pivots)):
            for place, head in enumerate(cluster[1:]):
                similarity[layer, cluster[0], head] = similarity[layer, head, cluster[0]] = 0.7
                # Satellites differ, so that budgets by stability do.
                stability[layer, head] = 0.35 + 0.05 * ((3 * layer + place) % 8)
    return HeadProfile(
        layers=layers,
        kv_heads=heads,
        stability=stability,
        similarity=dict.fromkeys(Graph, similarity),
        query_heads=geometry.query_heads,
        head_dim=geometry.head_dim,
        settings={"synthetic": NOTE, "stable_threshold": 0.5, "similarity_threshold": 0.5},
    )


def _share(place: int, count: int, places: int) -> int:
    """How many of `count` things fall on `place` when they are spread evenly over `places`."""
    return (place + 1) * count // places - place * count // places


def with_profile(method: Any, spec: ModelSpec, geometry: Geometry) -> tuple[Any, list[str]]:
    """The method as it can run on random weights, and what a reader must know about its profile.

    Others, and methods on real weights, come back as they are.
    """
    profiled = method.profiled
    if profiled is None or not spec.random:
        return method, []
    given = profiled.profile
    if given is None:
        profile, note = synthetic_profile(geometry), NOTE
    else:
        loaded = given if isinstance(given, HeadProfile) else load_profile(given)
        # Taken for its roles: the weights are nobody's, so the fingerprint of another model is no objection.
        profile = dataclasses.replace(loaded, fingerprint=None)
        note = f"roles of a given profile ({given}) on random weights"
    filled = dataclasses.replace(profiled, profile=profile)
    if profiled is method:
        return filled, [note]
    return dataclasses.replace(method, allocation=filled), [note]
