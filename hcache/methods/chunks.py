"""ShadowKV while decoding: each step brings the chunks of the prompt that its query needs into a buffer.

Source: ShadowKV, ICML 2025, arXiv 2410.21465 (section 4). A query is scored against one landmark a chunk,
the mean of its keys after RoPE. Keys of the best chunks are rebuilt from their factors, values come from host
memory; a chunk that is in the buffer already stays in its slot, and its values don't move again. A segment of
the store holds [selected | outliers | local tail | generated].

Shapes: B batch, Hq query heads, H KV heads, G = Hq/H, S = B*H segments, D head dim, n prompt tokens, s tokens
of a chunk, C chunks of a prompt, L landmarks and M selected chunks of the sequence that has most, o outliers
likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcache.attention.backends import to_segments
from hcache.cache.offload import HostRows
from hcache.cache.state import (
    Bytes,
    StoreLayer,
    add_bytes,
    latest_queries,
    no_bytes,
    on_host,
    one_by_one,
    storage_bytes,
    unpadded,
)
from hcache.cache.store import RaggedStore
from hcache.methods.low_rank import KeyFactors


@dataclass(frozen=True)
class ChunkPlan:
    """What one layer keeps of one prompt. All zero: the whole prompt, exact.

    Args:
        rank: columns of the key factors.
        chunks: chunks of the prompt; the tokens behind them are the local tail.
        outliers: chunks of each KV head that stay exact and have no landmark.
        selected: chunks of each KV head that a step brings in; at most `landmarks`.
    """

    rank: int = 0
    chunks: int = 0
    outliers: int = 0
    selected: int = 0

    @property
    def landmarks(self) -> int:
        """Chunks that can be selected."""
        return self.chunks - self.outliers


class Landmarks:
    """Mean keys of the chunks of one layer, by which a query finds the chunks it needs.

    Landmark j of a segment is that of its j-th chunk that is no outlier.

    Args:
        plans: one a sequence.
        like: k [B, H, T, D], whose dtype the landmarks take.
    """

    def __init__(self, plans: list[ChunkPlan], like: Tensor) -> None:
        heads, device = like.shape[1], like.device
        counts = [plan.landmarks for plan in plans for _ in range(heads)]
        outliers = max(plan.outliers for plan in plans)
        self.most = max(counts)
        self._numbers = sum(counts) * like.shape[-1]
        self._means_SLD = like.new_zeros(len(counts), self.most, like.shape[-1])
        self._counts_S = torch.tensor(counts, device=device)
        behind = torch.iinfo(torch.int32).max
        # Landmarks before each outlier: chunk numbers come from these, which are few, and needn't be stored.
        self._before_So = torch.full((len(counts), outliers), behind, dtype=torch.int32, device=device)

    def write(self, segment: int, means_CD: Tensor, outliers_o: Tensor) -> None:
        """Keep the means of a segment's chunks, those of the outliers (ascending) left out."""
        ordinary = torch.ones(means_CD.shape[0], dtype=torch.bool, device=means_CD.device)
        ordinary[outliers_o] = False
        means = means_CD[ordinary]
        self._means_SLD[segment, : len(means)] = means
        ahead = torch.arange(len(outliers_o), device=outliers_o.device)
        self._before_So[segment, : len(outliers_o)] = (outliers_o - ahead).int()

    def best(self, q: Tensor, count: int) -> Tensor:
        """The `count` best landmarks [S, count] of one query a head (q [B, Hq, 1, D]), best first.

        The softmax is each query head's own; the largest share in the group counts. Where a segment has
        fewer landmarks than `count`, the rest is arbitrary.
        """
        rows_SGD = to_segments(q, self._means_SLD.shape[0]).float()
        logits_SGL = rows_SGD @ self._means_SLD.float().transpose(1, 2) * q.shape[-1] ** -0.5
        missing_SL = torch.arange(self.most, device=q.device) >= self._counts_S.unsqueeze(1)
        # Not -inf: a segment without any landmark would turn to NaN.
        logits_SGL.masked_fill_(missing_SL.unsqueeze(1), torch.finfo(torch.float32).min)
        # Logarithms order as shares do, but small shares don't all round to the same zero.
        shares_SL = logits_SGL.log_softmax(-1).amax(1)
        return shares_SL.sort(dim=1, descending=True, stable=True).indices[:, :count]

    def chunks(self, landmarks_SM: Tensor) -> Tensor:
        """The chunk numbers that these landmarks (int32) stand for."""
        return landmarks_SM + torch.searchsorted(self._before_So, landmarks_SM, right=True)

    def nbytes(self) -> Bytes:
        """Bytes of the landmarks and their tables; padding is reserve."""
        total, payload = no_bytes(), self._numbers * self._means_SLD.element_size()
        total["device"] = {
            "payload": payload,
            "metadata": storage_bytes(self._counts_S, self._before_So),
            "reserved": storage_bytes(self._means_SLD) - payload,
        }
        return total


class ShadowLayer(StoreLayer):
    """A store whose first slots hold the chunks that the latest query selected.

    Args:
        plans: one a sequence.
        chunk: tokens of a chunk.
        offload: values of the chunks wait in host memory; False keeps them on the device.
    """

    def __init__(self, plans: list[ChunkPlan], chunk: int, offload: bool = True) -> None:
        super().__init__()
        self._plans, self._chunk, self._offload = plans, chunk, offload

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        batch, heads, width, _ = k.shape
        counts = [width] * batch if valid is None else valid.sum(1).tolist()
        self._heads = heads
        self._allocate(counts, k)
        self._kept = [
            on_host(self._keep(b, unpadded(k, valid, b), unpadded(v, valid, b))) for b in range(batch)
        ]
        self._held_SM = self._best(latest_queries(q, valid, 1)).int()
        self._fill(~self._unused())
        self._moved_by_prompt = self._host.moved_bytes

    def _allocate(self, counts: list[int], like: Tensor) -> None:
        """Empty buffers for prompts of these lengths."""
        plans, size, heads = self._plans, self._chunk, self._heads
        covered = [plan.chunks * size for plan in plans]
        lengths = [
            n - rows + (plan.selected + plan.outliers) * size
            for n, rows, plan in zip(counts, covered, plans, strict=True)
        ]
        self.store = RaggedStore(_each(lengths, heads), like, spare=self.reserve_tokens)
        self._host = HostRows(_each(covered, heads), like, keys=False, enabled=self._offload)
        rows = [n if plan.rank else 0 for n, plan in zip(counts, plans, strict=True)]
        self._factors = KeyFactors(rows, [plan.rank for plan in plans], like, self.rope)
        self._landmarks = Landmarks(plans, like)
        selected = _each([plan.selected for plan in plans], heads)
        self._most = max(selected)
        self._selected_S = torch.tensor(selected, device=like.device)
        used = [s * self._most + m for s, count in enumerate(selected) for m in range(count)]
        everywhere = len(used) == len(selected) * self._most
        self._used = None if everywhere else torch.tensor(used, dtype=torch.int32, device=like.device)
        self._hits = torch.zeros((), dtype=torch.int64, device=like.device)
        self._asked = torch.zeros_like(self._hits)

    def _keep(self, sequence: int, k_HnD: Tensor, v_HnD: Tensor) -> list[Tensor]:
        """Store all but the selection of one sequence; the positions that stay whatever is selected."""
        plan, size, tokens = self._plans[sequence], self._chunk, k_HnD.shape[1]
        covered = plan.chunks * size
        if plan.rank:
            self._factors.write(sequence, k_HnD)
        tail = torch.arange(covered, tokens, device=k_HnD.device)
        always = []
        for h, (k_nD, v_nD) in enumerate(zip(k_HnD, v_HnD, strict=True)):
            segment = sequence * self._heads + h
            means_CD, outliers = summarise(k_nD[:covered], size, plan.outliers)
            self._landmarks.write(segment, means_CD, outliers)
            self._host.write(segment, None, v_nD[:covered])
            always.append(torch.cat([chunk_positions(outliers, size).flatten(), tail]))
            self.store.write(segment, plan.selected * size, k_nD[always[h]], v_nD[always[h]])
        return always

    def step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        valid_S1 = None if valid is None else valid.repeat_interleave(self._heads, dim=0)
        limits = self.store.append(k.flatten(0, 1), v.flatten(0, 1), valid_S1)
        self._exchange(q, valid_S1)
        return self.backend.decode(q, self.store.ragged(), limits)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Token by token: each selects its own chunks."""
        return one_by_one(self, q, k, v, valid)

    def _exchange(self, q: Tensor, valid_S1: Tensor | None) -> None:
        """Exchange the chunks that the query doesn't want for those it misses, slot by slot."""
        best_SM, held_SM = self._best(q), self._held_SM.long()
        leaving_SM = ~self._marks(best_SM).gather(1, held_SM)
        coming_SM = ~self._marks(held_SM).gather(1, best_SM)
        if valid_S1 is not None:
            leaving_SM = leaving_SM & valid_S1
        # As many come as leave: the k-th slot that is left takes the k-th newcomer.
        newcomers_SM = best_SM.gather(1, coming_SM.int().sort(dim=1, descending=True, stable=True).indices)
        turn_SM = (leaving_SM.cumsum(1) - 1).clamp_min(0)
        self._held_SM.copy_(torch.where(leaving_SM, newcomers_SM.gather(1, turn_SM), held_SM))
        self._fill(leaving_SM)
        asked_SM = ~self._unused() if valid_S1 is None else ~self._unused() & valid_S1
        self._asked += asked_SM.sum()
        self._hits += (asked_SM & ~leaving_SM).sum()

    def _unused(self) -> Tensor:
        """[S, M] bool, slots that a sequence with a smaller selection leaves empty."""
        return torch.arange(self._most, device=self._selected_S.device) >= self._selected_S.unsqueeze(1)

    def _best(self, q: Tensor) -> Tensor:
        """The landmarks [S, M] that a query selects; unused slots hold one that doesn't exist."""
        return self._landmarks.best(q, self._most).masked_fill(self._unused(), self._landmarks.most)

    def _marks(self, landmarks_SM: Tensor) -> Tensor:
        """[S, L + 1] bool, True where a landmark is listed; the last stands for unused slots."""
        shape = (landmarks_SM.shape[0], self._landmarks.most + 1)
        return torch.zeros(shape, dtype=torch.bool, device=landmarks_SM.device).scatter_(
            1, landmarks_SM, True
        )

    def _fill(self, missing_SM: Tensor) -> None:
        """Write the chunks that are held but missing into their slots: keys rebuilt, values fetched."""
        held_SM = self._landmarks.chunks(self._held_SM).masked_fill(self._unused(), 0)
        positions_SR = chunk_positions(held_SM, self._chunk).flatten(1)
        slots_SR = self.store.rows([1] * len(positions_SR)).unsqueeze(1) + torch.arange(
            positions_SR.shape[1], device=positions_SR.device
        )
        slots = self._packed(slots_SR)
        rows = self._packed(self._host.first.unsqueeze(1) + positions_SR)
        missing = self._packed(missing_SM.repeat_interleave(self._chunk, dim=1))
        self._host.load(rows, self.store, slots, missing)
        # All are rebuilt, since shapes are fixed, and the missing ones written.
        keys = self._packed(self._factors.rebuild(positions_SR))
        before = self.store.keys.index_select(0, slots)
        self.store.keys.index_copy_(0, slots, torch.where(missing.unsqueeze(1), keys, before))

    def _packed(self, grid: Tensor) -> Tensor:
        """[S, M*s, ...] -> [rows, ...], without the rows of unused slots: they have no place in the store."""
        chunks = grid.unflatten(1, (self._most, self._chunk)).flatten(0, 1)
        return (chunks if self._used is None else chunks.index_select(0, self._used)).flatten(0, 1)

    def kept(self) -> list[list[Tensor]]:
        chunks_SM = self._landmarks.chunks(self._held_SM).cpu()
        found = []
        for b, (plan, always) in enumerate(zip(self._plans, self._kept, strict=True)):
            rows = chunks_SM[b * self._heads : (b + 1) * self._heads, : plan.selected]
            selected = chunk_positions(rows, self._chunk).flatten(1)
            pairs = zip(always, selected, strict=True)
            found.append([torch.cat(parts).sort().values for parts in pairs])
        return found

    def nbytes(self) -> Bytes:
        total = super().nbytes()
        for part in (self._host, self._factors, self._landmarks):
            total = add_bytes(total, part.nbytes())
        total["device"]["metadata"] += storage_bytes(self._held_SM, self._selected_S, self._hits, self._asked)
        if self._used is not None:
            total["device"]["metadata"] += storage_bytes(self._used)
        return total

    def counters(self) -> dict[str, float]:
        """A chunk is a hit if the step before had selected it already."""
        return {
            "chunk_hits": int(self._hits),
            "chunks_selected": int(self._asked),
            "host_to_device_bytes": self._host.moved_bytes - self._moved_by_prompt,
        }


def summarise(k_nD: Tensor, chunk: int, outliers: int) -> tuple[Tensor, Tensor]:
    """Landmarks [C, D] float32 of one head's keys, and its `outliers` worst chunks, ascending.

    A landmark stands badly for a chunk if one of the keys points elsewhere: the smallest cosine counts.
    """
    keys_CsD = k_nD.float().unflatten(0, (-1, chunk))
    means_CD = keys_CsD.mean(1)
    products_Cs = (keys_CsD @ means_CD.unsqueeze(-1)).squeeze(-1)
    lengths_Cs = keys_CsD.norm(dim=-1) * means_CD.norm(dim=-1, keepdim=True)
    cosine_C = (products_Cs / lengths_Cs.clamp_min(torch.finfo(torch.float32).tiny)).amin(1)
    return means_CD, cosine_C.sort(stable=True).indices[:outliers].sort().values


def chunk_positions(chunks: Tensor, size: int) -> Tensor:
    """[..., size] positions of the tokens of each chunk."""
    return chunks.unsqueeze(-1) * size + torch.arange(size, device=chunks.device)


def _each(numbers: list[int], heads: int) -> list[int]:
    """A sequence's number for each of its segments."""
    return [number for number in numbers for _ in range(heads)]
