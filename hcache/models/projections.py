"""Decode steps whose projections, gated MLPs and norms are our own kernels (hcache.kernels.products).

Layers of a kind we know are switched as a whole (hcache.models.layers), of others the parts: queries, keys
and values come from one launch, so do gate and up with what follows them, and a norm is one launch instead
of six. For steps of a few tokens in all: they are bound by reading the weights and, if not captured, by
launches. Knows module names and shapes; nothing of caches or methods.

What is put on modules has the same code and structure in every layer: torch.compile compiles it once.

Shapes: x [B, T, K]; of a norm x [B, T, ..., D].
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcache.kernels.products import linears, rms_norm, swiglu
from hcache.models import layers

log = logging.getLogger(__name__)

ROWS = 16
"""Most tokens of all sequences together: as in hcache.kernels.linear, which can't be read without Triton."""

WIDEST_NORM = 1 << 15
"""As in hcache.kernels.norm."""

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear maps of one module that are given the same input, the one that is called first in front."""

ALONE = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")

GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

CACHES = ("cache", "past_key_values")
"""What a cache is called by transformers' layers, newer ones first."""

GROUP, PLACE = "_hcache_group", "_hcache_place"


@contextmanager
def fused_projections(model: nn.Module, compiled: bool = False) -> Iterator[None]:
    """While entered, calls with at most ROWS tokens go to our kernels, in modules that have a match there.

    Switched on the modules of this model, never on their classes, and always switched back. For inference.
    Left alone are modules with other weights than 16-bit ones on CUDA, quantised ones, those with hooks or
    with a forward of their own on the instance, and those that don't compute what their names promise.

    Args:
        model: a transformers decoder.
        compiled: projections and MLPs alone; torch.compile fuses the rest of a layer, unless it is ours.
    """
    # Past nn.Module's own __setattr__: these are notes for a while, not parts of the model.
    given = _forwards(model, compiled)
    try:
        for module, parts in given.items():
            module.__dict__.update(parts)
        yield
    finally:
        for module, parts in given.items():
            for name in parts:
                module.__dict__.pop(name, None)


def takes(weight: Tensor) -> bool:
    """Whether the kernels take weights of this kind."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def _forwards(model: nn.Module, compiled: bool) -> dict[nn.Module, dict[str, Any]]:
    """Modules to be switched, and what each is given."""
    found: dict[nn.Module, dict[str, Any]] = {}
    for module in model.modules():
        if not compiled and _is_plain_layer(module):
            found[module] = _forward(_layer, module)
        if _is_swiglu(module):
            found[module] = _forward(_swiglu, module)
        else:
            for names in TOGETHER:
                found.update(_together([getattr(module, name, None) for name in names]))
        for name in ALONE:
            part = getattr(module, name, None)
            if _is_linear(part):
                found[part] = _forward(_linear, part)
        if not compiled and _is_rms_norm(module):
            found[module] = _forward(_rms_norm, module)
    return found


def _forward(function: Callable[..., Tensor], module: nn.Module) -> dict[str, Any]:
    # torch.compile knows methods by their code, other callables by identity: one would compile every layer.
    return {"forward": MethodType(function, module)}


def _together(parts: list[Any]) -> dict[nn.Module, dict[str, Any]]:
    """Forwards of linear maps that can share a launch; none if they can't."""
    modules = [part for part in parts if _is_linear(part)]
    alike = {(m.in_features, m.weight.dtype, m.weight.device, m.bias is None) for m in modules}
    if len(set(modules)) < len(parts) or len(alike) > 1:
        return {}
    group = _Group(modules)
    return {
        module: {**_forward(_other if place else _first, module), GROUP: group, PLACE: place}
        for place, module in enumerate(modules)
    }


class _Group:
    """Linear maps with one input.

    Attributes:
        modules: in the order of their calls; the first call makes the products of all.
        x: the latest input, until all of its products have been handed out.
        products: those of x.
    """

    def __init__(self, modules: list[nn.Linear]) -> None:
        self.modules = modules
        self.x: Tensor | None = None
        self.products: list[Tensor] = []


def _first(module: Any, x: Tensor) -> Tensor:
    """The forward of the first of a group: its own product, and the others' for later."""
    group: _Group = module._hcache_group
    group.x, group.products = None, []
    if not _few_rows(x, module):
        return nn.Linear.forward(module, x)
    group.x, group.products = x, _products(group.modules, x)
    return group.products[0]


def _other(module: Any, x: Tensor) -> Tensor:
    """The forward of another: what the first has made, if that was for the very same input."""
    group: _Group = module._hcache_group
    if x is not group.x:
        return nn.Linear.forward(module, x)
    product = group.products[module._hcache_place]
    if module._hcache_place == len(group.modules) - 1:
        group.x, group.products = None, []
    return product


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """The forward of a linear map."""
    return _products([module], x)[0] if _few_rows(x, module) else nn.Linear.forward(module, x)


def _layer(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **arguments: Any,
) -> Tensor:
    """The forward of a decoder layer; with a cache of transformers' own its class's."""
    cached = any(arguments.get(name) is not None for name in CACHES)
    if cached or position_embeddings is None or not _few_rows(hidden_states, module.self_attn.q_proj):
        arguments |= {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        out: Tensor = type(module).forward(module, hidden_states, **arguments)
        return out
    return layers.advance(module, hidden_states, attention_mask, position_embeddings)


def _swiglu(module: Any, x: Tensor) -> Tensor:
    """The forward of a gated MLP."""
    if not _few_rows(x, module.gate_proj):
        return type(module).forward(module, x)
    return module.down_proj(swiglu(x, module.gate_proj.weight, module.up_proj.weight))


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    """The forward of an RMSNorm."""
    few = x.dim() >= 3 and 0 < x.shape[0] * x.shape[1] <= ROWS
    if not few or x.dtype != module.weight.dtype:
        return type(module).forward(module, x)
    return rms_norm(x, module.weight, module.variance_epsilon)


def _products(modules: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    biases = [module.bias for module in modules if module.bias is not None]
    return linears(x, [module.weight for module in modules], biases)


def _few_rows(x: Tensor, module: nn.Linear) -> bool:
    return 0 < x.numel() <= ROWS * x.shape[-1] and x.dtype == module.weight.dtype


def _is_linear(part: Any) -> TypeGuard[nn.Linear]:
    """Whether it is a linear map and nothing else, with weights that the kernels take."""
    if type(part) is not nn.Linear or not _is_bare(part) or not takes(part.weight):
        return False
    return all(p.dtype == part.weight.dtype and p.is_contiguous() for p in part.parameters())


def _is_plain_layer(module: Any) -> bool:
    """Whether hcache.models.layers knows how to advance it, and all its parts are what they seem."""
    if not _is_bare(module) or not layers.is_plain(module) or not _is_swiglu(module.mlp):
        return False
    return all(
        _is_linear(part) if isinstance(part, nn.Linear) else _is_bare(part) and _is_taken(part)
        for part in module.modules()
        if part is not module
    )


def _is_taken(part: nn.Module) -> bool:
    return all(takes(weight) and weight.is_contiguous() for weight in part.parameters(recurse=False))


def _is_bare(module: nn.Module) -> bool:
    """Without hooks, and with the forward of its class."""
    return "forward" not in vars(module) and not any(getattr(module, name) for name in HOOKS)


def _is_swiglu(module: nn.Module) -> bool:
    """Whether it computes down(silu(gate(x)) * up(x)), asked of a twin of it with small weights."""
    if set(module._modules) != GATED or module._parameters or not _is_bare(module):
        return False
    parts: Any = module
    maps = (parts.gate_proj, parts.up_proj, parts.down_proj)
    if not all(_is_linear(part) for part in maps) or any(part.bias is not None for part in maps[:2]):
        return False
    gate, up, down = _numbers(6, 4), _numbers(6, 4) + 1, _numbers(4, 6)
    small = {
        name: _linear_map(weight)
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
    }
    # From small numbers to large ones, where a clamp would show.
    x = _numbers(1, 5, 4) * torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0], device="cpu").view(5, 1)
    answer = _answer(_twin(module, _modules={**module._modules, **small}), x)
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return answer is not None and torch.allclose(answer, expected, rtol=1e-5, atol=1e-6)


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether it computes what `rms_norm` does, to the bit in bfloat16, asked of a twin of 64 numbers."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or eps is None:
        return False
    if weight.dim() != 1 or weight.shape[0] > WIDEST_NORM or not takes(weight) or not _is_bare(module):
        return False
    x, small = 3 * _numbers(1, 5, 64).bfloat16(), 1 + _numbers(64).bfloat16()
    twin = _twin(module, _parameters={"weight": nn.Parameter(small, requires_grad=False)})
    answer = _answer(twin, x)
    return answer is not None and torch.equal(answer, rms_norm(x, small, eps))


def _twin(module: nn.Module, **parts: Any) -> nn.Module:
    """A shallow copy, with other modules or parameters."""
    twin = copy.copy(module)
    twin.__dict__.update(parts)
    return twin


def _answer(twin: nn.Module, x: Tensor) -> Tensor | None:
    """What it makes of x; None if it is of another kind, so that small weights don't fit or it wants more."""
    try:
        answer = twin.forward(x)
    except Exception as error:
        log.info("%s keeps its own forward: %s", type(twin).__name__, error)
        return None
    return answer if isinstance(answer, Tensor) and answer.shape == x.shape else None


def _numbers(*shape: int) -> Tensor:
    """The same every time; no generator of random numbers is moved on."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32, device="cpu").sin().view(shape)


def _linear_map(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
