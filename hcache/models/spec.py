"""The settings of one model: a frozen dataclass that is also the schema of conf/model.

It doesn't look at the disk, the network or torch; see source.py and loading.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import TypeVar

EMBEDDED = "tiny"
"""The value of `path` that means the model inside the package."""
SHAPE = "shape"
"""The value of `path` that means random weights of the shape in `shape`."""


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


class Architecture(Enum):
    """Model class of random weights; qwen2 has biases in its query, key and value projections."""

    llama = "llama"
    qwen2 = "qwen2"


class RopeScaling(Enum):
    """Rotary frequencies of random weights. `llama3`: those of Llama 3.1 (factor 8 from 8192 positions)."""

    none = "none"
    llama3 = "llama3"


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


@dataclass(unsafe_hash=True)  # as good as frozen: OmegaConf can't fill a frozen class that may be null
class Shape:
    """The numbers of a decoder whose weights are random: enough to time it, nothing to download.

    Args:
        architecture: llama or qwen2.
        hidden_size, intermediate_size, layers, query_heads, kv_heads, head_dim, vocabulary: of the weights.
        rope_theta, rope_scaling: of the rotary embedding.
        tied: the output projection is the embedding.
        max_positions: the longest prompt plus answer; costs nothing.
        seed: of the weights.

    Raises:
        ValueError: a number below 1, heads that don't divide, or an unknown choice.
    """

    architecture: Architecture = Architecture.llama
    hidden_size: int = 4096
    intermediate_size: int = 14336
    layers: int = 32
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling = RopeScaling.none
    tied: bool = False
    max_positions: int = 2097152
    seed: int = 0

    def __post_init__(self) -> None:
        for key, kind in (("architecture", Architecture), ("rope_scaling", RopeScaling)):
            setattr(self, key, _choice(kind, f"shape.{key}", getattr(self, key)))
        numbers = ("hidden_size", "intermediate_size", "layers", "query_heads", "kv_heads", "head_dim")
        for key in (*numbers, "vocabulary", "max_positions"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.shape.{key}={getattr(self, key)} must be at least 1")
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"model.shape.kv_heads={self.kv_heads} must divide model.shape.query_heads={self.query_heads}"
            )


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load, and how.

    Args:
        name: label in paths and tables; the last part of `path` if empty.
        path: a local directory, a Hugging Face Hub id, `tiny` for the model inside the package, or `shape`
            for random weights of the shape in `shape`.
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
        shape: of random weights, for path `shape` alone; a mapping of its fields will do.

    Raises:
        ValueError: an unknown choice, or settings that random weights have no use for.
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
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if isinstance(self.shape, Mapping):
            object.__setattr__(self, "shape", Shape(**self.shape))
        object.__setattr__(self, "dtype", _choice(Dtype, "dtype", self.dtype))
        object.__setattr__(self, "rope", _choice(Rope, "rope", self.rope))
        object.__setattr__(self, "quantization", _choice(Quantization, "quantization", self.quantization))
        if not self.name:
            object.__setattr__(self, "name", PurePath(self.path).name or "model")
        self._check_shape()

    def _check_shape(self) -> None:
        """A shape goes with path `shape` and with nothing that is about files."""
        if (self.path == SHAPE) != (self.shape is not None):
            raise ValueError(
                f"model.path={self.path} and model.shape={'set' if self.shape else 'null'} disagree; "
                f"random weights need model.path={SHAPE} and a model.shape, all others neither; for example "
                "model=shape_llama31_8b"
            )
        if self.shape is None:
            return
        unused = {
            "revision": self.revision is not None,
            "device_map": self.device_map is not None,
            "rope": self.rope is not Rope.none,
            "quantization": self.quantization is not Quantization.none,
        }
        for key in (key for key, is_set in unused.items() if is_set):
            raise ValueError(
                f"model.{key} can't be set for random weights (model.path={SHAPE}): leave it out"
            )

    @property
    def embedded(self) -> bool:
        """Whether this is the model inside the package."""
        return self.path == EMBEDDED

    @property
    def random(self) -> bool:
        """Whether the weights are random: no files, no tokenizer, no fingerprint."""
        return self.shape is not None
