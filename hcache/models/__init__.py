"""Loading models: what the user asks for (`ModelSpec`), where it is, and who it is (its fingerprint).

    spec.py      the settings of one model, checked; also the schema of conf/model
    source.py    from `model.path` to a directory or Hub id, with one clear error where there is none
    identity.py  geometry and fingerprint, from a live model or from the files of a checkpoint
    random_weights.py  models of a shape, for timing
    loading.py   transformers' from_pretrained, set up the way this library needs it

Importing this package imports neither torch nor transformers: a wrong path is answered without them.
It knows nothing of methods, caches or benchmarks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hcache.models.source import ModelNotFound, check_path
from hcache.models.spec import Dtype, ModelSpec, Quantization, Rope, Shape

if TYPE_CHECKING:
    from hcache.models.identity import checkpoint_fingerprint, fingerprint, model_geometry
    from hcache.models.loading import LoadedModel, expected_fingerprint, geometry, load

_LAZY = {
    "checkpoint_fingerprint": "identity",
    "fingerprint": "identity",
    "model_geometry": "identity",
    "LoadedModel": "loading",
    "expected_fingerprint": "loading",
    "geometry": "loading",
    "load": "loading",
}

__all__ = [
    "Dtype",
    "LoadedModel",
    "ModelNotFound",
    "ModelSpec",
    "Quantization",
    "Rope",
    "Shape",
    "check_path",
    "checkpoint_fingerprint",
    "expected_fingerprint",
    "fingerprint",
    "geometry",
    "load",
    "model_geometry",
]


def __getattr__(name: str) -> Any:
    """The names that need torch, imported when first asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
