"""Loading a model and its tokenizer through transformers' from_pretrained.

Weights come from safetensors unless `allow_pickle`, attention is transformers' sdpa, the model is in eval
mode without gradients, the tokenizer pads on the left. It knows nothing of what compresses the cache.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hcache.geometry import Geometry
from hcache.models.identity import checkpoint_fingerprint, config_geometry, fingerprint
from hcache.models.random_weights import random_model, shape_config
from hcache.models.source import (
    ModelNotFound,
    cached_directory,
    check_path,
    explain_hub_error,
    fetch_config,
    local_directory,
    source,
)
from hcache.models.spec import Dtype, ModelSpec, Quantization, Rope

LOGGER = logging.getLogger(__name__)
YARN_FACTOR = 4.0
YARN_FROM_TOKENS = 32768
# The families whose authors publish this setting: Qwen2.5 (model type qwen2) and Qwen3.
YARN_FAMILIES = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference, with what the rest of the library asks about it.

    `tokenizer` is transformers'; None for random weights, which have none, nor a fingerprint.
    """

    model: PreTrainedModel
    tokenizer: Any
    geometry: Geometry
    fingerprint: str | None
    spec: ModelSpec

    @property
    def name(self) -> str:
        """Label in paths and tables."""
        return self.spec.name

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return self.model.device

    @property
    def context_tokens(self) -> int:
        """The longest prompt plus answer the positions allow, tokens, rope override included."""
        return int(self.model.config.get_text_config().max_position_embeddings)


def load(spec: ModelSpec, device: str = "auto") -> LoadedModel:
    """Load the model and tokenizer of `spec`.

    Args:
        device: "auto" (CUDA if there is one, else CPU) or a torch device; without effect if
            `spec.device_map` is set.

    Raises:
        ModelNotFound: nothing to load at model.path; the message says what to do.
        ValueError: settings that don't fit this model or this machine.
    """
    check_path(spec)
    _check_packages(spec)
    config = load_config(spec)
    target = _target(spec, device)
    if spec.shape is not None:
        assert target is not None
        model = random_model(spec.shape, spec.dtype, target)
        return LoadedModel(model, None, config_geometry(config), None, spec)
    model = _load_weights(spec, config, target)
    model.eval().requires_grad_(False)
    identity = _identity(spec, model)
    return LoadedModel(model, _load_tokenizer(spec), config_geometry(config, identity), identity, spec)


def geometry(spec: ModelSpec, *, weights: bool = False) -> Geometry:
    """Geometry from the config alone.

    Args:
        weights: also look into the weights for the fingerprint, if their files are on this machine.

    Raises:
        ModelNotFound, ValueError: as `load`.
    """
    check_path(spec)
    return config_geometry(load_config(spec), expected_fingerprint(spec) if weights else None)


def expected_fingerprint(spec: ModelSpec) -> str | None:
    """The fingerprint the loaded model will have, from its files; None where only loading can tell.

    That is: files not on this machine, not safetensors, quantised at load, or projections unknown.
    """
    directory = cached_directory(spec)
    if directory is None or spec.quantization is not Quantization.none:
        return None
    try:
        return checkpoint_fingerprint(directory)
    except ValueError as error:
        LOGGER.info("no fingerprint before loading: %s", error)
        return None


def load_config(spec: ModelSpec) -> PreTrainedConfig:
    """The model's config with the rope override applied.

    Raises:
        ModelNotFound, ValueError: as `load`.
    """
    if spec.shape is not None:
        return shape_config(spec.shape, spec.dtype)
    fetch_config(spec)
    try:
        config = AutoConfig.from_pretrained(
            source(spec), revision=_revision(spec), trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.path={spec.path}: transformers can't read its config ({_first_line(error)}); "
            "if the checkpoint brings its own code and you trust it, set model.trust_remote_code=true"
        ) from error
    if spec.rope is Rope.yarn4:
        _set_yarn(spec, config)
    return config


def _set_yarn(spec: ModelSpec, config: PreTrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in YARN_FAMILIES or rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"model.rope=yarn4 doesn't suit model.path={spec.path} (model type {config.model_type}, rope "
            f"type {rope.get('rope_type', 'none')}); it is for {', '.join(YARN_FAMILIES)} with plain rope; "
            "set model.rope=none"
        )
    yarn = {"rope_type": "yarn", "factor": YARN_FACTOR, "original_max_position_embeddings": YARN_FROM_TOKENS}
    config.rope_parameters = {**rope, **yarn}
    config.max_position_embeddings = int(YARN_FACTOR * YARN_FROM_TOKENS)


def _check_packages(spec: ModelSpec) -> None:
    quantized = spec.quantization is Quantization.nf4
    needed = [("bitsandbytes", "model.quantization=nf4", quantized)]
    needed.append(("accelerate", "model.quantization=nf4", quantized))
    needed.append(("accelerate", f"model.device_map={spec.device_map}", spec.device_map is not None))
    for package, setting, wanted in needed:
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{setting} needs {package}, which is not installed; pip install 'hcache[quant]'"
            )
    if quantized and not torch.cuda.is_available():
        raise ValueError(
            "model.quantization=nf4 needs a CUDA GPU and there is none; set model.quantization=none"
        )


def _target(spec: ModelSpec, device: str) -> torch.device | None:
    """The one device of the model; None if a device map places it."""
    if spec.device_map is not None:
        return None
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} is not a device ({_first_line(error)}); try auto, cpu or cuda"
        ) from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device} is not on this machine ({torch.cuda.device_count()} CUDA devices)")
    return target


def _load_weights(spec: ModelSpec, config: PreTrainedConfig, target: torch.device | None) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source(spec),
            config=config,
            revision=_revision(spec),
            dtype="auto" if spec.dtype is Dtype.auto else getattr(torch, spec.dtype.value),
            attn_implementation="sdpa",
            use_safetensors=None if spec.allow_pickle else True,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            **_placement(spec, target),
        )
    except OSError as error:
        raise ModelNotFound(f"model.path={spec.path}: no weights to load; {_explain(spec, error)}") from error
    model, info = loaded
    if info["missing_keys"]:
        # transformers fills them with random numbers and only warns
        absent = sorted(info["missing_keys"])
        raise ValueError(
            f"model.path={spec.path}: the checkpoint lacks {len(absent)} of the model's weights "
            f"({', '.join(absent[:3])}, ...); it is incomplete, or not a checkpoint for this config.json"
        )
    return model if target is None or spec.quantization is not Quantization.none else model.to(target)


def _placement(spec: ModelSpec, target: torch.device | None) -> dict[str, Any]:
    """The arguments of from_pretrained that say where weights go, and whether quantised."""
    if spec.quantization is Quantization.none:
        return {} if spec.device_map is None else {"device_map": spec.device_map}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": four_bit, "device_map": spec.device_map or {"": target}}


def _load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source(spec), revision=_revision(spec), trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"model.path={spec.path}: no tokenizer that transformers can load ({_first_line(error)}); "
            "put the tokenizer's files beside the weights"
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _identity(spec: ModelSpec, model: PreTrainedModel) -> str | None:
    """Fingerprint of the loaded model, from its files where weights are offloaded; None if it has none."""
    try:
        offloaded = any(parameter.is_meta for parameter in model.parameters())
        return expected_fingerprint(spec) if offloaded else fingerprint(model)
    except ValueError as error:
        LOGGER.warning("model.path=%s: %s; head profiles can't be tied to it", spec.path, error)
        return None


def _revision(spec: ModelSpec) -> str:
    return "main" if spec.revision is None or local_directory(spec) is not None else spec.revision


def _explain(spec: ModelSpec, error: OSError) -> str:
    if local_directory(spec) is None and not str(error).count("safetensors"):
        return explain_hub_error(spec, error)
    hint = (
        "" if spec.allow_pickle else "; if it has only .bin files that you trust, set model.allow_pickle=true"
    )
    return f"{_first_line(error)}{hint}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
