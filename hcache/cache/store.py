"""The ragged store: one layer's kept keys and values, heads of any length, no padding between them.

Knows segments (one a sequence and KV head), slots and lengths; nothing of positions, methods or models.
Shapes: S = B*H segments, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hcache.attention.backends import CHUNK, Ragged

GROWTH = 4
"""A full store grows by at least a GROWTH-th of its longest segment, so appending stays linear overall."""


def _chunks(tokens: int) -> int:
    return -(-tokens // CHUNK)


class RaggedStore:
    """Flat [slots, D] buffers for K and V, and a length per segment kept on the device.

    Segment s owns whole chunks from `offsets[s]` on (`first` on the device). Slots beyond a segment's length
    are zero.

    Args:
        lengths: tokens of each of the S segments, sequence-major (s = b * H + h); the caller writes them.
        like: a tensor whose device, dtype and last dimension (D) the buffers take.
        spare: tokens that can be appended to every segment before the store must grow.
    """

    def __init__(self, lengths: list[int], like: Tensor, spare: int = CHUNK) -> None:
        self._bounds = list(lengths)
        self._device, self._dtype, self._dim = like.device, like.dtype, like.shape[-1]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self._device)
        self._spare = spare
        self._allocate(spare)

    def _allocate(self, spare: int) -> None:
        """Fresh zeroed buffers with room for `spare` tokens more than each segment's bound."""
        chunks = [max(1, _chunks(bound + spare)) for bound in self._bounds]
        self.offsets = [CHUNK * sum(chunks[:s]) for s in range(len(chunks))]
        self._capacity = [CHUNK * count for count in chunks]
        shape = (sum(self._capacity), self._dim)
        self.keys = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self.values = torch.zeros(shape, dtype=self._dtype, device=self._device)
        owner = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(chunks))
        start = torch.cat([torch.arange(count) for count in chunks]) * CHUNK
        self._owner, self._start = owner.to(self._device), start.to(self._device)
        self.first = torch.tensor(self.offsets, device=self._device)
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def rows(self, counts: list[int]) -> Tensor:
        """Rows in the flat buffers of the first `counts[s]` slots of each segment, in order: int64.

        Made once for the same counts until the buffers move, so that a step can ask without synchronising.
        """
        key = tuple(counts)
        if key not in self._rows:
            spans = [torch.arange(first, first + n) for first, n in zip(self.offsets, counts, strict=True)]
            self._rows[key] = torch.cat(spans).to(self._device)
        return self._rows[key]

    def write(self, segment: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Overwrite slots [slot, slot + len) of a segment; lengths stay."""
        first = self.offsets[segment] + slot
        self.keys[first : first + keys.shape[0]] = keys
        self.values[first : first + keys.shape[0]] = values

    def read(self, segment: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Views of a segment's first `tokens` keys and values, [tokens, D] each."""
        first = self.offsets[segment]
        return self.keys[first : first + tokens], self.values[first : first + tokens]

    def grow(self, bounds: list[int]) -> None:
        """Let segment s hold up to `bounds[s]` tokens; moves the buffers only if there is no room."""
        old, self._bounds = self._bounds, bounds
        if all(bound <= capacity for bound, capacity in zip(bounds, self._capacity, strict=True)):
            return
        keys, values, offsets = self.keys, self.values, self.offsets
        self._allocate(max(CHUNK, max(bounds) // GROWTH))
        for s, (first, bound) in enumerate(zip(offsets, old, strict=True)):
            self.write(s, 0, keys[first : first + bound], values[first : first + bound])

    def keep(self, slots: list[Tensor]) -> None:
        """Keep these slots of each segment, in this order, and free the rest: the buffers shrink."""
        keys, values, offsets = self.keys, self.values, self.offsets
        self._bounds = [index.numel() for index in slots]
        self.lengths = torch.tensor(self._bounds, dtype=torch.int32, device=self._device)
        self._allocate(self._spare)
        for s, (first, index) in enumerate(zip(offsets, slots, strict=True)):
            self.write(s, 0, keys[first + index], values[first + index])

    def append(self, k_STD: Tensor, v_STD: Tensor, valid_ST: Tensor | None = None) -> Tensor:
        """Append T tokens to every segment; tokens that are not valid leave no trace.

        Fixed shapes and no host synchronisation once there is room.

        Args:
            k_STD, v_STD: [S, T, D].
            valid_ST: [S, T] bool, None where all are.

        Returns:
            limits [S, T] int64: slots that token t of segment s may attend to, itself included.
        """
        segments, tokens, _ = k_STD.shape
        self.grow([bound + tokens for bound in self._bounds])
        if valid_ST is None:
            ahead = torch.arange(1, tokens + 1, device=self._device).expand(segments, tokens)
        else:
            ahead = valid_ST.long().cumsum(1)
            pads = ~valid_ST.unsqueeze(-1)
            k_STD, v_STD = k_STD.masked_fill(pads, 0), v_STD.masked_fill(pads, 0)
        limits = self.lengths.long().unsqueeze(1) + ahead
        self._scatter(limits, ahead, k_STD, v_STD, valid_ST)
        self.lengths += ahead[:, -1].int()
        return limits

    def _scatter(
        self, limits: Tensor, ahead: Tensor, k_STD: Tensor, v_STD: Tensor, valid: Tensor | None
    ) -> None:
        """Write valid tokens to their slots, and zeros of the others to the unused slots behind them."""
        slot = limits - 1
        if valid is not None:
            fed = torch.arange(1, ahead.shape[1] + 1, device=self._device)
            behind = self.lengths.long().unsqueeze(1) + ahead[:, -1:] + (fed - ahead) - 1
            slot = torch.where(valid, slot, behind)
        index = (self.first.unsqueeze(1) + slot).flatten()
        self.keys.index_copy_(0, index, k_STD.reshape(-1, self._dim))
        self.values.index_copy_(0, index, v_STD.reshape(-1, self._dim))

    def put(self, slot_S: Tensor, k_SD: Tensor, v_SD: Tensor, valid_S: Tensor | None = None) -> None:
        """Put one token into slot `slot_S[s]` of each segment; the slot at the length extends the segment.

        The caller has made room with `grow`. Fixed shapes, no host synchronisation.

        Args:
            valid_S: [S] bool, segments that have a token; the others stay as they are. None: all.
        """
        index = self.first + slot_S
        longer = torch.maximum(self.lengths, slot_S.int() + 1)
        if valid_S is not None:
            k_SD = torch.where(valid_S.unsqueeze(1), k_SD, self.keys[index])
            v_SD = torch.where(valid_S.unsqueeze(1), v_SD, self.values[index])
            longer = torch.where(valid_S, longer, self.lengths)
        self.keys.index_copy_(0, index, k_SD)
        self.values.index_copy_(0, index, v_SD)
        self.lengths.copy_(longer)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one segment."""
        return 2 * self._dim * self.keys.element_size()

    def ragged(self) -> Ragged:
        """The store as the attention backends read it."""
        return Ragged(self.keys, self.values, self._owner, self._start, self.offsets)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the live buffers: payload (K, V of stored tokens), metadata, reserved (unused slots)."""
        payload = int(self.lengths.sum()) * self.token_bytes
        tables = (self.lengths, self._owner, self._start, self.first, *self._rows.values())
        buffers = self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()
        metadata = sum(t.untyped_storage().nbytes() for t in tables)
        return {"payload": payload, "metadata": metadata, "reserved": buffers - payload}
