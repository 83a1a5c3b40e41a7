"""Keys of one layer as low-rank factors: [n, H*D], before RoPE, as a product of [n, r] and [r, H*D].

Source: ShadowKV, ICML 2025, arXiv 2410.21465 (section 3.1): before RoPE the keys of all heads of a layer
share a few directions, after it they don't. Knows positions and the model's RoPE; nothing of chunks, budgets
or methods.

Shapes: B batch, H KV heads, S = B*H segments, D head dim, W = H*D, n prompt tokens, T tokens of a block,
r rank, N rows of all sequences together, R rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from hcache.attention.rope import Rope
from hcache.cache.state import Bytes, no_bytes, storage_bytes

ROWS = 2048
"""Tokens of a layer whose keys are float32 at the same time while they are factorised."""


class KeyFactors:
    """Keys before RoPE of one layer as a product [n, r] @ [r, H*D], one basis for all heads of a sequence.

    Args:
        tokens: rows of each sequence, 0 for none.
        ranks: columns of each sequence.
        like: k [B, H, T, D], whose dtype the factors take.
        rope: takes the rotation off and puts it on again.
    """

    def __init__(self, tokens: list[int], ranks: list[int], like: Tensor, rope: Rope) -> None:
        self._tokens, self._ranks, self._rope, self._heads = tokens, ranks, rope, like.shape[1]
        self._offsets = list(accumulate(tokens, initial=0))
        self._rows_Nr = like.new_zeros(self._offsets[-1], max(ranks))
        self._basis_SrD = like.new_zeros(len(ranks) * self._heads, max(ranks), like.shape[-1])
        starts = torch.tensor(self._offsets[:-1], device=like.device)
        self._first_S = starts.repeat_interleave(self._heads)

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

    def nbytes(self) -> Bytes:
        """Bytes of both factors; what sequences of a lower rank leave empty is reserve."""
        total, width = no_bytes(), self._heads * self._basis_SrD.shape[-1]
        numbers = sum(r * (n + width) for r, n in zip(self._ranks, self._tokens, strict=True))
        buffers = storage_bytes(self._rows_Nr, self._basis_SrD)
        payload = numbers * self._rows_Nr.element_size()
        total["device"] = {
            "payload": payload,
            "metadata": storage_bytes(self._first_S),
            "reserved": buffers - payload,
        }
        return total
