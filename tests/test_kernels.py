"""Triton kernels against plain loops: on a GPU, or on a CPU under Triton's interpreter.

pytest -m gpu tests/test_kernels.py                        # on a CUDA device
TRITON_INTERPRET=1 pytest -m gpu tests/test_kernels.py     # without; Triton must be installed
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hcache.scoring import top_positions

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of outputs of about 1, by the dtype that weights and outputs are rounded to."""

LENGTHS = {
    "one": [70],
    "none": [0, 0, 0],
    "edges": [0, 1, 15, 16, 17, 63, 64, 65, 128],
    "huge": [3, 700, 0, 1, 20],
}


def mend_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two faults of the interpreter of Triton 3.6.

    `range` over scalars of a kernel calls int() on arrays of one number, which numpy 2.4 refuses; and a
    product of bfloat16 takes the bits for integers.
    """
    from triton import language
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch_tensor, product = interpreter._patch_lang_tensor, builder.create_dot

    def patch(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (
            self.cast_impl(x, language.float32) if x.dtype.scalar == language.bfloat16 else x for x in (a, b)
        )
        return product(self, a, b, *others)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1":
        mend_interpreter(monkeypatch)
        return "cpu"
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass
class Ragged:
    """Segments with free slots between them, which hold NaN; on the CPU."""

    q: Tensor
    keys: Tensor
    values: Tensor
    first: Tensor
    limits: Tensor

    @classmethod
    def make(cls, lengths: list[int], group: int, dim: int, dtype: torch.dtype, spare: int = 9) -> Ragged:
        first = [sum(lengths[:s]) + (s + 1) * spare for s in range(len(lengths))]
        slots = first[-1] + lengths[-1] + spare
        keys, values = normal(slots, dim, seed=1, dtype=dtype), normal(slots, dim, seed=2, dtype=dtype)
        dead = torch.ones(slots, dtype=torch.bool)
        for start, length in zip(first, lengths, strict=True):
            dead[start : start + length] = False
        keys[dead], values[dead] = torch.nan, torch.nan
        q = 2 * normal(len(lengths), group, dim, seed=3, dtype=dtype)
        return cls(q, keys, values, torch.tensor(first), torch.tensor(lengths, dtype=torch.int32))

    def slots(self, row: int) -> Tensor:
        return int(self.first[row]) + torch.arange(int(self.limits[row]))

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        return tuple(x.to(device) for x in (self.q, self.keys, self.values, self.first, self.limits))


def attention(q_GD: Tensor, k_nD: Tensor, v_nD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output [G, D], log-sum-exp [G] and logits [n, G], in float64."""
    logits_nG = k_nD.double() @ q_GD.double().T * q_GD.shape[1] ** -0.5
    if not len(k_nD):
        return torch.zeros(q_GD.shape), torch.full(q_GD.shape[:1], -torch.inf), logits_nG
    return logits_nG.softmax(0).T @ v_nD.double(), logits_nG.logsumexp(0), logits_nG


def check_decode(ragged: Ragged, device: str, programs: int | None, block: int | None = None) -> None:
    """Outputs and log-sum-exps of all segments, and the same bits in a second run."""
    from hcache.kernels.decode import decode, tuning_of

    tuning = tuning_of(ragged.q.shape[-1], ragged.q.dtype)
    tuning = tuning._replace(block=block or tuning.block)
    runs = [decode(*ragged.inputs(device), programs=programs, tuning=tuning) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    out, lse = (x.cpu() for x in runs[0])
    assert (out.dtype, lse.dtype) == (ragged.q.dtype, torch.float32)
    for s, q_GD in enumerate(ragged.q):
        slots = ragged.slots(s)
        expected, expected_lse, _ = attention(q_GD, ragged.keys[slots], ragged.values[slots])
        tolerance = TOLERANCES[out.dtype]
        torch.testing.assert_close(out[s].double(), expected.double(), rtol=0, atol=tolerance)
        torch.testing.assert_close(lse[s].double(), expected_lse.double(), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("programs", [1, 3, 40, None], ids=lambda p: f"programs-{p}")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_decode_equals_softmax_attention(device: str, lengths: list[int], programs: int | None) -> None:
    check_decode(Ragged.make(lengths, 4, 64, torch.float32), device, programs, block=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_decode_of_any_head_dim_and_dtype(device: str, dim: int, dtype: torch.dtype) -> None:
    check_decode(Ragged.make([130, 0, 33], 4, dim, dtype), device, 5)


@pytest.mark.parametrize("group", [1, 5, 7, 17, 64])
def test_decode_of_any_group(device: str, group: int) -> None:
    check_decode(Ragged.make([130, 0, 33], group, 32, torch.bfloat16), device, 5)


@pytest.mark.parametrize("seed", range(8))
def test_decode_of_random_lengths(device: str, seed: int) -> None:
    """More programs than blocks, fewer, and every boundary of a share in every place."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 20, (), generator=generator))
    lengths = (torch.rand(count, generator=generator) ** 4 * 300).int().tolist()
    check_decode(Ragged.make(lengths, 3, 16, torch.float32), device, 2 + 3 * seed, block=16)


def test_decode_merges_more_partial_results_than_one_tile(device: str) -> None:
    """Logits grow with the token, so that the second tile has the higher peak."""
    ragged = Ragged.make([16 * 90], 2, 16, torch.float32)
    ragged.keys *= torch.linspace(0, 3, len(ragged.keys)).unsqueeze(1)
    check_decode(ragged, device, 80, block=16)


def test_decode_of_large_logits_and_long_offsets(device: str) -> None:
    """Logits of hundreds must not overflow, and limits may be int64."""
    ragged = Ragged.make([100, 5], 2, 64, torch.float32)
    ragged.q *= 100
    ragged.limits = ragged.limits.long()
    check_decode(ragged, device, 4)


def test_decode_stores_logits_at_live_slots_only(device: str) -> None:
    from hcache.kernels.decode import decode

    ragged = Ragged.make([70, 0, 5], 5, 80, torch.bfloat16)
    logits = torch.full((len(ragged.keys), 5), 7.0, device=device)
    decode(*ragged.inputs(device), logits=logits, programs=3)
    expected = torch.full(logits.shape, 7.0)
    for s, q_GD in enumerate(ragged.q):
        slots = ragged.slots(s)
        expected[slots] = attention(q_GD, ragged.keys[slots], ragged.values[slots])[2].float()
    torch.testing.assert_close(logits.cpu(), expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_decode_of_pages(device: str, page_size: int, share: int, index: torch.dtype) -> None:
    """`share` rows of each segment, with pages and limits of their own; the last page is partial."""
    from hcache.kernels.decode import decode

    count = 6
    ragged = Ragged.make([count * page_size] * 2, 2, 32, torch.float32)
    generator = torch.Generator().manual_seed(page_size)
    pages = torch.stack([torch.randperm(count, generator=generator) for _ in range(2 * share)])
    limits = torch.randint(0, count * page_size + 1, (2 * share,), generator=generator)
    limits[0] = max(1, 3 * page_size - 1)
    # What lies behind a limit is no page at all.
    for r, limit in enumerate(limits.tolist()):
        pages[r, -(-limit // page_size) :] = 10**6
    q = normal(2 * share, 2, 32, seed=5)
    logits = torch.full((len(ragged.keys), share * 2), 7.0)
    there = [x.to(device) for x in (q, ragged.keys, ragged.values, ragged.first, limits)]
    written = logits.to(device, copy=True)
    table = pages.to(device, index)
    out, lse = decode(*there, pages=table, page_size=page_size, logits=written, programs=4)
    for r, limit in enumerate(limits.tolist()):
        t = torch.arange(limit)
        slots = ragged.first[r // share] + pages[r, t // page_size] * page_size + t % page_size
        expected = attention(q[r], ragged.keys[slots], ragged.values[slots])
        torch.testing.assert_close(out[r].cpu().double(), expected[0].double(), rtol=0, atol=2e-5)
        torch.testing.assert_close(lse[r].cpu().double(), expected[1].double(), rtol=3e-5, atol=3e-5)
        column = r % share * 2
        logits[slots, column : column + 2] = expected[2].float()
    torch.testing.assert_close(written.cpu(), logits, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [16, 80, 256])
def test_append_writes_one_token_per_segment(device: str, dim: int, dtype: torch.dtype) -> None:
    """From rows that are strided, and nowhere else."""
    from hcache.kernels.append import append

    ragged = Ragged.make([0, 7, 64, 1], 1, dim, dtype)
    keys, values = ragged.keys.to(device, copy=True), ragged.values.to(device, copy=True)
    k, v = normal(4, 3, dim, seed=6, dtype=dtype), normal(4, dim, seed=7, dtype=dtype)
    lengths = ragged.limits.to(device, copy=True)
    append(k.to(device)[:, 1], v.to(device), keys, values, ragged.first.to(device), lengths)
    slots = ragged.first + ragged.limits
    ragged.keys[slots], ragged.values[slots] = k[:, 1], v
    assert torch.equal(lengths.cpu(), ragged.limits + 1)
    for written, expected in ((keys, ragged.keys), (values, ragged.values)):
        torch.testing.assert_close(written.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("rows_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("rows", "dim"), [(1, 32), (7, 80), (4, 256), (20, 320)])
def test_scan_equals_products(
    device: str, rows: int, dim: int, rows_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    from hcache.kernels.scan import scan

    ragged = Ragged.make([100, 0, 64, 1], 1, dim, dtype)
    rows_XRD = normal(4, rows, dim, seed=8, dtype=rows_dtype)
    there = [x.to(device) for x in (rows_XRD, ragged.keys, ragged.first, ragged.limits)]
    logits = scan(*there, 103, scale=0.3).cpu()
    assert logits.shape == (4, rows, 103)
    for x, count in enumerate(ragged.limits.tolist()):
        keys = ragged.keys[ragged.slots(x)].double()
        expected = rows_XRD[x].double() @ keys.T * 0.3
        size = rows_XRD[x].double().abs() @ keys.abs().T * 0.3
        assert torch.all((logits[x, :, :count] - expected).abs() <= 1e-5 * size)
        assert torch.all(logits[x, :, count:] == -torch.inf)


def check_select(scores: Tensor, counts: list[int], width: int, device: str) -> None:
    from hcache.kernels.select import select

    rows, tokens = scores.shape
    positions = select(scores.to(device), torch.tensor(counts, device=device), width).cpu()
    assert (positions.shape, positions.dtype) == ((rows, width), torch.int32)
    for row, found, count in zip(scores, positions, counts, strict=True):
        ordered = torch.where(row.isnan(), -torch.inf, row)
        assert found[:count].tolist() == top_positions(ordered, count).tolist()
        assert torch.all(found[count:] == tokens)


@pytest.mark.parametrize("tokens", [1, 15, 64, 1000, 5000])
def test_select_of_distinct_scores(device: str, tokens: int) -> None:
    counts = [0, 1, tokens // 2, tokens]
    check_select(normal(4, tokens, seed=tokens), counts, tokens + 3, device)


def test_select_of_ties_and_specials(device: str) -> None:
    """Ties go to the earlier position; 0.0 ties with -0.0; infinities are scores like others."""
    generator = torch.Generator().manual_seed(1)
    menu = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3e38])
    scores = menu[torch.randint(0, len(menu), (40, 100), generator=generator)]
    check_select(scores, torch.randint(0, 101, (40,), generator=generator).tolist(), 100, device)


def test_select_takes_nan_last(device: str) -> None:
    scores = torch.tensor([[torch.nan, 1.0, -torch.inf, torch.nan, 2.0]] * 6)
    scores[0, 0] = -scores[0, 0]
    from hcache.kernels.select import select

    positions = select(scores.to(device), torch.arange(6, device=device), 5).cpu().tolist()
    full = [4, 1, 2, 0, 3]
    assert positions == [sorted(full[:count]) + [5] * (5 - count) for count in range(6)]


def test_select_into_a_tensor_with_a_rest_of_its_own(device: str) -> None:
    """Two rows share a number that fills the places they don't use."""
    from hcache.kernels.select import select

    scores, counts = normal(4, 50, seed=8), torch.tensor([3, 0, 7, 5])
    rest, out = torch.tensor([11, 22], dtype=torch.int32), torch.zeros(4, 7, dtype=torch.int32, device=device)
    assert select(scores.to(device), counts.to(device), 7, rest.to(device), out) is out
    for x, count in enumerate(counts.tolist()):
        taken = top_positions(scores[x], count).tolist()
        assert out[x].tolist() == taken + [int(rest[x // 2])] * (7 - count)


def test_select_of_scores_far_apart(device: str) -> None:
    """Infinite rows, finite numbers of all sizes between infinities, and more of +inf than is taken."""
    scores = normal(6, 900, seed=5) * 10.0 ** torch.linspace(-40, 38, 900)
    scores[0], scores[1], scores[2, 1:] = torch.inf, -torch.inf, torch.inf
    scores[3, ::3], scores[4, ::2], scores[5, ::7] = -torch.inf, torch.inf, torch.nan
    check_select(scores, [400, 400, 900, 850, 300, 900], 900, device)


@pytest.mark.parametrize("value", [0.0, -torch.inf])
@pytest.mark.parametrize("tokens", [16384, 32767, 65536])
def test_select_of_equal_scores_at_the_largest_sizes(device: str, tokens: int, value: float) -> None:
    """Of one part and of several: sums that fill what holds them. The interpreter refuses those of 32768."""
    check_select(torch.full((2, tokens), value), [tokens, tokens // 2 + 9], tokens, device)


def test_select_of_several_parts(device: str) -> None:
    check_select(normal(2, 40000, seed=3), [4000, 39999], 40000, device)


def test_select_refuses_longer_rows(device: str) -> None:
    from hcache.kernels.select import select

    with pytest.raises(ValueError, match="65537"):
        select(torch.zeros(1, 65537, device=device), torch.ones(1, device=device), 4)


@pytest.mark.parametrize("counted", [False, True], ids=["silent", "counted"])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("count", [0, 1, 57])
@pytest.mark.parametrize("dims", [(24,), (128, 128), (80, 16)], ids=str)
def test_copy_rows_copies_what_is_wanted(
    device: str, dims: tuple[int, ...], count: int, some: bool, counted: bool
) -> None:
    """One or two pairs of buffers, from pinned memory on a GPU, with fewer programs than blocks."""
    from hcache.kernels.rows import copy_rows

    generator = torch.Generator().manual_seed(9)
    rows, slots = torch.randint(0, 40, (count,), generator=generator), torch.randperm(70)[:count]
    mask = torch.rand(count, generator=generator) < 0.5
    number = torch.tensor(5, device=device) if counted else None
    pairs = [
        (normal(40, dim, seed=dim, dtype=torch.bfloat16), normal(70, dim, seed=1, dtype=torch.bfloat16))
        for dim in dims
    ]
    there = [(s.pin_memory() if device == "cuda" else s, t.to(device, copy=True)) for s, t in pairs]
    wanted = mask.to(device) if some else None
    copy_rows(there, rows.to(device), slots.to(device), wanted, programs=2, count=number)
    moved = mask if some else torch.ones_like(mask)
    for (source, target), (_, written) in zip(pairs, there, strict=True):
        target[slots[moved]] = source[rows[moved]]
        assert torch.equal(written.cpu(), target)
    if number is not None:
        assert int(number) == 5 + int(moved.sum())


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 37, 0], [40, 1, 33]], ids=str)
@pytest.mark.parametrize("look_up", [False, True], ids=["in order", "listed"])
@pytest.mark.parametrize("first", [False, True], ids=["side by side", "first rows"])
def test_copy_lists_copies_what_is_counted(
    device: str, counts: list[int], look_up: bool, first: bool
) -> None:
    from hcache.kernels.rows import copy_lists

    generator, room = torch.Generator().manual_seed(3), 40
    listed = torch.stack([torch.randperm(room, generator=generator) for _ in counts]).int()
    sources, targets = ([normal(150, dim, seed=dim + s) for dim in (24, 16)] for s in (0, 1))
    there = [x.pin_memory() if device == "cuda" else x for x in sources]
    written = [x.to(device, copy=True) for x in targets]
    source_first, target_first = torch.tensor([70, 0, 110]), torch.tensor([110, 60, 3])
    ends = (source_first.to(device), target_first.to(device)) if first else (None, None)
    number = torch.tensor(5, device=device)
    copy_lists(
        list(zip(there, written, strict=True)), torch.tensor(counts, device=device), listed.to(device),
        look_up=look_up, source_first_Q=ends[0], target_first_Q=ends[1], programs=2, count=number,
    )  # fmt: skip
    for source, target, ours in zip(sources, targets, written, strict=True):
        for q, count in enumerate(counts):
            row, slot = (int(source_first[q]), int(target_first[q])) if first else (q * room, q * room)
            rows = listed[q, :count].long() if look_up else torch.arange(count)
            target[slot : slot + count] = source[row + rows]
        assert torch.equal(ours.cpu(), target)
    assert int(number) == 5 + sum(counts)


def test_scan_says_what_a_softmax_needs_and_leaves_out_what_is_not_wanted(device: str) -> None:
    from hcache.kernels.scan import blocks_of, scan

    ragged = Ragged.make([150, 0, 64, 1], 1, 32, torch.float32)
    rows, wanted = normal(4, 3, 32, seed=8), torch.tensor([True, True, False, True])
    parts = torch.full((2, 4, 3, blocks_of(200)), 7.0, device=device)
    there = [x.to(device) for x in (rows, ragged.keys, ragged.first, ragged.limits)]
    logits = scan(*there, 200, scale=0.3, wanted_X=wanted.to(device), parts=parts).cpu()
    peaks, totals = parts.cpu()
    assert (parts[:, 2] == 7).all()
    for x in (0, 1, 3):
        blocks = torch.nn.functional.pad(logits[x], (0, 56), value=-torch.inf).unflatten(-1, (4, 64))
        assert torch.equal(peaks[x], blocks.amax(-1))
        below = blocks - peaks[x].nan_to_num(neginf=0.0).unsqueeze(-1)
        torch.testing.assert_close(totals[x], below.exp().sum(-1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_captured_in_a_graph_and_follow_new_lengths() -> None:
    """What a capture allows never waits for the device; lengths that change later are obeyed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from hcache.kernels.append import append
    from hcache.kernels.decode import decode
    from hcache.kernels.scan import scan
    from hcache.kernels.select import select

    ragged = Ragged.make([70, 1, 40], 4, 64, torch.float32)
    q, keys, values, first, lengths = ragged.inputs("cuda")
    k, v = normal(3, 64, seed=1).cuda(), normal(3, 64, seed=2).cuda()

    def step() -> tuple[Tensor, ...]:
        append(k, v, keys, values, first, lengths)
        logits = scan(q, keys, first, lengths, 90, scale=1.0)
        picked = select(logits[:, 0].contiguous(), lengths, 90)
        return (*decode(q, keys, values, first, lengths), picked)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert lengths.tolist() == [74, 5, 44]
    for s, (out_GD, length) in enumerate(zip(outs[0].cpu(), lengths.tolist(), strict=True)):
        live = slice(int(first[s]), int(first[s]) + length)
        expected = attention(ragged.q[s], keys[live].cpu(), values[live].cpu())[0]
        torch.testing.assert_close(out_GD.double(), expected, rtol=0, atol=2e-5)
        assert outs[2][s].tolist() == [*range(length), *[90] * (90 - length)]
    assert math.isfinite(float(outs[1].sum()))
