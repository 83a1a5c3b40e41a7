"""Captured decoding on a GPU: `pytest -m gpu tests/test_cuda_graphs.py`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hcache import Generator
from hcache.cache.lane import Lane
from hcache.contract.cases import CASES, Case
from hcache.contract.tiny_models import prompts
from hcache.engine import EngineSettings, Session
from hcache.methods.heterocache import OffloadSettings
from hcache.tape import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]
OVERLAPPED = Case(
    "heterocache",
    {"drift_threshold": 1.0, "steps": 4, "visible_after": 4},
    profiled=True,
    label="heterocache-overlapped",
)
ALL = [*CASES, OVERLAPPED]


@pytest.fixture(params=ALL, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def generator(case: Case, dtype: torch.dtype = torch.float32, graphs: str = "on", **how: str) -> Generator:
    model = copy.deepcopy(case.model()).to("cuda", dtype)
    settings = EngineSettings.of(graphs, how.get("compile", "off"))
    return Generator(model, case.make(case.model()), 0.5, runtime=settings)


def test_graphs_and_eager_give_the_same_tokens(case: Case) -> None:
    captured, eager = generator(case), generator(case, graphs="off")
    for seed, length in enumerate((151, 97, 150)):
        ids, mask = prompts(3, length, padded=True, seed=seed)
        more = prompts(3, 7, padded=True, seed=seed + 50) if seed == 2 else None
        ours, theirs = (g.generate(ids, mask, 40, follow_up=more) for g in (captured, eager))
        assert torch.equal(ours.tokens, theirs.tokens), f"prompt {seed}"
        assert (ours.engine["name"], ours.engine["backend"]) == ("graph", "triton")
        for key, value in theirs.counters.items():
            if key not in ("fed_tokens", "attended_fraction"):
                assert ours.counters[key] == value, key
    assert ours.timings.decode_ms
    assert min(ours.timings.decode_ms) > 0


def test_twenty_prompts_make_one_capture(case: Case) -> None:
    captured = generator(case)
    for seed in range(20):
        ids, _ = prompts(2, 200 - 5 * seed, seed=seed)
        out = captured.generate(ids, max_new_tokens=25)
    assert out.engine["captures"] == 1 or (case.divided_by_scores and out.engine["captures"] <= 3)
    assert out.timings.warmup_steps == 0


@pytest.mark.parametrize(("dtype", "compile"), [("bfloat16", "off"), ("float32", "default")])
def test_logits_agree_in_bfloat16_and_compiled(case: Case, dtype: str, compile: str) -> None:
    """Fed the same tokens, so that a near tie doesn't lead them apart."""
    kind = getattr(torch, dtype)
    ids, _ = prompts(2, 150)
    forced = torch.randint(3, 100, (25, 2, 1), device="cuda")
    ours, theirs = (
        logits_of(g, ids, forced)
        for g in (generator(case, kind, compile=compile), generator(case, kind, graphs="off"))
    )
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    # Selections of 16-bit scores may differ where they nearly tie; most steps must agree closely.
    assert error.median() < (2e-2 if dtype == "bfloat16" else 1e-4)
    assert error.max() < (0.5 if dtype == "bfloat16" else 1e-2)


def logits_of(generator: Generator, ids: Tensor, forced: Tensor) -> Tensor:
    """Logits [steps, B, V] of the decode steps that are fed `forced`."""
    out = torch.zeros(len(forced), 2, generator.model.config.vocab_size, device="cuda")
    step = torch.zeros(1, dtype=torch.int64, device="cuda")
    session: Session = generator.begin(ids, max_new_tokens=len(forced) + 1)

    def note(module: torch.nn.Module, args: object, logits: Tensor) -> None:
        out.index_copy_(0, step, logits[:, -1].float().unsqueeze(0))
        step.add_(1)

    with torch.inference_mode():
        handle = generator.model.lm_head.register_forward_hook(note)
        for token in forced:
            session._feed.token_B1.copy_(token)
            session.decode(1)
        handle.remove()
    return out


def test_sampling_with_a_seed_repeats_itself() -> None:
    captured = generator(Case("snapkv", {"window": 4}))
    ids, _ = prompts(2, 150)
    first, second, other = (
        captured.generate(ids, max_new_tokens=40, seed=seed, temperature=1.0, top_p=0.9) for seed in (1, 1, 2)
    )
    assert torch.equal(first.tokens, second.tokens) or first.timings.warmup_steps
    assert torch.equal(
        second.tokens,
        captured.generate(ids, max_new_tokens=40, seed=1, temperature=1.0, top_p=0.9).tokens,
    )
    assert not torch.equal(second.tokens, other.tokens)


def test_texts_end_without_a_wait_at_each_step() -> None:
    captured, eager = (generator(Case("fullkv"), graphs=graphs) for graphs in ("on", "off"))
    ids, _ = prompts(3, 60)
    free = eager.generate(ids, max_new_tokens=200)
    stop = [free.tokens[0, 20:22].tolist(), free.tokens[1, 30:33].tolist(), free.tokens[2, 9:10].tolist()]
    ours, theirs = (g.generate(ids, max_new_tokens=200, stop=stop) for g in (captured, eager))
    assert ours.lengths == theirs.lengths
    assert torch.equal(ours.tokens, theirs.tokens)


@contextmanager
def serialised(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work beside the main stream is waited for at once, on both sides."""
    beside = Lane.beside

    @contextmanager
    def at_once(self: Lane, *reads: Tensor) -> Iterator[None]:
        if torch.cuda.is_current_stream_capturing():
            with beside(self, *reads):
                yield
            return
        torch.cuda.synchronize()
        with beside(self, *reads):
            yield
        torch.cuda.synchronize()

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "beside", at_once)
        yield


def test_overlapped_and_serialised_refreshes_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 tokens with drift in every window, a hundred times."""
    model: PreTrainedModel = copy.deepcopy(OVERLAPPED.model()).cuda()
    ids, _ = prompts(2, 3500)
    made = [
        Generator(model, OVERLAPPED.make(OVERLAPPED.model()), 0.5, runtime=EngineSettings.of("on", "off"))
        for _ in range(2)
    ]
    with serialised(monkeypatch):
        expected = made[0].generate(ids, max_new_tokens=500)
    assert expected.counters["triggers"] > 200
    for repeat in range(100):
        ours = made[1].generate(ids, max_new_tokens=500)
        assert torch.equal(ours.tokens, expected.tokens), f"repeat {repeat}"


def test_offloading_changes_no_token() -> None:
    outs = []
    for enabled in (True, False):
        hyper = {**OVERLAPPED.hyper, "offload": OffloadSettings(enabled)}
        made = generator(Case("heterocache", hyper, profiled=True))
        outs.append(made.generate(prompts(2, 400)[0], max_new_tokens=60))
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    assert outs[0].memory.host_payload > 0 == outs[1].memory.host_payload


def test_a_step_that_waits_for_the_host_falls_back_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, eager = (generator(Case("snapkv", {"window": 4}), graphs=graphs) for graphs in ("auto", "off"))
    choose = Sampling.choose

    def waiting(self: Sampling, logits: Tensor) -> Tensor:
        logits.sum().item()
        return choose(self, logits)

    ids, _ = prompts(2, 150)
    with monkeypatch.context() as patch:
        patch.setattr(Sampling, "choose", waiting)
        ours = made.generate(ids, max_new_tokens=20)
    assert torch.equal(ours.tokens, eager.generate(ids, max_new_tokens=20).tokens)
    assert ours.engine["name"] == "eager"
    assert "could not be captured" in ours.engine["reason"]
    assert "goes on eagerly" in caplog.text
    sampled = made.generate(ids, max_new_tokens=20, seed=1, temperature=1.0)
    assert sampled.engine["name"] == "graph"
