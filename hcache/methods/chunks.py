"""ShadowKV while decoding: each step brings the chunks of the prompt that its query needs into a buffer.

Source: ShadowKV, ICML 2025, arXiv 2410.21465 (section 4). A query is scored against one landmark a chunk,
the mean of its keys after RoPE. Keys of the best chunks are rebuilt from their factors while their values
come from host memory; a chunk that is in the buffer already stays in its slot, and nothing of it moves again.
A segment of the store holds [selected | outliers | local tail | generated].

Shapes: B batch, Hq query heads, H KV heads, G = Hq/H, S = B*H segments, D head dim, n prompt tokens, s tokens
of a chunk, C chunks of a prompt, L landmarks and M selected chunks of the sequence that has most, o outliers
likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcache.attention.backends import to_segments
from hcache.cache.exchange import Changed, best, exchange, fetch
from hcache.cache.lane import lane_of
from hcache.cache.offload import HostRows
from hcache.cache.room import Held, Room
from hcache.cache.state import (
    Bytes,
    StoreLayer,
    Turn,
    add_bytes,
    latest_queries,
    no_bytes,
    on_host,
    one_by_one,
    storage_bytes,
    unpadded,
)
from hcache.kernels.fused import fused
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


class Landmarks(Held):
    """Mean keys of the chunks of one layer, by which a query finds the chunks it needs.

    Landmark j of a segment is that of its j-th chunk that is no outlier.

    Args:
        plans: one a sequence.
        like: k [B, H, T, D], whose dtype the landmarks take.
        room: rounds sizes, where steps are captured.

    Attributes:
        most: L; no landmark has this number.
    """

    def __init__(self, plans: list[ChunkPlan], like: Tensor, room: Room) -> None:
        heads, device = like.shape[1], like.device
        counts = [plan.landmarks for plan in plans for _ in range(heads)]
        outliers = room.size("outliers", max(1, *(plan.outliers for plan in plans)))
        self.most = room.size("landmarks", max(counts))
        self._numbers = sum(counts) * like.shape[-1]
        self._means_SLD = like.new_zeros(len(counts), self.most, like.shape[-1])
        self._counts_S = torch.tensor(counts, dtype=torch.int32, device=device)
        self._first_S = torch.arange(len(counts), device=device) * self.most
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

    def shares(self, q: Tensor) -> Tensor:
        """Logarithms [S, L] of the shares that the landmarks have of one query a head (q [B, Hq, 1, D]).

        The softmax is each query head's own; the largest share in the group counts. What stands behind a
        segment's landmarks is no larger than they are.
        """
        rows_SGD, scale = to_segments(q, self._means_SLD.shape[0]), q.shape[-1] ** -0.5
        if fused(q):
            from hcache.kernels.scan import scan

            means = self._means_SLD.flatten(0, 1)
            logits_SGL = scan(rows_SGD, means, self._first_S, self._counts_S, self.most, scale=scale)
        else:
            logits_SGL = rows_SGD.float() @ self._means_SLD.float().transpose(1, 2) * scale
            missing_SL = torch.arange(self.most, device=q.device) >= self._counts_S.unsqueeze(1)
            # Not -inf: a segment without any landmark would turn to NaN.
            logits_SGL.masked_fill_(missing_SL.unsqueeze(1), torch.finfo(torch.float32).min)
        # Logarithms order as shares do, but small shares don't all round to the same zero.
        return logits_SGL.log_softmax(-1).amax(1)

    def chunks(self, landmarks_SM: Tensor) -> Tensor:
        """The chunk numbers that these landmarks (int32) stand for."""
        return landmarks_SM + torch.searchsorted(self._before_So, landmarks_SM, out_int32=True, right=True)

    def nbytes(self) -> Bytes:
        """Bytes of the landmarks and their tables; padding is reserve."""
        total, payload = no_bytes(), self._numbers * self._means_SLD.element_size()
        total["device"] = {
            "payload": payload,
            "metadata": storage_bytes(self._counts_S, self._first_S, self._before_So),
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
        self._heads, self._even_steps, self._settled = heads, 0, False
        self._allocate(counts, k)
        self._kept = [
            on_host(self._keep(b, unpadded(k, valid, b), unpadded(v, valid, b))) for b in range(batch)
        ]
        self._held_SM = self._best(latest_queries(q, valid, 1))
        self._fill([unpadded(v, valid, b) for b in range(batch)])

    def _allocate(self, counts: list[int], like: Tensor) -> None:
        """Empty buffers for prompts of these lengths."""
        plans, size, heads, room = self._plans, self._chunk, self._heads, self.room
        covered = [plan.chunks * size for plan in plans]
        lengths = [
            n - rows + (plan.selected + plan.outliers) * size
            for n, rows, plan in zip(counts, covered, plans, strict=True)
        ]
        self.store = self.new_store(_each(lengths, heads), like)
        self._host = HostRows(_each(covered, heads), like, keys=False, enabled=self._offload, room=room)
        rows = [n if plan.rank else 0 for n, plan in zip(counts, plans, strict=True)]
        self._factors = KeyFactors(rows, [plan.rank for plan in plans], like, self.rope, room)
        self._landmarks = Landmarks(plans, like, room)
        selected = _each([plan.selected for plan in plans], heads)
        self._most = room.size("selected", max(selected))
        self._selected_S = torch.tensor(selected, dtype=torch.int32, device=like.device)
        self._missed_S = torch.zeros(len(selected), dtype=torch.int64, device=like.device)
        self._fed_S = torch.zeros_like(self._missed_S)

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

    def _fill(self, values: list[Tensor]) -> None:
        """The chunks that the prompt selects, from its values [H, n, D] a sequence."""
        chunks_SM, width = self._chunks(), self._held_SM.shape[1]
        everywhere_SM = torch.arange(width, dtype=torch.int32, device=chunks_SM.device).repeat(
            len(chunks_SM), 1
        )
        self._factors.restore(self.store, chunks_SM, Changed(everywhere_SM, self._selected_S), self._chunk)
        for b, (plan, v_HnD) in enumerate(zip(self._plans, values, strict=True)):
            for s, v_nD in enumerate(v_HnD, b * self._heads):
                positions = chunk_positions(chunks_SM[s, : plan.selected], self._chunk).flatten()
                self.store.read(s, len(positions))[1].copy_(v_nD[positions])

    def ready(self, even: bool) -> Turn:
        if not self._settled:
            self._host.settle()
            self._settled = True
        self._even_steps += even
        return super().ready(even)

    def advance(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        valid_S = None if valid is None else valid[:, 0].repeat_interleave(self._heads, dim=0)
        if valid_S is not None:
            self._fed_S += valid_S
        changed = exchange(self._held_SM, self._best(q), self._landmarks.most, self._missed_S, valid_S)
        chunks_SM = self._chunks()
        lane = lane_of(k.device, "fetch0")
        with lane.beside(chunks_SM, *changed):
            fetch(self._host, self.store, chunks_SM, changed, self._chunk)
        self._factors.restore(self.store, chunks_SM, changed, self._chunk)
        valid_S1 = None if valid_S is None else valid_S.unsqueeze(1)
        limits = self.store.append(k.flatten(0, 1), v.flatten(0, 1), valid_S1)
        lane.join()
        return self.backend.decode(q, self.store.ragged(), limits)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Token by token: each selects its own chunks."""
        return one_by_one(self, q, k, v, valid)

    def _best(self, q: Tensor) -> Tensor:
        """The landmarks [S, M] int32 that a query selects; unused slots hold one that doesn't exist."""
        return best(self._landmarks.shares(q), self._selected_S, self._most)

    def _chunks(self) -> Tensor:
        """The chunk in each slot [S, M] int32, chunk 0 in those that a smaller selection leaves unused."""
        unused_SM = self._held_SM == self._landmarks.most
        return self._landmarks.chunks(self._held_SM).masked_fill(unused_SM, 0)

    def kept(self) -> list[list[Tensor]]:
        chunks_SM = self._chunks().cpu()
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
        tables = (self._held_SM, self._selected_S, self._missed_S, self._fed_S)
        total["device"]["metadata"] += storage_bytes(*tables)
        return total

    def counters(self) -> dict[str, float]:
        """A chunk is a hit if the step before had selected it already."""
        asked = int(((self._fed_S + self._even_steps) * self._selected_S).sum())
        missed = int(self._missed_S.sum())
        return {
            "chunk_hits": asked - missed,
            "chunks_selected": asked,
            "host_to_device_bytes": missed * self._chunk * self._host.row_bytes * self._offload,
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
