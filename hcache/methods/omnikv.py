"""OmniKV: a few filter layers choose tokens at every step, the layers behind them attend to those alone.

Paper: OmniKV, ICLR 2025 (dynamic context selection); official repository antgroup/OmniKV 5c33cb5. Nothing is
lost for good.

| layers | device | host | decoding |
|---|---|---|---|
| dense: those before the first filter, filters, `wait_layers` behind each | full | - | attend to everything |
| filter | full | - | dense, and selects k prompt tokens for the sparse layers up to the next filter |
| sparse | k selected, all generated | full prompt | loads those of the k rows that it lacks, then attends |

The loads of all its sparse layers begin, one after the other, as soon as a filter has chosen, beside whatever
the device does until each layer's turn; the official code begins in the wait layers.

One index set a sequence: the same for all heads and all sparse layers between two filters. With `last` there
are no sinks and no window of recent prompt tokens; only its score keeps a token. The budget is charged with
the dense layers: k = floor((tokens * L - D * n) / (L - D)) with D of L layers dense, rounded down because one
k serves all sparse layers, so that fewer than L - D tokens a KV head stay unspent.

Differences from the official code, which runs one sequence and one turn: any batch, each sequence with its
own k; each token of a follow-up selects for itself; the window selectors score with the queries as they were,
not turned to the current position, and never exceed k; scores are float32 and softmaxes are compared as
logarithms, which don't vanish; queries come from the layer instead of being projected again; rows that the
step before had selected too stay where they are and don't cross again (the official code loads all k at every
step), so that the order of rows in a sparse layer, which only rounding can tell, is that in which they came.

Shapes: B batch, T tokens of this call, Hq query heads, H KV heads, G = Hq/H, D head dim, S = B*H segments, C
chunks of CHUNK slots, W latest queries, n room for the longest prompt, k for the largest selection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hcache.attention.backends import CHUNK, Ragged, to_segments
from hcache.budget import Budget
from hcache.cache.exchange import Changed, best, exchange, fetch
from hcache.cache.lane import Lane, lane_of
from hcache.cache.offload import HostRows
from hcache.cache.room import Held
from hcache.cache.state import (
    Bytes,
    LayerState,
    StoreLayer,
    Turn,
    add_bytes,
    latest_queries,
    storage_bytes,
    unpadded,
)
from hcache.geometry import Geometry
from hcache.kernels.fused import fused
from hcache.methods.base import Method, Usage
from hcache.methods.heterocache import OffloadSettings
from hcache.methods.registry import register

EXAMPLE_LAYERS, EXAMPLE_FILTERS, EXAMPLE_WAIT = 32, (2, 8, 18), 1
"""The official example configuration, for Llama-3-8B."""

SHALLOW_LAYERS = 16
"""Below this depth the defaults take a single filter: a quarter of the cache is feasible then."""

SCRATCH_NUMBERS = 2**22
"""float32 numbers of keys, and of logits, that scoring holds at once: 16 MiB each."""


class Selector(Enum):
    """What a prompt token is worth. Every one takes the maximum over all query heads.

    last: logit of the current query.
    softmax_before_last: its attention among the prompt's tokens.
    uniform: that of the last `window` queries, summed.
    exp: the same, a query counting half of the one after it.
    """

    last = "last"
    uniform = "uniform"
    exp = "exp"
    softmax_before_last = "softmax_before_last"

    @property
    def windowed(self) -> bool:
        """Looks at more queries than the current one."""
        return self in (Selector.uniform, Selector.exp)


@register("omnikv")
@dataclass(frozen=True)
class OmniKV(Method):
    """Filter layers select for the sparse layers behind them.

    Args:
        filter_layers: layers that select, ascending; None scales the official example to the model's depth,
            or is layer 0 in models of fewer than 16 layers.
        wait_layers: dense layers right behind each filter, during which the official code loads; None is 1,
            or 0 in models of fewer than 16 layers.
        selector: see Selector.
        window: queries that `uniform` and `exp` look at; prompt tokens among them are always selected.
        offload: where the prompts of sparse layers wait.
    """

    selects: ClassVar[bool] = True

    filter_layers: tuple[int, ...] | None = None
    wait_layers: int | None = None
    selector: Selector = Selector.last
    window: int = 16
    offload: OffloadSettings = field(default_factory=OffloadSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filter_layers is not None:
            object.__setattr__(self, "filter_layers", tuple(self.filter_layers))
            rises = all(a < b for a, b in pairwise(self.filter_layers))
            if not self.filter_layers or self.filter_layers[0] < 0 or not rises:
                raise ValueError(
                    f"method.filter_layers={list(self.filter_layers)} must name one or more layers, "
                    "ascending from 0; null takes the default for the model's depth"
                )
        if self.wait_layers is not None and self.wait_layers < 0:
            raise ValueError(f"method.wait_layers={self.wait_layers} must be 0 or more layers, or null")
        if self.window < 1:
            raise ValueError(f"method.window={self.window} must be at least 1 query")

    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        counts = [self.selected_tokens(geometry, budget, n) for n in prompt_tokens]
        sources = self.sources(geometry.layers)
        filters = {
            layer: FilterLayer(self.selector, self.window, counts) for layer in sources if layer is not None
        }
        return [
            filters.get(layer, StoreLayer())
            if source is None
            else filters[source].follower(self.offload.enabled)
            for layer, source in enumerate(sources)
        ]

    def sources(self, layers: int) -> list[int | None]:
        """For each layer the filter layer whose selection it reads; None for dense layers.

        Raises:
            ValueError: a filter layer that the model doesn't have.
        """
        shallow = layers < SHALLOW_LAYERS
        default = (0,) if shallow else [round(f * layers / EXAMPLE_LAYERS) for f in EXAMPLE_FILTERS]
        filters = default if self.filter_layers is None else self.filter_layers
        if filters[-1] >= layers:
            raise ValueError(
                f"method.filter_layers={list(filters)} must be below {layers}, the layers of this model; "
                "null takes the default for its depth"
            )
        wait = self.wait_layers
        if wait is None:
            wait = 0 if shallow else EXAMPLE_WAIT
        latest = [max((f for f in filters if f <= layer), default=None) for layer in range(layers)]
        return [None if f is None or layer - f <= wait else f for layer, f in enumerate(latest)]

    def selected_tokens(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> int:
        """k: what the dense layers leave of the budget, evenly over the sparse ones."""
        tokens = self.require(geometry, budget, prompt_tokens)
        dense = self.sources(geometry.layers).count(None)
        if dense == geometry.layers:
            return prompt_tokens
        return (tokens * geometry.layers - dense * prompt_tokens) // (geometry.layers - dense)

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        """The prompt in dense layers and one token in sparse ones, beside the window where there is one."""
        dense = self.sources(geometry.layers).count(None)
        least = min(1 + self.window * self.selector.windowed, prompt_tokens)
        total = dense * prompt_tokens + (geometry.layers - dense) * least
        return max(2, -(-total // geometry.layers))

    def shortage(self) -> str:
        window = f", and method.window={self.window} tokens more" if self.selector.windowed else ""
        return (
            f": its dense layers keep the whole prompt{window}; raise the budget, or make fewer layers dense "
            "with method.filter_layers and method.wait_layers"
        )

    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        selected = self.selected_tokens(geometry, budget, prompt_tokens)
        sources = self.sources(geometry.layers)
        dense = sources.count(None)
        sparse = geometry.layers - dense
        token = 2 * geometry.kv_heads * geometry.head_dim * number_bytes
        waiting = sparse * prompt_tokens * token
        window = self.window if self.selector.windowed else 1
        queries = window * geometry.query_heads * geometry.head_dim * number_bytes
        # For each filter what its sparse layers hold and which slots changed (int32), and its queries.
        tables = len(set(sources) - {None}) * (2 * 4 * selected + queries)
        kept = dense * prompt_tokens + sparse * selected
        return Usage(
            device_bytes=kept * token + tables + (0 if self.offload.enabled else waiting),
            attended_tokens=kept / geometry.layers,
            host_bytes=waiting if self.offload.enabled else 0,
            moved_bytes=sparse * selected * token if self.offload.enabled else 0,
            parts={"selected": selected, "dense_layers": dense},
        )

    def notes(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> list[str]:
        if self.offload.enabled or None not in self.sources(geometry.layers):
            return []
        return ["offload.enabled=false: sparse layers hold their prompts on the device, beyond the budget"]


class Selected(Held):
    """What a filter has selected: rows that its sparse layers hold, and those that they still have to load.

    Args:
        counts: tokens to select, one number a sequence.

    Attributes:
        held_Bk: int32, the prompt position in each slot of a sequence's segments; n in unused slots.
        changed: slots of the latest step that a sparse layer has to load.
        fetched_B: int64, positions that changed since the prompt.
        earlier: held_Bk and changed for each token of the latest call, if it brought several.
    """

    off_step = ("earlier", "counts")

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts
        self.earlier: list[tuple[Tensor, Changed]] = []

    def begin(self, held_Bk: Tensor, prompt: int) -> None:
        """Hold what the prompt has selected; n is `prompt`."""
        self.held_Bk, self._prompt = held_Bk.sort().values, prompt
        self._places_Bk = torch.zeros_like(held_Bk)
        self._counts_B = torch.zeros(len(held_Bk), dtype=torch.int32, device=held_Bk.device)
        self.fetched_B = torch.zeros(len(held_Bk), dtype=torch.int64, device=held_Bk.device)

    @property
    def changed(self) -> Changed:
        return Changed(self._places_Bk, self._counts_B)

    def take(self, wanted_Bk: Tensor, valid_B1: Tensor | None) -> None:
        """Hold what is wanted now, in sequences that have a token."""
        valid_B = None if valid_B1 is None else valid_B1[:, 0]
        changed = exchange(self.held_Bk, wanted_Bk, self._prompt, self.fetched_B, valid_B)
        # In place, as captured steps and the sparse layers' loads need it.
        self._places_Bk.copy_(changed.places_XM)
        self._counts_B.copy_(changed.counts_X)

    def remember(self) -> None:
        """Keep what is selected now for sparse layers that come later."""
        self.earlier.append((self.held_Bk.clone(), Changed(*(x.clone() for x in self.changed))))

    def positions(self, sequence: int) -> Tensor:
        """The latest selection of a sequence: sorted prompt positions."""
        return self.held_Bk[sequence].sort().values[: self.counts[sequence]].long()

    def nbytes(self) -> int:
        tables = [self.held_Bk, self._places_Bk, self._counts_B, self.fetched_B]
        for held_Bk, changed in self.earlier:
            tables += [held_Bk, *changed]
        return storage_bytes(*tables)


class FilterLayer(StoreLayer):
    """A dense layer whose latest queries select prompt tokens for the sparse layers behind it.

    Args:
        selector, window: as in OmniKV.
        counts: tokens to select, one number a sequence; more than the window if the selector has one, or the
            whole prompt.

    Attributes:
        selected: what it selects.
    """

    off_step = (*StoreLayer.off_step, "_followers")

    def __init__(self, selector: Selector, window: int, counts: list[int]) -> None:
        super().__init__()
        self._selector, self._counts = selector, counts
        self._window = window if selector.windowed else 1
        self.selected = Selected(counts)
        self._followers: list[SparseLayer] = []

    def follower(self, offload: bool) -> SparseLayer:
        """One more sparse layer that holds what is selected here; it must come later in the model."""
        self._followers.append(SparseLayer(self.selected, len(self._followers), offload))
        return self._followers[-1]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        super().prefill(q, k, v, valid)
        lengths = [kept[0].numel() for kept in self._kept]
        self._heads, device = k.shape[1], k.device
        self._prompt = self.room.size("prompt", max(lengths))
        self._most = self.room.size("selected", max(self._counts))
        self._prompt_B1 = torch.tensor(lengths, device=device).unsqueeze(1)
        self._counts_B1 = torch.tensor(self._counts, device=device).unsqueeze(1)
        self._fed_B1 = torch.zeros_like(self._prompt_B1)
        self._recent_BHqWD = latest_queries(q, valid, self._window)
        self.selected.begin(self._pick(), self._prompt)

    def ready(self, even: bool) -> Turn:
        # Before this layer's step is over, those behind it are loading.
        for layer in self._followers:
            layer.make_room()
        return super().ready(even)

    def advance(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        self._observe(q, valid)
        self.selected.take(self._pick(), valid)
        with ExitStack() as lanes:
            # Each lane begins where the one before it ends: first what is needed first.
            for layer in self._followers:
                lanes.enter_context(layer.lane.beside())
                layer.load(self.selected.held_Bk, self.selected.changed)
        return self._append(q, k, v, valid)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Attend to everything, and select once for each token: the sparse layers go through them."""
        self.selected.earlier.clear()
        for t in range(q.shape[2]):
            now = slice(t, t + 1)
            real = None if valid is None else valid[:, now]
            self._observe(q[:, :, now], real)
            self.selected.take(self._pick(), real)
            self.selected.remember()
        return super().extend(q, k, v, valid)

    def _observe(self, q_BHq1D: Tensor, valid_B1: Tensor | None) -> None:
        """Take the queries of one token more."""
        recent = torch.cat([self._recent_BHqWD[:, :, 1:], q_BHq1D], dim=2)
        if valid_B1 is not None:
            recent = torch.where(valid_B1[:, :, None, None], recent, self._recent_BHqWD)
        self._recent_BHqWD.copy_(recent)
        self._fed_B1 += 1 if valid_B1 is None else valid_B1

    def _pick(self) -> Tensor:
        """The best positions of each sequence [B, k] int32, in any order; n in unused slots."""
        return best(self._scores(), self._counts_B1[:, 0], self._most)

    def _scores(self) -> Tensor:
        """What each prompt token is worth now [B, n]: +inf where it must stay, -inf behind the prompt."""
        if not self._selector.windowed:
            return self._best(self._prompt_B1.repeat_interleave(self._heads, dim=0))[:, 0].contiguous()
        candidates_B1 = self._prompt_B1 - (self._window - self._fed_B1).clamp_min(0)
        best_BWn = self._best(candidates_B1.repeat_interleave(self._heads, dim=0))
        weight_W = torch.ones(self._window, device=best_BWn.device)
        if self._selector is Selector.exp:
            weight_W = 0.5 ** torch.arange(self._window - 1, -1, -1, device=best_BWn.device)
        scores_Bn = (weight_W.unsqueeze(1) * best_BWn.exp()).sum(1)
        column = torch.arange(self._prompt, device=scores_Bn.device)
        forced = scores_Bn.masked_fill(column >= candidates_B1, torch.inf)
        return forced.masked_fill(column >= self._prompt_B1, -torch.inf)

    def _best(self, limits_S1: Tensor) -> Tensor:
        """Maximum over query heads [B, W, n] of the latest queries' logits, or of logarithms of softmaxes.

        -inf from each limit on.
        """
        if fused(limits_S1) and self._window == 1:
            return self._best_scanned(limits_S1)
        ragged = self.store.ragged()
        width = self.store.longest // CHUNK
        # Chunks that are nobody's, all of whose logits are -inf, change nothing wherever they go.
        tile_C = (ragged.start // CHUNK).clamp_max(width - 1)
        totals_SR = None
        if self._selector is not Selector.last:
            totals_SR = self._log_totals(limits_S1, ragged.owner * width + tile_C, width)
        tile_C = ragged.owner // self._heads * width + tile_C
        shape = (self._prompt_B1.shape[0], width, self._window, CHUNK)
        best_TWN = torch.full(shape, -torch.inf, device=tile_C.device).flatten(0, 1)
        for now, logits_CRN in self._logits(ragged, limits_S1):
            if totals_SR is not None:
                logits_CRN -= totals_SR[ragged.owner[now]].unsqueeze(-1)
            heads_best = logits_CRN.unflatten(1, (-1, self._window)).amax(1)
            index = tile_C[now].view(-1, 1, 1).expand_as(heads_best)
            best_TWN.scatter_reduce_(0, index, heads_best, "amax")
        best_BWn = best_TWN.view(shape).transpose(1, 2).flatten(2)
        return F.pad(best_BWn, (0, self._prompt - best_BWn.shape[2]), value=-torch.inf)

    def _best_scanned(self, limits_S1: Tensor) -> Tensor:
        """`_best` of a single query, by a kernel that makes no float32 copy of the keys."""
        from hcache.kernels.scan import scan

        rows_SGD = to_segments(self._recent_BHqWD, limits_S1.shape[0])
        limits_S, scale = limits_S1[:, 0].contiguous(), rows_SGD.shape[-1] ** -0.5
        logits_SGn = scan(rows_SGD, self.store.keys, self.store.first, limits_S, self._prompt, scale=scale)
        if self._selector is not Selector.last:
            logits_SGn = logits_SGn.log_softmax(-1)
        return logits_SGn.view(self._prompt_B1.shape[0], -1, self._prompt).amax(1, keepdim=True)

    def _log_totals(self, limits_S1: Tensor, tile_C: Tensor, width: int) -> Tensor:
        """Logarithm of each softmax's denominator [S, R]. One place a chunk, so that sums have one order."""
        ragged, segments = self.store.ragged(), limits_S1.shape[0]
        parts_CR = torch.cat([logits_CRN.logsumexp(-1) for _, logits_CRN in self._logits(ragged, limits_S1)])
        tiles = torch.full((segments * width, parts_CR.shape[1]), -torch.inf, device=parts_CR.device)
        tiles.scatter_reduce_(0, tile_C.unsqueeze(1).expand_as(parts_CR), parts_CR, "amax")
        return tiles.unflatten(0, (segments, width)).logsumexp(1)

    def _logits(self, ragged: Ragged, limits_S1: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Float32 logits [C, R = G*W, CHUNK] of the latest queries, -inf beyond a segment's limit.

        As many chunks at a time as the scratch allows.
        """
        dim = self._recent_BHqWD.shape[-1]
        rows_SRD = to_segments(self._recent_BHqWD, limits_S1.shape[0]).float() * dim**-0.5
        keys_CND = ragged.keys.view(-1, CHUNK, dim)
        block = max(1, SCRATCH_NUMBERS // (CHUNK * max(dim, rows_SRD.shape[1])))
        within = torch.arange(CHUNK, device=keys_CND.device)
        for first in range(0, keys_CND.shape[0], block):
            now = slice(first, first + block)
            owner = ragged.owner[now]
            logits_CRN = torch.bmm(rows_SRD[owner], keys_CND[now].float().transpose(1, 2))
            hidden_CN = ragged.start[now].unsqueeze(1) + within >= limits_S1[owner]
            yield now, logits_CRN.masked_fill_(hidden_CN.unsqueeze(1), -torch.inf)

    def nbytes(self) -> Bytes:
        total = super().nbytes()
        tables = (self._prompt_B1, self._counts_B1, self._fed_B1, self._recent_BHqWD)
        total["device"]["metadata"] += storage_bytes(*tables) + self.selected.nbytes()
        return total


class SparseLayer(StoreLayer):
    """Holds what a filter layer selected and every later token; its whole prompt waits outside.

    Args:
        selected: what that layer selects; its call for the same tokens comes first, and begins the loads of a
            single token on `lane`.
        number: sparse layers of the same filter before this one.
        offload: the prompt waits in host memory; False keeps it on the device.
    """

    off_step = (*StoreLayer.off_step, "_selected")

    def __init__(self, selected: Selected, number: int, offload: bool) -> None:
        super().__init__()
        self._selected, self._number, self._offload = selected, number, offload

    @property
    def lane(self) -> Lane:
        """Where its loads run: each layer of a filter has its own, to wait for no load but its own."""
        return lane_of(self.store.keys.device, f"fetch{self._number}")

    def choose(self, q: Tensor, k: Tensor, v: Tensor, sequence: int) -> list[Tensor]:
        return [self._selected.positions(sequence)] * k.shape[0]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        batch, self._heads = k.shape[:2]
        lengths = [k.shape[2]] * batch if valid is None else valid.sum(1).tolist()
        rows = [n for n in lengths for _ in range(self._heads)]
        self._prompt = HostRows(rows, k, enabled=self._offload, room=self.room)
        for b in range(batch):
            k_HnD, v_HnD = unpadded(k, valid, b), unpadded(v, valid, b)
            for h in range(self._heads):
                self._prompt.write(b * self._heads + h, k_HnD[h], v_HnD[h])
        self._settled = False
        super().prefill(q, k, v, valid)
        self._kept.clear()  # the filter has the record, which changes with every token

    def make_room(self) -> None:
        """For one token more, before its rows are loaded."""
        if not self._settled:
            self._prompt.settle()
            self._settled = True
        self.store.expect(1)

    def load(self, held_Bk: Tensor, changed: Changed) -> None:
        """Bring the rows of changed slots of every head into the first slots of its segment."""
        fetch(self._prompt, self.store, held_Bk, changed)

    def ready(self, even: bool) -> Turn:
        return Turn(self.store.moves)  # the filter has made room

    def advance(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        self.lane.join()
        return self._append(q, k, v, valid)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Token by token: each attends to a selection of its own."""
        outs = []
        for t, (held_Bk, changed) in enumerate(self._selected.earlier):
            now = slice(t, t + 1)
            real = None if valid is None else valid[:, now]
            self.make_room()
            self.load(held_Bk, changed)
            outs.append(self._append(q[:, :, now], k[:, :, now], v[:, :, now], real))
        return torch.cat(outs, dim=2)

    def kept(self) -> list[list[Tensor]]:
        batch = range(len(self._selected.counts))
        return [[self._selected.positions(b).cpu()] * self._heads for b in batch]

    def nbytes(self) -> Bytes:
        return add_bytes(super().nbytes(), self._prompt.nbytes())

    def counters(self) -> dict[str, float]:
        rows = int(self._selected.fetched_B.sum()) * self._heads
        return {"host_to_device_bytes": rows * self._prompt.row_bytes * self._offload}
