"""Kernels of a few rows against plain torch: on a GPU, or on a CPU under Triton's interpreter.

pytest -m gpu tests/test_linear.py                        # on a CUDA device
TRITON_INTERPRET=1 pytest -m gpu tests/test_linear.py     # without; Triton must be installed
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hcache.models import projections
from tests.on_kernels import kernel_device
from tests.test_kernels import TOLERANCES, normal

pytestmark = pytest.mark.gpu

ROWS = pytest.mark.parametrize("rows", [1, 3, 4, 16])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SIZES = pytest.mark.parametrize(("outer", "inner"), [(64, 256), (33, 77), (100, 320), (1, 16)])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Under the interpreter, with what it truncates rounded to the nearest, as a GPU does it."""
    found = kernel_device(monkeypatch)
    if found == "cpu":
        from triton import language
        from triton.runtime import interpreter

        def rounded(self: Any, x: Any, kind: Any) -> Any:
            if kind.scalar == language.bfloat16:
                bits = x.data.view("uint32")
                x = interpreter.TensorHandle((bits + 0x7FFF + (bits >> 16 & 1)).view("float32"), x.dtype)
            return self.cast_impl(x, kind)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", rounded)
    return found


def weights_of(outer: int, inner: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Products with normal numbers are about 1."""
    return (normal(outer, inner, seed=seed) / inner**0.5).to(dtype)


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@ROWS
@DTYPES
@SIZES
@pytest.mark.parametrize("biased", [False, True])
def test_one_weight(device: str, rows: int, dtype: torch.dtype, outer: int, inner: int, biased: bool) -> None:
    from hcache.kernels.linear import Tuning, linear

    x, weight = normal(rows, inner, seed=1, dtype=dtype), weights_of(outer, inner, dtype, 2)
    bias = normal(outer, seed=3, dtype=dtype) if biased else None
    found = linear(
        x.to(device), weight.to(device), None if bias is None else bias.to(device), Tuning(16, 64, 4, 3)
    )
    check(found, F.linear(x.double(), weight.double(), None if bias is None else bias.double()), dtype)


@ROWS
@pytest.mark.parametrize("outers", [(64, 32), (33, 16, 1), (5, 70, 40), (16, 16, 16), (129, 3, 17)])
@pytest.mark.parametrize("biased", [False, True])
def test_weights_that_share_an_input(device: str, rows: int, outers: tuple[int, ...], biased: bool) -> None:
    """Neighbours in a launch don't touch each other's outputs, wherever the strips end."""
    from hcache.kernels.linear import Tuning, linears

    dtype, inner = torch.bfloat16, 77
    x = normal(rows, inner, seed=1, dtype=dtype)
    weights = [weights_of(outer, inner, dtype, 10 + i) for i, outer in enumerate(outers)]
    biases = [normal(outer, seed=20 + i, dtype=dtype) for i, outer in enumerate(outers)] if biased else []
    places = [part.to(device) for part in weights], [part.to(device) for part in biases]
    found = linears(x.to(device), *places, tuning=Tuning(32, 64, 4, 3))
    assert [out.shape for out in found] == [(rows, outer) for outer in outers]
    for out, weight, bias in zip(found, weights, biases or [None] * len(weights), strict=True):
        check(out, F.linear(x.double(), weight.double(), None if bias is None else bias.double()), dtype)


def test_tunings_of_narrow_and_wide_weights(device: str) -> None:
    """The defaults, with sizes that fill no tile."""
    from hcache.kernels.linear import NARROW_ROWS, linear

    x = normal(2, 300, seed=1, dtype=torch.bfloat16)
    for outer in (40, NARROW_ROWS + 5):
        weight = weights_of(outer, 300, torch.bfloat16, 2)
        check(linear(x.to(device), weight.to(device), None), x.double() @ weight.double().T, torch.bfloat16)


def test_sums_are_in_float32(device: str) -> None:
    """Thousands of ones: 16-bit sums would stop growing."""
    from hcache.kernels.linear import linear

    ones = torch.ones(1, 4096, dtype=torch.bfloat16, device=device)
    assert linear(ones, ones, None).item() == 4096


@ROWS
@DTYPES
@SIZES
def test_sum_with_a_residual(device: str, rows: int, dtype: torch.dtype, outer: int, inner: int) -> None:
    """Product and sum are each rounded, as by kernels of their own."""
    from hcache.kernels.linear import Tuning, linears

    x, weight = normal(rows, inner, seed=1, dtype=dtype), weights_of(outer, inner, dtype, 2)
    residual = normal(rows, outer, seed=3, dtype=dtype)
    tuning = Tuning(16, 64, 4, 3)
    product = linears(x.to(device), [weight.to(device)], [], tuning=tuning)[0].cpu()
    found = linears(x.to(device), [weight.to(device)], [], residual.to(device), tuning)[0].cpu()
    assert (found != residual + product).float().mean() < 0.02  # ties, under the interpreter
    torch.testing.assert_close(found, residual + product, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("batch", "heads", "dim"), [(1, (8, 2), 128), (3, (4, 4), 80), (16, (3, 1), 2)])
def test_rotate(
    device: str, batch: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, normed: bool
) -> None:
    """The same numbers as transformers' own code, but for the order of a norm's sum, and ties."""
    from hcache.kernels.products import rotate as plain
    from hcache.kernels.rotate import rotate

    q, k = (normal(batch, n * dim, seed=n, dtype=dtype) for n in heads)
    angle = 9 * normal(batch, dim // 2, seed=7).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    norms = (normal(dim, seed=8, dtype=dtype), normal(dim, seed=9, dtype=dtype)) if normed else None
    moved = None if norms is None else (norms[0].to(device), norms[1].to(device))
    found = rotate(q.to(device), k.to(device), cos.to(device), sin.to(device), moved, 1e-5)
    expected = plain(q, k, cos, sin, norms, 1e-5)
    llama = apply_rotary_pos_emb(q.view(batch, -1, dim), k.view(batch, -1, dim), cos, sin)
    for one, other, theirs in zip(found, expected, llama, strict=True):
        assert normed or torch.equal(other, theirs.flatten(1))
        assert (one.cpu() != other).float().mean() < 0.02
        torch.testing.assert_close(one.cpu(), other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_a_chain_gives_what_single_kernels_give(device: str) -> None:
    """Kernels that are launched early wait for each other: to the bit, captured and many times over."""
    if device != "cuda":
        pytest.skip("kernels run one after the other under the interpreter")
    from hcache.kernels import chain

    torch.manual_seed(0)
    weights = [torch.randn(n, k, device=device).bfloat16() / k**0.5 for n, k in SHAPES]
    x = torch.randn(2, 512, device=device).bfloat16()
    with chain.unchained():
        assert not chain.chained(x.device)["chain"]
        expected = long_chain(x, weights)
    assert chain.chained(x.device)["chain"] == (torch.cuda.get_device_capability()[0] >= 9)
    assert torch.equal(long_chain(x, weights), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = long_chain(x, weights)
    for _ in range(50):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)


SHAPES = ((512, 512), (128, 512), (128, 512), (512, 512), (4096, 512), (4096, 512), (512, 4096))


def long_chain(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Layers one behind the other, each kernel in need of what the one before it has left."""
    from hcache.kernels.gate import swiglu
    from hcache.kernels.linear import linears
    from hcache.kernels.norm import rms_norm
    from hcache.kernels.rotate import rotate

    ones, turn = torch.ones_like(x[0]), torch.full_like(x[:, :64], 0.5)
    wq, wk, wv, wo, gate, up, down = weights
    for _ in range(20):
        q, k, v = linears(rms_norm(x, ones, 1e-5), [wq, wk, wv], [])
        q, k = rotate(q, k, turn, turn)
        out = q + torch.cat([k, v, k, v], dim=1)  # no kernel of the chain
        x = linears(out, [wo], [], x)[0]
        x = linears(swiglu(rms_norm(x, ones, 1e-5), gate, up), [down], [], x)[0]
    return x


@ROWS
@DTYPES
@SIZES
def test_swiglu(device: str, rows: int, dtype: torch.dtype, outer: int, inner: int) -> None:
    from hcache.kernels.gate import swiglu

    x = normal(rows, inner, seed=1, dtype=dtype)
    gate, up = (2 * weights_of(outer, inner, dtype, seed) for seed in (2, 3))
    wide = [part.double() for part in (x, gate, up)]
    expected = F.silu(F.linear(wide[0], wide[1])) * F.linear(wide[0], wide[2])
    check(swiglu(x.to(device), gate.to(device), up.to(device)), expected, dtype)


def test_swiglu_rounds_as_separate_kernels_do(device: str) -> None:
    """One product a weight, so that sums are exact and every rounding shows."""
    from hcache.kernels.gate import swiglu

    x = torch.full((1, 1), 1.7, dtype=torch.bfloat16)
    gate, up = (3 * normal(400, 1, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    expected = F.silu(gate * x) * (up * x)
    found = swiglu(x.to(device), gate.to(device), up.to(device)).cpu()
    assert (found != expected.T).float().mean() < 0.02  # exp may differ in its last bit


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # exp of the interpreter
def test_swiglu_of_large_gates(device: str) -> None:
    from hcache.kernels.gate import swiglu

    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    gate = torch.tensor([[-300.0], [-80.0], [0.0], [80.0], [300.0]], dtype=torch.bfloat16, device=device)
    found = swiglu(one, gate, torch.ones_like(gate)).float().flatten()
    torch.testing.assert_close(found.cpu(), torch.tensor([0.0, 0.0, 0.0, 80.0, 300.0]), rtol=0, atol=1e-30)


@DTYPES
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (3, 77), (16, 128), (40, 16), (2, 4100), (1, 1)])
def test_rms_norm(device: str, rows: int, dim: int, dtype: torch.dtype) -> None:
    """To the bit but for the sum's order: the same numbers as transformers' own code."""
    from hcache.kernels.norm import rms_norm
    from hcache.kernels.products import rms_norm as plain

    x, weight = 3 * normal(rows, dim, seed=1, dtype=dtype), normal(dim, seed=2, dtype=dtype)
    found, expected = rms_norm(x.to(device), weight.to(device), 1e-5).cpu(), plain(x, weight, 1e-5)
    assert (found != expected).float().mean() < 0.02
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=1e-6)


def test_rms_norm_of_zeros_and_large_numbers(device: str) -> None:
    from hcache.kernels.norm import rms_norm

    x = torch.tensor([[0.0] * 20, [3e4] * 20], dtype=torch.float16, device=device)
    found = rms_norm(x, torch.full_like(x[0], 2.0), 1e-6)
    torch.testing.assert_close(found.cpu().float(), torch.tensor([[0.0] * 20, [2.0] * 20]))


def test_limits_are_those_of_the_kernels(device: str) -> None:
    from hcache.kernels import linear, norm

    assert (linear.ROWS, norm.WIDEST) == (projections.ROWS, projections.WIDEST_NORM)
    assert max(map(len, projections.TOGETHER)) <= linear.MOST
