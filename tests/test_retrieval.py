"""The embedded benchmark: what is asked can be answered, lengths are exact, scores are as the card says."""

import dataclasses
import hashlib
import json
import re

import pytest

from hcache import benchmarks
from hcache.benchmarks import BENCHMARKS, Example, Retrieval


class Words:
    """A tokenizer that cuts words into pieces of up to four letters, with a start token."""

    def encode(self, text: str) -> list[str]:
        return ["<s>", *re.findall(r"\w{1,4}|\W", text)]


def facts_of(text: str) -> dict[str, str]:
    """Key to what its line says."""
    return dict(re.findall(r"\nThe code of (\w{4}) is (.*?)\.\n", text))


def oracle(example: Example) -> str:
    """The answer, read from the prompt."""
    facts = facts_of(example.context)
    asked = re.search(r"\nQ: the codes? of ([a-z, ]{4,}?)$", example.question)
    assert asked is not None
    keys = asked.group(1).split(", ")
    said = [facts[key] for key in keys]
    if example.task.startswith("multi"):
        return ", ".join(f"{key} {value}" for key, value in zip(keys, said, strict=True)) + "."
    if example.task.startswith("chain"):
        target = said[0].removeprefix("the code of ")
        return f"{target} {facts[target]}."
    return f"{said[0]}."


def test_the_prompts_are_the_same_everywhere() -> None:
    prompts = "".join(e.prompt + "|".join(e.answers) for e in Retrieval(examples_per_task=3).examples(None))
    assert hashlib.sha256(prompts.encode()).hexdigest()[:16] == "986ba5ce19171028"


@pytest.mark.parametrize("seed", [0, 1])
def test_every_answer_is_in_its_context_once(seed: int) -> None:
    for example in Retrieval(seed=seed, lengths=(1024,), examples_per_task=10).examples(None):
        answer = oracle(example)
        assert Retrieval().score(example, answer, example.answers) == 1.0
        assert len(answer) + 1 <= example.max_new_tokens
        assert example.stop == ("\n",)
        for key in example.extra["keys"]:
            assert example.context.count(f"The code of {key} is ") == 1
        json.dumps(example.extra)


def test_prompts_have_exactly_the_length_in_bytes() -> None:
    for example in Retrieval(lengths=(1024, 1777), examples_per_task=4).examples(None):
        assert len(example.prompt.encode()) == example.extra["length"]


@pytest.mark.parametrize("length", [700, 3000])
def test_prompts_stay_just_below_the_length_in_other_tokens(length: int) -> None:
    for example in Retrieval(lengths=(length,), examples_per_task=4).examples(Words()):
        assert length - 2 <= len(Words().encode(example.prompt)) <= length
        assert Retrieval().score(example, oracle(example), example.answers) == 1.0


def test_more_examples_extend_the_list() -> None:
    def by_key(**settings) -> dict[tuple[str, str], Example]:
        settings = {"lengths": (1024,), **settings}
        return {(e.task, e.id): e for e in Retrieval(**settings).examples(None)}

    few = by_key(examples_per_task=2)
    for more in (
        by_key(examples_per_task=5),
        by_key(limit=3),
        by_key(lengths=(2048, 1024), query_aware=False),
    ):
        assert all(more[key] == example for key, example in few.items())
    chain = by_key(tasks=("chain",), examples_per_task=2)
    assert all(few[key] == example for key, example in chain.items())
    assert len(by_key(limit=1)) == 3
    other = by_key(seed=1, examples_per_task=2)
    assert not any(other[key].context == few[key].context for key in few)


def test_settings_shape_the_examples() -> None:
    (example,) = Retrieval(tasks=("multi",), lengths=(1024,), multi_keys=6, distractors=3, limit=1).examples(
        None
    )
    assert example.task == "multi_1024"
    assert len(example.answers) == len(example.extra["keys"]) == 6
    assert len(facts_of(example.context)) == 9


def test_facts_are_spread_over_the_context() -> None:
    places = []
    for example in Retrieval(tasks=("single",), lengths=(2048,), examples_per_task=60).examples(None):
        needle = f"The code of {example.extra['keys'][0]} is "
        places.append(example.context.index(needle) / len(example.context))
    quarters = [sum(low <= place < low + 0.25 for place in places) for low in (0, 0.25, 0.5, 0.75)]
    assert min(quarters) >= 5


def test_the_question_is_in_no_context() -> None:
    for example in Retrieval(lengths=(1024,), examples_per_task=2).examples(None):
        assert "Q:" not in example.context
        assert example.prompt == example.context + example.question + example.answer_prefix
    assert Retrieval().prompt_lengths() == (2048, 4096)
    assert Retrieval(query_aware=False).prompt_lengths() is None


@pytest.mark.parametrize(
    ("task", "prediction", "score"),
    [
        ("single_2048", "4821.", 1.0),
        ("single_2048", " 4821", 1.0),
        ("single_2048", "48210.", 0.0),
        ("single_2048", "1234, not 4821.", 0.0),
        ("single_2048", "", 0.0),
        ("chain_2048", "efgh 4821.", 1.0),
        ("chain_2048", "4821", 1.0),
        ("chain_2048", "efgh, which is fact 7, 4821.", 1.0),
        ("chain_2048", "efgh 4822.", 0.0),
        ("chain_2048", "the code of efgh.", 0.0),
    ],
)
def test_one_value_is_right_or_wrong(task: str, prediction: str, score: float) -> None:
    assert benchmarks.score("retrieval", task, prediction, ["4821"]) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("abcd 1111, efgh 2222.", 1.0),
        ("efgh is 2222, abcd is 1111.", 1.0),
        ("abcd 1111, efgh 1111.", 0.5),
        ("abcd 1111.", 0.5),
        ("abcd, efgh 2222.", 0.5),
        ("efgh 1111, abcd 2222.", 0.0),
        ("1111, 2222.", 1.0),
        ("2222, 1111.", 0.0),
        ("1111", 0.5),
        ("xabcd 1111, efgh 2222", 0.5),
        ("", 0.0),
    ],
)
def test_several_values_count_one_by_one(prediction: str, score: float) -> None:
    keys = ["abcd", "efgh"]
    assert benchmarks.score("retrieval", "multi_4096", prediction, ["1111", "2222"], keys=keys) == score


def test_scoring_an_example_needs_nothing_besides() -> None:
    (example,) = Retrieval(tasks=("multi",), lengths=(1024,), limit=1).examples(None)
    wrong = oracle(example).replace(example.answers[0], "none")
    assert Retrieval().score(example, wrong, example.answers) == 0.75


def test_multi_without_keys_and_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="multi needs keys"):
        benchmarks.score("retrieval", "multi_4096", "1111", ["1111"])
    with pytest.raises(ValueError, match="did you mean 'chain'"):
        benchmarks.score("retrieval", "chian_4096", "1111", ["1111"])


def test_postprocessing_cuts_at_the_stop() -> None:
    (example,) = Retrieval(tasks=("single",), lengths=(1024,), limit=1).examples(None)
    assert Retrieval().postprocess(" 4821.\nQ: the code", example) == "4821."


def test_averages() -> None:
    assert benchmarks.aggregate("retrieval", {"single_2048": 50.0, "multi_2048": 100.0}) == 75.0
    with pytest.raises(ValueError, match="unknown kind of average 'kv_papers'"):
        benchmarks.aggregate("retrieval", {"single_2048": 50.0}, kind="kv_papers")
    with pytest.raises(ValueError, match="no scores"):
        benchmarks.aggregate("retrieval", {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["singel"]}, "did you mean 'single'"),
        ({"tasks": []}, "must name each task once"),
        ({"tasks": ["single", "single"]}, "must name each task once"),
        ({"lengths": []}, "at least 256"),
        ({"lengths": [128]}, "at least 256"),
        ({"lengths": [2048, 2048]}, "different lengths"),
        ({"examples_per_task": 0}, "benchmark.examples_per_task=0 must be at least 1"),
        ({"limit": 0}, "benchmark.limit=0 must be at least 1"),
        ({"distractors": -1}, "benchmark.distractors=-1 must be at least 0"),
        ({"protocol": "chat"}, "unknown protocol 'chat'"),
        ({"lenghts": [2048]}, "did you mean 'lengths'"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        benchmarks.load("retrieval", **settings)


def test_too_short_a_length_says_how_much_is_needed() -> None:
    with pytest.raises(ValueError, match=r"lengths=300 is too short: .* alone take \d+ tokens"):
        benchmarks.load("retrieval", lengths=[300])


def test_unknown_benchmarks_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown benchmark 'longbenhc'.*retrieval"):
        benchmarks.load("longbenhc")


def test_it_is_registered_and_frozen() -> None:
    assert BENCHMARKS.get("retrieval") is Retrieval
    assert Retrieval.name == "retrieval"
    assert Retrieval(tasks=["single"], lengths=[512]).tasks == ("single",)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Retrieval().seed = 1  # type: ignore[misc]
