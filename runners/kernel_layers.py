"""Decoder layers of our kernels for `runners.kernels`: products, a chain of layers, rows fetched beside it.

Shapes: M sequences, K numbers of a token, N rows of a weight, H KV heads, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from runners.kernel_timing import DIM, GROUP, HEADS, Timing, copies, measure, random

WIDTH, INNER, WORDS = 4096, 14336, 128256
"""Of Llama-3.1-8B: numbers of a token, of an MLP's middle, and words."""

PRODUCTS = {
    "queries, keys and values": [(HEADS * GROUP * DIM, WIDTH), (HEADS * DIM, WIDTH), (HEADS * DIM, WIDTH)],
    "output": [(WIDTH, HEADS * GROUP * DIM)],
    "down": [(WIDTH, INNER)],
    "words": [(WORDS, WIDTH)],
}
"""[N, K] of the weights that share a launch."""

LAYERS = 8
"""Layers of a chain: their weights are many times the L2 cache."""

FETCHED_LAYERS, FETCHED_ROWS, WAITING_ROWS = 32, 90_000, 1 << 22
"""Layers that fetch, rows of keys and of values for each, and rows that wait in host memory."""

ROUNDS = 20
"""Of the chain beside a fetch: 160 layers, as of five steps."""


def _weights(shapes: list[tuple[int, int]]) -> list[Tensor]:
    return [random(n, k) / k**0.5 for n, k in shapes]


def products() -> list[Timing]:
    """The products of a layer and of the words for one sequence and for four, beside torch's."""
    from hcache.kernels.linear import linears

    timings = []
    for batch, (name, shapes) in itertools.product((1, 4), PRODUCTS.items()):
        nbytes = sum(2 * n * k for n, k in shapes)
        sets = [_weights(shapes) for _ in range(copies(nbytes))]
        x = random(batch, shapes[0][1])
        shape = f"M={batch} " + "+".join(f"{n}x{k}" for n, k in shapes)
        ours = [partial(linears, x, weights, []) for weights in sets]
        theirs = [partial(_plain, x, weights) for weights in sets]
        timings.append(measure(name, shape, nbytes, ours))
        timings.append(measure(f"{name}, torch", shape, nbytes, theirs))
    return [*timings, *_gates()]


def _plain(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [F.linear(x, weight) for weight in weights]


def _gates() -> list[Timing]:
    from hcache.kernels.gate import swiglu

    timings, nbytes = [], 2 * 2 * INNER * WIDTH
    pairs = [_weights([(INNER, WIDTH)] * 2) for _ in range(copies(nbytes))]
    for batch in (1, 4):
        x, shape = random(batch, WIDTH), f"M={batch} 2 x {INNER}x{WIDTH}"
        ours = [partial(swiglu, x, gate, up) for gate, up in pairs]
        timings.append(measure("gate and up", shape, nbytes, ours))
        theirs = [partial(_plain_gate, x, gate, up) for gate, up in pairs]
        timings.append(measure("gate and up, torch", shape, nbytes, theirs))
    return timings


def _plain_gate(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


@dataclass
class Layer:
    """Weights of a decoder layer, and a store with so many tokens a head."""

    batch: int
    tokens: int
    room: int = 8192
    """Tokens that are written behind those and not attended to, so that every step costs the same."""

    def __post_init__(self) -> None:
        attended, kept = HEADS * GROUP * DIM, HEADS * DIM
        self.first_norm, self.second_norm = random(2, WIDTH)
        self.together = _weights([(attended, WIDTH), (kept, WIDTH), (kept, WIDTH)])
        (self.output,) = _weights([(WIDTH, attended)])
        self.gate, self.up = _weights([(INNER, WIDTH)] * 2)
        (self.down,) = _weights([(WIDTH, INNER)])
        segments = self.batch * HEADS
        slots = self.tokens + self.room
        self.keys, self.values = random(2, segments * slots, DIM)
        self.first = torch.arange(segments, device="cuda") * slots
        self.limits = torch.full((segments,), self.tokens, dtype=torch.int32, device="cuda")
        self.lengths = self.limits.clone()
        self.turn = random(2, self.batch, DIM)

    @property
    def nbytes(self) -> int:
        """Weights and the tokens that are attended to."""
        parts = [*self.together, self.output, self.gate, self.up, self.down]
        return sum(part.nbytes for part in parts) + 2 * self.batch * HEADS * self.tokens * DIM * 2

    def advance(self, x: Tensor) -> Tensor:
        """One token of every sequence, as hcache.models.layers and StoreLayer do it."""
        from hcache.kernels.append import append
        from hcache.kernels.decode import decode
        from hcache.kernels.gate import swiglu
        from hcache.kernels.linear import linears
        from hcache.kernels.norm import rms_norm
        from hcache.kernels.rotate import rotate

        q, k, v = linears(rms_norm(x, self.first_norm, 1e-5), self.together, [])
        q, k = rotate(q, k, *self.turn)
        append(k.view(-1, DIM), v.view(-1, DIM), self.keys, self.values, self.first, self.lengths)
        out, _ = decode(q.view(-1, GROUP, DIM), self.keys, self.values, self.first, self.limits)
        (x,) = linears(out.view(x.shape[0], -1), [self.output], [], x)
        inner = swiglu(rms_norm(x, self.second_norm, 1e-5), self.gate, self.up)
        return linears(inner, [self.down], [], x)[0]


@dataclass
class Chain:
    """LAYERS layers, one behind the other."""

    batch: int
    tokens: int

    def __post_init__(self) -> None:
        self.layers = [Layer(self.batch, self.tokens) for _ in range(LAYERS)]
        self.start = random(self.batch, WIDTH)

    @property
    def shape(self) -> str:
        return f"M={self.batch} {self.tokens // 1024}K tokens a head"

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def run(self) -> Tensor:
        """One token of every sequence through all layers."""
        x = self.start
        for layer in self.layers:
            x = layer.advance(x)
        return x


def chains() -> list[Timing]:
    """A chain of layers, and the same launches each after the end of the one before."""
    from hcache.kernels.chain import unchained

    timings = []
    for batch, tokens in ((1, 3 * 1024), (1, 23 * 1024), (4, 3 * 1024), (4, 23 * 1024)):
        chain = Chain(batch, tokens)
        shape, nbytes = chain.shape, chain.nbytes
        timings.append(measure(f"{LAYERS} layers, chained", shape, nbytes, [chain.run], 4))
        with unchained():
            timings.append(measure(f"{LAYERS} layers, unchained", shape, nbytes, [chain.run], 4))
    return timings


@dataclass(frozen=True)
class Fetch:
    """Rows that FETCHED_LAYERS layers want from host memory, sorted as positions are."""

    host: list[Tensor]
    targets: list[Tensor]
    lists: list[Tensor]
    counts: Tensor
    first: Tensor

    @classmethod
    def make(cls) -> Fetch:
        host = [torch.zeros(WAITING_ROWS, DIM, dtype=torch.bfloat16, pin_memory=True) for _ in range(2)]
        targets = [random(FETCHED_ROWS, DIM) for _ in range(2)]
        picked = (
            torch.randperm(WAITING_ROWS, device="cuda")[:FETCHED_ROWS].sort().values
            for _ in range(FETCHED_LAYERS)
        )
        lists = [rows.int().unsqueeze(0) for rows in picked]
        counts = torch.full((1,), FETCHED_ROWS, device="cuda")
        return cls(host, targets, lists, counts, torch.zeros_like(counts))

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return FETCHED_LAYERS * FETCHED_ROWS * 2 * DIM * 2

    def run(self, programs: int, beside: int) -> None:
        """Issue all of it, so many layers side by side with so many programs each; joined by `join`."""
        from hcache.cache.lane import lane_of
        from hcache.kernels.rows import copy_lists

        pairs = list(zip(self.host, self.targets, strict=True))
        for layer, listed in enumerate(self.lists):
            with lane_of(self.first.device, f"layers{layer % beside}").beside():
                copy_lists(pairs, self.counts, listed, source_first_Q=self.first, programs=programs)

    def join(self, beside: int) -> None:
        """What follows begins when everything is there."""
        from hcache.cache.lane import lane_of

        for lane in range(beside):
            lane_of(self.first.device, f"layers{lane}").join()


def fetches(tokens: int = 56 * 1024) -> Iterator[Timing]:
    """Rows from host memory, a chain of layers, and both at once: how much of the first the second hides."""
    fetch, chain = Fetch.make(), Chain(1, tokens)
    alone = measure("chain alone", f"{ROUNDS} times, {chain.shape}", 0, [partial(_repeat, chain)], 1)
    yield alone
    for programs, beside in ((4, 2), (8, 1), (8, 2), (16, 1), (16, 2), (32, 2), (64, 4)):
        rows, nbytes = f"{programs} programs x {beside}", fetch.nbytes
        single = measure("fetch alone", rows, nbytes, [partial(_both, fetch, programs, beside, None)], 1)
        yield single
        together = measure(
            "fetch beside it", rows, nbytes, [partial(_both, fetch, programs, beside, chain)], 1
        )
        yield together
        hidden = (alone.us + single.us - together.us) / single.us
        print(f"{'':<65} {hidden:9.0%} of the fetch is hidden")


def _repeat(chain: Chain) -> None:
    for _ in range(ROUNDS):
        chain.run()


def _both(fetch: Fetch, programs: int, beside: int, chain: Chain | None) -> None:
    fetch.run(programs, beside)
    if chain is not None:
        _repeat(chain)
    fetch.join(beside)
