"""The contract on a GPU: `pytest -m gpu tests/test_cuda.py`; torch and transformers are enough."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hcache import Generator
from tests.contract.cases import CASES, Case
from tests.tiny_models import prompts, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return copy.deepcopy(tiny_model("llama", 4)).to("cuda", request.param)


def test_a_budget_for_everything_equals_the_full_cache(case: Case, model: PreTrainedModel) -> None:
    ids, mask = (x.cuda() for x in prompts(4, 90, padded=True))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, full = case.cache(model, 200), DynamicCache(config=model.config)
    tolerance = 1e-5 if model.dtype is torch.float32 else 3e-2
    with torch.inference_mode():
        for _ in range(20):
            ours, theirs = (
                model(ids, attention_mask=mask, position_ids=positions, past_key_values=c).logits[:, -1]
                for c in (cache, full)
            )
            assert (ours - theirs).norm() / theirs.norm() < tolerance
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            ids, positions = theirs.argmax(-1, keepdim=True), positions[:, -1:] + 1


def test_generate_and_generator_agree_when_compressed(case: Case) -> None:
    model = copy.deepcopy(tiny_model("llama", 4)).cuda()
    ids, mask = (x.cuda() for x in prompts(3, 90, padded=True))
    cache = case.cache(model, 0.5)
    theirs = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30, do_sample=False
    )
    ours = Generator(model, case.make(model), 0.5).generate(ids, mask, 30)
    assert torch.equal(ours.tokens, theirs[:, 90:].cpu())
    assert ours.memory.peak_device_bytes is not None
    assert ours.memory.peak_device_bytes > ours.memory.device_payload


def test_freeing_the_cache_lowers_allocated_memory_by_its_bytes(case: Case, model: PreTrainedModel) -> None:
    ids, _ = prompts(2, 4000)
    with torch.inference_mode():
        model(ids.cuda()[:, :64])
    gc.collect()
    cache = case.cache(model, 0.5)
    with torch.inference_mode():
        model(ids.cuda(), past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    device = sum(cache.nbytes()["device"].values())
    gc.collect()  # models of earlier tests
    before = requested()
    del cache
    gc.collect()
    assert before - requested() == pytest.approx(device, rel=0.01)


def requested() -> int:
    """Bytes asked of the CUDA allocator and not yet freed, without its rounding to whole blocks."""
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def test_satellites_wait_in_host_memory_and_come_back(model: PreTrainedModel) -> None:
    always = CASES[-1]
    ids, _ = prompts(1, 300)
    out = Generator(model, always.make(model), 0.5).generate(ids, max_new_tokens=20)
    assert out.memory.host_payload > 0
    assert out.counters["triggers"] > 0
    assert out.counters["host_to_device_bytes"] > 0
