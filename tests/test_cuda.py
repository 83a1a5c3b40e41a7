"""The contract on a GPU: `pytest -m gpu tests/test_cuda.py`; torch and transformers are enough."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hcache import Generator
from hcache.attention.backends import BACKENDS
from hcache.attention.rope import Rope
from hcache.contract.cases import CASES, Case
from hcache.contract.tiny_models import prompts, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return copy.deepcopy(tiny_model("llama", 4, layers=4)).to("cuda", request.param)


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
    model = copy.deepcopy(case.model()).cuda()
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


@contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_step_never_synchronises(case: Case, padded: bool) -> None:
    """Whole windows of HeteroCache and evictions included; masks are on the device as everything else is."""
    model = copy.deepcopy(case.model()).cuda()
    cache = case.cache(model, 0.5)
    states = cache.method.layers(cache.geometry, cache.budget, [150, 150])
    real = [torch.tensor([[True], [t % 3 != 1]], device="cuda") for t in range(40)] if padded else [None] * 40
    for state in states:
        state.backend, state.reserve_tokens = BACKENDS["sdpa"], 64
        if cache.method.needs_rope:
            state.rope = Rope.of(model)
        state.prefill(*(torch.randn(2, 4, 150, 16, device="cuda") for _ in range(3)), None)
    tokens = torch.randn(40, 3, 2, 4, 1, 16, device="cuda")
    for t, token in enumerate(tokens):
        with synchronising_is_an_error() if t else nullcontext():  # tables of the store are made once
            for state in states:
                state.step(*token, real[t])


def test_a_whole_decode_forward_never_synchronises(case: Case) -> None:
    model = copy.deepcopy(case.model()).cuda()
    ids, _ = prompts(2, 150)
    ids = ids.cuda()
    cache = case.cache(model, 0.5)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        for t in range(12):
            position = torch.full((2, 1), 150 + t, device="cuda")
            with synchronising_is_an_error() if t else nullcontext():
                model(ids[:, t : t + 1], position_ids=position, past_key_values=cache)


def test_states_on_the_gpu_keep_and_give_what_they_do_on_the_cpu(case: Case) -> None:
    """The same prompt and tokens in float32: kept sets, outputs and host rows agree."""
    model = case.model()
    cache = case.cache(model, 0.5)
    ours, theirs = (cache.method.layers(cache.geometry, cache.budget, [150, 150]) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    prompt = [torch.randn(2, 4, 150, 16, generator=generator) for _ in range(3)]
    tokens = torch.randn(20, 3, 2, 4, 1, 16, generator=generator)
    for states, device in ((ours, "cpu"), (theirs, "cuda")):
        rope = Rope.of(copy.deepcopy(model).to(device)) if cache.method.needs_rope else None
        for state in states:
            state.backend, state.reserve_tokens = BACKENDS["reference"], 64
            if rope is not None:
                state.rope = rope
            state.prefill(*(x.to(device) for x in prompt), None)
    for token in tokens:
        for cpu, gpu in zip(ours, theirs, strict=True):
            expected = cpu.step(*token, None)
            out = gpu.step(*token.cuda(), None)
            torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-4)
            for a, b in zip(cpu.kept(), gpu.kept(), strict=True):
                assert [h.tolist() for h in a] == [h.tolist() for h in b]


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
