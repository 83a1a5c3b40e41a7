"""The ragged store: one layer's kept keys and values, heads of any length, no padding between them.

Knows segments (one a sequence and KV head), slots and lengths; nothing of positions, methods or models.
Shapes: S = B*H segments, D head dim.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from hcache.attention.backends import CHUNK, Ragged
from hcache.cache.lane import lane_of
from hcache.cache.room import Held, Room

BEHIND = 2**30
"""First slot of a chunk that belongs to no segment: behind every limit."""

GROWTH = 4
"""A full store grows by at least a GROWTH-th of its longest segment, so appending stays linear overall."""


class RaggedStore(Held):
    """Flat [slots, D] buffers for K and V, and a length per segment kept on the device.

    Segment s owns whole chunks from `offsets[s]` on (`first` on the device). Slots beyond a segment's length
    are zero.

    Args:
        lengths: tokens of each of the S segments, sequence-major (s = b * H + h); the caller writes them.
        like: a tensor whose device, dtype and last dimension (D) the buffers take.
        spare: tokens that can be appended to every segment before the store must grow.
        room: rounds sizes, where steps are captured.
        granule: segments begin and end on multiples of so many slots, a multiple of CHUNK.

    Attributes:
        moves: how often the buffers have moved.
    """

    off_step = ("offsets",)

    def __init__(
        self,
        lengths: list[int],
        like: Tensor,
        spare: int = CHUNK,
        room: Room | None = None,
        granule: int = CHUNK,
    ) -> None:
        self._bounds = list(lengths)
        self._device, self._dtype, self._dim = like.device, like.dtype, like.shape[-1]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self._device)
        self._spare, self._room, self._granule = spare, room or Room(), granule
        self.moves = -1
        self._allocate(spare)

    def _allocate(self, spare: int) -> None:
        """Fresh zeroed buffers with room for `spare` tokens more than each segment's bound."""
        self.moves += 1
        granules = [max(1, -(-(bound + spare) // self._granule)) for bound in self._bounds]
        self._capacity = [self._granule * count for count in granules]
        self.offsets = [0, *accumulate(self._capacity)][:-1]
        total = self._granule * self._room.size("granules", sum(granules))
        self.longest = self._granule * self._room.size("longest", max(granules))
        self.keys = torch.zeros(total, self._dim, dtype=self._dtype, device=self._device)
        self.values = torch.zeros_like(self.keys)
        chunks = torch.tensor(self._capacity) // CHUNK
        owner = torch.arange(len(granules)).repeat_interleave(chunks)
        first = torch.tensor(self.offsets)
        start = torch.arange(len(owner)) * CHUNK - first[owner]
        rest = total // CHUNK - len(owner)
        self._owner = F.pad(owner, (0, rest), value=len(granules) - 1).to(self._device)
        self._start = F.pad(start, (0, rest), value=BEHIND).to(self._device)
        self.first = first.to(self._device)

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
        lane_of(self._device, "background").join()  # which may be writing into the buffers
        keys, values, offsets = self.keys, self.values, self.offsets
        self._allocate(max(CHUNK, max(bounds) // GROWTH))
        for s, (first, bound) in enumerate(zip(offsets, old, strict=True)):
            self.write(s, 0, keys[first : first + bound], values[first : first + bound])

    def expect(self, tokens: int) -> None:
        """Make room for so many more tokens in every segment. Knows of no token but those it was told of."""
        self.grow([bound + tokens for bound in self._bounds])

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

        The caller has made room with `expect`. Fixed shapes, no host synchronisation.

        Args:
            k_STD, v_STD: [S, T, D].
            valid_ST: [S, T] bool, None where all are.

        Returns:
            limits [S, T], integers: slots that token t of segment s may attend to, itself included. Good
            until the next call.
        """
        segments, tokens, _ = k_STD.shape
        if tokens == 1 and valid_ST is None and k_STD.is_cuda:
            from hcache.kernels.append import append

            append(k_STD[:, 0], v_STD[:, 0], self.keys, self.values, self.first, self.lengths)
            return self.lengths.unsqueeze(1)
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

    def settle(self, room: Room) -> None:
        """Take the sizes of this room from now on, once what the store is to hold is known.

        The buffers move to do so, unless they have these sizes; it counts as the first place they have.
        """
        self._room, self.moves = room, 0
        granules = [slots // self._granule for slots in self._capacity]
        total = self._granule * room.size("granules", sum(granules))
        longest = self._granule * room.size("longest", max(granules))
        if (total, longest) == (self.keys.shape[0], self.longest):
            return
        keys, values, offsets, self.moves = self.keys, self.values, self.offsets, -1
        self._allocate(self._spare)
        for s, (first, bound) in enumerate(zip(offsets, self._bounds, strict=True)):
            self.write(s, 0, keys[first : first + bound], values[first : first + bound])

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one segment."""
        return 2 * self._dim * self.keys.element_size()

    def ragged(self) -> Ragged:
        """The store as the attention backends read it."""
        return Ragged(self.keys, self.values, self._owner, self._start, self.first, self.longest)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the live buffers: payload (K, V of stored tokens), metadata, reserved (unused slots)."""
        payload = int(self.lengths.sum()) * self.token_bytes
        tables = (self.lengths, self._owner, self._start, self.first)
        buffers = self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()
        metadata = sum(t.untyped_storage().nbytes() for t in tables)
        return {"payload": payload, "metadata": metadata, "reserved": buffers - payload}
