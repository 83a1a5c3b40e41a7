"""Scores of InfiniteBench (Zhang et al. 2024, arXiv 2402.13718), 0 to 1, under both official rule sets.

Written from the behaviour of `src/compute_scores.py` of github.com/OpenBMB/InfiniteBench, with its quirks:
`2024-06` is commit 88b3daa, whose numbers the README has; `2024-08` is what later commits and other
projects' copies do. They differ in longdialogue_qa_eng, longbook_choice_eng and code_debug. Knows no prompt
and no file.

Where the official code raises on a prediction, the scorer could not go on, and the score is 0: math_find with
an int as answer and "4.0" predicted; math_calc and math_find where a run of digits is longer than Python
turns into an int (4300 by default). Answers may be of every type: a number that came back from a record as
text is a number again where the task has numbers, so that a repeated scoring never compares a text with an
int, as the official code_run does with answers that were read as texts (always 0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from hcache.benchmarks.scoring.words import bare_chinese, f1, qa_f1
from hcache.registry import unknown_name

Answer = str | int | float

EARLY, LATE = "2024-06", "2024-08"
RULES = (EARLY, LATE)
CHOICE_TASKS = ("longbook_choice_eng", "code_debug")
LETTERS = "ABCD"

_MARKS = "\n:\"'.,?!{}"
_NUMBER = re.compile(r"\d+\.\d+|\d+")


def score(
    task: str,
    prediction: str,
    answers: Any,
    *,
    options: Sequence[str] = (),
    rules: str = EARLY,
    model_family: str | None = None,
) -> float:
    """Score of one prediction.

    Args:
        answers: accepted answers, or the parts of one: a text, a number, a list of them, or a list of lists.
        options: the choices, which the choice tasks need to know the right letter.
        rules: 2024-06 or 2024-08.
        model_family: "gpt4" leaves out the first number of a math_calc prediction, as the official code does,
            since its prompt makes that model begin with the first operand; no other family has a rule.

    Raises:
        ValueError: an unknown task or rules, no answers, or answers that the task can't have.
    """
    if task not in TASKS:
        raise ValueError(f"benchmark 'infinitebench': {unknown_name('task', task, TASKS)}")
    check_rules(rules)
    right = label(task, answers, options)
    if task == "math_calc":
        return math_calc(prediction, right, skip_first=model_family == "gpt4")
    return float(_SCORERS[task](prediction, right, rules == LATE))


def check_rules(rules: str) -> None:
    """Raise ValueError for rules that are not known."""
    if rules not in RULES:
        raise ValueError(f"benchmark 'infinitebench': {unknown_name('rules', rules, RULES)}")


# --- answers


def label(task: str, answers: Any, options: Sequence[str] | None = ()) -> list[Any]:
    """Answers of any shape as the scorers take them: texts, numbers, or the right choice and its letter.

    math_calc takes the first of several lists, as the official code does; elsewhere lists are flattened.

    Raises:
        ValueError: none, one that is neither text nor number, no number where there must be one, or a choice
            whose letter can't be known.
    """
    if task == "math_calc":
        return _integers(answers)
    parts = list(_parts(task, answers))
    if not parts:
        raise ValueError(f"infinitebench {task}: needs one or more answers")
    if task in CHOICE_TASKS:
        return _choice(task, [str(part) for part in parts], [str(option) for option in options or ()])
    if task in ("code_run", "math_find"):
        return [_number(task, part) for part in parts]
    return [str(part) for part in parts]


def _parts(task: str, answers: Any) -> Iterator[Answer]:
    if isinstance(answers, list | tuple):
        for answer in answers:
            yield from _parts(task, answer)
    elif isinstance(answers, str | int | float) and not isinstance(answers, bool):
        yield answers
    else:
        raise ValueError(f"infinitebench {task}: an answer is a text or a number, got {answers!r:.60}")


def _number(task: str, part: Answer) -> int | float:
    """An int stays one and a float too: `str` keeps them apart, so its texts give the same back."""
    if not isinstance(part, str):
        return part
    for kind in (int, float):
        try:
            return kind(part)
        except ValueError:
            continue
    raise ValueError(f"infinitebench {task}: the answer must be a number, got {part!r:.60}")


def _integers(answers: Any) -> list[int | float]:
    while isinstance(answers, list | tuple) and answers and isinstance(answers[0], list | tuple):
        answers = answers[0]
    numbers: list[int | float] = []
    for part in _parts("math_calc", answers):
        if isinstance(part, str) and part.lstrip().startswith("["):
            numbers += _integers(_listed(part))
        else:
            numbers.append(_number("math_calc", part))
    if not numbers:
        raise ValueError("infinitebench math_calc: needs one or more answers")
    return numbers


def _listed(text: str) -> Any:
    """A list that was written as a text. Raises ValueError where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"infinitebench math_calc: {text!r:.60} is no list of numbers ({error})") from error


def _choice(task: str, parts: list[str], options: list[str]) -> list[str]:
    """[text, letter] of the right choice; a letter alone stands for the choice it names.

    The official code takes a text that is among the options, or text and letter, and raises for others.
    """
    if len(parts) == 2 and parts[1] in list(LETTERS):
        return parts
    known = options[: len(LETTERS)]
    if len(parts) == 1 and parts[0] in known:
        return [parts[0], LETTERS[known.index(parts[0])]]
    if len(parts) == 1 and parts[0] in list(LETTERS):
        place = LETTERS.index(parts[0])
        return [known[place] if place < len(known) else parts[0], parts[0]]
    raise ValueError(
        f"infinitebench {task}: the answer {parts!r:.80} is none of the options {known!r:.200}; "
        "give options=[...], or the answer as text and letter"
    )


# --- scorers: of a prediction, the label, and whether the later rules hold


def first_digits(prediction: str, right: list[str], late: bool = False) -> bool:
    """Whether the first run of digits (ASCII) is the label, leading zeros included."""
    found = re.search(r"[0-9]+", prediction)
    return right[0] == (found[0] if found else "")


def kv_retrieval(prediction: str, right: list[str], late: bool = False) -> bool:
    """Whether the label is a word once punctuation is space.

    The official 2024-06 code wants the label as a text and never finds one in a list, as later data has it;
    here a list counts as its first entry under both rule sets.
    """
    return right[0] in _spaced(prediction, _MARKS).split()


def longdialogue(prediction: str, right: list[str], late: bool) -> bool:
    """Whether a name is said: of 2024-06 the first one alone as one word, later any as part of the text.

    The first rule puts the prediction in upper case but not the name, and finds no name of several words.
    """
    if late:
        return any(name.upper() in prediction.upper() for name in right)
    return right[0] in [word.upper() for word in _spaced(prediction, _MARKS).split()]


def longbook_choice(prediction: str, right: list[str], late: bool) -> bool:
    """Whether the right text or letter is chosen.

    The first character decides if it is one of A to D ("Answer: B" chooses A), then the whole prediction,
    then what stands one character after the first known cue that occurs, then the first word that is part of
    "ABCD". The later rules first take the last letter of the first line that has one standing alone, if it is
    right.
    """
    said = prediction.strip()
    if late and _last_letter(said, "A-D") in right:
        return True
    if not said:
        return False
    if said[0] in LETTERS:
        return said[0] in right
    if said in right:
        return True
    said = _squeezed(_spaced(said, "\n\"'.,?!{}"))
    after = _after_cue(said, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return after.startswith(tuple(right))
    return next((word in right for word in said.split() if word in LETTERS), False)


def code_debug(prediction: str, right: list[str], late: bool) -> bool:
    """Whether the right function or letter is chosen.

    Of 2024-06: the letter with "." or ":" at the beginning, or letter or function one character after the
    first known cue that occurs; a bare letter is wrong. The later rules first take the last letter (to J) of
    the first line that has one standing alone, if it is right, and then a beginning with letter or function.
    """
    function, letter = right
    said = prediction.strip()
    if late and _last_letter(said, "A-J") == letter:
        return True
    if said[:2] in (f"{letter}.", f"{letter}:"):
        return True
    for taken in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        said = said.replace(taken, " ")
    said = _squeezed(said)
    if late and said.startswith((letter, function)):
        return True
    after = _after_cue(said, ("answer is:", "is:", "answer:", "correct option is:"))
    return after is not None and after.startswith((letter, function))


def math_find(prediction: str, right: list[int | float], late: bool = False) -> bool:
    """Whether the first number is the label, as an int where that is one and as a float where it is one.

    Signs don't count. "4.0" for the int 4 raises ValueError in the official code: wrong here.
    """
    found = _NUMBER.search(prediction)
    if found is None:
        return False
    try:
        return type(right[0])(found[0]) == right[0]
    except ValueError:
        return False


def code_run(prediction: str, right: list[int | float], late: bool = False) -> bool:
    """Whether the last word is the label, once punctuation is space: "4.0" ends in the word "0"."""
    words = _spaced(prediction, "\n.`'\":").split()
    try:
        return bool(words) and int(words[-1]) == right[0]
    except ValueError:
        return False


def longbook_qa_eng(prediction: str, right: list[str], late: bool = False) -> float:
    """LongBench's F1 of words, the best over the answers."""
    return max(qa_f1(prediction, answer) for answer in right)


def longbook_qa_chn(prediction: str, right: list[str], late: bool = False) -> float:
    """F1 of characters as multisets, without case, punctuation and space; the best over the answers."""
    return max(f1(bare_chinese(prediction), bare_chinese(answer)) for answer in right)


def longbook_sum_eng(prediction: str, right: list[str], late: bool = False) -> float:
    """ROUGE-Lsum F without stemmer, lines as sentences, the best over the references."""
    return max(float(_rouge().score(answer, prediction)["rougeLsum"].fmeasure) for answer in right)


def math_calc(prediction: str, right: Sequence[int | float], skip_first: bool = False) -> float:
    """Share of the label before the first number that differs; runs of digits are numbers, without signs."""
    try:
        said = [int(digits) for digits in re.findall(r"[0-9]+", prediction)][int(skip_first) :]
    except ValueError:
        return 0.0
    matching = 0
    for number, wanted in zip(said, right, strict=False):
        if number != wanted:
            break
        matching += 1
    return matching / len(right)


_SCORERS: dict[str, Callable[[str, list[Any], bool], float]] = {
    "passkey": first_digits,
    "number_string": first_digits,
    "kv_retrieval": kv_retrieval,
    "longbook_sum_eng": longbook_sum_eng,
    "longbook_qa_eng": longbook_qa_eng,
    "longbook_qa_chn": longbook_qa_chn,
    "longbook_choice_eng": longbook_choice,
    "longdialogue_qa_eng": longdialogue,
    "math_find": math_find,
    "code_run": code_run,
    "code_debug": code_debug,
}
TASKS = (*_SCORERS, "math_calc")


# --- parts of scorers


def _spaced(text: str, characters: str) -> str:
    return text.translate(dict.fromkeys(map(ord, characters), " "))


def _squeezed(text: str) -> str:
    """Runs of spaces, and of nothing else, as one."""
    return re.sub(r" {2,}", " ", text)


def _last_letter(text: str, letters: str) -> str | None:
    """The last letter that stands alone on the first line with one."""
    found = re.search(rf"\b[{letters}]\b(?!.*\b[{letters}]\b)", text)
    return found[0] if found else None


def _after_cue(text: str, cues: Sequence[str]) -> str | None:
    """What follows the first of `cues` that occurs, less one character; None if none does.

    "is:B" loses its letter to that, as in the official code.
    """
    for cue in cues:
        place = text.find(cue)
        if place >= 0:
            return text[place + len(cue) + 1 :]
    return None


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk

    return RougeScorer(["rougeLsum"], use_stemmer=False)
