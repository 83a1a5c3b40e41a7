"""Keys of one layer as low-rank factors: [n, H*D], before RoPE, as a product of [n, r] and [r, H*D].

Source: ShadowKV, ICML 2025, arXiv 2410.21465 (section 3.1): before RoPE the keys of all heads of a layer
share a few directions, after it they don't. Knows positions and the model's RoPE; nothing of chunks, budgets
or methods.

Shapes: B batch, H KV heads, S = B*H segments, D head dim, W = H*D, n prompt tokens, T tokens of a block,
r rank, N rows of all sequences together, R rows that are asked for, M slots of a segment's buffer, F rotary
frequencies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from hcache.attention.rope import Rope
from hcache.cache.exchange import Changed, changed_tokens
from hcache.cache.gather import copy_rows
from hcache.cache.room import Held, Room
from hcache.cache.state import Bytes, no_bytes, storage_bytes
from hcache.cache.store import RaggedStore
from hcache.kernels.fused import fused

log = logging.getLogger(__name__)

ROWS = 2048
"""Tokens of a layer whose keys are float32 at the same time while they are factorised."""


class KeyFactors(Held):
    """Keys before RoPE of one layer as a product [n, r] @ [r, H*D], one basis for all heads of a sequence.

    Args:
        tokens: rows of each sequence, 0 for none.
        ranks: columns of each sequence.
        like: k [B, H, T, D], whose dtype the factors take.
        rope: takes the rotation off and puts it on again.
        room: rounds sizes, where steps are captured.
    """

    def __init__(
        self, tokens: list[int], ranks: list[int], like: Tensor, rope: Rope, room: Room | None = None
    ) -> None:
        self._tokens, self._ranks, self._rope, self._heads = tokens, ranks, rope, like.shape[1]
        self._offsets = list(accumulate(tokens, initial=0))
        room, dim = room or Room(), like.shape[-1]
        rank = room.size("rank", max(ranks))
        self._rows_Nr = like.new_zeros(room.size("factor rows", self._offsets[-1]), rank)
        self._basis_SrD = like.new_zeros(len(ranks) * self._heads, rank, dim)
        starts = torch.tensor(self._offsets[:-1], device=like.device)
        self._first_S = starts.repeat_interleave(self._heads)
        halves = rope.halves(dim) if fused(like) else None
        if fused(like) and halves is None:
            _say_slow()
        self._frequencies_F, self._scaling = None, 1.0
        if halves is not None:
            self._frequencies_F = halves.frequencies_F.to(like.device, copy=True)
            self._scaling = halves.scaling

    def write(self, sequence: int, k_HnD: Tensor) -> None:
        """Factorise one sequence's keys, given after RoPE at positions 0 to n - 1."""
        rank = self._ranks[sequence]
        basis_Wr = self._top_directions(k_HnD, rank)
        for start, rows_TW in self._plain(k_HnD):
            first = self._offsets[sequence] + start
            self._rows_Nr[first : first + len(rows_TW), :rank] = rows_TW @ basis_Wr
        segments = slice(sequence * self._heads, (sequence + 1) * self._heads)
        self._basis_SrD[segments, :rank] = basis_Wr.unflatten(0, (self._heads, -1)).transpose(1, 2)

    def _top_directions(self, k_HnD: Tensor, rank: int) -> Tensor:
        """The right singular vectors [H*D, r] of the keys, from their Gram matrix.

        In float32, which holds squares: directions below 1/3000 of the strongest are noise. Keys of 16 bits
        are rounded ten times as much, and the basis is orthonormal all the same.
        """
        width = k_HnD.shape[0] * k_HnD.shape[2]
        gram_WW = torch.zeros(width, width, device=k_HnD.device)
        for _, rows_TW in self._plain(k_HnD):
            gram_WW.addmm_(rows_TW.T, rows_TW)
        vectors_WW = torch.linalg.eigh(gram_WW).eigenvectors
        return vectors_WW[:, -rank:].flip(1)

    def _plain(self, k_HnD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first position, keys before RoPE [T, H*D] float32), block by block."""
        for start in range(0, k_HnD.shape[1], ROWS):
            block_HTD = k_HnD[:, start : start + ROWS].float()
            positions = torch.arange(start, start + block_HTD.shape[1], device=k_HnD.device)
            plain_BHTD = self._rope.undo(block_HTD.unsqueeze(0), positions.unsqueeze(0))
            yield start, plain_BHTD[0].transpose(0, 1).flatten(1)

    def rebuild(self, positions_SR: Tensor) -> Tensor:
        """Keys [S, R, D] at these positions of each segment, after RoPE."""
        # A sequence without factors, last in the batch, would point behind the end; nobody reads its keys.
        rows_SR = (self._first_S.unsqueeze(1) + positions_SR).clamp_max(self._rows_Nr.shape[0] - 1)
        plain_SRD = self._rows_Nr[rows_SR].float() @ self._basis_SrD.float()
        turned_SRD = self._rope.rotate(plain_SRD.unsqueeze(1), positions_SR).squeeze(1)
        return turned_SRD.to(self._rows_Nr.dtype)

    def restore(self, store: RaggedStore, chunks_SM: Tensor, changed: Changed, size: int) -> None:
        """Rebuild the keys of changed chunks in the first slots of every segment. No host synchronisation.

        Args:
            chunks_SM: the chunk that each slot holds.
            size: tokens of a chunk.
        """
        if self._frequencies_F is not None:
            from hcache.kernels.rebuild import rebuild

            factors = (self._rows_Nr, self._basis_SrD, self._first_S)
            rotation = (self._frequencies_F, self._scaling)
            rebuild(*factors, *rotation, store.keys, store.first, chunks_SM, *changed, size)
            return
        # All that there could be are rebuilt, since shapes are fixed, and the changed ones written.
        positions_SR, slots_SR, wanted_SR = changed_tokens(chunks_SM, changed, size, len(self._first_S))
        keys_RD = self.rebuild(positions_SR).flatten(0, 1)
        slots_SR = store.first.unsqueeze(1) + slots_SR
        rows_R = torch.arange(len(keys_RD), device=keys_RD.device)
        copy_rows([(keys_RD, store.keys)], rows_R, slots_SR.flatten(), wanted_SR.flatten())

    def nbytes(self) -> Bytes:
        """Bytes of both factors; what sequences of a lower rank leave empty is reserve."""
        total, width = no_bytes(), self._heads * self._basis_SrD.shape[-1]
        numbers = sum(r * (n + width) for r, n in zip(self._ranks, self._tokens, strict=True))
        buffers = storage_bytes(self._rows_Nr, self._basis_SrD)
        payload = numbers * self._rows_Nr.element_size()
        tables = [self._first_S] + ([] if self._frequencies_F is None else [self._frequencies_F])
        total["device"] = {
            "payload": payload,
            "metadata": storage_bytes(*tables),
            "reserved": buffers - payload,
        }
        return total


@lru_cache(maxsize=1)
def _say_slow() -> None:
    """Said once."""
    log.warning(
        "this model's rotary embedding doesn't turn halves of a head: keys are rebuilt by torch, all of them "
        "at every step, which is several times slower than the kernel for the common layout"
    )
