"""lm-evaluation-harness over our cache; its own model is the reference where nothing is compressed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install 'hcache[lm_eval]'")

import yaml

from hcache import records
from hcache.benchmarks.lm_eval import LmEval, require_library
from hcache.budget import Budget
from hcache.harness import results as reported
from hcache.harness.generation import Wish, wish_of
from hcache.harness.likelihood import Scorer, uncompressed
from hcache.kv_cache import KVCache
from hcache.methods import METHODS, make
from hcache.metrics import wilson
from hcache.models import ModelSpec
from hcache.records import Predictions
from hcache.tiny.tokenizer import byte_tokenizer
from runners import evaluate, harness, interrupt, loading
from runners.config import BudgetConfig, RunConfig, RuntimeConfig
from runners.plan import planned
from tests.cells import write_checkpoint

DOCUMENTS = 3
SCORED = ("hc_choice", "hc_cloze")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def documents() -> list[dict[str, Any]]:
    """Passages of random words, longer than a budget of a quarter keeps; the last is nearly empty."""
    rng = Random(0)
    words = ["lamp", "river", "seven", "cold", "paper", "under", "stone", "north"]
    return [
        {
            "passage": " ".join(rng.choice(words) for _ in range(40 + 15 * i)),
            "choices": [rng.choice(words), "a longer choice " + rng.choice(words), "x"],
            "label": i % 3,
            "answer": rng.choice(words),
        }
        for i in range(DOCUMENTS)
    ]


def task_files(place: Path) -> Path:
    """A directory with four tasks of the library's kinds, and a group of two of them."""
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in documents()))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{passage}}\nSay one:",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks: dict[str, dict[str, Any]] = {
        "hc_generate": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "zz"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "hc_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        "hc_cloze": {
            "output_type": "loglikelihood",
            "doc_to_target": " {{answer}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", **mean},
            ],
        },
        "hc_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{passage}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "hc_plain": {
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", **mean}],
        },
    }
    for name, own in tasks.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **own}))
    group = {
        "group": "hc_group",
        "task": ["hc_choice", "hc_plain"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (place / "hc_group.yaml").write_text(yaml.safe_dump(group))
    return place


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Any connection fails the test; caches of data sets are the test's own."""
    import datasets

    def refuse(self: Any, address: Any) -> None:
        raise AssertionError(f"a test asked the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    yield
    interrupt.forget()


@pytest.fixture(autouse=True, scope="module")
def quick_environment() -> Iterator[None]:
    """The library's report on the machine takes seconds, and nothing here reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_files(tmp_path_factory.mktemp("tasks"))


def cell(
    checkpoint: Path, own_tasks: Path, outputs: Path, method: str = "fullkv", **settings: Any
) -> RunConfig:
    """A cell on the checkpoint.

    Settings: of the budget, of method and runtime as dicts `hyper` and `runtime`, else of the benchmark.
    """
    budget = {key: settings.pop(key) for key in ("kept_fraction", "kept_tokens") if key in settings}
    runtime = RuntimeConfig(device="cpu", **settings.pop("runtime", {}))
    hyper = settings.pop("hyper", {})
    return RunConfig(
        model=ModelSpec(name="random", path=str(checkpoint)),
        method=METHODS.get(method)(**hyper),
        benchmark=LmEval(include_path=str(own_tasks), **settings),
        budget=BudgetConfig(**budget),
        runtime=runtime,
        outputs=str(outputs),
        tag="test",
    )


def evaluated(run: RunConfig) -> dict[str, Any]:
    outcome = evaluate.run(run)
    assert outcome.status == "completed", outcome.message
    found = records.read_result(planned(run).directory)
    assert found is not None
    return found


def lines_of(run: RunConfig) -> list[dict[str, Any]]:
    return Predictions(planned(run).directory).load()


def library_model() -> Any:
    """The library's class for models of transformers.

    Its module imports accelerate, of which it uses nothing for a model that is handed over.
    """
    if importlib.util.find_spec("accelerate") is not None:
        return importlib.import_module("lm_eval.models.huggingface").HFLM
    with pytest.MonkeyPatch.context() as patch:
        for name in ("accelerate", "accelerate.utils"):
            patch.setitem(sys.modules, name, MagicMock(__spec__=None))
        return importlib.import_module("lm_eval.models.huggingface").HFLM


def by_library(run: RunConfig, **settings: Any) -> Any:
    """The same tasks by the library's own model class on the same weights."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    loaded = loading.loaded(run)
    model = library_model()(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1, **settings.pop("model", {})
    )
    manager = TaskManager(include_path=str(run.benchmark.include_path), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        tasks=list(run.benchmark.tasks),
        task_manager=manager,
        bootstrap_iters=0,
        **settings,
    )


ALL = ("hc_generate", "hc_choice", "hc_cloze", "hc_rolling", "hc_plain")


@pytest.fixture(scope="module")
def full(checkpoint: Path, own_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished cell of every kind of task without compression. Don't write to it."""
    run = cell(checkpoint, own_tasks, tmp_path_factory.mktemp("full"), tasks=ALL)
    evaluated(run)
    return run


@pytest.fixture(scope="module")
def reference(full: RunConfig) -> Any:
    return by_library(full)


def test_log_likelihoods_are_the_librarys_where_nothing_is_compressed(
    full: RunConfig, reference: Any
) -> None:
    lines = {(line["task"], line["id"]): line for line in lines_of(full)}
    for task in ("hc_choice", "hc_cloze", "hc_plain"):
        for sample in reference["samples"][task]:
            line = lines[task, str(sample["doc_id"])]
            expected = [float(answer[0]) for answer in sample["filtered_resps"]]
            assert line["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
            assert line["greedy"] == [bool(answer[1]) for answer in sample["filtered_resps"]]
    for sample in reference["samples"]["hc_rolling"]:
        line = lines["hc_rolling", str(sample["doc_id"])]
        assert line["log_likelihoods"] == pytest.approx([float(sample["resps"][0][0])], abs=1e-3)


def test_greedy_texts_are_the_librarys(full: RunConfig, reference: Any) -> None:
    lines = {line["id"]: line for line in lines_of(full) if line["task"] == "hc_generate"}
    for sample in reference["samples"]["hc_generate"]:
        assert lines[str(sample["doc_id"])]["prediction"] == sample["filtered_resps"][0]
    assert any(line["prediction"] for line in lines.values())


def test_metrics_are_the_librarys(full: RunConfig, reference: Any) -> None:
    result = records.read_result(planned(full).directory)
    assert result is not None
    for task in ALL:
        ours, theirs = result["tasks"][task], reference["results"][task]
        assert ours["n"] == DOCUMENTS
        for key, value in theirs.items():
            if "," in key and "_stderr" not in key:
                assert ours["metrics"][key] == pytest.approx(value, rel=1e-4), key
    assert result["tasks"]["hc_choice"]["metric"] == "acc,none"
    assert result["tasks"]["hc_choice"]["score"] == 100 * reference["results"]["hc_choice"]["acc,none"]
    assert result["tasks"]["hc_cloze"]["scale"] == "reported"
    assert result["tasks"]["hc_cloze"]["score"] == pytest.approx(
        reference["results"]["hc_cloze"]["perplexity,none"], rel=1e-4
    )
    percent = [result["tasks"][task]["score"] for task in ("hc_generate", "hc_choice", "hc_plain")]
    assert result["score"] == pytest.approx(sum(percent) / 3)
    assert any("hc_rolling (word_perplexity,none)" in note for note in result["notes"])


def test_the_record_has_what_others_have(full: RunConfig) -> None:
    result = records.read_result(planned(full).directory)
    assert result is not None
    assert set(result) >= {
        "cell",
        "config",
        "config_hash",
        "score",
        "tasks",
        "budget",
        "memory",
        "latency",
        "counters",
    }
    assert records.config_hash(result["config"]) == result["config_hash"]
    assert result["config"]["benchmark"]["name"] == "lm_eval"
    assert result["budget"]["requested_fraction"] == 1.0
    assert result["budget"]["attended_fraction"] == 1.0
    assert result["latency"]["decode_ms_per_token"]["median"] > 0
    assert result["counters"]["requests"] == DOCUMENTS * (1 + 3 + 1 + 1 + 3)
    assert result["counters"]["requests_uncompressed"] == result["counters"]["requests"]
    assert result["provenance"]["versions"]["lm_eval"]
    json.dumps(result, allow_nan=False)
    for line in lines_of(full):
        assert {"prompt_tokens", "new_tokens", "prefill_ms", "decode_ms", "decode_steps", "memory"} <= set(
            line
        )


def test_documents_have_predictions_and_answers(full: RunConfig) -> None:
    rows = documents()
    lines = {(line["task"], line["id"]): line for line in lines_of(full)}
    assert len(lines) == len(ALL) * DOCUMENTS
    for i, row in enumerate(rows):
        choice = lines["hc_choice", str(i)]
        assert choice["answers"] == [row["choices"][row["label"]]]
        best = max(range(3), key=choice["log_likelihoods"].__getitem__)
        assert choice["prediction"] == row["choices"][best]
        assert choice["score"] == float(best == row["label"])
        assert lines["hc_generate", str(i)]["answers"] == [row["answer"]]
        assert lines["hc_rolling", str(i)]["score"] is None
        assert lines["hc_cloze", str(i)]["score"] is None
        assert lines["hc_cloze", str(i)]["metrics"]["acc,none"] in (0, 1, 0.0, 1.0)


# --- compression


def test_a_quarter_is_compressed_and_counted(
    checkpoint: Path, own_tasks: Path, full: RunConfig, tmp_path: Path
) -> None:
    run = cell(checkpoint, own_tasks, tmp_path, "snapkv", tasks=ALL, kept_fraction=0.25, hyper={"window": 8})
    result = evaluated(run)
    counts = result["counters"]
    rolling, empty = DOCUMENTS, 3 * DOCUMENTS
    assert counts["requests_loglikelihood_rolling"] == rolling
    assert counts["requests_uncompressed"] == rolling + empty
    assert counts["requests_adjusted"] == 0
    assert any(
        f"{empty} of {counts['requests']:.0f} requests had contexts so short" in n for n in result["notes"]
    )
    assert any(f"{rolling} of" in note and "rolling" in note for note in result["notes"])
    exact = sum(len(row["passage"]) for row in documents()) + 3 * DOCUMENTS
    short = sum((1 + 3 + 1) * (len(row["passage"]) + len("\nSay one:")) for row in documents())
    weighed = (exact + short / 4) / (exact + short)
    assert result["budget"]["attended_fraction"] == pytest.approx(weighed, abs=0.01)
    choices = [line for line in lines_of(run) if line["task"] == "hc_choice"]
    for line in choices:
        memory = line["memory"]
        assert memory["device_payload"] == pytest.approx(0.25 * memory["full_kv_bytes"], rel=0.02)
        assert line["counters"]["attended_fraction"] == pytest.approx(0.25, abs=0.01)
    before = [line["log_likelihoods"] for line in lines_of(full) if line["task"] == "hc_choice"]
    after = [line["log_likelihoods"] for line in choices]
    assert after != before
    plain = [
        [line["log_likelihoods"] for line in lines_of(r) if line["task"] == "hc_plain"] for r in (run, full)
    ]
    assert plain[0] == [pytest.approx(values, abs=1e-4) for values in plain[1]]


def by_masking(model: Any, ids: list[int], continuation: list[int], kept: list[list[Any]]) -> list[Any]:
    """Logits after each token of context end and continuation, by attention with a mask, head by head."""
    import torch.nn.functional as F

    tokens = torch.tensor([ids + continuation[:-1]])
    n, total = len(ids), tokens.shape[1]
    core = model.model
    x = core.embed_tokens(tokens)
    rotary = core.rotary_emb(x, torch.arange(total).unsqueeze(0))
    for layer, heads in zip(core.layers, kept, strict=True):
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        shape = (1, total, -1, attention.head_dim)
        q, k, v = (
            p(h).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k = apply_rotary_pos_emb(q, k, *rotary)
        group = q.shape[1] // k.shape[1]
        mask = torch.ones(total, total, dtype=torch.bool).tril().repeat(k.shape[1], 1, 1)
        for head, positions in enumerate(heads):
            gone = torch.ones(n, dtype=torch.bool)
            gone[positions] = False
            mask[head, n:, :n] &= ~gone
        k, v, mask = (t.repeat_interleave(group, dim=d) for t, d in ((k, 1), (v, 1), (mask, 0)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(0))
        x = x + attention.o_proj(out.transpose(1, 2).reshape(1, total, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(core.norm(x))[0, n - 1 :]


def test_continuations_see_what_was_kept_and_nothing_else(full: RunConfig) -> None:
    """Against a full forward in which tokens behind the context are masked from what was dropped."""
    model = loading.loaded(full).model
    rng = Random(3)
    ids, continuation = ([rng.randrange(256) for _ in range(n)] for n in (120, 7))
    method = make("snapkv", window=8)
    scorer = Scorer(model, method, "auto", seed=0)
    context = scorer.compress([ids], Budget(kept_fraction=0.25))
    assert context.whole == [False]
    kept = [context.cache.kept(layer)[0] for layer in range(2)]
    ((found,),) = scorer.score(context, [[continuation]])
    with torch.inference_mode():
        log_probs = by_masking(model, ids, continuation, kept).log_softmax(-1)
    expected = sum(float(row[token]) for row, token in zip(log_probs, continuation, strict=True))
    assert found.log_prob == pytest.approx(expected, abs=1e-4)
    assert not found.greedy
    likeliest: list[int] = []
    with torch.inference_mode():
        for _ in range(3):
            likeliest.append(int(by_masking(model, ids, [*likeliest, 0], kept)[-1].argmax()))
    for tokens, expected_greedy in ((likeliest, True), ([*likeliest[:2], likeliest[2] - 1], False)):
        fresh = scorer.compress([ids], Budget(kept_fraction=0.25))
        assert scorer.score(fresh, [[tokens]])[0][0].greedy is expected_greedy


def test_every_continuation_meets_a_fresh_context(checkpoint: Path, own_tasks: Path, tmp_path: Path) -> None:
    """One by one and all of a document together: the same scores, for one token and for several."""
    run = cell(checkpoint, own_tasks, tmp_path, "snapkv", tasks=("hc_choice",), hyper={"window": 8})
    evaluated(run)
    loaded = loading.loaded(run)
    scorer = Scorer(loaded.model, run.method, "auto", seed=0)
    for line, row in zip(lines_of(run), documents(), strict=True):
        ids = loaded.tokenizer.encode(row["passage"] + "\nSay one:")
        alone = []
        for choice in row["choices"]:
            fresh = scorer.compress([ids], Budget(kept_fraction=0.25))
            alone.append(scorer.score(fresh, [[loaded.tokenizer.encode(" " + choice)]])[0][0].log_prob)
        assert line["log_likelihoods"] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "hyper"),
    [
        ("fullkv", {}),
        ("snapkv", {"window": 8}),
        ("h2o", {}),
        ("streaming_llm", {}),
        ("quest", {}),
        ("shadowkv", {}),
        ("omnikv", {}),
    ],
)
def test_continuations_side_by_side_are_those_one_by_one(
    checkpoint: Path, own_tasks: Path, tmp_path: Path, method: str, hyper: dict[str, Any]
) -> None:
    """Of contexts and continuations of any lengths, of one token and of several."""
    tasks = ("hc_choice", "hc_cloze", "hc_plain")
    found = []
    for size in (1, 3, 64):
        runtime = {"batch_size": size}
        run = cell(
            checkpoint,
            own_tasks,
            tmp_path,
            method,
            tasks=tasks,
            kept_fraction=0.7,
            hyper=hyper,
            runtime=runtime,
        )
        evaluated(run)
        lines = lines_of(run)
        found.append({(li["task"], li["id"]): li["log_likelihoods"] for li in lines})
        assert max(Counter(li["batch"] for li in lines).values()) >= min(size, 2)
    assert all(abs(value) > 0.1 for values in found[0].values() for value in values)
    for others in found[1:]:
        assert others.keys() == found[0].keys()
        for key, values in found[0].items():
            assert others[key] == pytest.approx(values, abs=2e-4), key


@pytest.mark.parametrize("method", ["fullkv", "snapkv", "quest"])
def test_contexts_of_any_length_are_scored_side_by_side(full: RunConfig, method: str) -> None:
    """Those of one token share the context of the one that is fed; padded or not, each is as if alone."""
    rng = Random(5)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(256) for _ in range(count)]

    scorer = Scorer(loading.loaded(full).model, make(method), "auto", seed=0)
    budget = Budget(kept_fraction=0.7)
    for lengths, fed in (((90, 120, 101), (4, 3, 9)), ((90, 90, 90), (3, 7, 4)), ((90, 95, 99), (2, 2, 2))):
        contexts = [tokens(count) for count in lengths]
        asked = [[tokens(1), tokens(count), tokens(1)] for count in fed]
        for wanted in (asked, [[one[0], one[2]] for one in asked]):
            together = scorer.compress(contexts, budget)
            found = scorer.score(together, wanted)
            assert together.generation.prompt_tokens == list(lengths)
            for context, one, likelihoods in zip(contexts, wanted, found, strict=True):
                for own, likelihood in zip(one, likelihoods, strict=True):
                    ((alone,),) = scorer.score(scorer.compress([context], budget), [[own]])
                    assert likelihood.log_prob == pytest.approx(alone.log_prob, abs=1e-4)
                    assert likelihood.greedy == alone.greedy


def test_continuations_of_one_token_share_a_context() -> None:
    from hcache.harness.model import Label, _apart, _Pair

    def pairs(*sizes: int) -> list[_Pair]:
        return [_Pair(i, Label("t", 0), [1, 2], [3] * size, 0) for i, size in enumerate(sizes)]

    for sizes, jobs in (
        ((1, 1), [[0, 1]]),
        ((2,), [[0]]),
        ((3, 1, 2, 1), [[1, 3, 0], [2]]),
        ((2, 3, 4), [[0], [1], [2]]),
    ):
        assert [[pair.place for pair in job] for job in _apart(pairs(*sizes))] == jobs


def test_contexts_are_compressed_no_more_often_than_needed(
    checkpoint: Path, own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each continuation of several tokens, side by side as far as they go."""
    run = cell(checkpoint, own_tasks, tmp_path, "snapkv", tasks=SCORED, runtime={"batch_size": 5})
    compressed: list[int] = []
    real = Scorer.compress

    def counting(self: Scorer, contexts: Any, budget: Any) -> Any:
        compressed.append(len(contexts))
        return real(self, contexts, budget)

    monkeypatch.setattr(Scorer, "compress", counting)
    counts = evaluated(run)["counters"]
    assert sum(compressed) == counts["requests"] == 4 * DOCUMENTS
    assert sorted(compressed) == [3, 4, 5]  # " x" is a step, the others are blocks


@pytest.mark.parametrize("method", ["streaming_llm", "quest", "shadowkv", "omnikv"])
def test_other_methods_answer_every_kind(
    checkpoint: Path, own_tasks: Path, tmp_path: Path, method: str
) -> None:
    run = cell(checkpoint, own_tasks, tmp_path, method, tasks=ALL, kept_fraction=0.5, limit=1)
    outcome = evaluate.run(run)
    if outcome.status == "infeasible":
        pytest.skip(outcome.message)
    result = records.read_result(planned(run).directory)
    assert result is not None
    assert outcome.status == "completed", outcome.message
    assert result["counters"]["requests_uncompressed"] == 1 + 3


def test_short_sequences_of_a_batch_are_told_apart() -> None:
    from hcache.contract.tiny_models import prompts, tiny_model

    model = tiny_model()
    ids, mask = prompts(2, 60, padded=True)
    mask[1, :40] = 0
    cache = KVCache(model, "snapkv", 24, window=4)
    model(ids, attention_mask=mask, past_key_values=cache, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    assert uncompressed(cache, 4) == [False, True]
    everything = KVCache(model, "fullkv")
    model(
        ids, attention_mask=mask, past_key_values=everything, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
    )
    assert uncompressed(everything, 4) == [True, True]


def test_short_contexts_are_refused_or_infeasible(checkpoint: Path, own_tasks: Path, tmp_path: Path) -> None:
    none = cell(checkpoint, own_tasks, tmp_path, "snapkv", tasks=("hc_choice",), kept_fraction=0.01)
    assert evaluate.run(none).status == "infeasible"
    some = cell(checkpoint, own_tasks, tmp_path, "snapkv", tasks=("hc_choice",), kept_fraction=0.13)
    outcome = evaluate.run(some)
    assert outcome.status == "failed"
    assert "budget.kept_tokens" in outcome.message
    tokens = cell(checkpoint, own_tasks, tmp_path, "snapkv", tasks=("hc_choice",), kept_tokens=300)
    result = evaluated(tokens)
    counts = result["counters"]
    assert 0 < counts["requests_uncompressed"] < counts["requests"]


def test_texts_side_by_side_are_those_one_by_one(checkpoint: Path, own_tasks: Path, tmp_path: Path) -> None:
    said = []
    for size in (1, 2):
        run = cell(
            checkpoint, own_tasks, tmp_path, "snapkv", tasks=("hc_generate",), runtime={"batch_size": size}
        )
        evaluated(run)
        said.append([line["prediction"] for line in lines_of(run)])
    assert said[0] == said[1]
    batches = [line["batch"] for line in lines_of(run)]
    assert batches[1] == batches[2] != batches[0], "the longest two ran together"


def test_empty_contexts_need_no_budget(checkpoint: Path, own_tasks: Path, tmp_path: Path) -> None:
    run = cell(checkpoint, own_tasks, tmp_path, "snapkv", tasks=("hc_plain",))
    counts = evaluated(run)["counters"]
    assert counts["requests_uncompressed"] == counts["requests"] == 3 * DOCUMENTS
    assert counts["requests_adjusted"] == 0


# --- windows, templates, settings


def test_too_long_contexts_lose_their_beginning(checkpoint: Path, own_tasks: Path, tmp_path: Path) -> None:
    run = cell(
        checkpoint, own_tasks, tmp_path, tasks=("hc_generate", "hc_choice", "hc_rolling"), max_length=200
    )
    result = evaluated(run)
    assert result["counters"]["requests_truncated"] == sum(
        (len(row["passage"]) + 9 + 24 > 200)
        + sum(len(row["passage"]) + 9 + len(c) > 200 for c in row["choices"])
        for row in documents()
    )
    assert any("lost their beginning" in note for note in result["notes"])
    theirs = by_library(run, model={"max_length": 200})
    lines = {(line["task"], line["id"]): line for line in lines_of(run)}
    for sample in theirs["samples"]["hc_choice"]:
        expected = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert lines["hc_choice", str(sample["doc_id"])]["log_likelihoods"] == pytest.approx(
            expected, abs=1e-4
        )
    for sample in theirs["samples"]["hc_generate"]:
        assert lines["hc_generate", str(sample["doc_id"])]["prediction"] == sample["filtered_resps"][0]
    for sample in theirs["samples"]["hc_rolling"]:
        found = lines["hc_rolling", str(sample["doc_id"])]["log_likelihoods"]
        assert found == pytest.approx([float(sample["resps"][0][0])], abs=1e-3)


def test_chat_template_and_shots_are_the_librarys(
    own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_checkpoint(tmp_path / "chat")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    settings = {"apply_chat_template": True, "system_instruction": "Be brief.", "limit": 2}
    run = cell(place, own_tasks, tmp_path / "o", tasks=("hc_generate", "hc_choice"), **settings)
    evaluated(run)
    theirs = by_library(run, fewshot_as_multiturn=True, **settings)
    lines = {(line["task"], line["id"]): line for line in lines_of(run)}
    assert len(lines) == 4
    for sample in theirs["samples"]["hc_choice"]:
        assert sample["arguments"][0][0].startswith("<system>Be brief.\n<user>")
        expected = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert lines["hc_choice", str(sample["doc_id"])]["log_likelihoods"] == pytest.approx(
            expected, abs=1e-4
        )
    for sample in theirs["samples"]["hc_generate"]:
        assert lines["hc_generate", str(sample["doc_id"])]["prediction"] == sample["filtered_resps"][0]


def test_a_group_has_the_librarys_average(checkpoint: Path, own_tasks: Path, tmp_path: Path) -> None:
    run = cell(checkpoint, own_tasks, tmp_path, tasks=("hc_group", "hc_generate"))
    manager = harness._manager
    import lm_eval.tasks

    own = lm_eval.tasks.TaskManager(include_path=str(own_tasks), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_manager", lambda *args: own)
        result = evaluated(run)
    assert harness._manager is manager
    assert set(result["tasks"]) == {"hc_choice", "hc_plain", "hc_generate"}
    group = result["aggregates"]["hc_group"]
    parts = [result["tasks"][task]["score"] for task in ("hc_choice", "hc_plain")]
    assert group["score"] == pytest.approx(sum(parts) / 2)
    assert group["n"] == 2 * DOCUMENTS
    assert result["score"] == pytest.approx((group["score"] + result["tasks"]["hc_generate"]["score"]) / 2)


def test_unknown_tasks_have_suggestions_before_the_model_loads(
    checkpoint: Path, own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    own = lm_eval.tasks.TaskManager(include_path=str(own_tasks), include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda *args: own)
    monkeypatch.setattr(loading, "loaded", lambda run: pytest.fail("the model was asked for"))
    outcome = evaluate.run(cell(checkpoint, own_tasks, tmp_path, tasks=("hc_choise",)))
    assert outcome.status == "failed"
    assert "knows no task 'hc_choise'; did you mean 'hc_choice'" in outcome.message
    assert "names no task" in evaluate.run(cell(checkpoint, own_tasks, tmp_path)).message
    monkeypatch.undo()
    _, names = harness._tasks(cell(checkpoint, own_tasks, tmp_path, tasks=("hc_plain",)))
    assert names == ["hc_plain"]


def test_patterns_stand_for_tasks(
    checkpoint: Path, own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    own = lm_eval.tasks.TaskManager(include_path=str(own_tasks), include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda *args: own)
    run = cell(checkpoint, own_tasks, tmp_path, tasks=("hc_c*", "hc_choice"))
    assert harness._tasks(run)[1] == ["hc_choice", "hc_cloze"]


def test_a_done_cell_is_read_back_and_a_higher_limit_runs(
    checkpoint: Path, own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cell(checkpoint, own_tasks, tmp_path, tasks=("hc_choice",), limit=2)
    assert evaluated(run)["tasks"]["hc_choice"]["n"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_plan", lambda *args: pytest.fail("it ran again"))
        for limit in (2, 1):
            again = replace(run, benchmark=replace(run.benchmark, limit=limit))
            assert evaluate.run(again).status == "completed"
    more = replace(run, benchmark=replace(run.benchmark, limit=None))
    assert planned(more).directory == planned(run).directory
    assert evaluated(more)["tasks"]["hc_choice"]["n"] == DOCUMENTS
    assert len(lines_of(more)) == DOCUMENTS


def test_a_stop_leaves_no_result(
    checkpoint: Path, own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cell(checkpoint, own_tasks, tmp_path, tasks=("hc_generate",))
    from hcache.harness.model import HarnessLM

    generate = HarnessLM._generate

    def stopped(self: Any, batch: Any) -> Any:
        interrupt._asked.set()
        return generate(self, batch)

    monkeypatch.setattr(HarnessLM, "_generate", stopped)
    outcome = evaluate.run(run)
    assert outcome.status == "interrupted"
    assert "starts this cell again" in outcome.message
    assert records.read_result(planned(run).directory) is None
    assert lines_of(run) == []


def test_a_failure_is_recorded(checkpoint: Path, own_tasks: Path, tmp_path: Path) -> None:
    sampled = cell(checkpoint, own_tasks, tmp_path, tasks=("hc_generate",), runtime={"temperature": 0.7})
    assert "benchmark.gen_kwargs" in evaluate.run(sampled).message
    chat = cell(checkpoint, own_tasks, tmp_path, tasks=("hc_generate",), apply_chat_template=True)
    assert "no chat template" in evaluate.run(chat).message
    beams = cell(checkpoint, own_tasks, tmp_path, tasks=("hc_generate",), gen_kwargs="num_beams=4")
    outcome = evaluate.run(beams)
    assert outcome.status == "failed"
    assert "num_beams=4" in outcome.message
    result = records.read_result(planned(beams).directory)
    assert result is not None
    assert "traceback" in result["error"]


def test_sampled_repeats_differ_and_a_seed_repeats_them(
    checkpoint: Path, own_tasks: Path, tmp_path: Path
) -> None:
    said = []
    for number in range(2):
        place = tmp_path / str(number)
        run = cell(
            checkpoint, own_tasks, place, tasks=("hc_generate",), gen_kwargs="do_sample=true,temperature=1.5"
        )
        evaluated(run)
        said.append([line["prediction"] for line in lines_of(run)])
    assert said[0] == said[1]
    greedy = cell(checkpoint, own_tasks, tmp_path / "greedy", tasks=("hc_generate",))
    evaluated(greedy)
    assert said[0] != [line["prediction"] for line in lines_of(greedy)]
    answers = responses_of_repeats(greedy)
    assert len(set(answers)) == 3


def responses_of_repeats(run: RunConfig) -> list[str]:
    """What is answered to one request that is asked three times, as the library does for `repeats`."""
    from lm_eval.api.instance import Instance

    model = harness._model(run, loading.loaded(run), lambda kind, done, total: None)
    asked = {"temperature": 1.5, "do_sample": True, "max_gen_toks": 16}
    request = Instance("generate_until", {}, ("some words", asked), 0, ("t", 0, 3))
    return model.generate_until([request] * 3)


# --- parts


def test_wishes() -> None:
    assert wish_of({}, "t") == Wish(256)
    asked = {"until": "\n", "max_gen_toks": 8, "max_new_tokens": 9, "temperature": 0.9, "do_sample": False}
    assert wish_of(asked, "t") == Wish(8, ("\n",))
    drawn = {"until": ["a", "", "b"], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}
    assert wish_of(drawn, "t") == Wish(5, ("a", "b"), 0.5, 0.9)
    assert wish_of({"top_k": 50, "do_sample": False}, "t") == Wish(256)
    assert Wish(8, ("zz", "\n")).cut("one\ntwo zz") == "one"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 10}, "task t asks for num_beams=10"),
        ({"top_k": 50, "temperature": 1.0}, "top_k=50"),
        ({"do_sample": True}, "needs a temperature above 0"),
        ({"presence_penalty": 1.0}, "presence_penalty=1.0"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be at least 1"),
    ],
)
def test_wishes_that_cant_be(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wish_of(asked, "t")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("a", "a")}, "each task once"),
        ({"num_fewshot": -1}, "num_fewshot=-1"),
        ({"max_length": 1}, "max_length=1"),
        ({"query_aware": False}, "query_aware"),
        ({"protocol": "chat"}, "protocol"),
        ({"shard": "0/2"}, "benchmark.shard"),
        ({"metadata": "{"}, "is no JSON"),
        ({"metadata": "[1]"}, "must be a JSON object"),
        ({"limit": 0}, "benchmark.limit=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LmEval(**settings)


def test_the_benchmark_says_who_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the library makes the prompts"):
        LmEval().examples(None)
    with pytest.raises(ValueError, match="the library scores"):
        LmEval().score("gsm8k", "1", ["1"])
    require_library()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'hcache\[lm_eval\]'"):
        require_library()


def test_own_files_are_part_of_the_identity(own_tasks: Path, tmp_path: Path) -> None:
    place = task_files(tmp_path)
    settings = {"tasks": ("hc_choice",), "include_path": str(place)}
    before = LmEval(**settings).identity()
    assert before["library"]
    (place / "hc_choice.yaml").write_text((place / "hc_choice.yaml").read_text() + "description: other\n")
    assert LmEval(**settings).identity() != before
    with pytest.raises(ValueError, match="is not a directory"):
        dataclasses.replace(LmEval(**settings), include_path=str(tmp_path / "no")).identity()


def sample(document: int, kind: str, **metrics: Any) -> dict[str, Any]:
    return {
        "doc_id": document,
        "filter": kind,
        "metrics": list(metrics),
        "target": "a",
        "filtered_resps": ["b"],
        **metrics,
    }


def test_scores_by_hand() -> None:
    """Two filters, a metric that is no mean, and one beyond 1."""
    samples = [
        sample(d, kind, exact=value, length=d, pair=(1.0, 2))
        for d, kind, value in ((0, "strict", 1), (0, "loose", 1), (1, "strict", 0), (1, "loose", 1))
    ]
    rows = {"alias": "t", "exact,strict": 0.5, "exact_stderr,strict": 0.25, "exact,loose": 1.0}
    shared = {
        "samples": {"t": samples},
        "n-shot": {"t": 5},
        "versions": {"t": 2},
        "higher_is_better": {"t": {"exact": True}},
    }
    scores = reported.task_scores({"results": {"t": rows}, **shared}, "t", wilson)
    assert scores.per_document == {0: 1.0, 1: 0.0}
    assert scores.record["score"] == 50.0
    assert scores.record["ci95"] == pytest.approx([100 * end for end in wilson(0.5, 2)])
    assert scores.record["n"] == 2
    assert scores.record["num_fewshot"] == 5
    assert scores.record["metrics"] == {"exact,strict": 0.5, "exact_stderr,strict": 0.25, "exact,loose": 1.0}
    rows = {"pair,strict": 7.0, "pair_stderr,strict": 1.0}
    scores = reported.task_scores({"results": {"t": rows}, **shared}, "t", wilson)
    assert scores.per_document is None
    assert scores.record["score"] == 7.0
    assert scores.record["ci95"] == pytest.approx([7 - 1.959964, 7 + 1.959964])
    rows = {"exact,strict": 0.7, "exact_stderr,strict": "N/A"}
    scores = reported.task_scores({"results": {"t": rows}, **shared}, "t", wilson)
    assert (scores.per_document, scores.record["score"], scores.record["ci95"]) == (None, 0.7, None)


def test_the_score_over_all() -> None:
    results = {"group_subtasks": {"g": ["a", "h"], "h": ["b"]}, "groups": {}}
    percent = {"metric": "acc,none", "scale": "percent"}
    tasks = {name: {**percent, "score": score} for name, score in (("a", 10.0), ("b", 20.0), ("c", 60.0))}
    assert reported.leaves(results, "g") == ["a", "b"]
    assert reported.overall(results, tasks, {}) == (30.0, [])
    groups = {"g": {**percent, "score": 40.0}, "h": {**percent, "score": 99.0}}
    assert reported.overall(results, tasks, groups) == (50.0, [])
    loss = {"metric": "word_perplexity,none", "scale": "reported", "score": 8.0}
    score, notes = reported.overall(results, {**tasks, "d": loss}, groups)
    assert score == 50.0
    assert "d (word_perplexity,none)" in notes[0]
    score, notes = reported.overall(results, {"d": loss}, {})
    assert score == 8.0
    assert "not from 0 to 100" in notes[0]
    assert reported.overall(results, {"d": {**loss, "score": None}}, {})[0] is None


def test_numbers() -> None:
    assert reported.number(True) == 1.0
    assert reported.number(torch.tensor(2.0)) == 2.0
    assert [reported.number(x) for x in (math.inf, math.nan, "N/A", None, (1, 2))] == [None] * 5
