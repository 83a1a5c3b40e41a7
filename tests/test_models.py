"""Loading models from checkpoints on disk, the errors of models that aren't there, and fingerprints."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import hcache.models as hm
from hcache.geometry import Geometry
from hcache.models import ModelNotFound, ModelSpec, identity, loading, source
from runners.config import schema_of

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def random_model(family: str = "llama", kv_heads: int = 2, seed: int = 0, **changes):
    config_class, model_class = FAMILIES[family]
    settings = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "eos_token_id": 258,
    }
    torch.manual_seed(seed)
    return model_class(config_class(**{**settings, **changes}))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def checkpoint(directory: Path, model=None, shard: str = "5GB", tokenizer: bool = True) -> Path:
    (model if model is not None else random_model()).save_pretrained(directory, max_shard_size=shard)
    if tokenizer:
        byte_tokenizer().save_pretrained(directory)
    return directory


def spec_of(directory: Path | str, **settings) -> ModelSpec:
    return ModelSpec(path=str(directory), **settings)


# loading


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_load_gives_the_saved_model_ready_for_inference(tmp_path, family, shard):
    model = random_model(family).eval()
    checkpoint(tmp_path, model, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shard == "20KB")
    loaded = hm.load(spec_of(tmp_path, name="mine"), device="cpu")
    ids = torch.randint(0, 256, (1, 12))
    torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits.detach())
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.geometry == Geometry(3, 4, 2, 8, loaded.fingerprint)
    assert loaded.name == "mine"
    assert loaded.device == torch.device("cpu")
    assert loaded.context_tokens == 512


def test_tokenizer_pads_on_the_left_and_has_a_pad_token(tmp_path):
    tokenizer = hm.load(spec_of(checkpoint(tmp_path)), device="cpu").tokenizer
    batch = tokenizer(["abc", "a"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert tokenizer.decode(tokenizer("héllo")["input_ids"]) == "héllo"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tmp_path, dtype):
    loaded = hm.load(spec_of(checkpoint(tmp_path), dtype=dtype), device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}


def test_dtype_auto_is_the_checkpoints_own(tmp_path):
    checkpoint(tmp_path, random_model().to(torch.bfloat16))
    assert hm.load(spec_of(tmp_path), device="cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_yarn4_changes_positions_as_transformers_computes_yarn(tmp_path, family):
    model = random_model(family, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    checkpoint(tmp_path, model)
    loaded = hm.load(spec_of(tmp_path, rope="yarn4"), device="cpu")
    rope = loaded.model.config.rope_parameters
    assert {
        k: rope[k] for k in ("rope_type", "factor", "original_max_position_embeddings", "rope_theta")
    } == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_theta": 1e4,
    }
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](loaded.model.config, "cpu")
    torch.testing.assert_close(loaded.model.model.rotary_emb.inv_freq, frequencies)
    assert loaded.model.model.rotary_emb.attention_scaling == scale > 1
    assert not torch.equal(frequencies, model.model.rotary_emb.inv_freq)
    assert loaded.context_tokens == 131072


def test_yarn4_is_refused_for_other_families_and_other_ropes(tmp_path):
    checkpoint(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"model.rope=yarn4 .*llama.*set model.rope=none"):
        hm.geometry(spec_of(tmp_path / "llama", rope="yarn4"))
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    checkpoint(tmp_path / "linear", random_model("qwen2", rope_parameters=linear))
    with pytest.raises(ValueError, match="rope type linear"):
        hm.geometry(spec_of(tmp_path / "linear", rope="yarn4"))


def test_missing_weights_are_an_error_not_random_numbers(tmp_path):
    file = checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights \(model.layers.1.self_attn.k_proj"):
        hm.load(spec_of(tmp_path), device="cpu")


def test_missing_tokenizer_is_a_clear_error(tmp_path):
    checkpoint(tmp_path, tokenizer=False)
    with pytest.raises(ValueError, match=r"model.path=.*no tokenizer"):
        hm.load(spec_of(tmp_path), device="cpu")


# settings


def test_spec_takes_choices_by_name_and_refuses_unknown_ones():
    spec = ModelSpec(path="org/some-model", dtype="bfloat16", rope="yarn4")
    assert (spec.dtype, spec.rope, spec.name) == (hm.Dtype.bfloat16, hm.Rope.yarn4, "some-model")
    with pytest.raises(ValueError, match=r"model.dtype='int8' .*auto, float32, bfloat16, float16"):
        ModelSpec(dtype="int8")
    with pytest.raises(ValueError, match=r"model.quantization='int3'"):
        ModelSpec(quantization="int3")


@pytest.mark.parametrize(
    ("settings", "package"),
    [({"quantization": "nf4"}, "bitsandbytes"), ({"device_map": "auto"}, "accelerate")],
)
def test_absent_packages_are_named(tmp_path, monkeypatch, settings, package):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs {package}.*hcache\[quant\]"):
        hm.load(spec_of(checkpoint(tmp_path), **settings))


def test_nf4_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="nf4 needs a CUDA GPU"):
        hm.load(spec_of(checkpoint(tmp_path), quantization="nf4"))


def test_nf4_reaches_transformers_as_a_bitsandbytes_config():
    arguments = loading._placement(ModelSpec(quantization="nf4"), torch.device("cuda:0"))
    config = arguments["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert arguments["device_map"] == {"": torch.device("cuda:0")}
    assert loading._placement(ModelSpec(), torch.device("cpu")) == {}


@pytest.mark.parametrize("device", ["warp9", "cuda:99"])
def test_unknown_device_is_a_clear_error(tmp_path, device):
    with pytest.raises(ValueError, match=f"device='?{device}"):
        hm.load(spec_of(checkpoint(tmp_path)), device=device)


# models that aren't there


@pytest.mark.parametrize("path", ["/no/such/model", "./no/such", "~/nowhere/at/all", "a/b/c", ""])
def test_missing_path(path):
    for function in (hm.check_path, hm.geometry, hm.load):
        with pytest.raises(ModelNotFound, match=r"model\.path"):
            function(ModelSpec(path=path))


def test_incomplete_directories(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        hm.check_path(spec_of(tmp_path))
    checkpoint(tmp_path, shard="20KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ModelNotFound, match=r"lacks model-00002"):
        hm.check_path(spec_of(tmp_path))
    (tmp_path / source.INDEX).write_text('{"weight_map": [')
    with pytest.raises(ModelNotFound, match="damaged"):
        hm.check_path(spec_of(tmp_path))
    (tmp_path / source.INDEX).unlink()
    with pytest.raises(ModelNotFound, match="no weights"):
        hm.check_path(spec_of(tmp_path))


def test_pickled_weights_only_if_allowed(tmp_path):
    model = random_model()
    checkpoint(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match=r"pytorch_model\.bin.*model\.allow_pickle=true"):
        hm.load(spec_of(tmp_path), device="cpu")
    loaded = hm.load(spec_of(tmp_path, allow_pickle=True), device="cpu")
    torch.testing.assert_close(loaded.model.lm_head.weight, model.lm_head.weight.detach())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, r"gated; ask for access at https://huggingface.co/org/name.*hf auth login"),
        (errors.RepositoryNotFoundError, "neither a local directory nor a model on the Hugging Face Hub"),
        (errors.RevisionNotFoundError, "no model.revision=v9"),
        (errors.LocalEntryNotFoundError, "can't be reached"),
        (errors.OfflineModeIsEnabled, "can't be reached"),
        (errors.HFValidationError, "spelling"),
        (errors.RemoteEntryNotFoundError, r"no config\.json"),
        (ConnectionError, r"gave an error \(boom\)"),
    ],
)
def test_hub_errors_are_one_clear_message(monkeypatch, error, message):
    def download(*_args, **_kwargs):
        raise error.__new__(error, "boom")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for function in (hm.geometry, hm.load):
        with pytest.raises(ModelNotFound, match=rf"model\.path=org/name: .*{message}"):
            function(ModelSpec(path="org/name", revision="v9"))


def test_a_hub_id_is_no_path_and_passes_the_cheap_check():
    hm.check_path(ModelSpec(path="org/name"))
    assert source.local_directory(ModelSpec(path="org/name")) is None
    assert source.local_directory(ModelSpec(path="tiny")).parts[-3:] == ("hcache", "tiny", "weights")


def test_a_wrong_path_is_answered_without_torch():
    code = (
        "import sys, hcache.models.source as s\n"
        "from hcache.models import ModelSpec, check_path\n"
        "try: check_path(ModelSpec(path='/no/such'))\n"
        "except s.ModelNotFound: print('refused', 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "False"]


# geometry and fingerprint


def test_geometry_needs_no_weights(tmp_path):
    checkpoint(tmp_path)
    expected = hm.geometry(spec_of(tmp_path), weights=True)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert hm.geometry(spec_of(tmp_path)) == Geometry(3, 4, 2, 8, None)
    assert expected.fingerprint is not None
    assert hm.expected_fingerprint(spec_of(tmp_path)) is None


def test_geometry_without_head_dim_or_kv_heads_in_the_config():
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32)
    assert identity.config_geometry(config) == Geometry(2, 4, 4, 8)
    with pytest.raises(ValueError, match="not a decoder with attention"):
        identity.config_geometry(transformers.MambaConfig())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_fingerprint_is_the_same_live_and_from_files(tmp_path, family, kv_heads, shard):
    model = random_model(family, kv_heads)
    expected = hm.fingerprint(model)
    assert len(expected) == 16
    assert int(expected, 16) >= 0
    assert hm.checkpoint_fingerprint(checkpoint(tmp_path, model, shard)) == expected
    assert hm.load(spec_of(tmp_path), device="cpu").fingerprint == expected


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprint_does_not_depend_on_float32_or_bfloat16(tmp_path, saved):
    checkpoint(tmp_path, random_model(initializer_range=0.001).to(saved))
    prints = {hm.load(spec_of(tmp_path, dtype=d), device="cpu").fingerprint for d in ("float32", "bfloat16")}
    assert prints == {hm.checkpoint_fingerprint(tmp_path)}


def test_bfloat16_weights_keep_their_fingerprint_in_float16(tmp_path):
    model = random_model(initializer_range=1e-5).to(torch.bfloat16)  # most samples lie near the cut
    checkpoint(tmp_path, model)
    assert hm.load(spec_of(tmp_path, dtype="float16"), device="cpu").fingerprint == hm.fingerprint(model)


@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_fingerprint_sees_every_layer_and_both_projections(projection):
    model = random_model()
    seen = {hm.fingerprint(model)}
    for layer in model.model.layers:
        getattr(layer.self_attn, projection).weight.data.mul_(1.5)
        seen.add(hm.fingerprint(model))
    assert len(seen) == 4


def test_fingerprint_differs_by_seed_and_by_architecture():
    models_ = [
        random_model(),
        random_model(seed=1),
        random_model(kv_heads=4),
        random_model(num_hidden_layers=2),
    ]
    assert len({hm.fingerprint(model) for model in models_}) == 4


def test_a_model_without_known_projections_has_no_fingerprint(tmp_path, caplog):
    with pytest.raises(ValueError, match="under a known name"):
        hm.fingerprint(transformers.GPTNeoForCausalLM(tiny_gpt_neo()).transformer.wte)


def tiny_gpt_neo():
    return transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]
    )


def test_a_damaged_checkpoint_has_no_fingerprint(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        hm.checkpoint_fingerprint(tmp_path / "nothing")
    checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="safetensors"):
        hm.checkpoint_fingerprint(tmp_path)


def test_fingerprint_reads_the_text_config_only(tmp_path):
    """Two checkpoints whose config.json differ in what is not attention have one fingerprint."""
    model = random_model()
    checkpoint(tmp_path, model)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "max_position_embeddings": 9, "rms_norm_eps": 1e-3}))
    assert hm.checkpoint_fingerprint(tmp_path) == hm.fingerprint(model)


# conf/model


CONF = Path(__file__).resolve().parent.parent / "conf" / "model"


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_model_config_is_a_spec(file):
    settings = OmegaConf.to_container(OmegaConf.load(file))
    assert settings.pop("defaults") == ["/schema/model/spec@_here_", "_self_"]
    if file.stem == "hf":
        assert settings["path"] == "???"
        assert set(settings) == {field.name for field in dataclasses.fields(ModelSpec)}
        settings["path"] = "some/model"
    spec = OmegaConf.to_object(OmegaConf.merge(schema_of(ModelSpec), settings))
    assert isinstance(spec, ModelSpec)
    assert spec.name == ("model" if file.stem == "hf" else file.stem)
