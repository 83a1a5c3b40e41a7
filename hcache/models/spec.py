"""The settings of one model: a frozen dataclass that is also the schema of conf/model.

It doesn't look at the disk, the network or torch; see source.py and loading.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import TypeVar

EMBEDDED = "tiny"
"""The value of `path` that means the model inside the package."""


class Dtype(Enum):
    """Number format of the loaded weights; `auto` is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Rope(Enum):
    """Rotary position override. `yarn4`: YaRN with factor 4 from 32768 positions, for Qwen2.5 and Qwen3."""

    none = "none"
    yarn4 = "yarn4"


class Quantization(Enum):
    """Weight quantisation at load. `nf4`: 4-bit NormalFloat through bitsandbytes, needs a CUDA GPU."""

    none = "none"
    nf4 = "nf4"


_Choice = TypeVar("_Choice", bound=Enum)


def _choice(kind: type[_Choice], key: str, value: object) -> _Choice:
    """`value` as a member of `kind`, by member or by name. Raises ValueError naming `key`."""
    if isinstance(value, kind):
        return value
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(member.name for member in kind)
        raise ValueError(f"model.{key}={value!r} is unknown; choose one of: {allowed}") from None


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load, and how.

    Args:
        name: label in paths and tables; the last part of `path` if empty.
        path: a local directory, a Hugging Face Hub id, or `tiny` for the model inside the package.
        revision: branch, tag or commit of a Hub id; None is its main branch.
        dtype: number format of the weights.
        device_map: transformers' device map ("auto", "balanced", ...) to spread layers over several
            devices; None puts the whole model on one device.
        attention: attention backend of the compressed cache (auto, reference, sdpa, ...); the name is
            checked where the backends are. Loading itself always uses transformers' sdpa.
        rope: rotary position override.
        quantization: weight quantisation at load. Quantised weights have another fingerprint.
        trust_remote_code: run Python code that comes with the checkpoint. Off unless you trust its author.
        allow_pickle: accept weights in .bin files, which are pickles and can run code. Off: safetensors only.

    Raises:
        ValueError: an unknown choice.
    """

    name: str = ""
    path: str = EMBEDDED
    revision: str | None = None
    dtype: Dtype = Dtype.auto
    device_map: str | None = None
    attention: str = "auto"
    rope: Rope = Rope.none
    quantization: Quantization = Quantization.none
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _choice(Dtype, "dtype", self.dtype))
        object.__setattr__(self, "rope", _choice(Rope, "rope", self.rope))
        object.__setattr__(self, "quantization", _choice(Quantization, "quantization", self.quantization))
        if not self.name:
            object.__setattr__(self, "name", PurePath(self.path).name or "model")

    @property
    def embedded(self) -> bool:
        """Whether this is the model inside the package."""
        return self.path == EMBEDDED
