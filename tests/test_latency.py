"""runner=latency on a CPU: points and their figures, ceilings, baselines, gaps, resume, what cells share."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import hcache.models as hm
from hcache import records
from hcache.budget import Budget
from hcache.geometry import Geometry
from hcache.methods import METHODS, make
from hcache.methods.base import Usage
from hcache.methods.snapkv import SnapKV
from hcache.models import ModelSpec, Shape
from hcache.profiling import HeadProfile
from runners import baselines, checks, interrupt, latency, latency_table, loading, point
from runners.ceilings import measure_ceilings
from runners.config import BudgetConfig, ConfigError, RunConfig, RuntimeConfig, register
from runners.latency_settings import (
    Baseline,
    Drift,
    LatencySettings,
    PromptKind,
    check_latency,
    drift_of,
    settings_of,
)
from runners.needle import needle_ids
from runners.plan import compose_all, planned
from runners.synthetic import synthetic_profile, with_profile
from runners.timing import call_times, is_out_of_memory, spread_of

CPU = torch.device("cpu")
SHAPE = Shape(
    hidden_size=64, intermediate_size=96, layers=2, query_heads=4, kv_heads=2, head_dim=16, vocabulary=120
)
SPEC = ModelSpec(name="small", path="shape", dtype="float32", shape=SHAPE)  # type: ignore[arg-type]
NUMBER = 4
TOKEN = 2 * 2 * 2 * 16 * NUMBER
"""Bytes of one token in all layers and heads, keys and values."""


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test is a process of its own, as far as cells share anything."""
    latency._shared.clear()
    yield
    interrupt.forget()


def cell(outputs: Path, method: str = "snapkv", fraction: float | None = 0.5, **settings: Any) -> RunConfig:
    """A small cell; settings are those of the section `latency`, and `hyper` of the method."""
    hyper = settings.pop("hyper", {"window": 8} if method == "snapkv" else {})
    spec = settings.pop("spec", SPEC)
    chosen = {"contexts": [64, 128], "steps": 4, "warmup": 2, "baselines": [Baseline.sdpa], **settings}
    return RunConfig(
        model=spec,
        method=METHODS.get(method)(**hyper),
        benchmark=None,
        budget=BudgetConfig(kept_fraction=fraction),
        runner=dataclasses.replace(RunConfig().runner, name="latency"),
        runtime=RuntimeConfig(device="cpu", threads=1),
        latency=LatencySettings(**chosen),
        outputs=str(outputs),
        tag="test",
    )


def measured(run: RunConfig) -> dict[str, Any]:
    outcome = latency.run(run)
    found = records.read_result(planned(run).directory)
    assert found is not None
    assert found["status"] == outcome.status
    return found


# --- a cell and its points


def test_record_has_a_point_for_each_context_and_batch(tmp_path: Path) -> None:
    result = measured(cell(tmp_path, batches=[2, 1]))
    points = result["latency"]["points"]
    assert result["status"] == "completed"
    assert [(p["context"], p["batch"]) for p in points] == [(64, 1), (128, 1), (64, 2), (128, 2)]
    for p in points:
        spread = p["decode_ms"]
        assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
        assert p["tokens_per_s"] == pytest.approx(1e3 * p["batch"] / spread["mean"])
        assert p["measured_steps"] == 4
        assert p["prefill_ms"] is None
        assert p["peak_device_bytes"] is None
        assert p["engine"]["name"] == "eager"
        assert p["engine"]["reason"]
    assert result["cell"]["benchmark"] == "latency"
    assert result["config"]["benchmark"]["contexts"] == [64, 128]
    assert records.config_hash(result["config"]) == result["config_hash"]
    assert "CPU" in result["provenance"]["device"]
    assert result["provenance"]["seconds"] > 0


def test_floor_is_weights_without_embedding_and_the_budgets_bytes_at_measured_bandwidth(
    tmp_path: Path,
) -> None:
    result = measured(cell(tmp_path, fraction=0.25, contexts=[128], batches=[3]))
    (p,) = result["latency"]["points"]
    model = hm.load(SPEC, "cpu").model
    everything = sum(x.nbytes for x in model.parameters())
    assert p["weights_bytes"] == everything - 120 * 64 * NUMBER
    assert p["budget_kv_bytes"] == 3 * 32 * TOKEN
    assert p["floor_bytes"] == p["weights_bytes"] + p["budget_kv_bytes"]
    bandwidth = p["ceilings"]["read_bytes_per_s"]["median"]
    assert p["floor_ms"] == pytest.approx(1e3 * p["floor_bytes"] / bandwidth)
    assert p["times_floor"] == pytest.approx(p["decode_ms"]["median"] / p["floor_ms"])


def test_tied_output_projection_is_read_and_counts() -> None:
    model = hm.load(dataclasses.replace(SPEC, shape=dataclasses.replace(SHAPE, tied=True)), "cpu").model
    assert point.weight_bytes(model) == sum(x.nbytes for x in model.parameters())


def test_bytes_are_those_of_the_storage_and_apart_from_the_floor(tmp_path: Path) -> None:
    full = measured(cell(tmp_path, "fullkv", contexts=[128]))["latency"]["points"][0]
    half = measured(cell(tmp_path, "snapkv", contexts=[128]))["latency"]["points"][0]
    assert full["full_kv_bytes"] == half["full_kv_bytes"] == 128 * TOKEN
    assert full["budget_kv_bytes"] == 128 * TOKEN
    assert full["attended_kv_bytes"] == 128 * TOKEN
    assert half["attended_kv_bytes"] == 64 * TOKEN
    assert half["read_bytes"] == half["weights_bytes"] + 64 * TOKEN
    assert 64 * TOKEN <= half["resident_kv_bytes"] < 80 * TOKEN
    assert half["host_kv_bytes"] == half["host_to_device_bytes_per_step"] == 0


def test_prompt_of_random_tokens_times_the_prefill(tmp_path: Path) -> None:
    run = cell(tmp_path, contexts=[64], prompt=PromptKind.random, prefills=2)
    (p,) = measured(run)["latency"]["points"]
    assert p["prefill_ms"]["median"] > 0
    assert p["baselines"]["sdpa"]["prefill_ms"]["median"] > 0


@dataclass(frozen=True)
class OneLayerMore(SnapKV):
    """Stands for what a method may do wrong at one point: see `fails_at`."""

    fails_at: int = 0
    failure: str = ""
    host: int = 0

    def layers(self, geometry: Any, budget: Any, prompt_tokens: list[int]) -> Any:
        if prompt_tokens[0] == self.fails_at:
            raise {"oom": torch.OutOfMemoryError, "bug": KeyError, "pin": RuntimeError}[self.failure](
                "CUDA error: out of memory" if self.failure == "pin" else "no"
            )
        return super().layers(geometry, budget, prompt_tokens)

    def usage(self, *args: Any) -> Usage:
        return dataclasses.replace(super().usage(*args), host_bytes=self.host)


def failing(tmp_path: Path, failure: str) -> RunConfig:
    run = cell(tmp_path)
    return dataclasses.replace(run, method=OneLayerMore(window=8, fails_at=64, failure=failure))


@pytest.mark.parametrize("failure", ["oom", "pin"])
def test_lack_of_memory_is_a_point_and_the_others_go_on(tmp_path: Path, failure: str) -> None:
    result = measured(failing(tmp_path, failure))
    short, long = result["latency"]["points"]
    assert (short["status"], long["status"], result["status"]) == ("out_of_memory", "completed", "completed")
    assert short["floor_ms"] > 0


def test_a_bug_at_one_point_fails_the_cell_but_not_its_other_points(tmp_path: Path) -> None:
    result = measured(failing(tmp_path, "bug"))
    short, long = result["latency"]["points"]
    assert (short["status"], long["status"], result["status"]) == ("failed", "completed", "failed")
    assert "KeyError" in result["error"]["message"]
    assert "Traceback" in result["error"]["traceback"]


def test_a_failed_point_runs_again_and_the_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = failing(tmp_path, "bug")
    before = measured(run)["latency"]["points"][1]
    monkeypatch.setattr(OneLayerMore, "layers", SnapKV.layers)
    result = measured(run)
    assert result["status"] == "completed"
    assert result["latency"]["points"][1] == before


def test_host_memory_is_looked_at_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(cell(tmp_path), method=OneLayerMore(window=8, host=1 << 60))
    monkeypatch.setattr(point, "_measured", lambda *args: pytest.fail("it was run"))
    for p in measured(run)["latency"]["points"]:
        assert p["status"] == "out_of_memory"
        assert "GiB" in p["message"]


def test_infeasible_points_name_the_smallest_budget_and_leave_others(tmp_path: Path) -> None:
    # A window of 8 needs more than 0.1 of 64 tokens, and less of 128.
    result = measured(cell(tmp_path, fraction=0.1))
    short, long = result["latency"]["points"]
    assert (short["status"], long["status"], result["status"]) == ("infeasible", "completed", "completed")
    assert 0.1 < short["smallest_fraction"] <= 0.16
    assert short["baselines"] == {}, "nothing is measured for a point that can't be"


def test_cell_of_nothing_but_infeasible_points_is_infeasible(tmp_path: Path) -> None:
    result = measured(cell(tmp_path, fraction=0.05))
    assert result["status"] == "infeasible"
    assert result["error"]["smallest_tokens"] == 9


def test_context_beyond_the_models_positions_is_a_gap(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, shape=dataclasses.replace(SHAPE, max_positions=100))
    short, long = measured(cell(tmp_path, spec=spec))["latency"]["points"]
    assert (short["status"], long["status"]) == ("completed", "infeasible")
    assert "has 100" in long["message"]


def test_a_points_memory_is_let_go_of_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    begun = point._begun

    def watch(*args: Any) -> Any:
        assert all(cache() is None for cache in kept), "an earlier point still holds its cache"
        session, times = begun(*args)
        kept.append(weakref.ref(session.cache))
        return session, times

    monkeypatch.setattr(point, "_begun", watch)
    gc.disable()  # what frees it must be said, not be luck
    try:
        measured(cell(tmp_path, contexts=[64, 128, 160]))
    finally:
        gc.enable()
    assert len(kept) == 3


# --- resume, and what cells share


def test_done_cell_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cell(tmp_path)
    first = measured(run)
    monkeypatch.setattr(latency, "_cell", lambda *args: pytest.fail("it ran again"))
    assert measured(run) == first


def test_stopped_cell_goes_on_after_its_last_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cell(tmp_path)
    real = latency._Bench.point

    def once(self: Any, context: int, batch: int) -> Any:
        interrupt._asked.set()
        return real(self, context, batch)

    monkeypatch.setattr(latency._Bench, "point", once)
    assert latency.run(run).status == "interrupted"
    assert records.read_result(planned(run).directory) is None
    (line,) = (planned(run).directory / "points.jsonl").read_text().splitlines()
    interrupt.forget()
    monkeypatch.setattr(latency._Bench, "point", real)
    points = measured(run)["latency"]["points"]
    assert points[0]["decode_ms"] == json.loads(line)["decode_ms"]
    assert [p["status"] for p in points] == ["completed"] * 2


def test_cells_of_a_sweep_share_model_ceilings_and_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"load": 0, "ceilings": 0, "baseline": 0}

    def counted(name: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return real(*args)

        return call

    monkeypatch.setattr(loading, "load", counted("load", loading.load))
    monkeypatch.setattr(latency, "measure_ceilings", counted("ceilings", latency.measure_ceilings))
    monkeypatch.setattr(latency, "measure_baseline", counted("baseline", latency.measure_baseline))
    loading._latest.clear()
    both = [Baseline.sdpa, Baseline.fullkv]
    found = [
        measured(cell(tmp_path, method, fraction, baselines=both))["latency"]["points"]
        for method, fraction in (("fullkv", 0.5), ("snapkv", 0.5), ("snapkv", 0.25))
    ]
    assert counts == {"load": 1, "ceilings": 1, "baseline": 2}
    full = found[0]
    for points in found[1:]:
        for p, base in zip(points, full, strict=True):
            assert p["ceilings"] == base["ceilings"]
            assert p["baselines"]["sdpa"] == base["baselines"]["sdpa"]
            assert p["baselines"]["fullkv"]["decode_ms"] == base["decode_ms"]
            assert p["run"] == base["run"]
            ratio = p["baselines"]["sdpa"]["decode_ms"]["median"] / p["decode_ms"]["median"]
            assert (p["speedup"], p["fastest_baseline"]) == (pytest.approx(ratio), "sdpa")


def test_headline_is_against_the_fastest_of_transformers_own() -> None:
    def ran(ms: float) -> dict[str, Any]:
        return {"status": "completed", "decode_ms": {"median": ms}}

    others = {"sdpa": ran(8.0), "static_compile": ran(4.0), "flash_attention_2": {"status": "failed"}}
    found = latency._speedup(
        {"status": "completed", "decode_ms": {"median": 2.0}}, {**others, "fullkv": ran(1.0)}
    )
    assert found == {"fastest_baseline": "static_compile", "speedup": 2.0}
    assert latency._speedup({"status": "completed", "decode_ms": {"median": 2.0}}, {})["speedup"] is None


def test_number_of_layers_is_cut_and_said(tmp_path: Path) -> None:
    result = measured(cell(tmp_path, contexts=[64], layers=1))
    (p,) = result["latency"]["points"]
    assert p["layers"] == 1
    assert p["full_kv_bytes"] == 64 * TOKEN // 2
    assert result["config"]["benchmark"]["layers"] == 1


# --- drift and profiles


def test_drift_is_applied_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Drifting(SnapKV):
        drift_every: int | None = None

    seen = []
    monkeypatch.setattr(
        latency, "measure_point", lambda task, *_: seen.append(task.method) or {"status": "x"}
    )
    for number, (drift, every) in enumerate(
        [(None, 0), (Drift.natural, None), (Drift.never, 0), (Drift.tenth, 10), (Drift.always, 1)]
    ):
        run = dataclasses.replace(cell(tmp_path, drift=drift, contexts=[64]), method=Drifting(window=8))
        bench = latency._Bench(run, settings_of(run.latency))
        bench.point(64, 1)
        assert seen[number].drift_every == every
        assert drift_of(run) == (drift or Drift.never)
    real = dataclasses.replace(run, model=ModelSpec(), latency=LatencySettings())
    assert drift_of(real) is Drift.natural
    assert drift_of(dataclasses.replace(real, method=Drifting(drift_every=7))) is None
    assert drift_of(dataclasses.replace(real, method=SnapKV())) is None


def test_drift_rate_is_of_the_measured_steps() -> None:
    before, after = {"windows": 4.0, "triggers": 4.0}, {"windows": 14.0, "triggers": 6.0}
    assert point._drift(before, after) == {"windows": 10.0, "triggers": 2.0, "drift_rate": 0.2}
    assert point._drift({"windows": 4.0}, {"windows": 4.0})["drift_rate"] is None
    assert point._drift({}, {}) == {}


def test_synthetic_profile_has_the_published_proportions() -> None:
    roles = synthetic_profile(Geometry(32, 32, 8, 128)).roles()
    published = {"anchor": 10, "volatile": 17, "pivot": 33, "satellite": 196}
    for role, count in published.items():
        assert roles.counts[role] == pytest.approx(count, abs=2), role
    assert roles.full_heads == pytest.approx(50, abs=2)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("layers", [1, 2, 48])
def test_synthetic_profile_exists_for_any_shape(layers: int, kv_heads: int) -> None:
    profile = synthetic_profile(Geometry(layers, kv_heads * 2, kv_heads, 16))
    roles = profile.roles()
    assert sum(roles.counts.values()) == layers * kv_heads
    if kv_heads > 1:
        assert all(any(role.name == "PIVOT" for role in row) for row in roles.matrix)
    assert torch.equal(
        profile.stability, synthetic_profile(Geometry(layers, kv_heads * 2, kv_heads, 16)).stability
    )


def test_given_profile_of_other_weights_is_taken_for_its_roles_and_said(tmp_path: Path) -> None:
    geometry = Geometry(2, 4, 2, 16)
    profile = dataclasses.replace(synthetic_profile(geometry), fingerprint="of-another-model")
    path = profile.save(tmp_path / "given.json")
    method, notes = with_profile(make("heterocache", profile=str(path)), SPEC, geometry)
    assert isinstance(method.profile, HeadProfile)
    assert method.profile.fingerprint is None
    method.head_profile(dataclasses.replace(geometry, fingerprint="of-random-weights"))
    assert "given.json" in notes[0]
    made_up, notes = with_profile(make("heterocache"), SPEC, geometry)
    assert "synthetic profile" in notes[0]
    assert made_up.profile.roles() == synthetic_profile(geometry).roles()


def test_profiles_reach_allocations_and_leave_real_models_alone() -> None:
    geometry = Geometry(2, 4, 2, 16)
    by_roles, notes = with_profile(make("snapkv", allocation="roles"), SPEC, geometry)
    assert by_roles.split.profile is not None
    assert notes
    real = make("heterocache")
    assert with_profile(real, ModelSpec(), geometry) == (real, [])
    assert with_profile(make("snapkv"), SPEC, geometry) == (make("snapkv"), [])


def test_profile_decides_the_cells_identity(tmp_path: Path) -> None:
    run = cell(tmp_path, "heterocache")
    path = dataclasses.replace(synthetic_profile(Geometry(2, 4, 2, 16))).save(tmp_path / "p.json")
    given = dataclasses.replace(run, method=make("heterocache", profile=str(path)))
    assert planned(run).config["method"]["content"] is not None
    assert planned(run).config["method"]["content"] == planned(given).config["method"]["content"]
    other = HeadProfile(2, 2, torch.zeros(2, 2), dict(synthetic_profile(Geometry(2, 4, 2, 16)).similarity))
    changed = dataclasses.replace(
        run, method=make("heterocache", profile=str(other.save(tmp_path / "o.json")))
    )
    assert planned(run).cell.config_hash != planned(changed).cell.config_hash


# --- prompts


def test_needle_prompt_has_its_length_its_fact_in_the_middle_and_its_question_at_the_end() -> None:
    tokenizer = hm.load(ModelSpec(), "cpu").tokenizer
    ids = needle_ids(tokenizer, 1200, 2)
    assert ids.shape == (2, 1200)
    for row, number in zip(ids, (7919, 5838), strict=True):
        text = tokenizer.decode(row)
        assert text.rstrip().endswith("the number is")
        place = text.index(f"gymnasium is {number}")
        assert 0.35 * len(text) < place < 0.6 * len(text)
    with pytest.raises(ValueError, match=r"latency.contexts=100 has no room"):
        needle_ids(tokenizer, 100, 1)


def test_needle_runs_on_the_embedded_model(tmp_path: Path) -> None:
    run = cell(tmp_path, spec=ModelSpec(), contexts=[512], prompt=PromptKind.needle, prefills=1)
    (p,) = measured(run)["latency"]["points"]
    assert p["status"] == "completed", p
    assert p["prefill_ms"]["median"] > 0


# --- ceilings, clock, baselines


def test_ceilings_are_measured_and_a_floor_follows() -> None:
    ceilings = measure_ceilings(CPU, 1 << 22)
    for spread in (ceilings.read_bytes_per_s, ceilings.copy_bytes_per_s):
        assert 1e8 < spread["p10"] <= spread["median"] <= spread["p90"] < 1e13  # type: ignore[operator]
    assert ceilings.host_to_device_bytes_per_s is None
    assert ceilings.floor_ms(ceilings.read_bytes_per_s["median"]) == pytest.approx(1e3)  # type: ignore[arg-type]


def test_clock_times_each_call_after_the_warm_up() -> None:
    calls: list[int] = []
    times = call_times(lambda: calls.append(1), repeats=3, warmup=2, device=CPU)
    assert (len(times), len(calls)) == (3, 5)
    assert spread_of([1.0, 2.0, 9.0]) == {"median": 2.0, "p10": 1.2, "p90": pytest.approx(7.6), "mean": 4.0}


def test_only_lack_of_memory_is_called_so() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_baseline_steps_are_transformers_own_greedy_decoding(kind: Any) -> None:
    """The same tokens as a full forward at each step: positions, place in the cache and mask are right."""
    loaded = hm.load(SPEC, "cpu")
    for weight in loaded.model.parameters():
        if weight.dim() > 1:
            weight *= 15  # as they are, the last token decides alone and positions don't matter
    ids = torch.randint(120, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = kind(config=loaded.model.config, **({"max_cache_len": 30} if kind is StaticCache else {}))
    baselines._prefill(loaded.model, ids, cache)()
    step = baselines._Step(loaded.model, cache, 20, 2, loaded.model)
    text = torch.cat([ids, torch.ones(2, 1, dtype=torch.int64)], dim=1)
    for _ in range(5):
        step()
        expected = loaded.model(text).logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(step._token, expected)
        text = torch.cat([text, expected], dim=1)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_filled_cache_holds_random_numbers_of_every_token(kind: Any) -> None:
    loaded = hm.load(SPEC, "cpu")
    cache = kind(config=loaded.model.config, **({"max_cache_len": 30} if kind is StaticCache else {}))
    baselines.fill(cache, loaded.model, 20, 2)
    assert int(cache.get_seq_length()) == 20
    for layer in cache.layers:
        for numbers in (layer.keys, layer.values):
            assert numbers.shape[:2] == (2, 2)
            assert float(numbers[:, :, :20].std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", [Baseline.sdpa, Baseline.static_compile])
def test_baseline_is_timed_and_leaves_the_model_as_it_was(
    kind: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_compiled", lambda model: model)
    loaded = hm.load(SPEC, "cpu")
    loaded.model.set_attn_implementation("eager")
    found = baselines.measure_baseline(kind, loaded, LatencySettings(steps=4, warmup=1), 64, 2, None)
    assert found["status"] == "completed"
    assert found["tokens_per_s"] == pytest.approx(2e3 / found["decode_ms"]["mean"])
    assert loaded.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError("no"), "out_of_memory"), (KeyError("no"), "failed")]
)
def test_baseline_that_fails_says_so_and_the_cell_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    def broken(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(baselines, "_compiled", broken)
    kinds = [Baseline.static_compile, Baseline.flash_attention_2, Baseline.sdpa]
    (p,) = measured(cell(tmp_path, contexts=[64], baselines=kinds))["latency"]["points"]
    assert p["baselines"]["static_compile"]["status"] == status
    assert p["baselines"]["flash_attention_2"]["status"] == "not_available"
    assert p["status"] == "completed"
    assert p["fastest_baseline"] == "sdpa"


@pytest.mark.slow
def test_static_cache_compiles_in_one_graph() -> None:
    loaded = hm.load(SPEC, "cpu")
    settings = LatencySettings(steps=4, warmup=2)
    found = baselines.measure_baseline(Baseline.static_compile, loaded, settings, 64, 2, None)
    assert found["status"] == "completed", found


# --- configuration


def test_runner_file_says_the_defaults_of_its_class() -> None:
    (run,) = compose_all(["runner=latency", "model=shape_llama31_8b"], False)
    assert settings_of(run.latency) == LatencySettings()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"contexts": []}, "latency.contexts=[]"),
        ({"contexts": [1]}, "latency.contexts=[1]"),
        ({"contexts": [64, 64]}, "different numbers"),
        ({"batches": [0]}, "latency.batches=[0]"),
        ({"steps": 1}, "latency.steps=1"),
        ({"prefills": 0}, "latency.prefills=0"),
        ({"drift": "often"}, "latency: "),
        ({"baselines": ["vllm"]}, "latency: "),
        ({"contxts": [64]}, "contxts"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings_of(settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_do_not_go_with_the_model(tmp_path: Path) -> None:
    run = cell(tmp_path, prompt=PromptKind.needle)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        checks.check_run(run)
    with pytest.raises(ConfigError, match=r"latency.layers=1 .*real weights"):
        check_latency(dataclasses.replace(cell(tmp_path, layers=1), model=ModelSpec()))
    with pytest.raises(ConfigError, match=r"latency.layers=9 .*has 2 layers"):
        check_latency(cell(tmp_path, layers=9))
    with pytest.raises(ConfigError, match=r"set latency.batches=\[4\]"):
        check_latency(dataclasses.replace(run, runtime=RuntimeConfig(batch_size=4)))
    assert checks.check_run(cell(tmp_path)) is not None


def test_settings_decide_the_cell(tmp_path: Path) -> None:
    hashes = {
        planned(run).cell.config_hash
        for run in (
            cell(tmp_path),
            cell(tmp_path, contexts=[64]),
            cell(tmp_path, drift=Drift.always),
            dataclasses.replace(cell(tmp_path), runtime=RuntimeConfig(device="cpu", graphs="off")),
        )
    }
    assert len(hashes) == 4


def test_experiment_is_the_published_sweep() -> None:
    runs = compose_all(["experiment=latency_224k"], True)
    assert {run.method.name for run in runs} == set(METHODS.names()) - {"random"}
    assert {run.budget.kept_fraction for run in runs} == {0.1, 0.25, 0.5}
    assert {run.model.name for run in runs} == {"shape_llama31_8b"}
    assert {run.runner.name for run in runs} == {"latency"}
    settings = settings_of(runs[0].latency)
    assert settings.contexts == [32768, 65536, 131072, 229376, 262144]
    assert settings.batches == [1, 4]
    assert settings.prompt is PromptKind.filled
    geometry = hm.geometry(runs[0].model)
    for run in runs:
        method, _ = with_profile(run.method, run.model, geometry)
        if run.method.name == "heterocache":
            budget = Budget(kept_fraction=run.budget.kept_fraction)
            assert run.method.roles.fit_budget
            assert method.usage(geometry, budget, 32768, 2).attended_tokens > 0
    assert settings.steps >= 50


# --- what is shown


def test_table_shows_every_point_and_says_why_there_are_gaps(tmp_path: Path) -> None:
    from rich.console import Console

    kinds = [Baseline.sdpa, Baseline.flash_attention_2, Baseline.fullkv]
    result = measured(cell(tmp_path, fraction=0.1, batches=[1, 2], baselines=kinds))
    with (tmp_path / "table.txt").open("w") as file:
        latency_table.show([result], Console(file=file, width=220))
    text = (tmp_path / "table.txt").read_text()
    assert text.count("infeasible, needs >= 0.1") == 2
    ran = result["latency"]["points"][1]
    row = next(line for line in text.splitlines() if line.split()[:4] == ["snapkv", "f0.1", "128", "1"])
    assert f"{ran['decode_ms']['median']:.2f} [" in row
    assert f"{ran['speedup']:.2f}x (sdpa)" in row
    assert f"{ran['times_floor']:.2f}" in row
    assert "baseline flash_attention_2: not available" in text
    assert latency_table.is_latency(result)
    assert not latency_table.is_latency({"latency": {"prefill_ms": {}}})


def test_cell_that_could_not_begin_is_recorded_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> Any:
        raise ValueError("no such device")

    monkeypatch.setattr(loading, "loaded", broken)
    result = measured(cell(tmp_path))
    assert (result["status"], result["latency"]["points"]) == ("failed", [])
    assert "no such device" in capsys.readouterr().out
