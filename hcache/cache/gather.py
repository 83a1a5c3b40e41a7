"""Copy single rows between buffers, straight from pinned host memory where the target is on a GPU.

A host that gathers first and copies then is five times slower than the whole zero-copy gather, and would need
the indices on the host, so the device would have to wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PROGRAMS = 64
"""Programs of a launch, at most: enough to keep PCIe busy, few enough to run beside other kernels."""


def copy_rows(
    pairs: Sequence[tuple[Tensor, Tensor]],
    rows: Tensor,
    slots: Tensor,
    wanted: Tensor | None = None,
    programs: int = PROGRAMS,
    count: Tensor | None = None,
) -> None:
    """target[slots[i]] = source[rows[i]] for each i that is wanted and each pair. No host synchronisation.

    Args:
        pairs: one or two (source [N, D], target [M, D]); a source is on the target's device or in pinned host
            memory.
        rows: [R] int64 on the target's device.
        slots: [R] int64; those of wanted rows are all different.
        wanted: [R] bool, None for all. Rows and slots that are not wanted must exist all the same.
        programs: how much of a GPU the copy may take.
        count: an int64 number on the target's device; grows by the rows that were wanted.
    """
    if rows.is_cuda:
        from hcache.kernels.rows import copy_rows as launch

        launch(pairs, rows, slots, wanted, programs, count)
        return
    if count is not None:
        count += rows.numel() if wanted is None else wanted.sum()
    if rows.numel() == 0:
        return
    if wanted is not None:
        # What isn't wanted does again what the first wanted row does, or writes back what is there.
        first, some = wanted.int().argmax().unsqueeze(0), wanted.any()
        rows, slots = torch.where(wanted, rows, rows[first]), torch.where(wanted, slots, slots[first])
    for source, target in pairs:
        fresh = source.index_select(0, rows)
        if wanted is not None:
            fresh = torch.where(some, fresh, target.index_select(0, slots))
        target.index_copy_(0, slots, fresh)


def copy_lists(
    pairs: Sequence[tuple[Tensor, Tensor]],
    counts_Q: Tensor,
    listed_QK: Tensor,
    *,
    look_up: bool = True,
    source_first_Q: Tensor | None = None,
    target_first_Q: Tensor | None = None,
    programs: int = PROGRAMS,
    count: Tensor | None = None,
) -> None:
    """target[target_first[q] + i] = source[source_first[q] + listed[q, i]] for i < counts[q] and each pair.

    No host synchronisation. On a GPU rows behind a list's count cost nothing.

    Args:
        pairs, programs, count: see copy_rows.
        counts_Q: [Q] int64, at most K.
        listed_QK: int32; only its shape counts if not `look_up`. Behind a list's count there is some row of
            the list's source.
        look_up: False takes row i for listed[q, i].
        source_first_Q, target_first_Q: [Q] int64, first row of each list's source and target; K * q if None.
    """
    if counts_Q.is_cuda:
        from hcache.kernels.rows import copy_lists as launch

        launch(
            pairs, counts_Q, listed_QK, look_up=look_up, source_first_Q=source_first_Q,
            target_first_Q=target_first_Q, programs=programs, count=count,
        )  # fmt: skip
        return
    lists, room = listed_QK.shape
    place_K = torch.arange(room, device=counts_Q.device)
    first_Q = torch.arange(lists, device=counts_Q.device) * room
    source_Q = first_Q if source_first_Q is None else source_first_Q
    target_Q = first_Q if target_first_Q is None else target_first_Q
    rows_QK = source_Q.unsqueeze(1) + (listed_QK if look_up else place_K)
    slots_QK = target_Q.unsqueeze(1) + place_K
    wanted_QK = place_K < counts_Q.unsqueeze(1)
    copy_rows(pairs, rows_QK.flatten(), slots_QK.flatten(), wanted_QK.flatten(), programs, count)
