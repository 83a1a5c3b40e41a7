"""Models of a shape with random weights: what they are, what they are refused for, that they need no file."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import hcache.models as hm
from hcache.geometry import Geometry
from hcache.methods import make
from hcache.models import ModelSpec, Shape
from hcache.models.random_weights import shape_config
from runners import checks, evaluate
from runners.config import ConfigError, RunConfig, plain_config, register
from runners.plan import compose_all, planned

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "layers": 3,
    "query_heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "vocabulary": 120,
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register()


def spec(**changes: object) -> ModelSpec:
    shape = Shape(**{**SMALL, **changes})  # type: ignore[arg-type]
    return ModelSpec(name="small", path="shape", dtype="float32", shape=shape)  # type: ignore[arg-type]


def composed(*lines: str) -> RunConfig:
    (run,) = compose_all(lines, False)
    return run


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_weights_are_seeded_normal_and_of_the_shape(architecture: str) -> None:
    loaded = hm.load(spec(architecture=architecture), "cpu")
    again = hm.load(spec(architecture=architecture), "cpu").model.state_dict()
    other = hm.load(spec(architecture=architecture, seed=1), "cpu").model.state_dict()
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    up = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(weights[up], other[up])
    assert weights[up].shape == (96, 64)
    assert float(weights[up].std()) == pytest.approx(0.02, rel=0.05)
    assert loaded.geometry == hm.geometry(spec(architecture=architecture), weights=True)
    assert loaded.geometry == Geometry(3, 4, 2, 16, None)
    assert loaded.tokenizer is None
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 120)


def test_bfloat16_by_default_and_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    loaded = hm.load(dataclasses.replace(spec(), dtype=hm.Dtype.auto), "cpu")
    assert torch.equal(torch.rand(2), expected)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    # Angles in bfloat16 would be wrong by whole turns at 200K tokens.
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "parameters", "geometry", "bias"),
    [
        ("shape_llama31_8b", 8_030_261_248, (32, 32, 8, 128), False),
        ("shape_qwen25_14b", 14_770_033_664, (48, 40, 8, 128), True),
    ],
)
def test_shipped_shapes_have_the_published_number_of_parameters(
    name: str, parameters: int, geometry: tuple[int, ...], bias: bool
) -> None:
    from transformers import AutoModelForCausalLM

    model = composed(f"model={name}", "runner=latency").model
    assert model.shape is not None
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(shape_config(model.shape))
    assert sum(p.numel() for p in built.parameters()) == parameters
    assert hm.geometry(model) == Geometry(*geometry)
    assert ("model.layers.0.self_attn.q_proj.bias" in dict(built.named_parameters())) is bias
    assert built.config.max_position_embeddings > 1_000_000
    assert not built.config.tie_word_embeddings
    rope = built.config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"]) == ((1e6, "default") if bias else (5e5, "llama3"))
    assert built.generation_config.eos_token_id is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "shape"}, "model.path=shape and model.shape=null disagree"),
        ({"path": "tiny", "shape": Shape()}, "model.path=tiny and model.shape=set disagree"),
        ({"path": "shape", "shape": Shape(), "rope": "yarn4"}, "model.rope can't be set"),
        ({"path": "shape", "shape": Shape(), "device_map": "auto"}, "model.device_map can't be set"),
        ({"path": "shape", "shape": Shape(), "quantization": "nf4"}, "model.quantization can't be set"),
        ({"path": "shape", "shape": {"layers": 0}}, "model.shape.layers=0 must be at least 1"),
        ({"path": "shape", "shape": {"kv_heads": 5}}, "model.shape.kv_heads=5 must divide"),
        ({"path": "shape", "shape": {"architecture": "bert"}}, "choose one of: llama, qwen2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        ModelSpec(**settings)  # type: ignore[arg-type]
    assert said in str(error.value)


@pytest.mark.parametrize("runner", ["evaluate", "profile"])
def test_runners_that_need_text_refuse_random_weights_before_loading(runner: str) -> None:
    run = composed("model=shape_llama31_8b", f"runner={runner}")
    with pytest.raises(ConfigError, match="random weights and no tokenizer.*runner=latency"):
        checks.check_run(run)


def test_evaluation_of_random_weights_fails_as_a_cell_with_that_message(tmp_path: object) -> None:
    """As where a launcher starts the job elsewhere, without the checks of the command line."""
    run = composed("model=shape_llama31_8b", "method=snapkv", "tracker=none", f"outputs={tmp_path}")
    outcome = evaluate.run(run)
    assert outcome.status == "failed"
    assert "no tokenizer" in outcome.message


def test_shape_is_the_identity_of_random_weights_and_absent_from_others() -> None:
    small = composed("model=shape_llama31_8b", "runner=latency", "method=snapkv")
    fewer = composed("model=shape_llama31_8b", "runner=latency", "method=snapkv", "model.shape.layers=4")
    assert planned(small).cell.config_hash != planned(fewer).cell.config_hash
    assert plain_config(small)["model"]["shape"]["hidden_size"] == 4096
    assert "shape" not in plain_config(composed("model=tiny", "method=snapkv"))["model"]


def test_every_method_plans_for_a_shape_without_loading() -> None:
    run = composed("model=shape_qwen25_14b", "runner=budget", "method=snapkv")
    usage = make(run.method).usage(hm.geometry(run.model), hm_budget(0.5), 1000, 2)
    assert usage.device_bytes >= 48 * 8 * 500 * 2 * 128 * 2


def hm_budget(fraction: float) -> object:
    from hcache.budget import Budget

    return Budget(kept_fraction=fraction)
