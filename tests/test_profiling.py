"""Head profiles: statistics and clustering against brute force, capture against eager attention, files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import random
import re
import statistics
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hcache.geometry import Geometry
from hcache.models import ModelSpec, fingerprint, geometry
from hcache.profiling import (
    ForeignProfile,
    Graph,
    HeadProfile,
    ProfileNotFound,
    PublishedProfile,
    Role,
    Roles,
    allocation_weights,
    assign_roles,
    capture,
    find_profile,
    library,
    load_profile,
    profile_heads,
    star_clusters,
)
from hcache.profiling import profile as profile_module
from hcache.profiling.overlap import OverlapStatistics, median, overlap, top_sets
from runners import profile as runner
from runners.config import RunConfig

A, V, P, S = Role.ANCHOR, Role.VOLATILE, Role.PIVOT, Role.SATELLITE
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def random_model(family: str = "llama", kv_heads: int = 2, implementation: str = "sdpa", **changes):
    config_class, model_class = FAMILIES[family]
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        # Far from uniform, yet not so peaked that pooling a single peak makes ties of its neighbours.
        "initializer_range": 0.25,
    }
    torch.manual_seed(0)
    config = config_class(**{**settings, **changes}, attn_implementation=implementation)
    return model_class(config).eval()


def text(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (tokens,), generator=torch.Generator().manual_seed(seed))


def random_profile(layers: int = 3, heads: int = 4, seed: int = 0, **facts) -> HeadProfile:
    generator = torch.Generator().manual_seed(seed)
    similarity = {}
    for graph in Graph:
        pairs = torch.rand(layers, heads, heads, generator=generator, dtype=torch.float64)
        similarity[graph] = (pairs + pairs.transpose(1, 2)) / 2
    stability = torch.rand(layers, heads, generator=generator, dtype=torch.float64)
    given = {"query_heads": 8, "head_dim": 16, "fingerprint": "0123456789abcdef", "settings": {"topk": 7}}
    return HeadProfile(layers, heads, stability, similarity, **{**given, **facts})


# overlap statistics


def brute_sets(scores: list[list[float]], count: int, kernel: int) -> list[set[int]]:
    half = kernel // 2
    sets = []
    for row in scores:
        padded = [0.0] * half + row + [0.0] * half
        smooth = [sum(padded[i : i + kernel]) / kernel for i in range(len(row))]
        sets.append(set(sorted(range(len(row)), key=lambda i: -smooth[i])[:count]))
    return sets


def test_overlap_is_of_the_smaller_set():
    a = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    b = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]).bool()
    assert overlap(a, b).tolist() == [2 / 3, 0.0]


def test_top_sets_give_ties_to_the_earlier_position():
    assert top_sets(torch.tensor([[1.0, 3.0, 1.0, 1.0]]), 2).int().tolist() == [[1, 1, 0, 0]]
    assert top_sets(torch.zeros(1, 5000), 700)[0].nonzero().flatten().tolist() == list(range(700))


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_median_is_the_usual_one(count):
    values = torch.rand(count, 3, dtype=torch.float64)
    expected = [statistics.median(column) for column in values.T.tolist()]
    assert median(values).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("steps", "kernel", "topk"), [(1, 1, 5), (4, 5, 6), (5, 3, 100)])
def test_statistics_equal_brute_force_pooled_over_texts(steps, kernel, topk):
    layers, heads, lengths = 2, 3, (20, 31)
    torch.manual_seed(steps)
    scores = [torch.rand(steps + 1, layers, heads, n, dtype=torch.float64) for n in lengths]
    streamed = OverlapStatistics(layers, topk, kernel)
    for steps_LHn in scores:
        streamed.start_text()
        for step_LHn in steps_LHn:
            for layer in range(layers):
                streamed.observe(layer, step_LHn[layer])
    result = streamed.result()

    def shared(a, b):
        return len(a & b) / min(len(a), len(b))

    for layer in range(layers):
        sets = [
            [brute_sets(step[layer].tolist(), min(topk, step.shape[-1]), kernel) for step in steps_LHn]
            for steps_LHn in scores
        ]
        for head, other in itertools.product(range(heads), repeat=2):
            stable = statistics.median(shared(s[head], text_[0][head]) for text_ in sets for s in text_[1:])
            assert result.stability[layer, head] == pytest.approx(stable)
            pairs = {
                Graph.median: [shared(s[head], s[other]) for text_ in sets for s in text_[1:]],
                Graph.prefill: [shared(text_[0][head], text_[0][other]) for text_ in sets],
                Graph.last_step: [shared(text_[-1][head], text_[-1][other]) for text_ in sets],
            }
            for graph, values in pairs.items():
                assert result.similarity[graph][layer, head, other] == pytest.approx(
                    statistics.median(values)
                )


# clustering, roles, weights


def brute_clusters(similarity: list[list[float]], threshold: float) -> dict[int, set[int]]:
    """Follows the rule word by word, counting degrees anew each time."""
    heads = len(similarity)
    taken: set[int] = set()
    clusters: dict[int, set[int]] = {}
    while True:
        best, degree = None, 0
        for head in range(heads):
            if head in taken:
                continue
            count = 0
            for other in range(heads):
                if other != head and other not in taken and similarity[head][other] >= threshold:
                    count += 1
            if count > degree:
                best, degree = head, count
        if best is None:
            return clusters
        near = {o for o in range(heads) if o != best and o not in taken and similarity[best][o] >= threshold}
        clusters[best] = near
        taken |= near | {best}


@pytest.mark.parametrize("seed", range(30))
def test_star_clusters_equal_brute_force(seed):
    generator = random.Random(seed)
    heads = generator.choice([1, 2, 5, 8, 12])
    pairs = [[0.0] * heads for _ in range(heads)]
    for a, b in itertools.combinations(range(heads), 2):
        pairs[a][b] = pairs[b][a] = round(generator.random(), 1)  # rounded: ties with the threshold
    threshold = generator.choice([0.0, 0.3, 0.5, 0.9, 1.0])
    found = {pivot: set(satellites) for pivot, satellites in star_clusters(pairs, threshold).items()}
    assert found == brute_clusters(pairs, threshold)


def test_star_clusters_by_hand():
    """1 has most neighbours and takes 0, 2, 3; then 4 and 5 are left with each other: the lower leads."""
    edges = {(0, 1), (1, 2), (1, 3), (3, 4), (4, 5)}
    pairs = [[1.0 if (a, b) in edges or (b, a) in edges else 0.0 for b in range(7)] for a in range(7)]
    assert star_clusters(pairs, 0.5) == {1: (0, 2, 3), 4: (5,)}
    roles = assign_roles([[0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.5]], [pairs], 0.5, 0.5)
    assert roles.matrix == ((S, P, S, S, P, S, A),)
    assert roles.pivot_of == ((1, None, 1, 1, None, 4, None),)
    assert roles.counts == {"anchor": 1, "volatile": 0, "pivot": 2, "satellite": 4}
    assert (roles.full_heads, roles.satellites(0, 1), roles.satellites(0, 0)) == (2, (0, 2, 3), ())
    assert assign_roles([[0.49] * 7], [pairs], 0.5, 0.5).matrix[0][6] is V


@pytest.mark.parametrize("seed", range(5))
def test_weights_equal_brute_force(seed):
    profile = random_profile(seed=seed)
    roles = profile.roles(0.5, 0.6)
    stability = profile.stability.tolist()
    cells = [(i, j) for i in range(3) for j in range(4) if roles.matrix[i][j] in (A, S)]
    raw = {cell: 1 / (stability[cell[0]][cell[1]] + 1e-6) for cell in cells}
    mean = sum(raw.values()) / len(raw)
    for i, j in itertools.product(range(3), range(4)):
        expected = raw[i, j] / mean if (i, j) in raw else None
        assert roles.weights[i][j] == (pytest.approx(expected) if expected else None)
    present = [w for row in roles.weights for w in row if w is not None]
    assert sum(present) / len(present) == pytest.approx(1)


def test_weights_where_no_head_is_compressed():
    assert allocation_weights([[0.5, 0.5]], [[V, P]]) == ((None, None),)


def test_demoting_frees_satellites_and_takes_weights_anew():
    pairs = [[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
    roles = assign_roles([[0.8, 0.4, 0.2]], pairs, 0.5, 0.5)
    assert roles.matrix == ((P, S, V),)
    lone = roles.demote(0, 2)
    assert lone.matrix == ((P, S, A),)
    assert lone.weights[0] == (None, pytest.approx(2 / 3, rel=1e-4), pytest.approx(4 / 3, rel=1e-4))
    both = lone.demote(0, 0)
    assert (both.matrix, both.pivot_of) == (((A, A, A),), ((None, None, None),))
    assert sum(both.weight_of(0, head) for head in range(3)) == pytest.approx(3)
    for wrong in (lambda: both.demote(0, 0), lambda: roles.weight_of(0, 0)):
        with pytest.raises(ValueError, match="head 0 of layer 0"):
            wrong()


def test_demoting_without_scores_gives_the_mean_weight():
    roles = Roles(((V, A),), ((None, None),), ((None, 1.0),), 0.5)
    assert roles.stability_of(0, 0) == 0
    assert roles.demote(0, 0).weights == ((1.0, 1.0),)


def test_thresholds_change_without_the_model():
    profile = random_profile()
    assert profile.roles() == profile.roles(0.5, 0.5, "median")
    nobody_similar = profile.roles(0.3, 1.0)
    expected = [[A if score >= 0.3 else V for score in row] for row in profile.stability.tolist()]
    assert [list(row) for row in nobody_similar.matrix] == expected
    assert profile.roles(0.5, 0.0).counts == {"anchor": 0, "volatile": 0, "pivot": 3, "satellite": 9}
    graphs = {profile.roles(0.5, 0.5, graph).matrix for graph in Graph}
    assert len(graphs) == 3


@pytest.mark.parametrize(
    "settings", [{"stable_threshold": 1.5}, {"similarity_threshold": -1}, {"graph": "mean"}]
)
def test_settings_of_roles_are_checked(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=rf"roles\.{name}="):
        random_profile().roles(**settings)


# capture


def eager_rows(model, ids: torch.Tensor, steps: int) -> list[list[torch.Tensor]]:
    """[step][layer] attention [Hq, n] of the last query, from whole eager matrices, without a cache."""
    n, rows = len(ids), []
    for _ in range(steps + 1):
        out = model(ids[None], output_attentions=True, use_cache=False)
        rows.append([layer[0, :, -1, :n] for layer in out.attentions])
        ids = torch.cat([ids, out.logits[0, -1].argmax()[None]])
    return rows


def reference_profile(model, ids, steps, topk, kernel, reduce):
    """Stability and similarity by the definitions, from eager attention."""
    kv_heads = model.config.num_key_value_heads
    sets = []
    for layers in eager_rows(model, ids, steps):
        step = []
        for row in layers:
            heads = reduce(row.unflatten(0, (kv_heads, -1)), 1)
            smooth = F.avg_pool1d(heads[None], kernel, stride=1, padding=kernel // 2)[0]
            step.append([set(head.topk(min(topk, len(ids))).indices.tolist()) for head in smooth])
        sets.append(step)

    def shared(a, b):
        return len(a & b) / min(len(a), len(b))

    layers, heads = range(len(sets[0])), range(kv_heads)
    stability = [
        [statistics.median(shared(s[i][h], sets[0][i][h]) for s in sets[1:]) for h in heads] for i in layers
    ]
    similarity = [
        [[statistics.median(shared(s[i][h], s[i][o]) for s in sets[1:]) for o in heads] for h in heads]
        for i in layers
    ]
    return torch.tensor(stability), torch.tensor(similarity)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_capture_equals_eager_attention(family, kv_heads, group):
    eager = random_model(family, kv_heads, "eager")
    ids = text(50)
    reduce = torch.mean if group == "mean" else torch.amax
    stability, similarity = reference_profile(eager, ids, 6, 9, 5, reduce)
    profile = profile_heads(random_model(family, kv_heads), ids, decode_steps=6, topk=9, group=group)
    torch.testing.assert_close(profile.stability.float(), stability)
    torch.testing.assert_close(profile.similarity[Graph.median].float(), similarity)
    assert 0 < float(stability.mean()) < 1


def test_rows_are_softmax_over_all_visible_tokens_then_sliced(monkeypatch):
    """Mass on generated tokens counts before the slice: with mean over a group this changes the order."""
    seen = []
    monkeypatch.setattr(OverlapStatistics, "observe", lambda self, layer, scores: seen.append(scores))
    monkeypatch.setattr(OverlapStatistics, "result", lambda self: pytest.skip("unused"))
    ids = text(20)
    with pytest.raises(pytest.skip.Exception):
        profile_heads(random_model(), ids, decode_steps=3, topk=4)
    rows = eager_rows(random_model(implementation="eager"), ids, 3)
    for step, layer in itertools.product(range(4), range(2)):
        expected = rows[step][layer].unflatten(0, (2, 2)).mean(1)
        torch.testing.assert_close(seen[2 * step + layer], expected, rtol=1e-4, atol=1e-6)
    assert float(seen[-1].sum(-1).max()) < 1


def test_texts_are_pooled_and_pads_left_out():
    model, short, long = random_model(), text(30), text(40, seed=1)
    both = profile_heads(model, [short, long.tolist()], decode_steps=3, topk=5)
    padded = torch.stack([F.pad(short, (10, 0), value=96), long])
    mask = torch.ones_like(padded)
    mask[0, :10] = 0
    batch = profile_heads(model, padded, decode_steps=3, topk=5, attention_mask=mask)
    assert torch.equal(both.stability, batch.stability)
    assert both.settings["prompt_tokens"] == [30, 40]
    alone = [profile_heads(model, ids, decode_steps=3, topk=5) for ids in (short, long)]
    assert not torch.equal(alone[0].stability, alone[1].stability)
    medians = torch.stack([profile.similarity[Graph.prefill] for profile in alone]).mean(0)
    torch.testing.assert_close(both.similarity[Graph.prefill], medians)


def test_topk_is_clipped_with_a_warning(caplog):
    profile = profile_heads(random_model(), text(12), decode_steps=2, topk=1024)
    assert "covers a whole text (12 tokens)" in caplog.text
    assert bool((profile.stability == 1).all())


def test_profile_knows_its_model():
    model = random_model("qwen3", 1)
    profile = profile_heads(model, text(20), decode_steps=2, topk=4)
    assert profile.fingerprint == fingerprint(model)
    profile.check(Geometry(2, 4, 1, 8, fingerprint(model)))
    assert profile.settings == {
        "texts": 1,
        "prompt_tokens": [20],
        "decode_steps": 2,
        "topk": 4,
        "kernel": 5,
        "group": "mean",
        "dtype": "float32",
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(monkeypatch, fails):
    model = random_model(attention_dropout=0.0).train()
    logits = model(text(9)[None]).logits
    if fails:
        monkeypatch.setattr(OverlapStatistics, "observe", lambda *_: [][0])
        with pytest.raises(IndexError):
            profile_heads(model, text(20), decode_steps=2, topk=4)
    else:
        profile_heads(model, text(20), decode_steps=2, topk=4)
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert torch.equal(model(text(9)[None]).logits, logits)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_nothing_of_prompt_by_prompt_size_is_built(monkeypatch):
    """No mask is made, and the biggest tensor of the capture has one row per head."""
    called = []
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *a, **k: called.append(a)
    )
    shapes = []
    original = capture.last_row

    def spy(query, key, scaling):
        row = original(query, key, scaling)
        shapes.append(tuple(row.shape))
        return row

    monkeypatch.setattr(capture, "last_row", spy)
    profile_heads(random_model(), text(64), decode_steps=2, topk=4)
    assert not called
    assert set(shapes) == {(2, 2, 64), (2, 2, 65), (2, 2, 66)}


def test_attention_that_is_not_plain_is_refused():
    sliding = random_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding_window=8"):
        profile_heads(sliding, text(20), decode_steps=2, topk=4)
    assert sliding.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (torch.zeros(0, dtype=torch.long), {}, "empty text"),
        ([], {}, "empty text"),
        (text(9), {"decode_steps": 0}, "decode_steps=0"),
        (text(9), {"topk": 0}, "topk=0"),
        (text(9), {"kernel": 4}, "kernel=4"),
        (text(9), {"group": "median"}, "group='median'"),
        (text(9), {"attention_mask": torch.ones(8)}, "shape of input_ids"),
        (text(9), {"attention_mask": torch.zeros(9)}, "empty text"),
    ],
)
def test_bad_input_to_profile_heads(ids, settings, message):
    with pytest.raises(ValueError, match=message):
        profile_heads(random_model(), ids, **{"topk": 4, **settings})


# files


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_save_and_load(tmp_path, suffix):
    profile = random_profile()
    path = profile.save(tmp_path / "new" / f"mine{suffix}")
    loaded = HeadProfile.load(path)
    assert torch.equal(loaded.stability, profile.stability)
    assert all(torch.equal(loaded.similarity[graph], profile.similarity[graph]) for graph in Graph)
    names = ("layers", "kv_heads", "query_heads", "head_dim", "fingerprint", "settings")
    assert [getattr(loaded, name) for name in names] == [getattr(profile, name) for name in names]
    assert loaded.roles(0.4, 0.6) == profile.roles(0.4, 0.6)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, r"no such file; make one: python run\.py runner=profile"),
        ("x.txt", b"", r"\.safetensors or \.json"),
        ("x.json", b'{"format": ', "can't be read"),
        ("x.json", b"[1, 2]", "can't be read"),
        ("x.json", b'{"format": "other"}', "its format is 'other'"),
        ("x.safetensors", b"12345678901234567890", "can't be read"),
    ],
)
def test_files_that_are_no_profile(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_profile(tmp_path / name)


def test_damaged_scores_are_refused(tmp_path):
    path = random_profile().save(tmp_path / "x.json")
    data = json.loads(path.read_text())
    data["scores"]["similarity.median"][0][0][1] = 0.123
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="not symmetric"):
        load_profile(path)
    data["scores"]["stability"] = [[2.0] * 4] * 3
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="outside 0 to 1"):
        load_profile(path)
    data["scores"]["stability"] = [[0.5] * 4] * 2
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"shape \[2, 4\], expected \[3, 4\]"):
        load_profile(path)


# the model it belongs to


def test_foreign_profiles_are_refused_naming_both():
    profile = random_profile()
    own = Geometry(3, 8, 4, 16, "0123456789abcdef")
    profile.check(own)
    others = {"layers": 4, "query_heads": 4, "kv_heads": 2, "head_dim": 8, "fingerprint": "fedcba9876543210"}
    for name, value in others.items():
        foreign = dataclasses.replace(own, **{name: value})
        with pytest.raises(ForeignProfile, match="0123456789abcdef") as caught:
            profile.check(foreign)
        label = "weights" if name == "fingerprint" else name
        assert f"{label} {value}" in str(caught.value).split("the model has")[1]
        assert "python run.py runner=profile" in str(caught.value)


def test_unknown_weights_are_compared_by_numbers_with_one_warning(caplog):
    profile_module._warn_once.cache_clear()
    profile, unknown = random_profile(), Geometry(3, 8, 4, 16)
    with caplog.at_level(logging.WARNING):
        profile.check(unknown)
        profile.check(unknown)
    assert [record.getMessage()[:30] for record in caplog.records] == ["the model has no fingerprint o"]
    with pytest.raises(ForeignProfile):
        profile.check(Geometry(3, 8, 4, 32))


def test_profiles_are_found_by_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("HCACHE_PROFILES", str(tmp_path / "user"))
    monkeypatch.setattr(library, "SHIPPED", tmp_path / "shipped")
    own = Geometry(3, 8, 4, 16, "0123456789abcdef")
    with pytest.raises(ProfileNotFound, match=r"0123456789abcdef.*python run\.py runner=profile model=mine"):
        find_profile(own, "mine")
    random_profile(seed=1).save(tmp_path / "shipped" / "profile.safetensors")
    assert float(find_profile(own).stability[0, 0]) == float(random_profile(seed=1).stability[0, 0])
    random_profile(seed=2).save(library.default_path("0123456789abcdef"))  # the user's own comes first
    assert float(find_profile(own).stability[0, 0]) == float(random_profile(seed=2).stability[0, 0])
    for unknown in ("fedcba9876543210", None):
        with pytest.raises(ProfileNotFound):
            find_profile(dataclasses.replace(own, fingerprint=unknown))


def test_user_directory_defaults_to_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("HCACHE_PROFILES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library.user_directory() == tmp_path / ".cache" / "hcache" / "profiles"


# the published format

NEW = {"anchor": 1, "volatile": 2, "pivot": 3, "satellite": 4}
OLD = {"Stable_Unique": 1, "Decaying_Unique": 2, "Similar_Leader": 3, "Similar_Member": 4}


def published(names=NEW, **changes) -> dict:
    counts = dict(zip(names, (1, 1, 2, 4), strict=True))
    data = {
        "meta": {"type_map": names, "counts": counts},
        "classification_matrix": [[4, 3, 4, 2], [3, 4, 1, 4]],
        "allocation_matrix": [[0.75, -1.0, 1.3125, -1.0], [-1.0, 0.9, 1.1, 0.7]],
        "leader_member_relations": [{"1": [0, 2]}, {"0": [1, 3]}],
    }
    return {**data, **changes}


def write(path, data):
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("names", [NEW, OLD], ids=["new", "old"])
def test_published_matrices_come_back_exactly(tmp_path, names):
    profile = load_profile(write(tmp_path / "p.json", published(names)))
    assert isinstance(profile, PublishedProfile)
    roles = profile.roles()
    assert [[int(role) for role in row] for row in roles.matrix] == published()["classification_matrix"]
    assert [[-1 if w is None else w for w in row] for row in roles.weights] == published()[
        "allocation_matrix"
    ]
    assert roles.pivot_of == ((1, None, 1, None), (None, 0, None, 0))
    assert roles.counts == {"anchor": 1, "volatile": 1, "pivot": 2, "satellite": 4}


def test_published_codes_are_read_from_the_file(tmp_path):
    names = {"anchor": 0, "volatile": 1, "pivot": 2, "satellite": 3}
    lower = [[code - 1 for code in row] for row in published()["classification_matrix"]]
    data = published(names, classification_matrix=lower)
    data["meta"]["counts"] = published()["meta"]["counts"]
    assert load_profile(write(tmp_path / "p.json", data)).roles().matrix == ((S, P, S, V), (P, S, A, S))


def test_published_profiles_refuse_other_settings(tmp_path):
    profile = load_profile(write(tmp_path / "x_topk9_th0.4_sim0.5_step50.json", published()))
    assert profile.roles(0.4, 0.5, "prefill") is profile.roles()
    assert profile.roles().stable_threshold == 0.4
    for settings in ({"stable_threshold": 0.5}, {"similarity_threshold": 0.3}, {"graph": "last_step"}):
        with pytest.raises(ValueError, match="no raw scores"):
            profile.roles(**settings)
    unnamed = load_profile(write(tmp_path / "renamed.json", published()))
    assert unnamed.roles(0.5, 0.5) is unnamed.roles()
    with pytest.raises(ValueError, match=r"stable_threshold=0\.4 .*made with 0\.5"):
        unnamed.roles(0.4)
    with pytest.raises(ValueError, match="no raw scores to save"):
        unnamed.save(tmp_path / "y.safetensors")


def test_published_profiles_are_checked_by_layers_and_heads(tmp_path, caplog):
    profile_module._warn_once.cache_clear()
    profile = load_profile(write(tmp_path / "p.json", published()))
    profile.check(Geometry(2, 16, 4, 64, "0123456789abcdef"))
    assert "the head profile has no fingerprint" in caplog.text
    with pytest.raises(
        ForeignProfile, match=r"layers 2, kv_heads 4, weights unknown, the model has layers 3"
    ):
        profile.check(Geometry(3, 16, 4, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": {"type_map": {**NEW, "leader": 5}}}, "unknown role 'leader'"),
        (
            {"meta": {"type_map": NEW, "counts": {"anchor": 2, "volatile": 1, "pivot": 2, "satellite": 4}}},
            "counts",
        ),
        ({"leader_member_relations": [{"1": [0]}, {"0": [1, 3]}]}, "relations don't fit head 2"),
        ({"leader_member_relations": [{"0": [1]}, {"0": [1, 3]}]}, "can't be a satellite"),
        ({"leader_member_relations": [{"1": [0, 2]}]}, "can't be read"),
        (
            {"allocation_matrix": [[0.75, 1.0, 1.3, -1.0], [-1.0, 0.9, 1.1, 0.7]]},
            "weight 1.0 of head 1, a pivot",
        ),
        ({"classification_matrix": [[4, 3, 4, 9], [3, 4, 1, 4]]}, "can't be read"),
    ],
)
def test_published_files_that_contradict_themselves(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_profile(write(tmp_path / "p.json", published(**changes)))


# the runner


BYTES = "".join(chr(code) for code in range(32, 127))


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A model and its tokenizer on disk, and a profile directory of the test's own."""
    monkeypatch.setenv("HCACHE_PROFILES", str(tmp_path / "profiles"))
    random_model().save_pretrained(tmp_path / "model")
    vocabulary = {symbol: i for i, symbol in enumerate(BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~")
    wrapped.save_pretrained(tmp_path / "model")
    return ModelSpec(path=str(tmp_path / "model"), name="mine")


def run_profile(spec, **section):
    small = {"prompt_tokens": 80, "decode_steps": 3, "topk": 9}
    return runner.run(RunConfig(model=spec, profile={**small, **section}))


def test_runner_files_the_profile_where_it_is_found(checkpoint, tmp_path):
    outcome = run_profile(checkpoint)
    assert outcome.status == "completed"
    profile = find_profile(geometry(checkpoint, weights=True))
    counts = ", ".join(f"{count} {name}" for name, count in profile.roles().counts.items())
    assert outcome.message.startswith(f"mine: {counts} (")
    assert profile.settings["prompt_tokens"] == [80]
    assert profile.settings["files"] == ["calibration.txt"]
    picture = library.default_path(profile.fingerprint).with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_runner_pools_texts_and_writes_where_asked(checkpoint, tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, symbol in zip(files, "ab", strict=True):
        file.write_text(f"{symbol} short text, " * 10)
    outcome = run_profile(checkpoint, texts=[str(file) for file in files], out=str(tmp_path / "x.json"))
    assert str(tmp_path / "x.json") in outcome.message
    settings = load_profile(tmp_path / "x.json").settings
    assert (settings["files"], settings["texts"]) == (["a.txt", "b.txt"], 2)


def test_runner_uses_a_short_text_whole_and_says_so(checkpoint, tmp_path, caplog):
    (tmp_path / "a.txt").write_text("only a few words, fewer than asked for")
    run_profile(checkpoint, text=str(tmp_path / "a.txt"))
    assert "fewer than profile.prompt_tokens=80" in caplog.text


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"text": "/no/such/file"}, r"profile\.text=/no/such/file"),
        ({"topk": 0}, r"profile\.topk=0"),
        ({"kernel": 4}, r"profile\.kernel=4"),
        ({"topk": "many"}, "topk"),
        ({"depth": 3}, "depth"),
        ({"group": "most"}, "group"),
        ({"text": "a", "texts": ["b"]}, "not both"),
        ({"out": "x.pt"}, r"\.safetensors or \.json"),
    ],
)
def test_runner_refuses_bad_settings_before_the_model_loads(monkeypatch, section, message):
    monkeypatch.setattr(runner, "load", lambda *_: pytest.fail("loaded"))
    outcome = run_profile(ModelSpec(), **section)
    assert outcome.status == "failed"
    assert re.search(message, outcome.message)


def test_runner_without_matplotlib_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert runner.draw_roles(random_profile().roles(), "x", tmp_path / "x.png") is None
    assert "matplotlib is not installed" in caplog.text


def test_shipped_text_is_long_enough_and_not_repeated():
    written = runner.CALIBRATION.read_text(encoding="utf-8")
    words = written.split()
    assert len(words) > 5000  # a BPE tokenizer makes more tokens than words of prose
    sentences = [part.strip() for part in re.split(r"[.!?]\s", written) if len(part) > 40]
    assert len(set(sentences)) == len(sentences)
