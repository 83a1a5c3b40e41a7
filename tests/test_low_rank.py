"""Key factors against a float64 SVD of the keys before rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcache.attention.rope import Halves, Rope
from hcache.cache.exchange import Changed
from hcache.cache.room import StickyRoom
from hcache.cache.store import RaggedStore
from hcache.contract.tiny_models import tiny_model
from hcache.methods import low_rank
from hcache.methods.low_rank import KeyFactors
from tests.on_kernels import kernel_device
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


def moved_to(device: str, factors: KeyFactors) -> KeyFactors:
    """The same factors on another device, with what the kernel needs where kernels are used there."""
    like = torch.empty(len(factors._ranks), HEADS, 1, DIM, dtype=factors._rows_Nr.dtype, device=device)
    moved = KeyFactors(factors._tokens, factors._ranks, like, factors._rope)
    for name in ("_rows_Nr", "_basis_SrD"):
        getattr(moved, name).copy_(getattr(factors, name))
    return moved


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


# Into a store

SIZE, SLOTS = 4, 7


def restored(factors: KeyFactors, store: RaggedStore, device: str, seed: int) -> None:
    """Rebuild chunks of every segment that has any: some places of some segments."""
    generator, segments = torch.Generator().manual_seed(seed), len(store.first)
    chunks = torch.stack([torch.randperm(15, generator=generator)[:SLOTS] for _ in range(segments)])
    places = torch.stack([torch.randperm(SLOTS, generator=generator) for _ in range(segments)])
    counts = torch.randint(0, SLOTS + 1, (segments,), generator=generator)
    counts *= torch.tensor(factors._ranks).repeat_interleave(HEADS) > 0
    changed = Changed(places.int().to(device), counts.int().to(device))
    before, total = store.keys.cpu().clone(), sum(factors._tokens)
    factors.restore(store, chunks.int().to(device), changed, SIZE)
    positions = (chunks.unsqueeze(-1) * SIZE + torch.arange(SIZE)).flatten(1)
    expected = moved_to("cpu", factors).rebuild(positions)
    for s, first in enumerate(store.offsets):
        for place in places[s, : counts[s]].tolist():
            now = slice(place * SIZE, (place + 1) * SIZE)
            before[first:][now] = expected[s, now]
    assert total == factors._rows_Nr.shape[0]
    tolerance = 1e-5 if before.dtype is torch.float32 else 2 * torch.finfo(before.dtype).eps
    torch.testing.assert_close(store.keys.cpu(), before, rtol=tolerance, atol=tolerance)


def check_restored(factors: KeyFactors, device: str) -> None:
    there = moved_to(device, factors)
    store = RaggedStore([SLOTS * SIZE + 5] * len(there._first_S), there._rows_Nr.new_empty(1, DIM))
    store.keys.copy_(torch.randn(store.keys.shape, generator=torch.Generator().manual_seed(1)))
    for seed in range(3):
        restored(there, store, device, seed)


@pytest.mark.parametrize("missing", [None, 0, 2])
def test_chunks_are_rebuilt_where_they_are_listed_and_nowhere_else(missing: int | None) -> None:
    ranks = [9, 4, 40]
    if missing is not None:
        ranks[missing] = 0
    check_restored(factors_of([keys_of(n, seed=n) for n in (90, 70, 120)], ranks), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [16, 32])
def test_a_kernel_rebuilds_the_same(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = factors_of([keys_of(n, seed=n) for n in (90, 70, 120)], [9, 0, 40], dtype)
    device = kernel_device(monkeypatch)
    monkeypatch.setattr("hcache.kernels.rebuild.TOKENS", tokens)
    monkeypatch.setattr("hcache.kernels.rebuild.PROGRAMS", 9)
    there = moved_to(device, factors)
    assert there._frequencies_F is not None
    check_restored(factors, device)


class Scaled:
    """A rotation of the first numbers of a head alone, with a factor."""

    def __init__(self, half: int) -> None:
        self.formula = Halves(1000.0 ** -torch.linspace(0, 1, half), 1.3)

    def halves(self, dim: int) -> Halves:
        return self.formula

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        frequencies, scaling = self.formula
        angles = positions.unsqueeze(-1).double() * frequencies.to(x.device).double()
        half = frequencies.numel()
        left, right, rest = x.double().split([half, half, x.shape[-1] - 2 * half], dim=-1)
        cos, sin = angles.cos().unsqueeze(1) * scaling, angles.sin().unsqueeze(1) * scaling
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1).to(x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [8, 5, 1])
def test_a_kernel_turns_parts_of_heads_with_a_factor(half: int, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = factors_of([keys_of(70)], [12])
    factors._rope = Scaled(half)  # type: ignore[assignment]
    check_restored(factors, kernel_device(monkeypatch))


@pytest.mark.gpu
def test_a_kernel_turns_to_positions_of_a_million_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's product and cosine in float32, as transformers has them."""
    factors = factors_of([keys_of(70)], [12])
    device = kernel_device(monkeypatch)
    from hcache.kernels.rebuild import rebuild

    last, size = 1_000_000 // SIZE, SIZE
    frequencies = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    rows, basis = factors._rows_Nr[:SIZE].to(device), factors._basis_SrD.to(device)
    keys, first = torch.zeros(HEADS * 64, DIM, device=device), 64 * torch.arange(HEADS, device=device)
    ones = torch.ones(HEADS, 1, dtype=torch.int32, device=device)
    # The only rows there are stand for the chunk at a million.
    begin = torch.full((HEADS,), -last * size, device=device)
    rebuild(
        rows, basis, begin, frequencies.to(device), 1.0, keys, first, last * ones, 0 * ones, ones[:, 0], size
    )
    angles = (last * size + torch.arange(size)).float().unsqueeze(1) * frequencies
    left, right = (factors._rows_Nr[:SIZE] @ factors._basis_SrD).chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    expected = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
    found = keys.cpu().view(HEADS, 64, DIM)[:, :SIZE]
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def test_room_for_more_changes_nothing() -> None:
    room, k = StickyRoom(), keys_of(60)
    like = torch.empty(1, HEADS, 1, DIM)
    KeyFactors([90], [14], like, Rope.of(tiny_model("llama")), room)
    wide = KeyFactors([60], [9], like, Rope.of(tiny_model("llama")), room)
    wide.write(0, k)
    assert wide._rows_Nr.shape == (96, 14)
    torch.testing.assert_close(rebuilt(wide, 1, 60), rebuilt(factors_of([k], [9]), 1, 60), rtol=0, atol=1e-6)
    device = wide.nbytes()["device"]
    assert device["payload"] == 9 * (60 + WIDTH) * 4
    assert sum(device.values()) == sum(x.nbytes for x in (wide._rows_Nr, wide._basis_SrD, wide._first_S))
