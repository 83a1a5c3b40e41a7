"""A buffer that follows a choice: what stays, what moves, and the kernels that do it.

pytest -m gpu tests/test_exchange.py                        # on a CUDA device
TRITON_INTERPRET=1 pytest -m gpu tests/test_exchange.py     # without; Triton must be installed
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hcache.cache.exchange import Changed, best, changed_tokens, exchange, fetch
from hcache.cache.offload import HostRows
from hcache.cache.store import RaggedStore
from tests.on_kernels import kernel_device
from tests.operations import Operations

MOST, WIDTH = 40, 12
COUNTS = [12, 5, 0, 1, 9]
"""Slots that each row uses."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    return kernel_device(monkeypatch)


def choice(seed: int, counts: list[int] = COUNTS, width: int = WIDTH, most: int = MOST) -> Tensor:
    """Different numbers in each row, `most` behind them: [X, M] int32."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((len(counts), width), most, dtype=torch.int32)
    for row, count in zip(rows, counts, strict=True):
        row[:count] = torch.randperm(most, generator=generator)[:count]
    return rows


def check_exchange(
    held: Tensor, wanted: Tensor, valid: Tensor | None, device: str, most: int = MOST
) -> tuple[Tensor, Changed]:
    """Against sets, row by row."""
    before, moved = held.clone(), torch.full((len(held),), 100, device=device)
    held = held.to(device)
    changed = exchange(held, wanted.to(device), most, moved, None if valid is None else valid.to(device))
    held, places, counts = held.cpu(), changed.places_XM.cpu(), changed.counts_X.cpu()
    assert torch.equal(moved.cpu() - 100, counts.long())
    for x, (old, new) in enumerate(zip(before.tolist(), held.tolist(), strict=True)):
        target = wanted[x].tolist() if valid is None or valid[x] else old
        assert sorted(new) == sorted(target)
        differ = [m for m, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
        assert places[x, : counts[x]].tolist() == differ
        assert len(differ) == len(set(target) - set(old))
    return held, Changed(places, counts)


SOME = torch.tensor([[True, False], [False, True], [True, False], [True, False], [False, True]])
MASKS = [None, SOME[:, 0], torch.zeros(5, dtype=torch.bool)]


@pytest.mark.parametrize("valid", MASKS, ids=["all", "some", "none"])
def test_only_what_is_not_held_moves(valid: Tensor | None) -> None:
    held = choice(0)
    for seed in range(1, 8):
        held, _ = check_exchange(held, choice(seed), valid, "cpu")
    check_exchange(held, held.flip(1)[:, torch.randperm(WIDTH)], valid, "cpu")


def test_an_exchange_has_fixed_shapes_and_asks_the_device_for_nothing() -> None:
    traces = []
    for seed in range(4):
        held, wanted, moved = choice(0), choice(seed), torch.zeros(5, dtype=torch.int64)
        with Operations() as operations:
            changed = exchange(held, wanted, MOST, moved, None)
            changed_tokens(held, changed, 4, 10)
        assert operations.synchronised() == []
        traces.append(operations.trace)
    assert all(trace == traces[0] for trace in traces)


def check_best(device: str) -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 3.0], [3.0, 1.0, 1.0, 1.0, 0.0]], device=device)
    chosen = best(scores, torch.tensor([2, 3], device=device), 4)
    assert [sorted(row) for row in chosen.tolist()] == [[1, 2, 5, 5], [0, 1, 2, 5]]
    assert chosen.dtype is torch.int32
    assert chosen.is_contiguous()


def test_the_best_are_the_largest_and_earlier_ones_of_equals() -> None:
    check_best("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("most", [4, 5])
def test_a_kernel_finds_the_same_best_and_torch_does_where_it_holds_fewer(
    most: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcache.kernels.select.MOST", most)
    check_best(device)


def rows_and_store(
    counts: list[int], share: int, size: int, keys: bool, device: str, dtype: torch.dtype = torch.float32
) -> tuple[HostRows, RaggedStore]:
    """A waiting prompt of MOST units a segment, except for rows that use none, and an empty store."""
    lengths = [MOST * size * (count > 0) for count in counts for _ in range(share)]
    like = torch.empty(1, 7, dtype=dtype, device=device)
    host = HostRows(lengths, like, keys=keys)
    for s, n in enumerate(lengths):
        values = torch.randn(n, 7, generator=torch.Generator().manual_seed(s)).to(device, dtype)
        host.write(s, -values if keys else None, values)
    host.settle()
    return host, RaggedStore([count * size + 3 for count in counts for _ in range(share)], like)


def check_fetch(share: int, size: int, keys: bool, device: str) -> None:
    """Slots hold the rows of the units that they should after every exchange; nothing else is touched."""
    host, store = rows_and_store(COUNTS, share, size, keys, device)
    held = torch.full((len(COUNTS), WIDTH), MOST, dtype=torch.int32)
    first_choice = choice(0)
    slots = torch.arange(WIDTH, dtype=torch.int32).repeat(len(COUNTS), 1)
    held, changed = first_choice, Changed(slots, torch.tensor(COUNTS, dtype=torch.int32))
    for seed in range(1, 5):
        fetch(host, store, held.to(device), Changed(*(x.to(device) for x in changed)), size)
        for s, (x, first) in enumerate(itertools.product(range(len(COUNTS)), range(share))):
            assert s == x * share + first
            stored_keys, stored = (part.cpu() for part in store.read(s, store._capacity[s]))
            start = host._offsets[s]
            rows = [start + u * size + i for u in held[x, : COUNTS[x]].tolist() for i in range(size)]
            assert torch.equal(stored[: len(rows)], host.values.cpu()[rows])
            assert torch.equal(stored_keys, -stored if keys else torch.zeros_like(stored))
            assert not stored[len(rows) :].any()
        held, changed = check_exchange(held, choice(seed), MASKS[seed % 2], "cpu")


SHAPES = [(1, 4), (2, 1), (3, 5)]


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(("share", "size"), SHAPES)
def test_fetched_rows_are_those_of_the_units_held(share: int, size: int, keys: bool) -> None:
    check_fetch(share, size, keys, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(("share", "size"), SHAPES)
def test_a_kernel_fetches_the_same(share: int, size: int, keys: bool, device: str) -> None:
    check_fetch(share, size, keys, device)


@pytest.mark.gpu
@pytest.mark.parametrize("valid", MASKS, ids=["all", "some", "none"])
@pytest.mark.parametrize("block", [4, 64])
def test_a_kernel_exchanges_the_same(
    valid: Tensor | None, block: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcache.kernels.exchange.BLOCK", block)
    held = choice(0)
    for seed in range(1, 8):
        held, _ = check_exchange(held, choice(seed), valid, device)
    check_exchange(held, held, valid, device)


@pytest.mark.gpu
def test_a_kernel_exchanges_many_slots(device: str) -> None:
    counts, width, most = [9000, 10_000], 10_000, 50_000
    held = choice(0, counts, width, most)
    for seed in range(1, 4):
        wanted = choice(seed, counts, width, most)
        held, _ = check_exchange(held, wanted, None, device, most)
