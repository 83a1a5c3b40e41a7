"""Key factors against a float64 SVD of the keys before rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcache.attention.rope import Rope
from hcache.contract.tiny_models import tiny_model
from hcache.methods import low_rank
from hcache.methods.low_rank import KeyFactors
from tests.operations import Operations

DIM, HEADS = 16, 3
WIDTH = HEADS * DIM


def turn(x_HnD: Tensor, sign: int = 1) -> Tensor:
    """Rotary embedding at positions 0 to n - 1 in float64; sign -1 takes it off."""
    angles = torch.arange(x_HnD.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM)
    turned = torch.complex(*x_HnD.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), sign * angles)
    return torch.cat([turned.real, turned.imag], -1)


def keys_of(tokens: int, seed: int = 0) -> Tensor:
    """Rotated keys [H, n, D] whose directions before rotation weigh less and less."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    plain_nW = torch.randn(tokens, WIDTH, generator=generator) * 0.9 ** torch.arange(WIDTH) @ mixed
    return turn(plain_nW.unflatten(1, (HEADS, DIM)).transpose(0, 1)).float()


def truncated(k_HnD: Tensor, rank: int) -> Tensor:
    """Keys before rotation [n, H*D] float64, all heads together, at the best rank-r approximation."""
    u, s, v = torch.linalg.svd(turn(k_HnD, -1).transpose(0, 1).flatten(1), full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def as_keys(plain_nW: Tensor) -> Tensor:
    return turn(plain_nW.unflatten(1, (HEADS, DIM)).transpose(0, 1))


def factors_of(prompts: list[Tensor], ranks: list[int], dtype: torch.dtype = torch.float32) -> KeyFactors:
    like = torch.empty(len(prompts), HEADS, 1, DIM, dtype=dtype)
    rows = [k.shape[1] if rank else 0 for k, rank in zip(prompts, ranks, strict=True)]
    factors = KeyFactors(rows, ranks, like, Rope.of(tiny_model("llama")))
    for b, (k, rank) in enumerate(zip(prompts, ranks, strict=True)):
        if rank:
            factors.write(b, k.to(dtype))
    return factors


def rebuilt(factors: KeyFactors, batch: int, tokens: int) -> Tensor:
    """All keys of all segments [B, H, n, D]."""
    positions = torch.arange(tokens).expand(batch * HEADS, tokens)
    return factors.rebuild(positions).unflatten(0, (batch, HEADS))


@pytest.mark.parametrize("tokens", [200, 30], ids=["long", "shorter-than-wide"])
def test_all_directions_give_the_keys_back(tokens: int) -> None:
    k = keys_of(tokens)
    out = rebuilt(factors_of([k], [min(tokens, WIDTH)]), 1, tokens)[0]
    torch.testing.assert_close(out, k, rtol=0, atol=1e-5)


def test_the_error_is_that_of_a_truncated_svd_and_never_rises_with_the_rank() -> None:
    k = keys_of(150)
    whole = torch.linalg.svdvals(turn(k, -1).transpose(0, 1).flatten(1))
    errors = []
    for rank in (1, 2, 5, 8, 13, 20, 32, 47):
        out = rebuilt(factors_of([k], [rank]), 1, 150)[0].double()
        torch.testing.assert_close(out, as_keys(truncated(k, rank)), rtol=0, atol=3e-4)
        errors.append(float((out - k).norm()))  # a rotation leaves lengths as they are
        assert errors[-1] == pytest.approx(float(whole[rank:].norm()), rel=1e-4)
    assert errors == sorted(errors, reverse=True)


def test_the_factors_are_keys_in_an_orthonormal_basis() -> None:
    k, rank = keys_of(100), 7
    factors = factors_of([k], [rank])
    basis = factors._basis_SrD.transpose(0, 1).flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(rank), rtol=0, atol=1e-5)
    plain = turn(k, -1).transpose(0, 1).flatten(1).float()
    torch.testing.assert_close(factors._rows_Nr, plain @ basis.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 33, 64, 4096])
def test_blocks_make_no_difference(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    k = keys_of(100)
    monkeypatch.setattr(low_rank, "ROWS", rows)
    out = rebuilt(factors_of([k], [9]), 1, 100)[0].double()
    torch.testing.assert_close(out, as_keys(truncated(k, 9)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_sequences_of_different_lengths_and_ranks(missing: int) -> None:
    """One without factors, wherever in the batch; rows that are asked of it come from anywhere."""
    prompts, ranks = [keys_of(n, seed=n) for n in (90, 70, 120)], [9, 4, 12]
    ranks[missing] = 0
    factors = factors_of(prompts, ranks)
    out = rebuilt(factors, 3, 70).double()
    for b, (k, rank) in enumerate(zip(prompts, ranks, strict=True)):
        if rank:
            expected = as_keys(truncated(k, rank))[:, :70]
            torch.testing.assert_close(out[b], expected, rtol=0, atol=1e-4)
    rows = sum(r * (k.shape[1] + WIDTH) for r, k in zip(ranks, prompts, strict=True))
    device = factors.nbytes()["device"]
    assert device["payload"] == rows * 4
    held = (factors._rows_Nr, factors._basis_SrD, factors._first_S)
    assert sum(device.values()) == sum(x.nbytes for x in held)


def test_each_segment_asks_for_its_own_rows() -> None:
    k = keys_of(80)
    factors = factors_of([k], [WIDTH])
    positions = torch.stack([torch.randperm(80)[:11] for _ in range(HEADS)])
    expected = torch.stack([k[h, positions[h]] for h in range(HEADS)])
    torch.testing.assert_close(factors.rebuild(positions), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_take_the_dtype_of_the_keys(dtype: torch.dtype) -> None:
    k = keys_of(150)
    factors = factors_of([k], [12], dtype)
    out = rebuilt(factors, 1, 150)[0]
    assert {x.dtype for x in (factors._rows_Nr, factors._basis_SrD, out)} == {dtype}
    error = (out.double() - as_keys(truncated(k, 12))).norm() / k.norm()
    assert error < 4 * torch.finfo(dtype).eps
    # The product and its rotation are rounded once, at the end.
    exact = turn(factors._rows_Nr.double() @ factors._basis_SrD.double()).to(dtype)
    assert (exact != out).float().mean() < 0.01


def test_rebuilding_never_synchronises() -> None:
    factors = factors_of([keys_of(60)], [5])
    positions = torch.arange(20).expand(HEADS, 20)
    with Operations() as operations:
        factors.rebuild(positions)
    assert not operations.synchronised()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_keys_are_float32_at_a_time(dtype: torch.dtype) -> None:
    k = torch.randn(HEADS, 30_000, DIM).to(dtype)
    factors = KeyFactors([30_000], [8], k[None], Rope.of(tiny_model("llama")))
    with Operations() as operations:
        factors.write(0, k)
    assert operations.peak_bytes < 8 * low_rank.ROWS * WIDTH * 4
