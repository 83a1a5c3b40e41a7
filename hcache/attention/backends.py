"""Attention backends: exact causal attention over a prompt, and attention over a ragged store.

Knows tensors and lengths; nothing of methods, roles or models. Every backend agrees with `reference` within
rounding on every layout.

Shapes: B batch, T tokens of this call, Hq query heads, H KV heads, G = Hq/H, D head dim, S = B*H segments
(one a sequence and KV head), C chunks of CHUNK slots, W = G*T query rows of a segment.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hcache.registry import unknown_name

log = logging.getLogger(__name__)

CHUNK = 64
"""Slots of a chunk. A segment starts on a chunk boundary and owns whole chunks."""

SCRATCH_NUMBERS = 2**26
"""float32 numbers of scratch that attending several query tokens at once may take, 256 MiB."""


@dataclass
class Ragged:
    """What one call attends to: flat buffers cut into chunks, each owned by one segment.

    Args:
        keys, values: [slots, D]; slots is a multiple of CHUNK.
        owner: [C] int64, segment of each chunk; chunks of a segment are consecutive.
        start: [C] int64, first slot of each chunk, counted from its segment's own first slot; behind every
            limit for chunks that are nobody's.
        first: [S] int64, first slot of each segment in the buffers.
        longest: slots that the longest segment owns, on the host.
    """

    keys: Tensor
    values: Tensor
    owner: Tensor
    start: Tensor
    first: Tensor
    longest: int


@dataclass
class Pages:
    """A choice of pages of a store, as which a step reads it.

    Args:
        table: [R, M] int32, pages in the order in which row r reads them, counted within its segment; R is
            S, or a multiple of it where several rows share a segment.
        size: tokens of a page; it divides CHUNK.
    """

    table: Tensor
    size: int


class Backend(Protocol):
    """Scores are q.k / sqrt(D); softmax is in float32 or better.

    Attributes:
        granule: slots on a multiple of which the segments of a store begin and end.
    """

    granule: int

    def prefill(self, q_BHqTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        """Exact causal attention without pads. Returns [B, Hq, T, D]."""
        ...

    def decode(
        self, q_BHqTD: Tensor, ragged: Ragged, limits_ST: Tensor, pages: Pages | None = None
    ) -> Tensor:
        """Attention of query t of segment s over the first `limits_ST[s, t]` slots of that segment.

        With `pages` T is 1, and limits are [R, 1]: row r sees the first so many slots of its pages.
        Returns [B, Hq, T, D]; rows with limit 0 are zero.
        """
        ...

    def decode_scored(
        self, q_BHq1D: Tensor, ragged: Ragged, limits_S1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`decode` of one query token, its logits [slots, G] and, of each softmax, the logarithm of the
        denominator [S, G]; float32. Logits beyond the limits are undefined.
        """
        ...


def gathered(ragged: Ragged, pages: Pages) -> Ragged:
    """Copies of chosen pages, row after row, in whole chunks."""
    rows, width = pages.table.shape
    dim, chunks = ragged.keys.shape[1], -(-width * pages.size // CHUNK)
    table = F.pad(pages.table, (0, chunks * CHUNK // pages.size - width))
    first_R = (ragged.first // pages.size).repeat_interleave(rows // ragged.first.numel())
    index = (first_R.unsqueeze(1) + table).flatten()
    keys, values = (
        x.view(-1, pages.size * dim).index_select(0, index).view(-1, dim)
        for x in (ragged.keys, ragged.values)
    )
    row = torch.arange(rows, device=keys.device)
    start = (CHUNK * torch.arange(chunks, device=keys.device)).repeat(rows)
    slots = CHUNK * chunks
    return Ragged(keys, values, row.repeat_interleave(chunks), start, slots * row, slots)


def to_segments(q_BHqTD: Tensor, segments: int) -> Tensor:
    """[B, Hq, T, D] -> [S, G*T, D]: the query rows that share one KV head, group-major."""
    return q_BHqTD.reshape(segments, -1, q_BHqTD.shape[-1])


class ReferenceBackend:
    """Plain torch in float32, one segment at a time: slow, obvious, the truth."""

    granule = CHUNK

    def prefill(self, q_BHqTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        group = q_BHqTD.shape[1] // k_BHTD.shape[1]
        k, v = (x.float().repeat_interleave(group, dim=1) for x in (k_BHTD, v_BHTD))
        tokens, dim = q_BHqTD.shape[-2:]
        scores = q_BHqTD.float() @ k.transpose(-1, -2) * dim**-0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=k.device).triu(1)
        return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).to(q_BHqTD.dtype)

    def decode(
        self, q_BHqTD: Tensor, ragged: Ragged, limits_ST: Tensor, pages: Pages | None = None
    ) -> Tensor:
        ragged = ragged if pages is None else gathered(ragged, pages)
        segments, tokens = limits_ST.shape
        out = torch.zeros_like(to_segments(q_BHqTD, segments))
        for s, first in enumerate(ragged.first.tolist()):
            rows = to_segments(q_BHqTD, segments)[s].float().unflatten(0, (-1, tokens))
            for t, limit in enumerate(limits_ST[s].tolist()):
                if limit:
                    k = ragged.keys[first : first + limit].float()
                    v = ragged.values[first : first + limit].float()
                    weights = (rows[:, t] @ k.T * k.shape[-1] ** -0.5).softmax(-1)
                    out[s].unflatten(0, (-1, tokens))[:, t] = (weights @ v).to(out.dtype)
        return out.view_as(q_BHqTD)

    def decode_scored(
        self, q_BHq1D: Tensor, ragged: Ragged, limits_S1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows_SGD = to_segments(q_BHq1D, limits_S1.shape[0]).float()
        shape = ragged.keys.shape[0], rows_SGD.shape[1]
        logits = torch.full(shape, torch.nan, device=q_BHq1D.device)
        totals_SG = torch.full(rows_SGD.shape[:2], -torch.inf, device=q_BHq1D.device)
        limits = limits_S1[:, 0].tolist()
        for s, (first, limit) in enumerate(zip(ragged.first.tolist(), limits, strict=True)):
            rows_nG = ragged.keys[first : first + limit].float() @ rows_SGD[s].T * rows_SGD.shape[-1] ** -0.5
            logits[first : first + limit], totals_SG[s] = rows_nG, rows_nG.logsumexp(0)
        return self.decode(q_BHq1D, ragged, limits_S1), logits, totals_SG


def fastest_kernels(like: Tensor) -> AbstractContextManager[Any]:
    """Where torch looks for causal attention first: cuDNN, on the devices it was measured to be fastest on.

    It takes grouped heads as they are; at 128K on an H200 it had 1.7 times the speed of torch's flash kernel.
    What it can't do torch gives to the next one; what the user switched off (torch.backends.cuda) stays off.
    """
    half = like.dtype in (torch.float16, torch.bfloat16)
    if not (like.is_cuda and half and torch.cuda.get_device_capability(like.device)[0] in (9, 10)):
        return nullcontext()
    allowed = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    return sdpa_kernel([kernel for kernel, on in allowed.items() if on], set_priority=True)


class SdpaBackend:
    """torch's scaled_dot_product_attention over the prompt, a batched product over chunks when decoding."""

    granule = CHUNK

    def prefill(self, q_BHqTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        grouped = q_BHqTD.shape[1] != k_BHTD.shape[1]
        with fastest_kernels(q_BHqTD):
            return F.scaled_dot_product_attention(q_BHqTD, k_BHTD, v_BHTD, is_causal=True, enable_gqa=grouped)

    def decode(
        self, q_BHqTD: Tensor, ragged: Ragged, limits_ST: Tensor, pages: Pages | None = None
    ) -> Tensor:
        """All chunks in one product, for as many query tokens at a time as the scratch allows."""
        ragged = ragged if pages is None else gathered(ragged, pages)
        group = q_BHqTD.shape[0] * q_BHqTD.shape[1] // limits_ST.shape[0]
        numbers = ragged.owner.numel() * group * (CHUNK + q_BHqTD.shape[-1])
        block = max(1, SCRATCH_NUMBERS // max(numbers, 1))
        blocks = [slice(t, t + block) for t in range(0, limits_ST.shape[1], block)]
        outs = [self._merge(q_BHqTD[:, :, now], ragged, limits_ST[:, now])[0] for now in blocks]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def decode_scored(
        self, q_BHq1D: Tensor, ragged: Ragged, limits_S1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, scores_CGN, totals_SG = self._merge(q_BHq1D, ragged, limits_S1)
        return out, scores_CGN.transpose(1, 2).flatten(0, 1), totals_SG

    def _merge(self, q_BHqTD: Tensor, ragged: Ragged, limits_ST: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A softmax a segment, merged from the maxima and sums of its chunks, in float32 throughout.

        Returns the output, the chunks' logits [C, W, N], and the logarithms of the denominators [S, W].
        """
        rows_SWD = to_segments(q_BHqTD, limits_ST.shape[0])
        owner = ragged.owner
        scores_CWN = _chunk_scores(rows_SWD, ragged, limits_ST)
        peak_SW = torch.full(rows_SWD.shape[:2], -torch.inf, device=owner.device)
        peak_CW = scores_CWN.amax(-1)
        peak_SW.scatter_reduce_(0, owner.unsqueeze(1).expand_as(peak_CW), peak_CW, "amax")
        # A row that sees nothing has peak -inf; 0 instead keeps exp(-inf - 0) = 0 rather than NaN.
        peak_SW = peak_SW.masked_fill(peak_SW == -torch.inf, 0.0)
        weights_CWN = (scores_CWN - peak_SW[owner].unsqueeze(-1)).exp_()
        total_SW = torch.zeros_like(peak_SW).index_add_(0, owner, weights_CWN.sum(-1))
        values_CND = ragged.values.view(-1, CHUNK, ragged.values.shape[-1]).float()
        parts_CWD = torch.bmm(weights_CWN, values_CND)
        sums_SWD = torch.zeros(rows_SWD.shape, device=owner.device).index_add_(0, owner, parts_CWD)
        total_SW = total_SW.clamp_min(torch.finfo(torch.float32).tiny)
        out_SWD = sums_SWD / total_SW.unsqueeze(-1)
        return out_SWD.to(q_BHqTD.dtype).view_as(q_BHqTD), scores_CWN, peak_SW + total_SW.log()


def _chunk_scores(rows_SWD: Tensor, ragged: Ragged, limits_ST: Tensor) -> Tensor:
    """Scaled float32 logits [C, W, CHUNK]; -inf beyond a row's limit.

    A product in bfloat16 would round logits of 20 by up to 0.06, many times what its softmax can bear.
    """
    dim = rows_SWD.shape[-1]
    keys_CDN = ragged.keys.view(-1, CHUNK, dim).transpose(1, 2).float()
    scores_CWN = torch.bmm(rows_SWD.float()[ragged.owner] * dim**-0.5, keys_CDN)
    slot_CN = ragged.start.unsqueeze(1) + torch.arange(CHUNK, device=ragged.start.device)
    hidden_CTN = slot_CN.unsqueeze(1) >= limits_ST[ragged.owner].unsqueeze(-1)
    groups = rows_SWD.shape[1] // limits_ST.shape[1]
    return scores_CWN.masked_fill_(hidden_CTN.repeat(1, groups, 1), -torch.inf)


def causal(backend: Backend, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Exact causal attention [B, Hq, T, D] among real tokens; rows of pads are zero.

    With pads every sequence is attended alone: no [T, T] mask is ever built, and a sequence gives the
    same numbers as it does outside a batch.
    """
    if valid is None:
        return backend.prefill(q, k, v)
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        real = valid[b]
        alone = (x[b : b + 1, :, real] for x in (q, k, v))
        out[b, :, real] = backend.prefill(*alone)[0]
    return out


class TritonBackend(SdpaBackend):
    """Our kernels when decoding one token, torch's attention over the prompt and over several tokens."""

    def decode(
        self, q_BHqTD: Tensor, ragged: Ragged, limits_ST: Tensor, pages: Pages | None = None
    ) -> Tensor:
        if q_BHqTD.shape[2] > 1:
            return super().decode(q_BHqTD, ragged, limits_ST, pages)
        from hcache.kernels.decode import decode

        table, size = (None, 0) if pages is None else (pages.table, pages.size)
        rows_RGD = to_segments(q_BHqTD, limits_ST.shape[0])
        out_RGD, _ = decode(
            rows_RGD,
            ragged.keys,
            ragged.values,
            ragged.first,
            limits_ST[:, 0],
            pages=table,
            page_size=size,
        )
        return out_RGD.view_as(q_BHqTD)

    def decode_scored(
        self, q_BHq1D: Tensor, ragged: Ragged, limits_S1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from hcache.kernels.decode import decode

        rows_SGD = to_segments(q_BHq1D, limits_S1.shape[0])
        shape = ragged.keys.shape[0], rows_SGD.shape[1]
        logits = torch.empty(shape, device=rows_SGD.device)
        out_SGD, totals_SG = decode(
            rows_SGD, ragged.keys, ragged.values, ragged.first, limits_S1[:, 0], logits=logits
        )
        return out_SGD.view_as(q_BHq1D), logits, totals_SG


BACKENDS: dict[str, Backend] = {
    "reference": ReferenceBackend(),
    "sdpa": SdpaBackend(),
    "triton": TritonBackend(),
}


@cache
def _fastest(device: str) -> str:
    """What `auto` stands for on a kind of device; logged once."""
    name = "triton" if device == "cuda" and find_spec("triton") else "sdpa"
    log.info("attention backend: %s (chosen by auto for %s)", name, device)
    return name


def resolve(name: str = "auto", device: str = "cpu") -> tuple[str, Backend]:
    """The backend called `name` and its real name; `auto` takes the fastest that is available and logs it.

    Args:
        device: the kind of device, cpu or cuda.

    Raises:
        ValueError: no such backend, or not on this kind of device.
    """
    if name == "auto":
        name = _fastest(device)
    if name not in (*BACKENDS, "flash_attn"):
        raise ValueError(unknown_name("attention backend", name, [*BACKENDS, "flash_attn", "auto"]))
    if name in ("triton", "flash_attn") and device != "cuda":
        raise ValueError(f"attention backend {name} needs a CUDA GPU, the model is on {device}; use auto")
    return name, _flash() if name == "flash_attn" else BACKENDS[name]


@cache
def _flash() -> Backend:
    from hcache.attention.flash import FlashBackend  # which needs this module, and its package

    return FlashBackend()
