"""Rows copied between buffers, and the host store of rows: against loops, byte for byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcache.cache.gather import copy_lists, copy_rows
from hcache.cache.offload import HostRows
from hcache.cache.store import RaggedStore
from tests.operations import Operations

LENGTHS = [5, 0, 70, 1]
"""Rows of each segment of the host store."""


def numbers(rows: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def copied(source: Tensor, rows: Tensor, target: Tensor, slots: Tensor, wanted: Tensor | None) -> Tensor:
    """What copy_rows must leave in the target, row by row."""
    target = target.clone()
    for i in range(len(rows)):
        if wanted is None or wanted[i]:
            target[slots[i]] = source[rows[i]]
    return target


def picks(count: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (repeated ones too) of 40, slots (all different) of 60, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 40, (count,), generator=generator)
    slots = torch.randperm(60, generator=generator)[:count]
    return rows, slots, torch.rand(count, generator=generator) < 0.5


def check_copy(dim: int, dtype: torch.dtype, count: int, some: bool, device: str) -> None:
    """copy_rows from host memory (pinned where the device is a GPU) against the loop."""
    source, target = numbers(40, dim, dtype), numbers(60, dim, dtype, seed=2)
    rows, slots, mask = picks(count)
    wanted = mask if some else None
    expected = copied(source, rows, target, slots, wanted)
    there = target.to(device, copy=True)
    source = source.pin_memory() if device == "cuda" else source
    count = torch.zeros((), dtype=torch.int64, device=device)
    flags = None if wanted is None else mask.to(device)
    copy_rows([(source, there)], rows.to(device), slots.to(device), flags, count=count)
    assert torch.equal(there.cpu(), expected)
    assert count.item() == (len(rows) if wanted is None else int(mask.sum()))


def filled(device: str, dtype: torch.dtype, keys: bool, enabled: bool) -> tuple[HostRows, Tensor, Tensor]:
    """A host store of LENGTHS, and the flat keys and values that went into it."""
    flat_keys, flat_values = numbers(sum(LENGTHS), 24, dtype, 3), numbers(sum(LENGTHS), 24, dtype, 4)
    host = HostRows(LENGTHS, torch.empty(1, 24, dtype=dtype, device=device), keys, enabled)
    parts = zip(flat_keys.split(LENGTHS), flat_values.split(LENGTHS), strict=True)
    for segment, (k, v) in enumerate(parts):
        host.write(segment, k.to(device) if keys else None, v.to(device))
    host.settle()
    return host, flat_keys, flat_values


def check_rows(device: str, dtype: torch.dtype, keys: bool, enabled: bool) -> None:
    """Rows come back byte for byte into their slots and nowhere else, and what moved is counted."""
    host, flat_keys, flat_values = filled(device, dtype, keys, enabled)
    assert host.first.tolist() == [0, 5, 5, 75]
    target = RaggedStore([10, 10], torch.empty(1, 24, dtype=dtype, device=device))
    target.keys.normal_()
    target.values.normal_()
    rows, slots = torch.tensor([75, 5, 74, 5, 0]), torch.tensor([3, 64, 65, 9, 0])
    wanted = torch.tensor([True, False, True, True, False])
    moved = 0
    for mask, count in ((wanted, 3), (None, 5), (torch.zeros_like(wanted), 0)):
        expected_keys, expected_values = (
            copied(source, rows, buffer.cpu(), slots, mask)
            for source, buffer in ((flat_keys, target.keys), (flat_values, target.values))
        )
        before = target.keys.clone()
        host.load(rows.to(device), target, slots.to(device), None if mask is None else mask.to(device))
        assert torch.equal(target.values.cpu(), expected_values)
        assert torch.equal(target.keys.cpu(), expected_keys if keys else before.cpu())
        moved += count if enabled else 0
        row = (1 + keys) * 24 * dtype.itemsize
        assert (host.row_bytes, host.moved_bytes) == (row, moved * row)


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("count", [0, 1, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_copied_to_their_slots(dtype: torch.dtype, count: int, some: bool) -> None:
    check_copy(24, dtype, count, some, "cpu")


@pytest.mark.parametrize("enabled", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("keys", [True, False], ids=["both", "values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_host_rows_come_back_as_they_were(dtype: torch.dtype, keys: bool, enabled: bool) -> None:
    check_rows("cpu", dtype, keys, enabled)


def test_what_is_not_wanted_may_be_nan() -> None:
    """A row that isn't wanted leaves no trace, whatever it holds."""
    source, target = torch.full((3, 4), torch.nan), torch.zeros(3, 4)
    copy_rows([(source, target)], torch.arange(3), torch.arange(3), torch.zeros(3, dtype=torch.bool))
    assert torch.equal(target, torch.zeros(3, 4))


@pytest.mark.parametrize("wanted", [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]])
def test_slots_that_are_not_wanted_may_be_those_of_others(wanted: list[int]) -> None:
    """Padding of a table points anywhere; two pairs go by the same rows."""
    mask = torch.tensor(wanted, dtype=torch.bool)
    slots = torch.where(mask, torch.arange(4) + 1, torch.tensor([1, 1, 4, 4]))
    sources, targets = ([numbers(6, dim, seed=s + dim) for dim in (3, 4)] for s in (0, 10))
    rows = torch.tensor([0, 3, 3, 1])
    expected = [copied(s, rows, t, slots, mask) for s, t in zip(sources, targets, strict=True)]
    copy_rows(list(zip(sources, targets, strict=True)), rows, slots, mask)
    for target, right in zip(targets, expected, strict=True):
        assert torch.equal(target, right)


@pytest.mark.parametrize("look_up", [False, True], ids=["in order", "listed"])
@pytest.mark.parametrize("first", [False, True], ids=["side by side", "first rows"])
def test_lists_are_copied_up_to_their_counts(look_up: bool, first: bool) -> None:
    source, target, count = numbers(20, 3), numbers(20, 3, seed=1), torch.tensor(1)
    counts, listed = [2, 0, 4], torch.tensor([[3, 1, 0, 2], [0, 0, 0, 0], [2, 3, 1, 0]]).int()
    froms, tos = ([9, 0, 16], [12, 5, 0]) if first else ([0, 4, 8], [0, 4, 8])
    expected = target.clone()
    for q, rows in enumerate(counts):
        for i in range(rows):
            expected[tos[q] + i] = source[froms[q] + (int(listed[q, i]) if look_up else i)]
    copy_lists(
        [(source, target)], torch.tensor(counts), listed, look_up=look_up, count=count,
        source_first_Q=torch.tensor(froms) if first else None,
        target_first_Q=torch.tensor(tos) if first else None,
    )  # fmt: skip
    assert torch.equal(target, expected)
    assert int(count) == 1 + sum(counts)


@pytest.mark.parametrize("keys", [True, False], ids=["both", "values"])
@pytest.mark.parametrize("enabled", [True, False], ids=["host", "device"])
def test_bytes_are_counted_where_they_are(keys: bool, enabled: bool) -> None:
    host, *_ = filled("cpu", torch.bfloat16, keys, enabled)
    payload, here = (1 + keys) * sum(LENGTHS) * 24 * 2, "host" if enabled else "device"
    there = "device" if enabled else "host"
    assert host.nbytes()[here]["payload"] == payload
    assert host.nbytes()[there]["payload"] == 0
    assert host.nbytes()["device"]["metadata"] == 8 * len(LENGTHS) + 8
    assert host.nbytes()["host"]["metadata"] == 0


def test_loading_never_synchronises(monkeypatch: pytest.MonkeyPatch) -> None:
    host, *_ = filled("cpu", torch.float32, True, True)
    target = RaggedStore([10, 10], torch.empty(1, 24))
    rows, masks = torch.arange(5), [torch.arange(5) > 1, torch.arange(5) < 1]
    for name in ("tolist", "item", "cpu"):
        monkeypatch.setattr(Tensor, name, None)
    traces = []
    for wanted in masks:
        with Operations() as operations:
            host.load(rows, target, rows, wanted)
        assert not operations.synchronised()
        traces.append(operations.trace)
    assert traces[0] == traces[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestPinned:
    """The same from pinned host memory into a GPU."""

    @pytest.mark.parametrize("dim", [16, 24, 128])
    @pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
    @pytest.mark.parametrize("count", [0, 1, 30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_rows_are_copied_to_their_slots(
        self, dtype: torch.dtype, count: int, some: bool, dim: int
    ) -> None:
        check_copy(dim, dtype, count, some, "cuda")

    @pytest.mark.parametrize("enabled", [True, False], ids=["host", "device"])
    @pytest.mark.parametrize("keys", [True, False], ids=["both", "values"])
    def test_host_rows_come_back_as_they_were(self, keys: bool, enabled: bool) -> None:
        check_rows("cuda", torch.bfloat16, keys, enabled)

    @pytest.mark.parametrize("enabled", [True, False], ids=["host", "device"])
    def test_buffers_are_pinned_or_on_the_device(self, enabled: bool) -> None:
        host, *_ = filled("cuda", torch.float32, True, enabled)
        for buffer in (host.keys, host.values):
            assert buffer is not None
            assert buffer.is_pinned() == enabled
            assert buffer.is_cuda != enabled

    def test_loading_is_captured_in_a_graph_and_follows_new_rows(self) -> None:
        """What a capture allows never waits for the device."""
        host, _, values = filled("cuda", torch.float32, False, True)
        target = RaggedStore([64], torch.empty(1, 24, device="cuda"))
        rows, slots = torch.arange(5, device="cuda"), torch.arange(5, device="cuda")
        wanted = torch.ones(5, dtype=torch.bool, device="cuda")
        host.load(rows, target, slots, wanted)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            host.load(rows, target, slots, wanted)
        rows += 60
        wanted[2] = False
        graph.replay()
        expected = values[:5].clone()
        expected[[0, 1, 3, 4]] = values[[60, 61, 63, 64]]
        assert torch.equal(target.values[:5].cpu(), expected)
        assert host.moved_bytes == (5 + 4) * host.row_bytes
