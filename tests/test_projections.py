"""Projections, MLPs and norms by operators of our own: the same numbers, compiled once, always undone.

On a CPU the operators are plain torch; their kernels are tested in tests/test_linear.py.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from hcache.compiling import Compile, CompiledLayers, decoder_layers
from hcache.contract.tiny_models import FAMILIES, prompts, tiny_model
from hcache.kernels import products
from hcache.kv_cache import attention_modules
from hcache.models import layers, projections
from hcache.models.projections import fused_projections

MODELS = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any dtype on any device are switched."""
    monkeypatch.setattr(projections, "takes", lambda weight: True)


class Ours(TorchDispatchMode):
    """Counts calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "hcache":
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def logits(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False, **arguments).logits


def counted(module: nn.Module, *args: Any) -> tuple[Any, dict[str, int]]:
    with torch.inference_mode(), Ours() as ours:
        out = module(*args)
    return out, dict(ours.calls)


def traces(model: nn.Module) -> list[str]:
    """What is left on modules."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key in vars(module)
        if key == "forward" or key.startswith("_hcache")
    ]


@MODELS
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (4, 1), (16, 1), (2, 8), (1, 3)])
@pytest.mark.usefixtures("everywhere")
def test_numbers_are_the_same(family: str, batch: int, tokens: int) -> None:
    model = tiny_model(family)
    ids, _ = prompts(batch, tokens)
    expected = logits(model, ids)
    with fused_projections(model):
        found, calls = counted(lambda ids: logits(model, ids), ids)
    assert torch.equal(found, expected)
    # A layer: queries, keys and values; their output; down. And the head. Norms of heads are the rotation's.
    assert calls == {"linears": 2 * 3 + 1, "swiglu": 2, "rms_norm": 2 * 2 + 1}


@MODELS
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (4, 1), (2, 8)])
@pytest.mark.usefixtures("everywhere")
def test_parts_of_other_layers(family: str, batch: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are not of the kind we know keep their forward, and their parts are switched one by one."""
    monkeypatch.setattr(layers, "is_plain", lambda layer: False)
    model = tiny_model(family)
    ids, _ = prompts(batch, tokens)
    expected = logits(model, ids)
    with fused_projections(model):
        found, calls = counted(lambda ids: logits(model, ids), ids)
    assert torch.equal(found, expected)
    norms = {"llama": 2, "qwen2": 2, "qwen3": 4}[family]
    assert calls == {"linears": 2 * 3 + 1, "swiglu": 2, "rms_norm": 2 * norms + 1}


@MODELS
@pytest.mark.usefixtures("everywhere")
def test_biases_and_norms_matter(family: str) -> None:
    """Tiny models come with biases of 0 and norms of 1, which hide what is left out."""
    model = copy.deepcopy(tiny_model(family))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    ids, _ = prompts(3, 2)
    expected = logits(model, ids)
    assert not torch.allclose(expected, logits(tiny_model(family), ids), atol=1e-2)
    with fused_projections(model):
        assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 17), (17, 1), (3, 6)])
@pytest.mark.usefixtures("everywhere")
def test_longer_inputs_go_as_always(batch: int, tokens: int) -> None:
    model = tiny_model("qwen3")
    ids, _ = prompts(batch, tokens)
    expected = logits(model, ids)
    with fused_projections(model):
        found, calls = counted(lambda ids: logits(model, ids, logits_to_keep=0), ids)
    assert torch.equal(found, expected)
    assert not calls


@pytest.mark.usefixtures("everywhere")
def test_other_dtypes_and_empty_inputs_go_as_always() -> None:
    norm = LlamaRMSNorm(8)
    empty = torch.zeros(0, 1, 64)
    model = tiny_model()
    with fused_projections(norm), fused_projections(model):
        _, calls = counted(norm, torch.ones(1, 1, 8, dtype=torch.bfloat16))
        out, more = counted(model.model.layers[0].self_attn.q_proj, empty)
    assert (calls, more) == ({}, {})
    assert out.shape == (0, 1, 64)


@MODELS
@pytest.mark.usefixtures("everywhere")
def test_norms_can_be_left_out(family: str) -> None:
    model = tiny_model(family)
    with fused_projections(model, compiled=True):
        _, calls = counted(lambda ids: logits(model, ids), prompts(1, 1)[0])
    assert set(calls) == {"linears", "swiglu"}


@MODELS
def test_float32_on_a_cpu_is_left_alone(family: str) -> None:
    with fused_projections(tiny_model(family)):
        assert not traces(tiny_model(family))


@MODELS
@pytest.mark.usefixtures("everywhere")
def test_all_is_undone(family: str) -> None:
    model = tiny_model(family)
    with fused_projections(model):
        switched = traces(model)
        with fused_projections(model):
            pass
        assert traces(model) == switched
    assert switched
    assert not traces(model)


@pytest.mark.usefixtures("everywhere")
def test_all_is_undone_after_an_exception() -> None:
    """In the middle of a step, after queries and before keys; the next step starts afresh."""
    model = copy.deepcopy(tiny_model())
    ids, _ = prompts(1, 1)
    expected = logits(model, ids)
    broken = model.model.layers[1].self_attn.k_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), fused_projections(model):
        logits(model, ids)
    assert not traces(model)
    broken.remove()
    with fused_projections(model):
        assert torch.equal(logits(model, ids), expected)


@pytest.mark.usefixtures("everywhere")
def test_products_are_of_the_very_same_input_and_handed_out_once() -> None:
    attention = tiny_model("qwen2").model.layers[0].self_attn
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    x, other = torch.randn(2, 1, 1, 64).unbind(0)
    with torch.inference_mode():
        expected = [part(x) for part in (q, k, v)]
        of_other = k(other)
    with torch.inference_mode(), fused_projections(attention):
        q(x)
        assert torch.equal(k(other), of_other)
        assert torch.equal(k(x), expected[1])
        assert torch.equal(v(x), expected[2])
        # Nothing of this step is left: not for an input that has changed, and no memory.
        assert (q._hcache_group.x, q._hcache_group.products) == (None, [])
        x.copy_(other)
        assert torch.equal(k(x), of_other)
        q(x)
        x.copy_(torch.ones_like(x))
        q(x)
        assert torch.equal(k(x), k(torch.ones_like(x)))


class Scaled(LlamaMLP):
    """Holds what a gated MLP holds, and does more."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x) * 0.99) * self.up_proj(x))


class Clamped(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class Sized(LlamaMLP):
    """Can't be asked with small weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 64)).view(x.shape)


def mlp_of(kind: type[LlamaMLP], **settings: Any) -> LlamaMLP:
    return kind(LlamaConfig(hidden_size=64, intermediate_size=96, **settings)).requires_grad_(False)


@pytest.mark.parametrize(
    ("mlp", "expected"),
    [
        (mlp_of(LlamaMLP), {"swiglu": 1, "linears": 1}),
        (mlp_of(LlamaMLP, hidden_act="gelu"), {"linears": 2}),
        (mlp_of(LlamaMLP, mlp_bias=True), {"linears": 2}),
        (mlp_of(Scaled), {"linears": 2}),
        (mlp_of(Clamped), {"linears": 2}),
        (mlp_of(Sized), {"linears": 2}),
    ],
    ids=["plain", "gelu", "biased", "scaled", "clamped", "sized"],
)
@pytest.mark.usefixtures("everywhere")
def test_only_plain_gated_mlps_are_one_operator(mlp: LlamaMLP, expected: dict[str, int]) -> None:
    x = 10 * torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        own = mlp(x)
    with fused_projections(mlp):
        found, calls = counted(mlp, x)
    assert torch.equal(found, own)
    assert calls == expected


class CentredRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + self.weight * 0.01


@pytest.mark.parametrize(
    ("kind", "ours"), [(LlamaRMSNorm, True), (Olmo2RMSNorm, False), (CentredRMSNorm, False)]
)
@pytest.mark.usefixtures("everywhere")
def test_only_norms_that_round_alike_are_switched(kind: type[nn.Module], ours: bool) -> None:
    norm = kind(32)
    with fused_projections(norm):
        assert bool(traces(norm)) == ours


@pytest.mark.usefixtures("everywhere")
def test_modules_with_hooks_or_forwards_of_their_own_are_left_alone() -> None:
    model = copy.deepcopy(tiny_model())
    hooked, own = model.model.layers
    seen: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        seen.append(module)

    parts = [hooked.self_attn.k_proj, hooked.mlp.up_proj, hooked.input_layernorm, model.lm_head]
    for part in parts:
        part.register_forward_hook(note)
    own.mlp.forward = own.mlp.forward
    own.self_attn.o_proj.forward = own.self_attn.o_proj.forward
    ids, _ = prompts(1, 1)
    expected = logits(model, ids)
    before = traces(model)
    seen.clear()
    with fused_projections(model):
        found, calls = counted(lambda ids: logits(model, ids), ids)
    assert torch.equal(found, expected)
    assert len(seen) == len(parts)
    assert traces(model) == before
    # In one layer what follows attention, and down; in the other q, k and v, gate and up, and down.
    assert calls == {"linears": 2 + 3, "rms_norm": 4}


@torch.compiler.disable
def break_here(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Attention to oneself, behind a break of the graph as hcache.attention.function's is."""
    share = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(share, 1) for part in (key, value))
    return (query + key + value).transpose(1, 2).contiguous(), None


@contextmanager
def compiled(model: PreTrainedModel, layers: int, backend: CompileCounterWithBackend) -> Iterator[None]:
    """As hcache.compiling does it, with a backend that counts."""
    twins = CompiledLayers(
        decoder_layers(model, attention_modules(model, layers)), Compile.default, backend=backend
    )
    with twins.on():
        yield


@MODELS
@pytest.mark.usefixtures("everywhere")
def test_all_layers_are_compiled_once(family: str) -> None:
    """However many there are and however often one enters; and the operators are in the graphs."""
    AttentionInterface.register("break_here", break_here)
    frames = {}
    for count in (2, 6):
        for fused in (False, True):
            torch._dynamo.reset()
            model = copy.deepcopy(tiny_model(family, layers=count))
            model.set_attn_implementation("break_here")
            ids, _ = prompts(3, 1)
            expected = logits(model, ids)
            backend = CompileCounterWithBackend("aot_eager")
            for _ in range(3):
                context = fused_projections(model, compiled=True) if fused else nullcontext()
                with context, compiled(model, count, backend):
                    assert torch.equal(logits(model, ids), expected)
            frames[count, fused] = backend.frame_count
            targets = [str(node.target) for graph in backend.graphs for node in graph.graph.nodes]
            assert sum("hcache.linears" in target for target in targets) == (3 if fused else 0)
            assert not any("hcache.rms_norm" in target for target in targets)
            assert any("hcache.swiglu" in target for target in targets) == fused
    assert len(set(frames.values())) == 1, frames


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_keep_torchs_contracts(dtype: torch.dtype) -> None:
    """Schema, fake shapes and strides, no aliasing."""
    x, weight, other = torch.randn(2, 1, 8), torch.randn(5, 8), torch.randn(3, 8)
    x, weight, other = (part.to(dtype) for part in (x, weight, other))
    checks = ("test_schema", "test_faketensor")
    biases = [weight[:, 0].clone(), other[:, 0].clone()]
    torch.library.opcheck(products.linears, (x, [weight, other], biases), test_utils=checks)
    torch.library.opcheck(products.linears, (x, [weight], []), test_utils=checks)
    torch.library.opcheck(products.swiglu, (x, weight, weight + 1), test_utils=checks)
    torch.library.opcheck(products.rms_norm, (x, weight[0], 1e-6), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@MODELS
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_agree_on_a_gpu(family: str, batch: int, dtype: torch.dtype) -> None:
    """As they are and compiled by inductor, and captured in a graph."""
    model = copy.deepcopy(tiny_model(family, layers=6)).to("cuda", dtype)
    ids = prompts(batch, 1)[0].cuda()
    exact = logits(copy.deepcopy(model).float(), ids)
    own_error = distance(logits(model, ids), exact)
    with fused_projections(model):
        assert counted(lambda ids: logits(model, ids), ids)[1]["swiglu"] == 6
    # Four dimensions: transformers looks for no pads, which would wait for the device.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda")
    torch._dynamo.reset()
    for how in (Compile.off, Compile.default):
        twins = CompiledLayers(decoder_layers(model, attention_modules(model, 6)), how)
        with twins.on(), fused_projections(model, compiled=how is not Compile.off):
            found = logits(model, ids, attention_mask=mask)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = logits(model, ids, attention_mask=mask)
            graph.replay()
        assert distance(found, exact) < max(2e-2, 1.5 * own_error), how
        assert torch.equal(again, found), how


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()
