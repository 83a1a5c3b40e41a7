"""The flash-attn package as an attention backend (`model.attention=flash_attn`).

A ragged store is flash-attn's paged cache of one KV head: every segment is a sequence, its query heads are
the heads, and its pages of 256 slots follow one another. What flash-attn has not, several tokens that see
different lengths and attention weights, is the sdpa backend's. The package is looked for when the backend is
made.

Shapes: B batch, T tokens of this call, Hq query heads, H KV heads, G = Hq/H, D head dim, S = B*H segments,
R rows that a step reads (S, or a multiple of it), M pages of the longest segment.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hcache.attention.backends import Pages, Ragged, SdpaBackend, gathered, to_segments

log = logging.getLogger(__name__)

PAGE = 256
"""Slots of a page, the least that flash-attn takes."""

LARGEST_HEAD = 256


class FlashBackend(SdpaBackend):
    """`flash_attn_func` over the prompt, `flash_attn_with_kvcache` over the store.

    Raises:
        ValueError: flash-attn is not installed, or not for this torch.
    """

    granule = PAGE

    def __init__(self) -> None:
        flash_attn = _package()
        self._attend, self._attend_cache = flash_attn.flash_attn_func, flash_attn.flash_attn_with_kvcache

    def prefill(self, q_BHqTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        refuse(q_BHqTD)
        q, k, v = (x.transpose(1, 2) for x in (q_BHqTD, k_BHTD, v_BHTD))
        return self._attend(q, k, v, causal=True).transpose(1, 2)

    def decode(
        self, q_BHqTD: Tensor, ragged: Ragged, limits_ST: Tensor, pages: Pages | None = None
    ) -> Tensor:
        """No host synchronisation; shapes and the number of splits depend on the store's size alone."""
        if limits_ST.shape[1] > 1:
            return super().decode(q_BHqTD, ragged, limits_ST, pages)
        refuse(q_BHqTD)
        rows, dim = limits_ST.shape[0], q_BHqTD.shape[-1]
        if pages is None:
            table, shape = _table(ragged), (-1, PAGE, 1, dim)
        else:
            _say_that_pages_are_copied()
            ragged, table, shape = gathered(ragged, pages), None, (rows, -1, 1, dim)
        out_R1GD = self._attend_cache(
            to_segments(q_BHqTD, rows).unsqueeze(1),
            ragged.keys.view(shape),
            ragged.values.view(shape),
            cache_seqlens=limits_ST[:, 0].int(),
            block_table=table,
        )
        return out_R1GD.view(q_BHqTD.shape)


def _table(ragged: Ragged) -> Tensor:
    """Pages of each segment [S, M] int32, in order; behind its last one they are another's and never read."""
    assert ragged.keys.shape[0] % PAGE == 0
    assert ragged.longest % PAGE == 0
    pages = torch.arange(ragged.longest // PAGE, dtype=torch.int32, device=ragged.first.device)
    return (ragged.first // PAGE).int().unsqueeze(1) + pages


def refuse(q: Tensor) -> None:
    """Raise ValueError for what flash-attn can't do."""
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.is_cuda:
        raise ValueError(
            f"model.attention=flash_attn needs float16 or bfloat16 on a CUDA device, got {q.dtype} on "
            f"{q.device}; load the model in bfloat16 on a GPU, or choose model.attention=sdpa"
        )
    if q.shape[-1] % 8 or q.shape[-1] > LARGEST_HEAD:
        raise ValueError(
            "model.attention=flash_attn needs a head dim that is a multiple of 8 and at most "
            f"{LARGEST_HEAD}, the model has {q.shape[-1]}; choose model.attention=sdpa"
        )


def _package() -> Any:
    try:
        import flash_attn
    except ImportError as error:
        raise ValueError(
            f"model.attention=flash_attn needs the package flash-attn, built for torch {torch.__version__} "
            f"({error}); pip install 'hcache[flash]', or choose model.attention=sdpa"
        ) from error
    return flash_attn


@cache
def _say_that_pages_are_copied() -> None:
    log.warning(
        "model.attention=flash_attn reads pages of %d tokens; the smaller ones that this method selects are "
        "copied together in every step",
        PAGE,
    )
