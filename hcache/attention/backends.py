"""Attention backends: exact causal attention over a prompt, and attention over a ragged store.

Knows tensors and lengths; nothing of methods, roles or models. Every backend agrees with `reference` within
rounding on every layout.

Shapes: B batch, T tokens of this call, Hq query heads, H KV heads, G = Hq/H, D head dim, S = B*H segments
(one a sequence and KV head), C chunks of CHUNK slots, W = G*T query rows of a segment.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

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
        start: [C] int64, first slot of each chunk, counted from its segment's own first slot.
        offsets: S host integers, first slot of each segment in the buffers.
    """

    keys: Tensor
    values: Tensor
    owner: Tensor
    start: Tensor
    offsets: list[int]


class Backend(Protocol):
    """Scores are q.k / sqrt(D); softmax is in float32 or better."""

    def prefill(self, q_BHqTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        """Exact causal attention without pads. Returns [B, Hq, T, D]."""
        ...

    def decode(self, q_BHqTD: Tensor, ragged: Ragged, limits_ST: Tensor) -> Tensor:
        """Attention of query t of segment s over the first `limits_ST[s, t]` slots of that segment.

        Returns [B, Hq, T, D]; rows with limit 0 are zero.
        """
        ...

    def decode_weighed(self, q_BHq1D: Tensor, ragged: Ragged, limits_S1: Tensor) -> tuple[Tensor, Tensor]:
        """`decode` of one query token, and its attention weights [slots, G] float32, 0 beyond the limits."""
        ...


def to_segments(q_BHqTD: Tensor, segments: int) -> Tensor:
    """[B, Hq, T, D] -> [S, G*T, D]: the query rows that share one KV head, group-major."""
    return q_BHqTD.reshape(segments, -1, q_BHqTD.shape[-1])


class ReferenceBackend:
    """Plain torch in float32, one segment at a time: slow, obvious, the truth."""

    def prefill(self, q_BHqTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        group = q_BHqTD.shape[1] // k_BHTD.shape[1]
        k, v = (x.float().repeat_interleave(group, dim=1) for x in (k_BHTD, v_BHTD))
        tokens, dim = q_BHqTD.shape[-2:]
        scores = q_BHqTD.float() @ k.transpose(-1, -2) * dim**-0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=k.device).triu(1)
        return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).to(q_BHqTD.dtype)

    def decode(self, q_BHqTD: Tensor, ragged: Ragged, limits_ST: Tensor) -> Tensor:
        segments, tokens = limits_ST.shape
        out = torch.zeros_like(to_segments(q_BHqTD, segments))
        for s, first in enumerate(ragged.offsets):
            rows = to_segments(q_BHqTD, segments)[s].float().unflatten(0, (-1, tokens))
            for t, limit in enumerate(limits_ST[s].tolist()):
                if limit:
                    k = ragged.keys[first : first + limit].float()
                    v = ragged.values[first : first + limit].float()
                    weights = (rows[:, t] @ k.T * k.shape[-1] ** -0.5).softmax(-1)
                    out[s].unflatten(0, (-1, tokens))[:, t] = (weights @ v).to(out.dtype)
        return out.view_as(q_BHqTD)

    def decode_weighed(self, q_BHq1D: Tensor, ragged: Ragged, limits_S1: Tensor) -> tuple[Tensor, Tensor]:
        rows_SGD = to_segments(q_BHq1D, limits_S1.shape[0]).float()
        weights = torch.zeros(ragged.keys.shape[0], rows_SGD.shape[1], device=q_BHq1D.device)
        for rows_GD, first, limit in zip(rows_SGD, ragged.offsets, limits_S1[:, 0].tolist(), strict=True):
            logits = ragged.keys[first : first + limit].float() @ rows_GD.T * rows_GD.shape[1] ** -0.5
            weights[first : first + limit] = logits.softmax(0)
        return self.decode(q_BHq1D, ragged, limits_S1), weights


class SdpaBackend:
    """torch's scaled_dot_product_attention over the prompt, a batched product over chunks when decoding."""

    def prefill(self, q_BHqTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        grouped = q_BHqTD.shape[1] != k_BHTD.shape[1]
        return F.scaled_dot_product_attention(q_BHqTD, k_BHTD, v_BHTD, is_causal=True, enable_gqa=grouped)

    def decode(self, q_BHqTD: Tensor, ragged: Ragged, limits_ST: Tensor) -> Tensor:
        """All chunks in one product, for as many query tokens at a time as the scratch allows."""
        group = q_BHqTD.shape[0] * q_BHqTD.shape[1] // limits_ST.shape[0]
        numbers = ragged.owner.numel() * group * (CHUNK + q_BHqTD.shape[-1])
        block = max(1, SCRATCH_NUMBERS // max(numbers, 1))
        blocks = [slice(t, t + block) for t in range(0, limits_ST.shape[1], block)]
        outs = [self._merge(q_BHqTD[:, :, now], ragged, limits_ST[:, now])[0] for now in blocks]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def decode_weighed(self, q_BHq1D: Tensor, ragged: Ragged, limits_S1: Tensor) -> tuple[Tensor, Tensor]:
        out, weights_CGN, total_SG = self._merge(q_BHq1D, ragged, limits_S1)
        weights_CGN = weights_CGN / total_SG[ragged.owner].unsqueeze(-1)
        return out, weights_CGN.transpose(1, 2).flatten(0, 1)

    def _merge(self, q_BHqTD: Tensor, ragged: Ragged, limits_ST: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A softmax a segment, merged from the maxima and sums of its chunks, in float32 throughout.

        Returns the output, the chunks' unnormalised weights [C, W, N] and their sums a segment [S, W].
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
        return out_SWD.to(q_BHqTD.dtype).view_as(q_BHqTD), weights_CWN, total_SW


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


BACKENDS: dict[str, Backend] = {"reference": ReferenceBackend(), "sdpa": SdpaBackend()}


@lru_cache(maxsize=1)
def _fastest() -> str:
    """What `auto` stands for; logged once."""
    log.info("attention backend: sdpa (chosen by auto)")
    return "sdpa"


def resolve(name: str = "auto") -> tuple[str, Backend]:
    """The backend called `name` and its real name; `auto` takes the fastest that is available and logs it.

    Raises:
        ValueError: no such backend.
    """
    if name == "auto":
        name = _fastest()
    if name not in BACKENDS:
        raise ValueError(unknown_name("attention backend", name, [*BACKENDS, "auto"]))
    return name, BACKENDS[name]
