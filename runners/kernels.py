"""Micro-benchmark of the kernels on the CUDA device at hand, beside torch's own and the device's ceiling.

    python -m runners.kernels [--only PART ...] [--tune] [--out FILE]

`--tune` tries tunings of the decode kernel and prints the best for each layout; `--only` names parts.

Shapes: B sequences, H KV heads, G query heads of one, D head dim, S = B*H segments, X scans.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from runners import kernel_layers
from runners.kernel_timing import DIM, GROUP, HEADS, Timing, copies, measure, random


@dataclass(frozen=True)
class Layout:
    """Lengths of the segments of a store."""

    name: str
    batch: int
    lengths: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 2 * sum(self.lengths) * DIM * 2

    @property
    def shape(self) -> str:
        return f"{self.name}, batch {self.batch}"


def layouts(tokens: int, batch: int) -> list[Layout]:
    """One even and two uneven layouts of the same total."""
    total = HEADS * tokens
    proportions = {
        "even": [1.0] * HEADS,
        "1 to 8": [1.0 + h for h in range(HEADS)],
        "1 and 7 x 5%": [1.0] + [0.05] * (HEADS - 1),
    }
    return [
        Layout(f"{tokens // 1024}K {name}", batch, tuple(int(total * p / sum(parts)) for p in parts * batch))
        for name, parts in proportions.items()
    ]


@dataclass
class Stores:
    """Random keys and values of a layout, as often as it takes to miss the cache."""

    layout: Layout
    q: Tensor
    buffers: list[tuple[Tensor, Tensor]]
    first: Tensor
    limits: Tensor

    @classmethod
    def make(cls, layout: Layout) -> Stores:
        slots = sum(layout.lengths)
        buffers = [(random(slots, DIM), random(slots, DIM)) for _ in range(copies(layout.nbytes))]
        limits = torch.tensor(layout.lengths, dtype=torch.int32, device="cuda")
        first = limits.long().cumsum(0) - limits
        return cls(layout, random(len(layout.lengths), GROUP, DIM), buffers, first, limits)

    def decode(self, least: int = 32, **options: Any) -> Timing:
        """The stream-K kernel, with options of `hcache.kernels.decode.decode`."""
        from hcache.kernels.decode import decode

        calls = [
            lambda k=k, v=v: decode(self.q, k, v, self.first, self.limits, **options) for k, v in self.buffers
        ]
        return measure("decode", self.layout.shape, self.layout.nbytes, calls, least)

    def sdpa(self) -> Timing:
        """torch's flash attention over the same numbers; even layouts only."""
        heads = (self.layout.batch, HEADS, -1, DIM)
        q = self.q.view(self.layout.batch, HEADS * GROUP, 1, DIM)
        calls = [
            lambda k=k, v=v: F.scaled_dot_product_attention(q, k.view(heads), v.view(heads), enable_gqa=True)
            for k, v in self.buffers
        ]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return measure("sdpa flash", self.layout.shape, self.layout.nbytes, calls)


def ceiling() -> Timing:
    """What reading alone reaches: the sum of 4 GiB."""
    numbers = random(2**30, dtype=torch.float32)
    return measure("read ceiling (sum)", "4 GiB float32", 2**32, [numbers.sum], 2)


def attention() -> list[Timing]:
    """decode at all layouts, and SDPA at the even ones."""
    timings = []
    for tokens, batch in itertools.product((32, 128, 224), (1, 4)):
        for layout in layouts(tokens * 1024, batch):
            stores = Stores.make(layout)
            timings.append(stores.decode())
            if len(set(layout.lengths)) == 1:
                timings.append(stores.sdpa())
            del stores
    return timings


def row_copies(count: int = 8 * 3000, host_rows: int = 8 * 32768) -> list[Timing]:
    """Random rows of keys and values from pinned host memory, with few programs and many."""
    from hcache.kernels.rows import copy_rows

    hosts = [torch.zeros(host_rows, DIM, dtype=torch.bfloat16, pin_memory=True) for _ in range(2)]
    targets = [random(count, DIM) for _ in range(2)]
    pairs = list(zip(hosts, targets, strict=True))
    slots = torch.arange(count, device="cuda")
    # Each call reads other rows, should the device cache any of the host's memory.
    picks = torch.randperm(host_rows, device="cuda")[: host_rows // count * count].split(count)
    nbytes = count * DIM * 2 * 2
    return [
        measure(
            f"copy_rows, {programs} programs",
            f"{count} rows of K and V from host",
            nbytes,
            [partial(copy_rows, pairs, rows, slots, None, programs) for rows in picks],
        )
        for programs in (16, 32, 64, 128)
    ]


def pages_of_quest(scans: int = 8, rows: int = 4, dim: int = 256, width: int = 14336) -> list[Timing]:
    """Scores of all pages of 224K tokens, and the best tenth of them."""
    from hcache.kernels.scan import scan
    from hcache.kernels.select import select

    nbytes = scans * width * dim * 2
    keys = [random(scans * width, dim) for _ in range(copies(nbytes))]
    first = torch.arange(scans, device="cuda") * width
    counts = torch.full((scans,), width, device="cuda")
    shape = f"X={scans} R={rows} D={dim} N={width}"
    timings = []
    for dtype in (torch.float32, torch.bfloat16):
        q = random(scans, rows, dim, dtype=dtype)
        calls = [lambda k=k, q=q: scan(q, k, first, counts, width, scale=1.0) for k in keys]
        timings.append(measure(f"scan, {dtype} rows".replace("torch.", ""), shape, nbytes, calls))
    scores, best = random(scans, width, dtype=torch.float32), width // 10
    taken = torch.full_like(counts, best)
    shape = f"X={scans} N={width} k={best}"
    timings.append(measure("select", shape, 0, [lambda: select(scores, taken, best)]))
    timings.append(measure("torch.topk, sorted positions", shape, 0, [lambda: scores.topk(best)[1].sort()]))
    return timings


def paged(pages: int = 1433, page_size: int = 16, of_pages: int = 14336) -> list[Timing]:
    """decode over random pages of each segment: what Quest reads of 224K tokens."""
    from hcache.kernels.decode import decode

    q = random(HEADS, GROUP, DIM)
    slots, nbytes = HEADS * of_pages * page_size, 2 * HEADS * pages * page_size * DIM * 2
    keys, values = random(slots, DIM), random(slots, DIM)
    first = torch.arange(HEADS, device="cuda") * of_pages * page_size
    limits = torch.full((HEADS,), pages * page_size, device="cuda")
    # Each call reads other pages, or the cache would hold them.
    tables = torch.rand(copies(nbytes), HEADS, of_pages, device="cuda").argsort(-1)[..., :pages].int()
    calls = [
        partial(decode, q, keys, values, first, limits, pages=table, page_size=page_size) for table in tables
    ]
    return [measure("decode of pages", f"{pages} x {page_size} tokens a head", nbytes, calls)]


def appends(segments: int = HEADS) -> list[Timing]:
    """One token a segment, beside torch's operations for it."""
    from hcache.kernels.append import append

    keys, values = random(segments * 8192, DIM), random(segments * 8192, DIM)
    k, v = random(segments, DIM), random(segments, DIM)
    first = torch.arange(segments, device="cuda") * 8192
    lengths = torch.zeros(segments, dtype=torch.int32, device="cuda")

    def plain() -> None:
        index = first + lengths
        keys.index_copy_(0, index, k)
        values.index_copy_(0, index, v)
        lengths.add_(1)

    shape = f"S={segments} D={DIM}"
    timing = measure("append", shape, 0, [lambda: append(k, v, keys, values, first, lengths)], 200)
    lengths.zero_()
    return [timing, measure("append by torch", shape, 0, [plain], 200)]


def tune(best: int = 4) -> list[tuple[Timing, tuple[int, ...]]]:
    """The fastest tunings of the decode kernel a layout, each with its (block, warps, stages, programs)."""
    from triton.runtime.errors import OutOfResources

    from hcache.kernels.decode import Tuning

    found = []
    wanted = [layouts(32768, 1)[0], *layouts(131072, 1)[:2], layouts(229376, 1)[0], layouts(32768, 4)[1]]
    for layout in wanted:
        stores, timings = Stores.make(layout), []
        for numbers in itertools.product((32, 64, 128), (4, 8), (2, 3, 4, 5), (1, 2, 3)):
            tuning = Tuning(*numbers)
            if tuning.programs_per_sm * (tuning.stages - 1) * tuning.block * DIM * 4 > 220 * 1024:
                continue
            try:
                timings.append((stores.decode(least=8, tuning=tuning), tuple(tuning)))
            except OutOfResources:
                print(f"{tuning} does not fit the device")
        found += sorted(timings, key=lambda pair: pair[0].us)[:best]
        del stores
    return found


PARTS: dict[str, Callable[[], Iterable[Timing]]] = {
    "ceiling": lambda: [ceiling()],
    "attention": attention,
    "rows": row_copies,
    "quest": pages_of_quest,
    "pages": paged,
    "append": appends,
    "products": kernel_layers.products,
    "layers": kernel_layers.chains,
    "fetch": kernel_layers.fetches,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print one table, and write it as JSON where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m runners.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--tune", action="store_true", help="try tunings of the decode kernel")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    import triton

    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}
    device = torch.cuda.get_device_name()
    print(f"{device}, {versions}\n{'':<65} {'us':>9}  {'p10 to p90':>20}    TB/s")
    timings = []
    for name in options.only:
        for timing in PARTS[name]():
            print(timing.line(), flush=True)
            timings.append(timing)
    tuned = tune() if options.tune else []
    for timing, tuning in tuned:
        print(f"{timing.line()}  {tuning}", flush=True)
    if options.out:
        record = {"device": device, "versions": versions, "timings": [asdict(t) for t in timings]}
        record["tuned"] = [{**asdict(t), "tuning": tuning} for t, tuning in tuned]
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
