"""Quest: each step reads only the pages whose keys could matter most to its query.

Paper: Quest, ICML 2024, arXiv 2406.10774 (section 3). Kept on the device: all keys and values, and of each
page (`page_size` tokens in a row, by position) the elementwise minimum and maximum of its keys after RoPE, in
the cache's dtype. Nothing is lost, nothing is on the host: the budget is what a step attends to, so Quest
saves reading and no memory.

A step bounds the logits of every page by sum_j max(q_j * max_j, q_j * min_j) and attends exactly to the best
pages and to the current one, which is always among them. Prompts and follow-ups of several tokens are dense.

Differences from the official code (mit-han-lab/quest 01c1623): heads that share keys choose pages together,
unless `group` is per_query_head; as in its CUDA path, and not in its evaluation code, the current page is
always attended to and a budget that covers everything drops nothing; the dense first layers can be charged to
the budget; batches of sequences of different lengths.

Shapes: B batch, T tokens of this call, Hq query heads, H KV heads, G = Hq/H, D head dim, S = B*H segments,
P pages there is room for, R rows that choose pages (S, or B*Hq with per_query_head), M pages a row may read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hcache.attention.backends import CHUNK, Pages, to_segments
from hcache.budget import Budget
from hcache.cache.state import Bytes, LayerState, StoreLayer, Turn, storage_bytes
from hcache.geometry import Geometry
from hcache.kernels.fused import fused
from hcache.methods.base import Method, Usage
from hcache.methods.registry import register

SCANNED = 512
"""Most numbers of a page's bounds that the kernels take: head dims up to 256."""

PAPER_SKIPS = 2
"""First layers that the paper leaves dense: less than a tenth of their attention can be left out."""


class QuestGroup(Enum):
    """How the query heads that share a KV head choose pages; the same for all where each has its own keys.

    max_softmax gives a page its largest share in any head's softmax over the pages' bounds; mean and max are
    those of the bounds; with per_query_head every query head has pages of its own, as officially.
    """

    max_softmax = "max_softmax"
    mean = "mean"
    max = "max"
    per_query_head = "per_query_head"


@register("quest")
@dataclass(frozen=True)
class Quest(Method):
    """Top pages by an upper bound of their logits, chosen anew at each step.

    Args:
        page_size: tokens of a page, a power of two up to 64.
        skip_layers: first layers that attend to everything; None takes the paper's 2, or none on models of
            fewer than 16 layers, where 2 would be more than an eighth.
        charge_skipped: take the skipped layers' full attention out of the budget, so that the average over
            layers is the budget; False gives the budget to each of the other layers, as the paper does.
        group: see QuestGroup.
    """

    selects: ClassVar[bool] = True

    page_size: int = 16
    skip_layers: int | None = None
    charge_skipped: bool = False
    group: QuestGroup = QuestGroup.max_softmax

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page_size < 1 or CHUNK % self.page_size:
            raise ValueError(f"method.page_size={self.page_size} must be 1, 2, 4, 8, 16, 32 or 64 tokens")
        if self.skip_layers is not None and self.skip_layers < 0:
            raise ValueError(f"method.skip_layers={self.skip_layers} must be 0 or more layers, or null")

    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        pages = [self.pages(geometry, budget, n) for n in prompt_tokens]
        dense = self.dense_layers(geometry)
        return [
            StoreLayer() if layer < dense else QuestLayer(self.page_size, pages, self.group)
            for layer in range(geometry.layers)
        ]

    def dense_layers(self, geometry: Geometry) -> int:
        """First layers that attend to everything. Raises ValueError where that would be all of them."""
        if self.skip_layers is None:
            return PAPER_SKIPS if geometry.layers >= 8 * PAPER_SKIPS else 0
        if self.skip_layers >= geometry.layers:
            raise ValueError(
                f"method.skip_layers={self.skip_layers} must be smaller than the model's {geometry.layers} "
                "layers; lower it, or use method=fullkv"
            )
        return self.skip_layers

    def pages(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> int:
        """Pages, the current one included, that a step of a layer that is not skipped may attend to."""
        self.require(geometry, budget, prompt_tokens)
        tokens = budget.tokens(prompt_tokens)
        if tokens >= prompt_tokens:
            # Rounded up: a budget for the prompt leaves nothing of it out, whatever the length of its last
            # page. Pages of generated tokens compete within the budget.
            return max(1, -(-tokens // self.page_size))
        if self.charge_skipped:
            dense = self.dense_layers(geometry)
            left = geometry.layers * tokens - dense * prompt_tokens
            tokens = left // (geometry.layers - dense)
        return tokens // self.page_size

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        smallest, dense = 2 * self.page_size, self.dense_layers(geometry)
        if not self.charge_skipped:
            return smallest
        total = (geometry.layers - dense) * smallest + dense * prompt_tokens
        return -(-total // geometry.layers)

    def shortage(self) -> str:
        charged = " besides the skipped layers (method.charge_skipped=true)" if self.charge_skipped else ""
        return (
            f": a step attends to two pages of method.page_size={self.page_size} at least{charged}; "
            "lower page_size or raise the budget"
        )

    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        dense, pages = self.dense_layers(geometry), self.pages(geometry, budget, prompt_tokens)
        # Keys and values of a token, or the minimum and maximum of a page, in all KV heads of a layer.
        row_bytes = 2 * geometry.kv_heads * geometry.head_dim * number_bytes
        prompt_pages = -(-prompt_tokens // self.page_size)
        rows = geometry.layers * prompt_tokens + (geometry.layers - dense) * prompt_pages
        left_out = max(0, prompt_pages - pages) * self.page_size * (geometry.layers - dense)
        return Usage(
            device_bytes=rows * row_bytes,
            attended_tokens=prompt_tokens - left_out / geometry.layers,
            parts={"pages": pages, "dense_layers": dense},
        )

    def notes(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> list[str]:
        notes = ["keeps everything on the device; the budget is what a step attends to"]
        if self.group is QuestGroup.per_query_head and geometry.group > 1:
            notes.append(
                f"group=per_query_head: each of the {geometry.group} query heads of a KV head has the budget "
                "for itself, and attended_fraction counts what they read together"
            )
        dense, asked = self.dense_layers(geometry), budget.tokens(prompt_tokens)
        if dense and not self.charge_skipped and asked < prompt_tokens:
            average = self.usage(geometry, budget, prompt_tokens, 1).attended_tokens / prompt_tokens
            notes.append(
                f"the first {dense} of {geometry.layers} layers attend to everything besides the budget: a "
                f"step attends to {average:.3f} of {prompt_tokens} tokens on average, where "
                f"{asked / prompt_tokens:.3f} was asked; method.charge_skipped=true takes them out of it"
            )
        return notes


class QuestLayer(StoreLayer):
    """A store of everything, of which a step reads some pages.

    Args:
        page_size: tokens of a page; it divides CHUNK, so pages lie whole in the store's flat buffers.
        pages: pages that a step may attend to, one number a sequence.
        group: see QuestGroup.
    """

    def __init__(self, page_size: int, pages: list[int], group: QuestGroup) -> None:
        super().__init__()
        self._page, self._pages, self._group = page_size, pages, group

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        super().prefill(q, k, v, valid)
        batch, heads, _, dim = k.shape
        self._heads = heads
        # Maxima of k and of -k: the page's maximum and minimum in a form in which a bound is one product.
        # -inf where there is no key yet, so that a new key is always a maximum with what is there.
        self._bounds_SP2D = k.new_full((batch * heads, self._room(), 2 * dim), -torch.inf)
        for s, positions in enumerate(head for sequence in self._kept for head in sequence):
            keys_nD, _ = self.store.read(s, positions.numel())
            pages = page_bounds(keys_nD, self._page)
            self._bounds_SP2D[s, : pages.shape[0]] = pages
        choosers = q.shape[1] if self._group is QuestGroup.per_query_head else heads
        self._allowed_R = torch.tensor(self._pages, device=k.device).repeat_interleave(choosers)
        self._limits_R = torch.zeros_like(self._allowed_R)
        self._chosen_RM = self._allowed_R.new_zeros(batch * choosers, 0, dtype=torch.int32)
        self._lay_out()
        self._choose(*_last_query(q, valid))

    def ready(self, even: bool) -> Turn:
        self._expect(1)
        return Turn((self.store.moves, self._bounds_SP2D.shape[1], self._chosen_RM.shape[1], self._sees_all))

    def advance(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        if valid is None and self._by_kernels(q):
            self._advance_by_kernels(q, k, v)
            limits_ST = self.store.lengths.unsqueeze(1)
        else:
            limits_ST = self._append_bounded(k, v, valid)
            self._choose(q[:, :, 0], None if valid is None else valid[:, 0])
        if self._sees_all:
            return self.backend.decode(q, self.store.ragged(), limits_ST)
        pages = Pages(self._chosen_RM, self._page)
        return self.backend.decode(q, self.store.ragged(), self._limits_R.unsqueeze(1), pages)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Dense, as the prompt; the choice of the last query is on record for `kept`."""
        self._expect(k.shape[2])
        limits_ST = self._append_bounded(k, v, valid)
        out = self.backend.decode(q, self.store.ragged(), limits_ST)
        self._choose(*_last_query(q, valid))
        return out

    @property
    def _sees_all(self) -> bool:
        """Whether there can be no page too many until the store grows: nothing to choose."""
        return min(self._pages) >= self._bounds_SP2D.shape[1]

    def _by_kernels(self, q: Tensor) -> bool:
        """Whether a step's work beside attending is done by kernels of our own."""
        if not fused(q):
            return False
        from hcache.kernels.select import MOST

        _, room, width = self._bounds_SP2D.shape
        return room <= MOST and width <= SCANNED

    def _advance_by_kernels(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Append and choose in few kernels; the chosen pages are ascending, so the current one is last."""
        from hcache.kernels.bounds import Worth, take_in, worth_of
        from hcache.kernels.scan import scan
        from hcache.kernels.select import select

        store, bounds = self.store, self._bounds_SP2D
        segments, room, width = bounds.shape
        rows_SG2D, earlier_S, pages_R = take_in(
            to_segments(q, segments).contiguous(), k.flatten(0, 1)[:, 0], v.flatten(0, 1)[:, 0],
            store.keys, store.values, store.first, store.lengths,
            bounds, self._allowed_R, self._limits_R, self._page,
        )  # fmt: skip
        worth = {
            QuestGroup.max_softmax: Worth.softmax,
            QuestGroup.mean: Worth.mean,
            QuestGroup.max: Worth.max,
            QuestGroup.per_query_head: Worth.each,
        }[self._group]
        scale = (width // 2) ** -0.5 if worth is Worth.softmax else 1.0
        scores_SGP = scan(rows_SG2D, bounds.view(-1, width), self._first_S, earlier_S, room, scale=scale)
        # Places that a row doesn't use hold its current page, as in plain torch: never another segment's.
        chosen_RM = self._chosen_RM
        select(worth_of(scores_SGP, earlier_S, worth), pages_R, chosen_RM.shape[1], earlier_S, chosen_RM)

    def _append_bounded(self, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Store tokens and update the bounds of their pages. Returns the store's limits [S, T]."""
        real_ST = None if valid is None else valid.repeat_interleave(self._heads, dim=0)
        limits_ST = self.store.append(k.flatten(0, 1), v.flatten(0, 1), real_ST)
        news_ST2D = both_signs(k.flatten(0, 1))
        if real_ST is not None:
            news_ST2D = news_ST2D.masked_fill(~real_ST.unsqueeze(-1), -torch.inf)
        width = self._bounds_SP2D.shape[2]
        rows_ST = self._first_S.unsqueeze(1) + (limits_ST - 1).clamp_min(0) // self._page
        index = rows_ST.reshape(-1, 1).expand(-1, width)
        self._bounds_SP2D.view(-1, width).scatter_reduce_(0, index, news_ST2D.flatten(0, 1), "amax")
        return limits_ST

    def _choose(self, q_BHqD: Tensor, valid_B: Tensor | None) -> None:
        """Put the pages that this query attends to on record: the best earlier ones, then the current one.

        The current page is the only one that may not be full, so what is attended to is a prefix. Rows of
        sequences without a query keep their record.
        """
        choosers = self._allowed_R.numel() // self.store.lengths.numel()
        last_S = ((self.store.lengths.long() - 1) // self._page).clamp_min(0)
        order_RP = self._scores(q_BHqD, last_S).sort(dim=-1, descending=True, stable=True).indices
        last_R, lengths_R = (x.repeat_interleave(choosers) for x in (last_S, self.store.lengths.long()))
        earlier_R = torch.minimum(self._allowed_R - 1, last_R)
        slots = self._chosen_RM.shape[1]
        place_M = torch.arange(slots, device=q_BHqD.device)
        is_earlier_RM = place_M < earlier_R.unsqueeze(1)
        chosen_RM = torch.where(is_earlier_RM, order_RP[:, :slots], last_R.unsqueeze(1))
        limits_R = lengths_R - (last_R - earlier_R) * self._page
        if valid_B is not None:
            real_R = valid_B.repeat_interleave(self._allowed_R.numel() // valid_B.numel())
            chosen_RM = torch.where(real_R.unsqueeze(1), chosen_RM, self._chosen_RM)
            limits_R = torch.where(real_R, limits_R, self._limits_R)
        self._chosen_RM.copy_(chosen_RM)
        self._limits_R.copy_(limits_R)

    def _scores(self, q_BHqD: Tensor, last_S: Tensor) -> Tensor:
        """What each earlier page is worth to each row [R, P] in float32; -inf from the current page on.

        Rows without an earlier page may be NaN; nothing is taken from them.
        """
        segments, room, _ = self._bounds_SP2D.shape
        parts_SG2D = both_signs(q_BHqD.reshape(segments, -1, q_BHqD.shape[-1]).float()).relu_()
        bounds_SGP = parts_SG2D @ self._bounds_SP2D.float().transpose(1, 2)
        hidden_SP = torch.arange(room, device=q_BHqD.device) >= last_S.unsqueeze(1)
        bounds_SGP.masked_fill_(hidden_SP.unsqueeze(1), -torch.inf)
        if self._group is QuestGroup.per_query_head:
            return bounds_SGP.flatten(0, 1)
        if self._group is QuestGroup.mean:
            return bounds_SGP.mean(1)
        if self._group is QuestGroup.max:
            return bounds_SGP.amax(1)
        # The logarithm has the same order, and keeps it where small shares would all round to zero.
        return (bounds_SGP * q_BHqD.shape[-1] ** -0.5).log_softmax(-1).amax(1)

    def _room(self) -> int:
        """Pages of the store's longest segment, all its slots counted."""
        return self.store.longest // self._page

    def _expect(self, tokens: int) -> None:
        """Room for so many tokens more, in the store and behind the bounds."""
        self.store.expect(tokens)
        more = self._room() - self._bounds_SP2D.shape[1]
        if more > 0:
            self._bounds_SP2D = F.pad(self._bounds_SP2D, (0, 0, 0, more), value=-torch.inf)
            self._lay_out()

    def _lay_out(self) -> None:
        """The table of chosen pages, as wide for every row, and where each segment's bounds begin."""
        segments, room, _ = self._bounds_SP2D.shape
        width = self.room.size("pages", min(max(self._pages), room))
        # A table is never wider than what pages are chosen from.
        self._chosen_RM = F.pad(self._chosen_RM, (0, min(width, room) - self._chosen_RM.shape[1]))
        self._first_S = room * torch.arange(segments, device=self._chosen_RM.device)

    def kept(self) -> list[list[Tensor]]:
        """Of per_query_head, what the query heads of a KV head attend to together."""
        chosen_RM, limits = self._chosen_RM.cpu(), self._limits_R.tolist()
        slots_RMp = chosen_RM.long().unsqueeze(-1) * self._page + torch.arange(self._page)
        rows = [row[:limit] for row, limit in zip(slots_RMp.flatten(1), limits, strict=True)]
        choosers = len(rows) // self.store.lengths.numel()
        heads = [torch.cat(rows[r : r + choosers]).unique() for r in range(0, len(rows), choosers)]
        prompts = [sequence[0].numel() for sequence in self._kept]
        return [
            [head[head < n] for head in heads[b * self._heads : (b + 1) * self._heads]]
            for b, n in enumerate(prompts)
        ]

    def nbytes(self) -> Bytes:
        """Bounds of pages that hold a token and a row's places for its pages are metadata, others reserve."""
        total = super().nbytes()
        bounds, chosen = self._bounds_SP2D, self._chosen_RM
        used = int((-(-self.store.lengths // self._page)).sum()) * bounds.shape[-1] * bounds.element_size()
        used += int(self._allowed_R.clamp_max(chosen.shape[1]).sum()) * chosen.element_size()
        total["device"]["metadata"] += used + storage_bytes(self._allowed_R, self._limits_R, self._first_S)
        total["device"]["reserved"] += storage_bytes(bounds, chosen) - used
        return total


def both_signs(x: Tensor) -> Tensor:
    """x and -x in one row: [..., D] -> [..., 2D]."""
    return torch.cat([x, -x], dim=-1)


def page_bounds(keys_nD: Tensor, page_size: int) -> Tensor:
    """Elementwise maxima of k and of -k over each page, the last one full or not: [pages, 2D]."""
    whole = keys_nD.shape[0] // page_size
    pages = [keys_nD[: whole * page_size].unflatten(0, (whole, page_size))]
    if keys_nD.shape[0] % page_size:
        pages.append(keys_nD[whole * page_size :].unsqueeze(0))
    return torch.cat([torch.cat([x.amax(1), -x.amin(1)], dim=-1) for x in pages])


def _last_query(q_BHqTD: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Query of each sequence's last real token [B, Hq, D], and which sequences have one [B] (None: all)."""
    if valid is None:
        return q_BHqTD[:, :, -1], None
    batch, tokens = valid.shape
    at_B = (valid * torch.arange(tokens, device=valid.device)).argmax(1)
    return q_BHqTD[torch.arange(batch, device=valid.device), :, at_B], valid.any(1)
