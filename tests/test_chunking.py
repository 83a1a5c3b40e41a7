"""MLPs and norms in pieces: the same numbers, less memory, always switched back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hcache import KVCache
from hcache.contract.tiny_models import FAMILIES, prompts, tiny_model
from hcache.models.chunking import chunked_mlps, tokenwise_modules
from tests.operations import Operations

MODELS = pytest.mark.parametrize("family", FAMILIES)


def logits(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.inference_mode():
        return model(ids, **arguments).logits


def own_forwards(model: nn.Module) -> dict[str, Any]:
    """Forwards that sit on instances; classes' own don't show here."""
    return {name: part.__dict__["forward"] for name, part in model.named_modules() if "forward" in vars(part)}


def lengths_seen(model: nn.Module, run: Callable[[], Any]) -> list[int]:
    """Tokens of each call of the linear maps inside the MLPs and of each norm's own code."""
    seen: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[0] * args[0].shape[1])

    inside = [part for name, part in model.named_modules() if ".mlp." in name and not list(part.children())]
    handles = [part.register_forward_pre_hook(note) for part in inside]
    run()
    for handle in handles:
        handle.remove()
    return seen


@MODELS
@pytest.mark.parametrize("tokens", [1, 7, 16, 70, 200])
@pytest.mark.parametrize("batch", [1, 3])
def test_pieces_give_the_same_numbers(family: str, tokens: int, batch: int) -> None:
    model = tiny_model(family)
    ids, mask = prompts(batch, 70, padded=batch > 1)
    expected = logits(model, ids, attention_mask=mask)
    with chunked_mlps(model, tokens):
        torch.testing.assert_close(logits(model, ids, attention_mask=mask), expected, rtol=1e-5, atol=1e-5)


@MODELS
def test_norms_in_pieces_give_the_same_bits(family: str) -> None:
    model = tiny_model(family)
    norms = [part for part in tokenwise_modules(model) if "Norm" in type(part).__name__]
    assert len(norms) == {"llama": 5, "qwen2": 5, "qwen3": 9}[family]
    for norm in norms:
        x = torch.randn(2, 50, 3, norm.weight.shape[0])
        whole = norm(x)
        with chunked_mlps(model, 14):
            assert torch.equal(norm(x), whole)


@pytest.mark.parametrize(("batch", "largest"), [(1, 16), (3, 15), (20, 20)])
def test_no_piece_is_larger_than_asked(batch: int, largest: int) -> None:
    """The tokens of all sequences together; one of each sequence is the least."""
    model = tiny_model()
    ids, _ = prompts(batch, 70)
    with chunked_mlps(model, 16):
        seen = lengths_seen(model, lambda: logits(model, ids))
    assert max(seen) == largest
    per_map = len(seen) // sum(".mlp." in name for name, _ in model.named_modules())
    assert per_map == -(-70 // (largest // batch))


def test_a_prompt_that_fits_and_a_single_token_go_as_they_always_do() -> None:
    model = tiny_model()
    with chunked_mlps(model, 16):
        assert set(lengths_seen(model, lambda: logits(model, prompts(1, 16)[0]))) == {16}
        assert set(lengths_seen(model, lambda: logits(model, prompts(1, 1)[0]))) == {1}


def test_less_memory_is_alive_at_one_time() -> None:
    """An MLP twelve times as wide as the hidden state: in pieces its own tensors hardly show."""
    model = wide_model()
    ids, _ = prompts(1, 512)
    peaks = []
    for tokens in (512, 32):
        with chunked_mlps(model, tokens), Operations() as operations, torch.no_grad():
            model(ids, logits_to_keep=1)
        peaks.append(operations.peak_bytes)
    hidden = 512 * 64 * 4
    assert peaks[0] > 24 * hidden
    assert peaks[1] < 12 * hidden


def wide_model() -> PreTrainedModel:
    config = copy.deepcopy(tiny_model().config)
    config.intermediate_size = 12 * config.hidden_size
    return type(tiny_model())(config).eval()


def test_a_compressed_cache_keeps_the_same_positions() -> None:
    model = tiny_model()
    ids, _ = prompts(2, 70)
    whole, pieces = (KVCache(model, "snapkv", 0.5, window=8) for _ in range(2))
    expected = logits(model, ids, past_key_values=whole)
    with chunked_mlps(model, 9):
        torch.testing.assert_close(logits(model, ids, past_key_values=pieces), expected, rtol=1e-5, atol=1e-5)
    for layer in range(2):
        for a, b in zip(whole.kept(layer), pieces.kept(layer), strict=True):
            assert [h.tolist() for h in a] == [h.tolist() for h in b]


def test_it_is_always_switched_back() -> None:
    model = copy.deepcopy(tiny_model())
    with chunked_mlps(model, 8):
        inside = own_forwards(model)
    assert own_forwards(model) == {}
    assert "model.layers.0.mlp" in inside
    assert "model.norm" in inside
    with pytest.raises(RuntimeError, match="in the middle"), chunked_mlps(model, 8):
        raise RuntimeError("in the middle")
    assert own_forwards(model) == {}
    with chunked_mlps(model, 8), chunked_mlps(model, 4):
        pass
    assert own_forwards(model) == {}


def test_a_forward_that_was_on_an_instance_comes_back() -> None:
    """accelerate's offloading puts one there."""
    model = copy.deepcopy(tiny_model())
    mlp = model.model.layers[0].mlp
    theirs = mlp.forward
    seen: list[int] = []

    def moved(x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return theirs(x)

    mlp.forward = moved
    with chunked_mlps(model, 30):
        logits(model, prompts(1, 70)[0])
    assert seen == [30, 30, 10]
    assert own_forwards(model) == {"model.layers.0.mlp": moved}


def test_another_model_of_the_class_is_left_alone() -> None:
    model, other = tiny_model(), copy.deepcopy(tiny_model())
    with chunked_mlps(model, 8):
        assert own_forwards(other) == {}
        assert max(lengths_seen(other, lambda: logits(other, prompts(1, 70)[0]))) == 70


def test_other_decoders_with_an_mlp_and_layer_norms() -> None:
    config = GPTNeoXConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=101
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config).eval()
    ids, _ = prompts(2, 70)
    expected = logits(model, ids)
    with chunked_mlps(model, 16):
        assert max(lengths_seen(model, lambda: logits(model, ids))) == 16
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_experts_keep_the_whole_prompt() -> None:
    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=101,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    found = tokenwise_modules(model)
    assert not [part for part in found if "Norm" not in type(part).__name__]
    assert len(found) == 9


class Mixture(nn.Module):
    """Tokens may compete for the room that experts have."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.add_module(part, nn.Linear(64, 64))


@pytest.mark.parametrize("part", ["router", "experts", "shared_expert_gate", "gate"])
def test_names_tell_of_experts(part: str) -> None:
    model = copy.deepcopy(tiny_model())
    before = len(tokenwise_modules(model))
    model.model.layers[1].mlp = Mixture(part)
    assert len(tokenwise_modules(model)) == before - 1


class Pair(nn.Module):
    """An MLP whose name gives nothing away, and which returns something beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(x.shape[1])
        return x, x.sum()


def test_what_is_not_one_tensor_a_token_is_said_and_taken_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(tiny_model())
    pair = model.model.layers[1].mlp = Pair()
    x = torch.randn(1, 70, 64)
    with chunked_mlps(model, 16):
        out, total = pair(x)
    assert torch.equal(out, x)
    assert torch.equal(total, x.sum())
    assert pair.calls == [16, 70]
    assert "Pair does not return a tensor a token" in caplog.text


def test_no_tokens_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"), chunked_mlps(tiny_model(), 0):
        pass
