"""A buffer of a step's choice: what is chosen and held already stays where it is, newcomers take the slots of
what leaves, and only they are fetched.

A row of the buffer has M slots. Slot m holds one unit, a run of tokens of the prompt, known by a number below
`most`; slots that a row doesn't use hold `most` itself. Knows numbers, slots and stores; nothing of scores or
methods.

Shapes: X rows, each the choice of one segment or of several neighbours (S segments, S/X a row); M slots of a
row, K numbers that can be chosen, R = M * size tokens of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hcache.cache.offload import HostRows
from hcache.cache.store import RaggedStore
from hcache.kernels.fused import fused


class Changed(NamedTuple):
    """Slots that got another unit: the first `counts_X[x]` of `places_XM[x]`; the rest are any slots."""

    places_XM: Tensor
    counts_X: Tensor


def best(scores_XK: Tensor, counts_X: Tensor, width: int) -> Tensor:
    """Numbers [X, width] of the `counts_X[x]` largest scores in any order, ties to the lower; K behind them.

    No host synchronisation.

    Args:
        scores_XK: [X, K] float32, contiguous.
        counts_X: [X] int32 or int64, at most min(K, width) each.
    """
    tokens = scores_XK.shape[1]
    assert width <= tokens
    if fused(scores_XK):
        from hcache.kernels.select import MOST, select

        if tokens <= MOST:
            return select(scores_XK, counts_X, width)
    order_XM = scores_XK.sort(dim=1, descending=True, stable=True).indices[:, :width]
    unused_XM = torch.arange(width, device=order_XM.device) >= counts_X.unsqueeze(1)
    return order_XM.masked_fill(unused_XM, tokens).int()


def exchange(
    held_XM: Tensor, wanted_XM: Tensor, most: int, moved_X: Tensor, valid_X: Tensor | None = None
) -> Changed:
    """Put what is wanted and not held into the slots of what is held and not wanted. No host synchronisation.

    Args:
        held_XM: [X, M] int32, changed in place.
        wanted_XM: [X, M] int32, of each row as many different numbers as it holds.
        most: what unused slots hold.
        moved_X: [X] int64, grows by the units that came.
        valid_X: [X] bool, rows that change; None for all.
    """
    if fused(held_XM):
        from hcache.kernels.exchange import exchange as exchange_by_kernel

        return Changed(*exchange_by_kernel(held_XM, wanted_XM, most, moved_X, valid_X))
    leaving_XM = ~_listed(wanted_XM, most).gather(1, held_XM.long())
    coming_XM = ~_listed(held_XM, most).gather(1, wanted_XM.long())
    if valid_X is not None:
        leaving_XM = leaving_XM & valid_X.unsqueeze(1)
    # As many come as leave: the k-th slot that is left takes the k-th newcomer.
    newcomers_XM = _first_ones(wanted_XM, coming_XM)
    turn_XM = (leaving_XM.cumsum(1) - 1).clamp_min(0)
    held_XM.copy_(torch.where(leaving_XM, newcomers_XM.gather(1, turn_XM), held_XM))
    counts_X = leaving_XM.sum(1)
    moved_X += counts_X
    slots_XM = torch.arange(held_XM.shape[1], dtype=torch.int32, device=held_XM.device).expand_as(held_XM)
    return Changed(_first_ones(slots_XM, leaving_XM), counts_X.int())


def _listed(numbers_XM: Tensor, most: int) -> Tensor:
    """[X, most + 1] bool, True where a number is listed."""
    marks = torch.zeros(numbers_XM.shape[0], most + 1, dtype=torch.bool, device=numbers_XM.device)
    return marks.scatter_(1, numbers_XM.long(), True)


def _first_ones(numbers_XM: Tensor, chosen_XM: Tensor) -> Tensor:
    """Each row's chosen numbers in their order, then zeros."""
    width = numbers_XM.shape[1]
    place_XM = torch.where(chosen_XM, chosen_XM.cumsum(1) - 1, width)
    # One place more takes what is not chosen.
    return numbers_XM.new_zeros(numbers_XM.shape[0], width + 1).scatter_(1, place_XM, numbers_XM)[:, :-1]


class Tokens(NamedTuple):
    """Tokens of the changed slots, segment by segment; where not wanted, token 0 in slot 0."""

    positions_SR: Tensor
    slots_SR: Tensor
    wanted_SR: Tensor


def changed_tokens(units_XM: Tensor, changed: Changed, size: int, segments: int) -> Tokens:
    """The tokens of changed units, all that there could be: shapes don't depend on how many changed.

    Args:
        units_XM: the unit that each slot holds; its tokens begin at `size` times its number.
    """
    places_XM = changed.places_XM.long()
    wanted_XM = torch.arange(places_XM.shape[1], device=places_XM.device) < changed.counts_X.unsqueeze(1)
    within = torch.arange(size, device=places_XM.device)
    wanted_XR = wanted_XM.repeat_interleave(size, dim=1)
    positions_XR, slots_XR = (
        (numbers_XM.long().unsqueeze(-1) * size + within).flatten(1).masked_fill(~wanted_XR, 0)
        for numbers_XM in (units_XM.gather(1, places_XM), places_XM)
    )
    share = segments // units_XM.shape[0]
    return Tokens(*(x.repeat_interleave(share, dim=0) for x in (positions_XR, slots_XR, wanted_XR)))


def fetch(host: HostRows, store: RaggedStore, units_XM: Tensor, changed: Changed, size: int = 1) -> None:
    """Bring the tokens of changed units into the first slots of every segment. No host synchronisation."""
    if fused(units_XM):
        from hcache.kernels.fetch import fetch as fetch_by_kernel

        pairs = [(host.values, store.values)]
        pairs += [] if host.keys is None else [(host.keys, store.keys)]
        fetch_by_kernel(pairs, host.first, store.first, units_XM, *changed, size)
        return
    positions_SR, slots_SR, wanted_SR = changed_tokens(units_XM, changed, size, len(store.first))
    # A segment without rows, last in the batch, would point behind the end; nothing of it is wanted.
    rows_SR = (host.first.unsqueeze(1) + positions_SR).clamp_max(host.values.shape[0] - 1)
    slots_SR = store.first.unsqueeze(1) + slots_SR
    host.load(rows_SR.flatten(), store, slots_SR.flatten(), wanted_SR.flatten())
