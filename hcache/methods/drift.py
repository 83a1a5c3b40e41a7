"""HeteroCache while decoding: pivots are watched, and satellites get new tokens when their pivot drifts.

Source: HeteroCache, arXiv 2601.13684 (drift monitoring and asynchronous retrieval). Every `steps` tokens of a
sequence, each pivot's last queries are scored over its own prompt keys. The overlap of their top `base`
positions with the pivot's reference set is taken, query by query; when the median falls below the threshold,
the reference becomes the last query's set and each satellite's resident prompt tokens become that query's top
positions. Overlap, decision and refresh stay on the device: a decision is a flag there, under which the same
operations write or leave what they find.

Shapes: B batch, T tokens of this call, Hq query heads, H KV heads, G = Hq/H, S = B*H segments, D head dim,
n prompt tokens, W steps, P pivots and Q satellites of all sequences, R rows of all satellites together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hcache.cache.offload import HostRows
from hcache.cache.state import Bytes, StoreLayer, add_bytes, one_by_one, storage_bytes
from hcache.scoring import Group, Pooling, pool, reduce_group, top_positions, window_attention


@dataclass(frozen=True)
class DriftRule:
    """How heads are scored and when a pivot has drifted; fields as in HeteroCache."""

    window: int
    kernel: int
    pooling: Pooling
    group: Group
    steps: int
    threshold: float
    visible_after: int

    def smooth(self, attention_HGn: Tensor) -> Tensor:
        """[H, G, n] attention to [H, n] scores: pooled over neighbours, then joined over the group."""
        return reduce_group(pool(attention_HGn, self.kernel, self.pooling), self.group)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps of one prompt.

    Args:
        counts: prompt tokens kept by each KV head.
        satellites: pivot -> the satellites it watches for.
        base: size of a pivot's reference set.
    """

    counts: list[int]
    satellites: dict[int, list[int]]
    base: int

    def watched(self, prompt_tokens: int) -> dict[int, list[int]]:
        """Pivot -> its satellites that don't hold the whole prompt; pivots without any are not watched."""
        partial = {
            pivot: [head for head in members if self.counts[head] < prompt_tokens]
            for pivot, members in sorted(self.satellites.items())
        }
        return {pivot: members for pivot, members in partial.items() if members}


@dataclass(frozen=True)
class Pivot:
    """One pivot of one sequence under observation.

    Args:
        segment: its own in the store; it holds the whole prompt.
        tokens: of the prompt, n.
        base: size of its reference set.
        satellites: their places among all satellites of the layer, Q.
    """

    segment: int
    tokens: int
    base: int
    satellites: list[int]


class HeteroLayer(StoreLayer):
    """A store whose satellites are rewritten in place.

    Args:
        plans: one a sequence.
        rule: scoring and drift.
        offload: the full KV of satellites waits in host memory; False keeps it on the device.
    """

    def __init__(self, plans: list[LayerPlan], rule: DriftRule, offload: bool = True) -> None:
        super().__init__()
        self._plans, self._rule, self._offload = plans, rule, offload

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        batch, heads = k.shape[:2]
        tokens = [k.shape[2]] * batch if valid is None else valid.sum(1).tolist()
        watched = [plan.watched(n) for plan, n in zip(self._plans, tokens, strict=True)]
        satellites = [sorted(head for members in pivots.values() for head in members) for pivots in watched]
        self._satellites = [b * heads + head for b in range(batch) for head in satellites[b]]
        place = {segment: i for i, segment in enumerate(self._satellites)}
        self._pivots = [
            Pivot(b * heads + pivot, tokens[b], self._plans[b].base, [place[b * heads + h] for h in members])
            for b in range(batch)
            for pivot, members in watched[b].items()
        ]
        waiting = [tokens[s // heads] if s in place else 0 for s in range(batch * heads)]
        self._host = HostRows(waiting, like=k, enabled=self._offload)
        self._references: list[Tensor] = []
        super().prefill(q, k, v, valid)
        self._make_tables(q, heads)

    def choose(self, q: Tensor, k: Tensor, v: Tensor, sequence: int) -> list[Tensor]:
        plan, tokens = self._plans[sequence], k.shape[1]
        everything = torch.arange(tokens, device=k.device)
        if min(plan.counts) >= tokens:
            return [everything] * k.shape[0]
        scores = self._rule.smooth(window_attention(q, k, self._rule.window))
        for pivot, members in plan.watched(tokens).items():
            self._references.append(_mask(top_positions(scores[pivot], plan.base), tokens))
            for head in members:
                self._host.write(sequence * k.shape[0] + head, k[head], v[head])
        return [
            everything if count >= tokens else top_positions(row, count)
            for row, count in zip(scores, plan.counts, strict=True)
        ]

    def _make_tables(self, q: Tensor, heads: int) -> None:
        """What steps work on, all of it on the device."""
        device, count = q.device, len(self._satellites)
        kept = [self._kept[s // heads][s % heads] for s in self._satellites]
        sizes = [len(positions) for positions in kept]
        self._spans = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        self._slots = [0] * (len(self._plans) * heads)
        for segment, size in zip(self._satellites, sizes, strict=True):
            self._slots[segment] = size
        # Positions that satellites hold, and those that a decision has put in their place.
        self._held_R = torch.cat([*kept, torch.empty(0)]).int().to(device)
        self._next_R = self._held_R.clone()
        self._coming_Q = torch.zeros(count, dtype=torch.bool, device=device)
        self._sizes_Q = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._first_Q = self._host.first[self._satellites]
        self._sequence_Q = torch.tensor([s // heads for s in self._satellites], device=device).long()
        self._sequence_P = torch.tensor([p.segment // heads for p in self._pivots], device=device).long()
        self._segment_P = torch.tensor([p.segment for p in self._pivots], device=device).long()
        shape = (len(self._pivots), self._rule.steps, q.shape[1] // heads, q.shape[-1])
        self._queries_PWGD = q.new_zeros(shape)
        self._seen_B = torch.zeros(len(self._plans), dtype=torch.int64, device=device)
        self._fed, self._even = 0, True
        self._tally = torch.zeros(3, dtype=torch.int64, device=device)  # windows, triggers, refreshed tokens

    def step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        if not self._pivots:
            return super().extend(q, k, v, valid)
        self._fed += 1
        self._even = self._even and valid is None
        self._seen_B += 1 if valid is None else valid[:, 0].long()
        real_B = None if valid is None else valid[:, 0]
        self._deliver(real_B)
        out = super().extend(q, k, v, valid)
        self._observe(q, real_B)
        return out

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Token by token where pivots watch: a refresh inside the question is seen by the rest of it."""
        if not self._pivots:
            return super().extend(q, k, v, valid)
        return one_by_one(self, q, k, v, valid)

    def _may_end(self, fed: int) -> bool:
        """Whether a window of some sequence may have ended with its token number `fed`.

        The host knows as long as every sequence has had every token; afterwards only the device does.
        """
        return not self._even or fed % self._rule.steps == 0

    def _deliver(self, real_B: Tensor | None) -> None:
        """Write the refreshes that the coming token is the first to see."""
        if not self._may_end(self._fed - self._rule.visible_after):
            return
        arriving_Q = self._arriving(self._seen_B)
        if real_B is not None:
            arriving_Q = arriving_Q & real_B[self._sequence_Q]
        arriving_R = self._each_row(arriving_Q)
        self._held_R.copy_(torch.where(arriving_R, self._next_R, self._held_R))
        rows_R = self._each_row(self._first_Q) + self._held_R
        self._host.load(rows_R, self.store, self.store.rows(self._slots), arriving_R)
        self._coming_Q &= ~arriving_Q
        self._tally[2] += arriving_R.sum()

    def _arriving(self, seen_B: Tensor) -> Tensor:
        """Satellites [Q] whose refresh is due for the token number `seen` of their sequence."""
        due_B = (seen_B - self._rule.visible_after) % self._rule.steps == 0
        return self._coming_Q & due_B[self._sequence_Q]

    def _each_row(self, x_Q: Tensor) -> Tensor:
        """A satellite's entry for each of its rows [R]."""
        return x_Q.repeat_interleave(self._sizes_Q, output_size=self._held_R.numel())

    def _observe(self, q: Tensor, real_B: Tensor | None) -> None:
        """Collect the pivots' queries; where there are W of them, look whether the pivot has drifted."""
        steps = self._rule.steps
        rows_PGD = q.reshape(-1, *self._queries_PWGD.shape[2:])[self._segment_P]
        slot_P = (self._seen_B[self._sequence_P] - 1) % steps
        full_P = slot_P == steps - 1
        if real_B is not None:
            real_P = real_B[self._sequence_P]
            here = torch.arange(len(self._pivots), device=q.device)
            rows_PGD = torch.where(real_P[:, None, None], rows_PGD, self._queries_PWGD[here, slot_P])
            full_P = full_P & real_P
        index = slot_P.view(-1, 1, 1, 1).expand(-1, 1, *rows_PGD.shape[1:])
        self._queries_PWGD.scatter_(1, index, rows_PGD.unsqueeze(1))
        if self._may_end(self._fed):
            for p in range(len(self._pivots)):
                self._review(p, full_P[p])

    def _review(self, p: int, full: Tensor) -> None:
        """Where a window is full: the median overlap with the reference decides about new rows."""
        pivot, reference = self._pivots[p], self._references[p]
        order_Wn = self._prompt_scores(p).sort(dim=-1, descending=True, stable=True).indices
        overlap_W = reference[order_Wn[:, : pivot.base]].float().mean(1).sort().values
        median = (overlap_W[(len(overlap_W) - 1) // 2] + overlap_W[len(overlap_W) // 2]) / 2
        drifted = full & (median < self._rule.threshold)
        latest_n = order_Wn[-1]
        reference.copy_(torch.where(drifted, _mask(latest_n[: pivot.base], pivot.tokens), reference))
        for satellite in pivot.satellites:
            span = self._spans[satellite]
            best = latest_n[: span.stop - span.start].sort().values.int()
            self._next_R[span] = torch.where(drifted, best, self._next_R[span])
            self._coming_Q[satellite] |= drifted
        self._tally[0] += full
        self._tally[1] += drifted

    def _prompt_scores(self, p: int) -> Tensor:
        """Scores [W, n] of a pivot's queries over its own prompt keys, softmax over the prompt alone."""
        keys_nD, _ = self.store.read(self._pivots[p].segment, self._pivots[p].tokens)
        logits_WGn = self._queries_PWGD[p].float() @ keys_nD.float().T * keys_nD.shape[1] ** -0.5
        return self._rule.smooth(logits_WGn.softmax(-1))

    def kept(self) -> list[list[Tensor]]:
        """A refresh that the next token will see counts as kept already."""
        positions = super().kept()
        heads = len(positions[0])
        soon_R = self._each_row(self._arriving(self._seen_B + 1))
        now_R = torch.where(soon_R, self._next_R, self._held_R).long().cpu()
        for segment, span in zip(self._satellites, self._spans, strict=True):
            positions[segment // heads][segment % heads] = now_R[span]
        return positions

    def nbytes(self) -> Bytes:
        total = add_bytes(super().nbytes(), self._host.nbytes())
        tables = (self._held_R, self._next_R, self._coming_Q, self._sizes_Q, self._first_Q, self._sequence_Q)
        watching = (self._sequence_P, self._segment_P, self._queries_PWGD, self._seen_B, self._tally)
        total["device"]["metadata"] += storage_bytes(*tables, *watching, *self._references)
        return total

    def counters(self) -> dict[str, float]:
        windows, triggers, refreshed = self._tally.tolist()
        return {
            "windows": windows,
            "triggers": triggers,
            "refreshed_tokens": refreshed,
            "host_to_device_bytes": self._host.moved_bytes,
        }


def _mask(positions: Tensor, tokens: int) -> Tensor:
    """Bool [tokens], True at `positions`."""
    return torch.zeros(tokens, dtype=torch.bool, device=positions.device).scatter_(0, positions, True)
