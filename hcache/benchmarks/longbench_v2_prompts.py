"""Prompts of LongBench v2: whose files, in which mode of asking, and a template filled with a row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hcache.benchmarks.prompt_files import PromptFile
from hcache.benchmarks.scoring.longbench_v2 import LETTERS, SUBSTRING
from hcache.benchmarks.source import DataError, Row

_REPOSITORY = "THUDM/LongBench"
_COMMIT = "2e00731f8d0bff23dc4325161044d0ed8af94c1e"
ZERO_SHOT = PromptFile(
    _REPOSITORY,
    _COMMIT,
    "prompts/0shot.txt",
    "68a162252bc9ff71d5d7abca3d69bb31aac3c35f832d657a2866f2018b8a6950",
)
THOUGHTS = PromptFile(
    _REPOSITORY,
    _COMMIT,
    "prompts/0shot_cot.txt",
    "6cc33d92fd8f611662b756c1f10f302c541ca005b58c46d5f3188ac3a939bfe8",
)
CONCLUSION = PromptFile(
    _REPOSITORY,
    _COMMIT,
    "prompts/0shot_cot_ans.txt",
    "85ec59df4ac0e27aabbc619a7ca5cf3ae1787dd5a76cf51a18944eb52c91955f",
)
NO_CONTEXT = PromptFile(_REPOSITORY, _COMMIT, "prompts/0shot_no_context.txt")
HETEROCACHE = PromptFile(
    "ponytaill/HeteroCache",
    "01dc7feea79756ef4dd1140158e02acf0585540b",
    "scripts/longbenchv2/pred.py",
    "9c915cde95074601cf575d5268e88d9ad9499709155f6093c5c2a6bd761ee331",
)
_HETEROCACHE_NAME = "template_0shot"
_OMITTED = "The text is too long and omitted here."
"""What pred.py puts in the document's place when it asks for the second time."""

CHOICES = tuple(f"C_{letter}" for letter in LETTERS)
_PLACEHOLDER = re.compile(r"\$(DOC|Q|C_[A-D]|COT)\$")


@dataclass(frozen=True)
class Protocol:
    """What published runs differ in.

    Args:
        prompts: the file its template is from.
        max_length: tokens of the prompt before the chat template; None for what the model holds.
        max_new_tokens: of an answer.
        extraction: how the answer is found in a reply.
    """

    prompts: PromptFile
    max_length: int | None
    max_new_tokens: int
    extraction: str


OFFICIAL = "official"
PROTOCOLS = {
    OFFICIAL: Protocol(ZERO_SHOT, 120_000, 128, "official"),
    "heterocache": Protocol(HETEROCACHE, 128_500, 128, "heterocache"),
    "kvpress": Protocol(ZERO_SHOT, None, 16, SUBSTRING),
}


class Mode(NamedTuple):
    """One way of asking. The answer to `then`, where there is one, is what counts.

    Args:
        prompts: the file of the (first) prompt; None for the protocol's.
        max_new_tokens: of the (first) reply; None for the protocol's.
        then: the file of a second prompt, which has the reply to the first and no document.
    """

    prompts: PromptFile | None = None
    max_new_tokens: int | None = None
    then: PromptFile | None = None


PLAIN = "0shot"
MODES = {PLAIN: Mode(), "cot": Mode(THOUGHTS, 1024, CONCLUSION), "no_context": Mode(NO_CONTEXT)}


@dataclass(frozen=True)
class Template:
    """A prompt's text around its placeholders.

    Args:
        pieces: text and names of placeholders by turns, text first and last.
    """

    pieces: tuple[str, ...]

    @classmethod
    def of(cls, text: str, source: PromptFile, *needed: str) -> Template:
        """Raises DataError for a text that lacks question, choices or one of the other `needed` names."""
        pieces = tuple(_PLACEHOLDER.split(text))
        missing = [name for name in (*needed, "Q", *CHOICES) if name not in pieces[1::2]]
        if missing:
            raise DataError(f"{source.path} of {source.repository} has no ${missing[0]}$")
        return cls(pieces)

    def filled(self, values: Mapping[str, str], behind: str) -> tuple[str, str]:
        """(up to and with the last placeholder `behind`, the rest), every value without space around it.

        A value is never searched for placeholders: a document may contain `$Q$`. Without the placeholder the
        rest is all.
        """
        parts = [values[piece].strip() if place % 2 else piece for place, piece in enumerate(self.pieces)]
        places = [place for place in range(1, len(self.pieces), 2) if self.pieces[place] == behind]
        end = places[-1] + 1 if places else 0
        return "".join(parts[:end]), "".join(parts[end:])


def values_of(row: Row) -> dict[str, str]:
    """What the placeholders of a first prompt stand for."""
    choices = {f"C_{letter}": row[f"choice_{letter}"] for letter in LETTERS}
    return {"DOC": row["context"], "Q": row["question"], **choices}


def first_template(protocol: str, mode: str, prompt_dir: str | None) -> Template:
    """Of the prompt that is asked first, or alone. Raises DataError where it can't be had or is broken."""
    prompts = MODES[mode].prompts or PROTOCOLS[protocol].prompts
    if prompts is HETEROCACHE:
        text = prompts.literals(prompt_dir).get(_HETEROCACHE_NAME)
    else:
        text = prompts.text(prompt_dir)
    if not isinstance(text, str):
        raise DataError(f"{prompts.path} of {prompts.repository} has no text {_HETEROCACHE_NAME}")
    if protocol == "kvpress":
        text = "".join(text.rpartition('"')[::2])  # its format line has lost the closing quote
    return Template.of(text, prompts, *(() if prompts is NO_CONTEXT else ("DOC",)))


def second_template(mode: str, prompt_dir: str | None) -> Template | None:
    """Of the prompt that follows the first reply; None where none does. Raises DataError as the first."""
    prompts = MODES[mode].then
    return None if prompts is None else Template.of(prompts.text(prompt_dir), prompts, "COT")


def around_reply(template: Template, row: Row) -> tuple[str, str]:
    """What stands before and behind the first reply in the second prompt."""
    return template.filled({**values_of(row), "DOC": _OMITTED, "COT": ""}, "COT")


def files_of(protocol: str, mode: str) -> list[PromptFile]:
    """All that a run reads."""
    asked = MODES[mode]
    return [asked.prompts or PROTOCOLS[protocol].prompts, *([asked.then] if asked.then else [])]
