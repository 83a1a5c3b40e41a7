"""The embedded model: text, rows, schedule, tokenizer, scoring, checkpoints, and the weights as shipped."""

import hashlib
import json
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hcache import KVCache
from hcache.tiny import directory
from hcache.tiny.batches import make_batch, make_items, training_row
from hcache.tiny.model import VOCABULARY, new_model, rounded_copy, score_items
from hcache.tiny.prose import SHAPES, prose, sentence
from hcache.tiny.schedule import CAPS, TOP, WARMUP_STEPS, Ladder, language_weight, learning_rate
from hcache.tiny.text import KINDS, Keys, distractors, puzzle, scatter
from hcache.tiny.tokenizer import SPECIALS, write_tokenizer
from hcache.tiny.train import TABLE_LENGTHS, Trainer, load_state, main, markdown_table, parse

shipped = pytest.mark.skipif(not directory().exists(), reason="the embedded weights are not in this checkout")


def test_prose_is_the_same_everywhere() -> None:
    digest = hashlib.sha256(prose(Random("golden"), 100_000).encode()).hexdigest()
    assert digest[:16] == "e1dda51cf61c9253"


def test_prose_has_the_size_asked_for_and_a_longer_one_begins_alike() -> None:
    long = prose(Random(1), 5000)
    assert len(long) == 5000
    assert long.isascii()
    assert long.startswith(prose(Random(1), 777))
    assert prose(Random(2), 5000) != long


def test_prose_varies() -> None:
    rng = Random(0)
    sentences = [sentence(rng) for _ in range(2000)]
    assert len(set(sentences)) > 1990
    assert len(SHAPES) > 30
    assert not any("{" in text or "}" in text for text in sentences)


@pytest.mark.parametrize("kind", KINDS)
def test_the_facts_of_a_puzzle_answer_it(kind: str) -> None:
    item = puzzle(Random(3), kind, Keys(Random(4)), multi_keys=3)
    text = "".join(item.facts)
    for key, value in zip(item.keys, item.values, strict=True):
        assert f"The code of {key} is {value}.\n" in text
    if kind == "chain":
        assert f"is the code of {item.keys[0]}.\n" in text
        assert item.keys[0] not in item.question
    else:
        assert all(key in item.question for key in item.keys)
    assert item.asked == f"{item.question}{item.answer_prefix}{item.answer}.\n"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'riddle' \(known: single, multi, chain\)"):
        puzzle(Random(0), "riddle", Keys(Random(0)))


def test_pointers_among_distractors_point_at_facts() -> None:
    facts = distractors(Random(5), Keys(Random(6)), 200)
    pointers = [fact.split()[-1][:4] for fact in facts if "is the code of" in fact]
    assert len(facts) == 200
    assert 20 < len(pointers) < 80
    assert all(any(fact.startswith(f"\nThe code of {target} is ") for fact in facts) for target in pointers)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_scattered_facts_keep_their_order_and_the_filler(even: bool, count: int) -> None:
    filler = prose(Random(7), 3000).encode()
    facts = [f"\n<{i}>\n" for i in range(count)]
    text = scatter(Random(8), filler, facts, even)
    places = [text.index(fact.encode()) for fact in facts]
    assert places == sorted(places)
    for fact in facts:
        text = text.replace(fact.encode(), b"", 1)
    assert text == filler


def test_evenly_scattered_facts_reach_every_part() -> None:
    filler = b"x" * 8000
    text = scatter(Random(9), filler, ["F"] * 8)
    places = [i for i, byte in enumerate(text) if byte == ord("F")]
    assert [place * 8 // len(text) for place in places] == list(range(8))


@pytest.mark.parametrize("length", [256, 2048])
def test_training_rows_say_where_their_answers_are(length: int) -> None:
    for seed in range(20):
        row, spans = training_row(Random(seed), length, KINDS)
        assert len(row) == length
        assert spans
        for start, stop in spans:
            question, answer = row[:start].rsplit(b"\nQ: ", 1)[1].decode(), row[start:stop].decode()
            _check_answer(row.split(b"\nQ: ", 1)[0].decode(errors="replace"), question, answer)


def _check_answer(context: str, question: str, answer: str) -> None:
    assert answer.endswith(".\n")
    said = answer.removesuffix(".\n").split(", ")
    if question.startswith("the codes of "):
        keys = question.removeprefix("the codes of ").removesuffix(" are ").split(", ")
        assert [pair[:4] for pair in said] == keys
    else:
        key = question.removeprefix("the code of ").removesuffix(" is ")
        if len(said[0]) > 4:
            assert f"\nThe code of {key} is the code of {said[0][:4]}.\n" in context
        said = said if len(said[0]) > 4 else [f"{key} {said[0]}"]
    for pair in said:
        key, value = pair.split(" ")
        assert f"\nThe code of {key} is {value}.\n" in context


def test_batches_are_pure_and_their_positions_come_before_the_answers() -> None:
    batch = make_batch("a", 256, 64, KINDS)
    again = make_batch("a", 256, 64, KINDS)
    assert np.array_equal(batch.tokens, again.tokens)
    assert np.array_equal(batch.language, again.language)
    assert not np.array_equal(batch.tokens, make_batch("b", 256, 64, KINDS).tokens)
    text = batch.tokens.tobytes()
    answers = bytes(text[place + 1] for place in batch.answers)
    assert set(answers) <= set(b"abcdefghijklmnopqrstuvwxyz0123456789, .\n")
    assert answers.count(b".\n") >= 64
    assert batch.language.max() < 64 * 256
    assert (batch.language % 256).max() < 255


def test_items_end_in_their_answers() -> None:
    items = make_items("multi", 700, 5, "code")
    for row, start, values in zip(items.tokens, items.starts, items.values, strict=True):
        text = row.tobytes()
        assert text[:start].endswith(b" are ")
        assert text.endswith(b".\n")
        assert len(values) == 4
        for begin, stop in values:
            key, value = text[begin:stop].split(b" ")
            assert b"\nThe code of " + key + b" is " + value + b".\n" in text


class Oracle:
    """A stand-in for the model that knows every row, or errs at one place of each."""

    def __init__(self, tokens: np.ndarray, wrong: list[int]) -> None:
        answers = torch.from_numpy(tokens).long().roll(-1, dims=1)
        for row, place in enumerate(wrong):
            answers[row, place - 1] += 1
        self._hidden = torch.nn.functional.one_hot(answers, VOCABULARY).float()
        self.device = torch.device("cpu")

    def model(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self._hidden)

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=torch.eye(VOCABULARY))


def test_one_wrong_byte_makes_an_answer_wrong_and_one_value() -> None:
    items = make_items("multi", 700, 4, "prose")
    right = score_items(Oracle(items.tokens, []), items)  # type: ignore[arg-type]
    assert right == {"exact": 1.0, "values": 1.0, "n": 4}
    wrong_digit = score_items(Oracle(items.tokens, [v[1][1] - 1 for v in items.values]), items)  # type: ignore[arg-type]
    assert wrong_digit == {"exact": 0.0, "values": 0.75, "n": 4}
    wrong_end = score_items(Oracle(items.tokens, [699] * 4), items)  # type: ignore[arg-type]
    assert wrong_end == {"exact": 0.0, "values": 1.0, "n": 4}
    before = score_items(Oracle(items.tokens, [int(start) - 1 for start in items.starts]), items)  # type: ignore[arg-type]
    assert before["exact"] == 1.0


def test_single_climbs_first_and_the_others_follow() -> None:
    ladder = Ladder()
    assert ladder.kinds(256) == ("single",)
    assert ladder.climb({"single": 0.5}, 0.0) == []
    assert ladder.climb({"single": 0.95}, 0.0) == ["single", "multi", "chain"]
    assert ladder.levels == {"single": 1, "multi": 0, "chain": 0}
    assert ladder.kinds(1024) == ladder.kinds(CAPS[TOP]) == ("single",)
    assert ladder.kinds(256) == KINDS
    assert {ladder.length(Random(i)) for i in range(50)} == {256, 512, 1024}
    assert ladder.batch_tokens(4096) == 4 * Ladder().batch_tokens(4096)
    while not ladder.done:
        ladder.climb(dict.fromkeys(ladder.tested(), 1.0), 0.0)
    assert ladder.kinds(CAPS[TOP]) == KINDS


def test_a_stuck_ladder_is_forced_up_in_time() -> None:
    ladder = Ladder()
    for progress in (0.13, 0.23, 0.35, 0.36, 0.37, 0.38):
        ladder.climb(dict.fromkeys(ladder.tested(), 0.0), progress)
    assert ladder.done


def test_rates_warm_up_stay_and_decay() -> None:
    assert learning_rate(0, 0.0) < learning_rate(WARMUP_STEPS // 2, 0.0) < learning_rate(WARMUP_STEPS, 0.1)
    assert learning_rate(5000, 0.6) == learning_rate(WARMUP_STEPS, 0.1)
    assert learning_rate(9000, 1.0) < 0.05 * learning_rate(5000, 0.6)
    assert language_weight(0.0) == pytest.approx(0.5)
    assert language_weight(0.9) == pytest.approx(0.1)


def test_rounding_keeps_the_rotary_frequencies() -> None:
    model = new_model(0)
    rounded = rounded_copy(model)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


TEXTS = [
    "hello\n\n  world \t\r\n",
    "é ü 漢字 🙂 e\u0301 \u00a0 ▁ \x00\x7f",
    "it 's n't . , don't",
    " leading and trailing ",
    "",
    "\nQ: the code of qwxy is 4821.\n",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    new_model(0).config.save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_bytes_and_give_the_text_back(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_byte_has_its_own_id_and_specials_follow(tokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == [256, 257, 258]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert len(tokenizer) == 259
    assert tokenizer.decode([72, 105, 258], skip_special_tokens=True) == "Hi"
    padded = tokenizer(["ab", "a"], padding=True)
    assert padded["input_ids"] == [[97, 98], [256, 97]]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_saves_resumes_and_ships(tmp_path, threads, capsys) -> None:
    command = ["--out", str(tmp_path), "--smoke", "--no-compile", "--minutes", "5"]
    main([*command, "--max-steps", "2"])
    first = load_state(parse([*command, "--resume"]))
    assert first is not None
    assert first["step"] == 2
    with pytest.raises(ValueError, match="give --resume or another --out"):
        main(command)
    main([*command, "--max-steps", "3", "--resume"])
    second = load_state(parse([*command, "--resume"]))
    assert second is not None
    assert second["step"] == second["optimizer"]["state"][0]["step"] == 3
    assert second["seconds"] > first["seconds"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in model.named_parameters():
        assert torch.equal(value, second["weights"][name].bfloat16())
    assert (tmp_path / "model.safetensors").stat().st_size < 12 * 2**20
    assert (tmp_path / "state.pt").stat().st_size < 60 * 10**6
    record = json.loads((tmp_path / "scores.json").read_text())
    assert markdown_table(record["scores"]) in capsys.readouterr().out


def test_saving_leaves_the_optimizer_as_it_was(tmp_path, threads) -> None:
    args = parse(["--out", str(tmp_path)])
    trainer = Trainer(args, Ladder(), torch.device("cpu"))
    batch = make_batch("a", 256, 2, ("single",))
    trainer.train_step(batch, 0.0)
    stored = trainer.state()
    assert stored["optimizer"]["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert all(moments["exp_avg"].dtype == torch.float32 for moments in trainer.optimizer.state.values())
    trainer.train_step(batch, 0.0)
    assert trainer.step == 2


def test_resuming_needs_a_state_of_the_same_seed(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*state\.pt"):
        load_state(parse(["--out", str(tmp_path), "--resume"]))
    torch.save({"seed": 1}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="--seed 0 differs from the 1"):
        load_state(parse(["--out", str(tmp_path), "--resume"]))


@shipped
@pytest.mark.parametrize(("kind", "least"), [("single", 0.99), ("multi", 0.95), ("chain", 0.9)])
def test_the_shipped_scores_leave_the_losses_to_compression(kind: str, least: float) -> None:
    scores = json.loads((directory() / "scores.json").read_text())["scores"][f"prose {kind}"]
    assert list(scores) == [str(length) for length in TABLE_LENGTHS]
    assert min(score["exact"] for score in scores.values()) >= least


@shipped
@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_model_recalls(kind: str, threads) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory(), dtype=torch.float32).eval()
    assert score_items(model, make_items(kind, 1024, 8, "prose", seed=1))["values"] >= 0.7


@shipped
def test_generate_of_the_shipped_model_feeds_each_token_once(threads) -> None:
    """With use_cache: false in its generation_config, generate would feed the whole text at every step."""
    model = AutoModelForCausalLM.from_pretrained(directory(), dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model, "fullkv")
    tokens = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == tokens.shape[1] - 1
