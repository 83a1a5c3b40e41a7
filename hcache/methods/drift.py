"""HeteroCache while decoding: pivots are watched, and satellites get new tokens when their pivot drifts.

Source: HeteroCache, arXiv 2601.13684 (drift monitoring and asynchronous retrieval). Every `steps` tokens of a
sequence, each pivot's last queries are scored over its own prompt keys. The overlap of their top `base`
positions with the pivot's reference set is taken, query by query; when the median falls below the threshold,
the reference becomes the last query's set and each satellite's resident prompt tokens become that query's top
positions.

A step collects the pivots' queries, and sets those of a full window aside. All else is background work, which
may run beside the steps before the token that is the first to see its outcome: scores, decision, and fetching
rows. With `visible_after` 1 there is no such step and rows go straight into the store; otherwise they wait in
a staging buffer, and the step that is the first to see them copies them from there.

Everything stays on the device: a decision is a flag there, under which the same operations write or leave
what they find. Tables have the sizes that the layer's room gives, and what differs between prompts is in
them, not in Python, so that steps captured once serve other prompts too.

Shapes: B batch, T tokens of this call, Hq query heads, H KV heads, G = Hq/H, S = B*H segments, D head dim,
n prompt tokens and N room for them, W steps, P pivots and Q satellites of all sequences, K room for the
resident tokens of one satellite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hcache.cache.gather import copy_lists
from hcache.cache.offload import HostRows
from hcache.cache.room import Held, Room
from hcache.cache.state import Bytes, StoreLayer, Turn, add_bytes, one_by_one, storage_bytes
from hcache.kernels.fused import fused
from hcache.scoring import Group, Pooling, pool, reduce_group, top_positions, window_attention

DELIVERY_PROGRAMS = 1024
"""Programs that copy staged rows into the store: the step waits for them, they may take the whole device."""

FETCH_PROGRAMS = 8
"""Programs of a layer that fetch rows while steps go on. Reads that wait for the bus hold up all others: with
64 programs a layer, steps stood still until all was fetched (LOG.md).
"""

MOST_ROWS = 64
"""Query rows that one scan takes (hcache.kernels.scan)."""

BEHIND = -1.0
"""Score of positions behind a prompt: below every score, which are sums of shares of attention."""


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
    drift_every: int | None = None

    def smooth(self, attention_HGn: Tensor) -> Tensor:
        """[H, G, n] attention to [H, n] scores: pooled over neighbours, then joined over the group."""
        return reduce_group(pool(attention_HGn, self.kernel, self.pooling), self.group)

    def drifted(self, overlap_PW: Tensor, windows_P: Tensor) -> Tensor:
        """Whether each pivot [P] has drifted in its window number `windows_P` (the first is 1)."""
        if self.drift_every is not None:
            every = self.drift_every
            return windows_P % every == 0 if every else torch.zeros_like(windows_P, dtype=torch.bool)
        ordered_PW = overlap_PW.sort(dim=1).values
        middle, last = (self.steps - 1) // 2, self.steps // 2
        return (ordered_PW[:, middle] + ordered_PW[:, last]) / 2 < self.threshold


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


class Kind(NamedTuple):
    """Steps of one kind do the same operations on the same tensors.

    Args:
        moves: of the store.
        delivers: staged rows may go into the store.
        even: every sequence has a token in it.
    """

    moves: int
    delivers: bool
    even: bool


class Seen(NamedTuple):
    """A full window of one pivot, as a journal notes it: overlaps by step, and what came of them."""

    sequence: int
    head: int
    number: int
    overlap: tuple[float, ...]
    drifted: bool


class Staging(Held):
    """Rows that have been fetched and that no step sees yet, [Q * K, D]; the room's."""

    def __init__(self, rows: int, like: Tensor, room: Room) -> None:
        shape = (rows, like.shape[-1])
        self.keys = room.buffer("staged_keys", shape, like)
        self.values = room.buffer("staged_values", shape, like)


class Watch(Held):
    """Who watches for whom, on the device.

    Args:
        pivots: sequence and head of each pivot.
        satellites: sequence, head and pivot (its place among them) of each satellite.
        sizes: resident tokens of each satellite.
        tokens: prompt tokens of each sequence.
        bases: size of the reference sets of each sequence.
        heads: KV heads.
    """

    def __init__(
        self,
        pivots: list[tuple[int, int]],
        satellites: list[tuple[int, int, int]],
        sizes: list[int],
        tokens: list[int],
        bases: list[int],
        heads: int,
        device: torch.device,
    ) -> None:
        def table(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        self.segment_P = table([b * heads + head for b, head in pivots])
        self.sequence_P = table([b for b, _ in pivots])
        self.tokens_P = table([tokens[b] for b, _ in pivots])
        self.base_P = table([bases[b] for b, _ in pivots])
        self.segment_Q = table([b * heads + head for b, head, _ in satellites])
        self.pivot_Q = table([pivot for *_, pivot in satellites])
        self.sizes_Q = table(sizes)

    def tables(self) -> list[Tensor]:
        """All of it."""
        return list(vars(self).values())


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
        self._fed, self._even = 0, True
        self._delivers = False

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        batch, heads = k.shape[:2]
        self._tokens = [k.shape[2]] * batch if valid is None else valid.sum(1).tolist()
        watched = [plan.watched(n) for plan, n in zip(self._plans, self._tokens, strict=True)]
        self._pivots = [(b, pivot) for b in range(batch) for pivot in watched[b]]
        self._satellites = sorted(
            (b, head, p) for p, (b, pivot) in enumerate(self._pivots) for head in watched[b][pivot]
        )
        waiting = [0] * (batch * heads)
        for b, head, _ in self._satellites:
            waiting[b * heads + head] = self._tokens[b]
        self._host = HostRows(waiting, like=k, enabled=self._offload, room=self.room)
        self._references: list[Tensor] = []
        super().prefill(q, k, v, valid)
        if self._pivots:
            self._make_tables(q, heads)
        self._references.clear()

    def choose(self, q: Tensor, k: Tensor, v: Tensor, sequence: int) -> list[Tensor]:
        plan, tokens = self._plans[sequence], k.shape[1]
        everything = torch.arange(tokens, device=k.device)
        if min(plan.counts) >= tokens:
            return [everything] * k.shape[0]
        scores = self._rule.smooth(window_attention(q, k, self._rule.window))
        for pivot, members in plan.watched(tokens).items():
            self._references.append(top_positions(scores[pivot], plan.base))
            for head in members:
                self._host.write(sequence * k.shape[0] + head, k[head], v[head])
        return [
            everything if count >= tokens else top_positions(row, count)
            for row, count in zip(scores, plan.counts, strict=True)
        ]

    def _make_tables(self, q: Tensor, heads: int) -> None:
        """What steps and background work on, all of it on the device."""
        device, rule = q.device, self._rule
        kept = [self._kept[b][head] for b, head, _ in self._satellites]
        self._sizes = [len(positions) for positions in kept]
        bases = [plan.base for plan in self._plans]
        self._watch = Watch(self._pivots, self._satellites, self._sizes, self._tokens, bases, heads, device)
        pivots, satellites = len(self._pivots), len(self._satellites)
        room_N = self.room.size("prompt", max(self._tokens))
        room_K = min(room_N, self.room.size("resident", max(1, *self._sizes)))
        self._reference_PN = torch.zeros(pivots, room_N, dtype=torch.bool, device=device)
        for row_N, positions in zip(self._reference_PN, self._references, strict=True):
            row_N[positions] = True
        # Positions that the latest decision has given to satellites; 0 behind each one's own.
        chosen = [torch.nn.functional.pad(positions, (0, room_K - len(positions))) for positions in kept]
        self._chosen_QK = torch.stack(chosen).int().to(device)
        self._first_Q = self._host.first[self._watch.segment_Q]
        shape = (pivots, rule.steps, q.shape[1] // heads, q.shape[-1])
        self._queries_PWGD, self._finished_PWGD = q.new_zeros(shape), q.new_zeros(shape)
        self._full_P = torch.zeros(pivots, dtype=torch.bool, device=device)
        self._windows_P, self._triggers_P = torch.zeros(2, pivots, dtype=torch.int64, device=device)
        self._staging: Staging | None = None
        if rule.visible_after > 1:
            self._staging = Staging(satellites * room_K, q, self.room)
            # Positions that satellites hold, and whether others are on their way.
            self._held_QK = self._chosen_QK.clone()
            self._coming_Q = torch.zeros(satellites, dtype=torch.bool, device=device)

    def ready(self, even: bool) -> Turn:
        turn = super().ready(even)
        if not self._pivots:
            return turn
        if self._fed == 0:
            self._host.settle()
        self._fed += 1
        self._even = self._even and even
        delivers = self._may_end(self._fed - self._rule.visible_after)
        self._delivers = delivers and self._staging is not None
        return Turn(
            Kind(self.store.moves, self._delivers, even),
            joins=delivers and self._fed > self._rule.visible_after,
            starts=self._may_end(self._fed),
        )

    def _may_end(self, fed: int) -> bool:
        """Whether a window of some sequence may have ended with its token number `fed`.

        The host knows as long as every sequence has had every token; afterwards only the device does.
        """
        return not self._even or fed % self._rule.steps == 0

    def advance(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        if not self._pivots:
            return super().advance(q, k, v, valid)
        real_B = None if valid is None else valid[:, 0]
        if self._delivers:
            self._deliver(real_B)
        out = super().advance(q, k, v, valid)
        self._observe(q, real_B)
        return out

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Token by token where pivots watch: a refresh inside the question is seen by the rest of it."""
        if not self._pivots:
            return super().extend(q, k, v, valid)
        return one_by_one(self, q, k, v, valid)

    def _fed_P(self) -> Tensor:
        """Tokens that each pivot's sequence has had since the prompt, of which it holds all."""
        return self.store.lengths[self._watch.segment_P] - self._watch.tokens_P

    def _observe(self, q: Tensor, real_B: Tensor | None) -> None:
        """Collect the pivots' queries; set those of a window aside that this token has filled."""
        watch, steps = self._watch, self._rule.steps
        if real_B is None and fused(q):
            from hcache.kernels import pivots

            pivots.observe(
                q, self.store.lengths, watch.segment_P, watch.tokens_P,
                self._queries_PWGD, self._finished_PWGD, self._full_P,
            )  # fmt: skip
            return
        rows_PGD = q.reshape(-1, *self._queries_PWGD.shape[2:])[watch.segment_P]
        slot_P = (self._fed_P() - 1) % steps
        full_P = slot_P == steps - 1
        if real_B is not None:
            real_P = real_B[watch.sequence_P]
            here = torch.arange(len(real_P), device=q.device)
            rows_PGD = torch.where(real_P[:, None, None], rows_PGD, self._queries_PWGD[here, slot_P])
            full_P = full_P & real_P
        index = slot_P.view(-1, 1, 1, 1).expand(-1, 1, *rows_PGD.shape[1:])
        self._queries_PWGD.scatter_(1, index, rows_PGD.unsqueeze(1))
        aside = torch.where(full_P[:, None, None, None], self._queries_PWGD, self._finished_PWGD)
        self._finished_PWGD.copy_(aside)
        self._full_P |= full_P

    def background(self) -> None:
        """Look whether pivots with a full window have drifted, and fetch what their satellites need then."""
        if not self._pivots:
            return
        fresh_Q = self._review()
        if self._staging is None:
            first_Q = self.store.first[self._watch.segment_Q]
            self._host.load_lists(fresh_Q, self._chosen_QK, self._first_Q, self.store, first_Q)
        else:
            self._host.load_lists(
                fresh_Q, self._chosen_QK, self._first_Q, self._staging, programs=FETCH_PROGRAMS
            )

    def _place_K(self) -> Tensor:
        return torch.arange(self._chosen_QK.shape[1], device=self._chosen_QK.device)

    def _arriving(self) -> Tensor:
        """Satellites [Q] whose staged rows the coming token of their sequence is the first to see."""
        due_P = (self._fed_P() + 1 - self._rule.visible_after) % self._rule.steps == 0
        return self._coming_Q & due_P[self._watch.pivot_Q]

    def _deliver(self, real_B: Tensor | None) -> None:
        """Copy rows that the coming token is the first to see from the staging buffer into the store."""
        assert self._staging is not None
        counts_Q = self._arrive(real_B)
        copy_lists(
            [(self._staging.values, self.store.values), (self._staging.keys, self.store.keys)],
            counts_Q, self._chosen_QK, look_up=False,
            target_first_Q=self.store.first[self._watch.segment_Q], programs=DELIVERY_PROGRAMS,
        )  # fmt: skip

    def _arrive(self, real_B: Tensor | None) -> Tensor:
        """Rows [Q] of each satellite that the coming token is the first to see; from now on they are held."""
        watch = self._watch
        if fused(self._chosen_QK):
            from hcache.kernels import pivots

            return pivots.arrive(
                self.store.lengths, watch.segment_P, watch.tokens_P, watch.sequence_P, watch.pivot_Q,
                watch.sizes_Q, self._chosen_QK, self._held_QK, self._coming_Q, real_B,
                steps=self._rule.steps, visible_after=self._rule.visible_after,
            )  # fmt: skip
        arriving_Q = self._arriving()
        if real_B is not None:
            arriving_Q = arriving_Q & real_B[watch.sequence_P][watch.pivot_Q]
        counts_Q = watch.sizes_Q * arriving_Q
        wanted_QK = self._place_K() < counts_Q.unsqueeze(1)
        self._held_QK.copy_(torch.where(wanted_QK, self._chosen_QK, self._held_QK))
        self._coming_Q &= ~arriving_Q
        return counts_Q

    def _review(self) -> Tensor:
        """Decide about pivots whose window is full: new references, and new positions for their satellites.

        No window is full afterwards, and what is to be fetched into the staging buffer is coming.

        Returns:
            [Q] rows that each satellite must fetch, 0 where its pivot has not drifted.
        """
        if fused(self._finished_PWGD) and self.journal is None:  # kernels tell nobody what they saw
            return self._review_fused()
        watch, rule = self._watch, self._rule
        order_PWN = (
            self._prompt_scores(self._prompt_logits()).sort(dim=-1, descending=True, stable=True).indices
        )
        place_N = torch.arange(order_PWN.shape[-1], device=order_PWN.device)
        top_PN = place_N < watch.base_P.unsqueeze(1)
        hits_PWN = self._reference_PN.unsqueeze(1).expand_as(order_PWN).gather(2, order_PWN)
        overlap_PW = (hits_PWN & top_PN.unsqueeze(1)).sum(-1).float() / watch.base_P.unsqueeze(1)
        self._windows_P += self._full_P
        drifted_P = self._full_P & rule.drifted(overlap_PW, self._windows_P)
        self._triggers_P += drifted_P
        if self.journal is not None:
            self.journal += self._seen(overlap_PW, drifted_P)
        latest_PN = order_PWN[:, -1]
        reference_PN = torch.zeros_like(top_PN).scatter_(1, latest_PN, top_PN)
        self._reference_PN.copy_(torch.where(drifted_P.unsqueeze(1), reference_PN, self._reference_PN))
        drifted_Q = drifted_P[watch.pivot_Q]
        best_QK = self._best(latest_PN[watch.pivot_Q])
        self._chosen_QK.copy_(torch.where(drifted_Q.unsqueeze(1), best_QK, self._chosen_QK))
        self._full_P.zero_()
        fresh_Q = watch.sizes_Q * drifted_Q
        if self._staging is not None:
            self._coming_Q |= fresh_Q > 0
        return fresh_Q

    def _seen(self, overlap_PW: Tensor, drifted_P: Tensor) -> list[Seen]:
        """The windows that are full now. Waits for the device."""
        told = [values.tolist() for values in (self._full_P, self._windows_P, overlap_PW, drifted_P)]
        rows = zip(self._pivots, *told, strict=True)
        return [Seen(b, head, n, tuple(lap), moved) for (b, head), full, n, lap, moved in rows if full]

    def _review_fused(self) -> Tensor:
        """The same in a few kernels, without sorting."""
        from hcache.kernels import pivots

        watch, rule = self._watch, self._rule
        logits_PWGN, parts = self._scanned_logits()
        return pivots.review(
            logits_PWGN, parts, watch.tokens_P, watch.base_P, watch.pivot_Q, watch.sizes_Q, self._full_P,
            self._reference_PN, self._chosen_QK, self._windows_P, self._triggers_P,
            None if self._staging is None else self._coming_Q,
            kernel=rule.kernel, average=rule.pooling is Pooling.avg, group=rule.group.value,
            threshold=rule.threshold, every=rule.drift_every,
        )  # fmt: skip

    def _scanned_logits(self) -> tuple[Tensor, Tensor]:
        """Logits as `_prompt_logits` has them, where a window is full, and what a softmax needs of them."""
        from hcache.kernels.scan import blocks_of, scan

        watch, (pivots, width) = self._watch, self._reference_PN.shape
        rows_PRD, scale = self._finished_PWGD.flatten(1, 2), self._finished_PWGD.shape[-1] ** -0.5
        first_P = self.store.first[watch.segment_P]
        logits, parts = [], []
        for some_PRD in rows_PRD.split(MOST_ROWS, dim=1):
            shape = (2, pivots, some_PRD.shape[1], blocks_of(width))
            parts.append(torch.empty(shape, dtype=torch.float32, device=rows_PRD.device))
            logits.append(
                scan(
                    some_PRD,
                    self.store.keys,
                    first_P,
                    watch.tokens_P,
                    width,
                    scale=scale,
                    wanted_X=self._full_P,
                    parts=parts[-1],
                )
            )
        if len(parts) > 1:
            logits, parts = [torch.cat(logits, dim=1)], [torch.cat(parts, dim=2)]
        return logits[0].unflatten(1, self._finished_PWGD.shape[1:3]), parts[0]

    def _prompt_logits(self) -> Tensor:
        """Float32 logits [P, W, G, N] of the queries set aside over the pivot's prompt, -inf behind it."""
        watch, width = self._watch, self._reference_PN.shape[1]
        rows_PRD, scale = self._finished_PWGD.flatten(1, 2), self._finished_PWGD.shape[-1] ** -0.5
        first_P = self.store.first[watch.segment_P]
        place_N = torch.arange(width, device=first_P.device)
        inside_PN = place_N < watch.tokens_P.unsqueeze(1)
        slots_PN = first_P.unsqueeze(1) + torch.where(inside_PN, place_N, 0)
        keys_PND = self.store.keys[slots_PN].float()
        logits_PRN = rows_PRD.float() @ keys_PND.transpose(1, 2) * scale
        logits_PRN = logits_PRN.masked_fill(~inside_PN.unsqueeze(1), -torch.inf)
        return logits_PRN.unflatten(1, self._finished_PWGD.shape[1:3])

    def _prompt_scores(self, logits_PWGN: Tensor) -> Tensor:
        """Scores [P, W, N], softmax over the prompt alone; BEHIND it all are lower."""
        scores_PWN = self._rule.smooth(logits_PWGN.softmax(-1).flatten(0, 1)).unflatten(
            0, logits_PWGN.shape[:2]
        )
        place_N = torch.arange(scores_PWN.shape[-1], device=scores_PWN.device)
        return scores_PWN.masked_fill(place_N >= self._watch.tokens_P.view(-1, 1, 1), BEHIND)

    def _best(self, order_QN: Tensor) -> Tensor:
        """The first positions of an order, ascending, as many as each satellite holds; 0 behind [Q, K]."""
        behind_QK = self._place_K() >= self._watch.sizes_Q.unsqueeze(1)
        best_QK = order_QN[:, : behind_QK.shape[1]].masked_fill(behind_QK, order_QN.shape[1])
        return best_QK.sort(dim=1).values.masked_fill(behind_QK, 0).int()

    def kept(self) -> list[list[Tensor]]:
        """A refresh that the next token will see counts as kept already. Background work must be done."""
        positions = super().kept()
        if not self._pivots:
            return positions
        now_QK = self._chosen_QK
        if self._staging is not None:
            now_QK = torch.where(self._arriving().unsqueeze(1), self._chosen_QK, self._held_QK)
        rows = now_QK.long().cpu()
        for (b, head, _), row_K, size in zip(self._satellites, rows, self._sizes, strict=True):
            positions[b][head] = row_K[:size]
        return positions

    def nbytes(self) -> Bytes:
        """What is staged counts as metadata: it is there beside what satellites hold. Padding is reserve."""
        total = add_bytes(super().nbytes(), self._host.nbytes())
        if not self._pivots:
            return total
        rows, tokens = sum(self._sizes), sum(self._tokens[b] for b, _ in self._pivots)
        used, padded = 4 * rows + tokens, [self._chosen_QK, self._reference_PN]
        tables = [*self._watch.tables(), self._first_Q, self._queries_PWGD, self._finished_PWGD, self._full_P]
        if self._staging is not None:
            used += rows * (4 + self._host.row_bytes)
            padded += [self._held_QK, self._staging.keys, self._staging.values]
            tables.append(self._coming_Q)
        device = total["device"]
        device["metadata"] += used + storage_bytes(*tables, self._windows_P)  # and of triggers: one storage
        device["reserved"] += storage_bytes(*padded) - used
        return total

    def counters(self) -> dict[str, float]:
        """Rows count as refreshed when they are fetched. Background work must be done."""
        watched = bool(self._pivots)
        return {
            "windows": int(self._windows_P.sum()) if watched else 0,
            "triggers": int(self._triggers_P.sum()) if watched else 0,
            "refreshed_tokens": self._host.loaded_rows,
            "host_to_device_bytes": self._host.moved_bytes,
        }
