"""The embedded model's shape, its initial weights, and the exact-answer score of a model on held-out items.

The recipe's architecture: 6 layers, 8 query and 4 KV heads of 32, hidden size 256, bytes as tokens. Knows
nothing of optimisers, schedules or files.
"""

from __future__ import annotations

from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hcache.tiny.batches import Items

VOCABULARY = 272
PAD, BOS, EOS = 256, 257, 258
EVAL_TOKENS = 131072  # of one forward pass while scoring


class Score(TypedDict):
    """Shares, 0 to 1: whole answers exactly right, and asked keys answered exactly right; n answers."""

    exact: float
    values: float
    n: int


def tiny_config() -> LlamaConfig:
    """The shape of the embedded model."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        initializer_range=0.06,  # 1 / sqrt(hidden); with .02 recall is found too late
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        use_cache=False,
    )


def new_model(seed: int, device: torch.device | None = None) -> LlamaForCausalLM:
    """Fresh float32 weights from `seed`, the same on every device."""
    torch.manual_seed(seed)
    model: nn.Module = LlamaForCausalLM(tiny_config())
    return cast(LlamaForCausalLM, model.to(device=device, dtype=torch.float32))


def _embedding(model: LlamaForCausalLM) -> Tensor:
    """The byte embedding [vocabulary, hidden], which is also the output layer."""
    return cast(Tensor, model.get_input_embeddings().weight)


def rounded_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A bfloat16 copy on the model's device, without gradients.

    Only parameters are rounded, as when loading a checkpoint: rotary frequencies in bfloat16 would lose
    positions.
    """
    rounded = new_model(0, model.device).eval().requires_grad_(False)
    with torch.no_grad():
        for target, source in zip(rounded.parameters(), model.parameters(), strict=True):
            target.data = source.to(torch.bfloat16)
    return rounded


def next_byte_logits(model: LlamaForCausalLM, tokens_BT: Tensor, positions: Tensor) -> Tensor:
    """Logits [len(positions), vocabulary] after the given flat positions (row * T + column)."""
    hidden = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state.flatten(0, 1)
    return nn.functional.linear(hidden.index_select(0, positions), _embedding(model))


@torch.no_grad()
def score_items(model: LlamaForCausalLM, items: Items) -> Score:
    """Exact answers under teacher forcing, the same as of greedy decoding: one wrong byte fails either.

    `values` counts an asked key as right if its bytes are, given the right answer so far.
    """
    length = items.tokens.shape[1]
    rows = max(1, EVAL_TOKENS // length)
    exact = right = asked = 0
    for first in range(0, len(items.tokens), rows):
        hits_BT = _hits(model, torch.from_numpy(items.tokens[first : first + rows]))
        for row, hits_T in enumerate(hits_BT, start=first):
            exact += bool(hits_T[items.starts[row] :].all())
            right += sum(bool(hits_T[start:stop].all()) for start, stop in items.values[row])
            asked += len(items.values[row])
    return Score(exact=exact / len(items.tokens), values=right / asked, n=len(items.tokens))


def _hits(model: LlamaForCausalLM, tokens_BT: Tensor) -> Tensor:
    """[B, T] bool on the CPU: the byte is the most likely one after those before it (the first is no hit)."""
    tokens_BT = tokens_BT.to(model.device).long()
    hidden = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
    tail = min(256, tokens_BT.shape[1] - 1)  # no answer is longer
    guess = nn.functional.linear(hidden[:, -tail - 1 : -1], _embedding(model)).argmax(-1)
    hits_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    hits_BT[:, -tail:] = guess == tokens_BT[:, -tail:]
    return hits_BT.cpu()
