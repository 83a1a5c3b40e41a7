"""InfiniteBench's scores under both rule sets, by hand; F1 against slow references. All words are our own."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from hcache.benchmarks.scoring import infinitebench as scoring
from hcache.benchmarks.scoring.infinitebench import EARLY, LATE, RULES, TASKS, label, score

NAMES = ["ada", "bell", "cray", "dijkstra"]


# --- numbers and keys


@pytest.mark.parametrize("task", ["passkey", "number_string"])
@pytest.mark.parametrize(
    ("prediction", "value"),
    [
        ("71432", 1),
        (" It is 71432, not 9.", 1),
        ("key71432x", 1),
        ("9 then 71432", 0),
        ("714321", 0),
        ("071432", 0),
        ("7 1432", 0),
        ("71,432", 0),
        ("none", 0),
        ("", 0),
        ("٧ 71432", 1),  # a digit, but none of ASCII's
    ],
)
def test_the_first_run_of_digits_is_the_answer(task: str, prediction: str, value: float) -> None:
    for answers in ("71432", ["71432"], 71432, [["71432"]]):
        for rules in RULES:
            assert score(task, prediction, answers, rules=rules) == value


def test_leading_zeros_are_part_of_a_key() -> None:
    assert score("passkey", "0123", ["0123"]) == 1
    assert score("passkey", "123", ["0123"]) == 0


@pytest.mark.parametrize(
    ("prediction", "value"),
    [
        ("ab-12-cd", 1),
        ('{"x": "ab-12-cd"}.', 1),
        ("it:ab-12-cd!", 1),
        ("so 'ab-12-cd',\nand", 1),
        ("ab-12-cd?", 1),
        ("xab-12-cd", 0),
        ("(ab-12-cd)", 0),  # brackets are no space
        ("ab-12-cd;", 0),
        ("AB-12-CD", 0),
        ("ab 12 cd", 0),
        ("", 0),
    ],
)
def test_a_key_is_a_word(prediction: str, value: float) -> None:
    for answers in ("ab-12-cd", ["ab-12-cd"]):
        for rules in RULES:
            assert score("kv_retrieval", prediction, answers, rules=rules) == value


@pytest.mark.parametrize(
    ("prediction", "answer", "value"),
    [
        ("88", 88, 1),
        ("It's 88.", 88, 1),
        ("-88", 88, 1),
        ("88 or 7", 88, 1),
        ("7 or 88", 88, 0),
        ("088", 88, 1),
        ("88.0", 88, 0),  # ValueError in the official code
        ("88.0", 88.0, 1),
        ("88", 88.0, 1),
        ("88.", 88.0, 1),
        ("12.5", 12.5, 1),
        ("012.50 is it", 12.5, 1),
        ("12", 12.5, 0),
        ("12,5", 12.5, 0),
        ("12.5", 12, 0),
        (".5", 5, 1),
        ("none", 88, 0),
        ("", 0, 0),
        ("9" * 5000, 88, 0),  # ValueError, too long for an int
    ],
)
def test_math_find_compares_as_the_answer_is(prediction: str, answer: int | float, value: float) -> None:
    for answers in (answer, [answer], str(answer), [str(answer)], json.loads(json.dumps([answer]))):
        for rules in RULES:
            assert score("math_find", prediction, answers, rules=rules) == value


@pytest.mark.parametrize(
    ("prediction", "answer", "value"),
    [
        ("4", 4, 1),
        ("It is 4.", 4, 1),
        ("`4`", 4, 1),
        ("f(2):4", 4, 1),
        ("= -4", -4, 1),
        ("-4", 4, 0),
        ("+4", 4, 1),
        ("04", 4, 1),
        ("4.0", 4, 0),
        ("4.0", 0, 1),
        ("4 or 5", 4, 0),
        ("4,", 4, 0),
        ("four", 4, 0),
        ("", 4, 0),
        (" . ", 4, 0),
    ],
)
def test_code_run_takes_the_last_word(prediction: str, answer: int, value: float) -> None:
    for answers in (answer, [answer], str(answer), [str(answer)]):
        for rules in RULES:
            assert score("code_run", prediction, answers, rules=rules) == value


@pytest.mark.parametrize(
    ("prediction", "value"),
    [
        ("[4, 14, 6, 9]", 1.0),
        ("4 14 6 9 77", 1.0),
        ("4, 14, 6", 0.75),
        ("4, 14, 7, 9", 0.5),
        ("4, 6, 9", 0.25),
        ("-4 then -14", 0.5),
        ("4.14", 0.5),
        ("04, 014", 0.5),
        ("3, 4, 14", 0.0),
        ("none", 0.0),
        ("", 0.0),
        ("4, 14, " + "9" * 5000, 0.0),  # ValueError, too long for an int
    ],
)
def test_math_calc_counts_until_the_first_wrong_number(prediction: str, value: float) -> None:
    right, text = [4, 14, 6, 9], "[4, 14, 6, 9]"
    for answers in (right, [right], [str(number) for number in right], text, [text]):
        for rules in RULES:
            assert score("math_calc", prediction, answers, rules=rules) == value


def test_math_calc_takes_the_first_of_several_lists() -> None:
    assert score("math_calc", "4 14 6", [[4, 14], [6]]) == 1
    assert label("math_calc", [[4, 14], [6]]) == [4, 14]


def test_gpt4_begins_with_the_first_operand() -> None:
    assert score("math_calc", "1, 4, 14", [4, 14], model_family="gpt4") == 1
    assert score("math_calc", "4, 14", [4, 14], model_family="gpt4") == 0
    assert score("math_calc", "1, 4, 14", [4, 14], model_family="yarn-mistral") == 0
    assert score("math_calc", "", [4, 14], model_family="gpt4") == 0
    assert score("passkey", "1 2", ["1"], model_family="gpt4") == 1


# --- names and choices


@pytest.mark.parametrize(
    ("prediction", "answers", "early", "late"),
    [
        ("LEA", ["LEA", "LEA MOON"], 1, 1),
        ("lea", ["LEA"], 1, 1),
        ('It is "Lea".', ["LEA"], 1, 1),
        ("Lea Moon", ["LEA MOON", "LEA"], 0, 1),  # two words are never one
        ("Moon", ["LEA", "MOON"], 0, 1),  # only the first name
        ("Lea", ["Lea"], 0, 1),  # the name itself isn't put in upper case
        ("pleased", ["LEA"], 0, 1),  # part of a word
        ("Lea-Ann", ["LEA"], 0, 1),
        ("Leo", ["LEA", "LEA MOON"], 0, 0),
        ("", ["LEA"], 0, 0),
    ],
)
def test_names(prediction: str, answers: list[str], early: float, late: float) -> None:
    assert score("longdialogue_qa_eng", prediction, answers, rules=EARLY) == early
    assert score("longdialogue_qa_eng", prediction, answers, rules=LATE) == late


@pytest.mark.parametrize(
    ("prediction", "early", "late"),
    [
        ("B", 1, 1),
        ("  B. bell", 1, 1),
        ("bell", 1, 1),
        ("C", 0, 0),
        ("", 0, 0),
        (" \n", 0, 0),
        ("Answer: B", 0, 1),  # begins with A
        ("Bananas", 1, 1),
        ("C, no, B", 0, 1),
        ("B, no, C", 1, 1),
        ("I say B\nand not C", 1, 1),
        ("I say C\nand not B", 0, 0),  # the first line with a letter, and the first word that is one
        ("The answer is: B", 1, 1),
        ("The answer is: bell", 1, 1),
        ("The answer is B.", 1, 1),
        ("The answer is:B", 0, 1),  # one character after the cue is left out
        ("the option is  bell", 1, 1),
        ("So the answer: C or B", 0, 1),
        ("it's answer is C\nB", 0, 0),
        ("no answer is", 0, 0),
        ("it is AB or B", 0, 1),  # "AB" is part of "ABCD"
        ("it is ABD or B", 1, 1),  # "ABD" is not
        ("it is BC", 0, 0),
        ("perhaps ada", 0, 0),
        ("b", 0, 0),
        ("it is 'B'!", 1, 1),
        ("it is (B)", 0, 1),  # brackets are no space
    ],
)
def test_choice(prediction: str, early: float, late: float) -> None:
    for answers in (["bell"], "bell", ["bell", "B"], ["B"]):
        assert score("longbook_choice_eng", prediction, answers, options=NAMES, rules=EARLY) == early
        assert score("longbook_choice_eng", prediction, answers, options=NAMES, rules=LATE) == late


@pytest.mark.parametrize(
    ("prediction", "early", "late"),
    [
        ("B", 0, 1),  # a bare letter is wrong
        ("B.", 1, 1),
        (" B: bell", 1, 1),
        ("B) bell", 0, 1),
        ("bell", 0, 1),
        ("bell_ringer", 0, 1),
        ("Bells", 0, 1),  # begins with the letter
        ("'bell'", 0, 0),  # its quotes leave space in front
        ("C", 0, 0),
        ("C.", 0, 0),
        ("", 0, 0),
        ("The answer is: B", 1, 1),
        ("the answer is: `bell`", 1, 1),  # the quote is a space, and two are one
        ("the answer is: -bell", 1, 1),
        ("the answer is: **bell**", 1, 1),
        ("the answer is:-bell", 1, 1),  # the dash is the space that is left out
        ("the answer is:\tbell", 1, 1),  # any character is
        ("The answer is:B", 0, 1),
        ("It is:\nbell", 1, 1),
        ("It is: C, not B", 0, 1),
        ("It is: B, not C", 1, 1),
        ("my answer: bell", 1, 1),
        ("Answer: B", 0, 1),
        ("the correct option is: bell", 1, 1),  # without "option", by the cue "is:"
        ("the answer is: Option bell", 1, 1),
        ("the answer: cray. It is: bell", 1, 1),  # "is:" goes before "answer:"
        ("It is: bell. The answer is: cray", 0, 0),  # "answer is:" goes before "is:"
        ("J is not, B is", 0, 1),
        ("B is not, J is", 0, 1),  # begins with the letter
        ("So B, not J", 0, 0),
        ("answer is:", 0, 0),
    ],
)
def test_code_debug(prediction: str, early: float, late: float) -> None:
    for answers in (["bell"], "bell", ["bell", "B"], ["B"]):
        assert score("code_debug", prediction, answers, options=NAMES, rules=EARLY) == early
        assert score("code_debug", prediction, answers, options=NAMES, rules=LATE) == late


def test_a_choice_with_its_letter_needs_no_options() -> None:
    for task in scoring.CHOICE_TASKS:
        assert label(task, ["bell"], NAMES) == ["bell", "B"] == label(task, ["bell", "B"])
        assert label(task, ["D"], NAMES) == ["dijkstra", "D"]
        assert label(task, "C", None) == ["C", "C"]
        assert score(task, "B.", ("bell", "B")) == 1


def test_texts_that_are_letters_are_texts_first() -> None:
    assert label("longbook_choice_eng", ["C"], ["D", "C", "B", "A"]) == ["C", "B"]


@pytest.mark.parametrize("answers", [["turing"], ["bell", "E"], ["ada", "bell"], ["a", "b", "c"]])
def test_choices_that_have_no_letter_are_refused(answers: list[str]) -> None:
    for task in scoring.CHOICE_TASKS:
        with pytest.raises(ValueError, match=f"infinitebench {task}: .*none of the options.*give options"):
            score(task, "B", answers, options=NAMES)
    with pytest.raises(ValueError, match="none of the options"):
        score("code_debug", "B", ["fifth"], options=[*NAMES, "fifth"])


# --- texts


def slow_f1(said: list[str], right: list[str]) -> float:
    """By crossing out one token at a time."""
    left, shared = list(right), 0
    for token in said:
        if token in left:
            left.remove(token)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(right)
    return 2 * precision * recall / (precision + recall)


def test_english_answers_have_the_best_f1_of_words() -> None:
    assert score("longbook_qa_eng", "The old Mill!", ["a mill", "old mill pond"]) == pytest.approx(0.8)
    assert score("longbook_qa_eng", "the old mill", "an old mill.") == 1
    assert score("longbook_qa_eng", "", ["mill"]) == 0
    assert score("longbook_qa_eng", "7 geese", [7]) == pytest.approx(2 / 3)


def test_chinese_answers_have_the_best_f1_of_characters() -> None:
    assert score("longbook_qa_chn", "在山上。", ["山上", "河边"]) == pytest.approx(0.8)
    assert (
        score("longbook_qa_chn", "《 A b》，「c」！", ["《abc"]) == 1
    )  # the opening mark stays, the other goes
    assert score("longbook_qa_chn", "《山", ["山"]) == pytest.approx(2 / 3)
    assert score("longbook_qa_chn", "山．", ["山"]) == pytest.approx(2 / 3)
    assert score("longbook_qa_chn", "山山", ["山"]) == pytest.approx(2 / 3)
    assert score("longbook_qa_chn", "。", ["山"]) == 0
    assert score("longbook_qa_chn", "山", ["。"]) == 0
    rng = random.Random(0)
    for _ in range(50):
        said, right = ("".join(rng.choices("山河水a", k=rng.randint(1, 9))) for _ in range(2))
        assert score("longbook_qa_chn", said, [right]) == pytest.approx(slow_f1(list(said), list(right)))


@pytest.mark.parametrize(
    "mark", "！？｡。＂（），－／：；＠［＼］｛～｢､、〃》『【〔〖〜〟〰〾–—‘’‛“„‟…‧﹏.-!~\u3000 \t"
)
def test_chinese_marks_are_deleted(mark: str) -> None:
    assert score("longbook_qa_chn", f"{mark}山{mark}水", ["山水"]) == 1


@pytest.mark.parametrize("mark", "《〈〉．·￥")
def test_other_marks_stay(mark: str) -> None:
    assert score("longbook_qa_chn", f"{mark}山", ["山"]) < 1


def test_summaries_have_rouge_lsum_without_stems() -> None:
    def value(said: str, right: Any) -> float:
        return score("longbook_sum_eng", said, right)

    assert value("on mats\nthe cats", "the cats\non mats") == 1  # a line is a sentence
    assert value("on mats the cats", "the cats on mats") == pytest.approx(0.5)
    assert value("walked fast", ["walking fast"]) == pytest.approx(0.5)  # a stemmer would say 1
    assert value("the cat sat\non the mat", ["the cat\nsat on mat"]) == pytest.approx(10 / 11)
    assert value("one two", ["three", "one two", "one"]) == 1
    assert value("one two", ["three", "one"]) == pytest.approx(2 / 3)
    assert value("", ["one"]) == 0


# --- what is refused, and types


def test_both_rule_sets_agree_elsewhere() -> None:
    rng = random.Random(1)
    pieces = ["7", "B", "bell", "is:", "4.0", ".", "\n", "山", "the", "-3", '"']
    same = set(TASKS) - {"longdialogue_qa_eng", *scoring.CHOICE_TASKS}
    for task in same:
        answers: list[Any] = [7] if re.match(r"math|code", task) else ["7"]
        for _ in range(20):
            said = " ".join(rng.choices(pieces, k=4))
            assert score(task, said, answers, rules=EARLY) == score(task, said, answers, rules=LATE)


def test_scores_are_floats_of_every_task() -> None:
    assert len(TASKS) == 12
    for task in TASKS:
        value = score(task, "7", ["7"], options=["7", "8", "9", "10"])
        assert type(value) is float
        assert 0 <= value <= 1


def test_numbers_survive_being_texts() -> None:
    for number in (4, -4, 0, 88.0, 12.5, 1e20, 1e-7):
        (back,) = label("math_find", [str(number)])
        assert (back, type(back)) == (number, type(number))


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown task 'math_fnd'; did you mean 'math_find'"):
        score("math_fnd", "1", [1])
    with pytest.raises(ValueError, match="unknown rules '2024-07'; did you mean '2024-0"):
        score("math_find", "1", [1], rules="2024-07")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("answers", [[], None, [None], {"a": 1}, [True], [[]]])
def test_answers_of_no_use_are_refused(task: str, answers: Any) -> None:
    with pytest.raises(ValueError, match=f"infinitebench {task}: "):
        score(task, "1", answers, options=NAMES)


@pytest.mark.parametrize("task", ["math_find", "math_calc", "code_run"])
def test_words_where_a_number_must_be_are_refused(task: str) -> None:
    with pytest.raises(ValueError, match=f"infinitebench {task}: the answer must be a number, got 'seven'"):
        score(task, "1", ["seven"])
    with pytest.raises(ValueError, match="is no list of numbers"):
        score("math_calc", "1", "[1, 2")
