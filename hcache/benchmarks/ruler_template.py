"""RULER's prompt templates: read from its authors' file, filled in, and cut where the question begins.

The question is what follows the context in the template; space in between belongs to the context. Knows no
generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from hcache.benchmarks.prompt_files import PromptFile
from hcache.benchmarks.source import DataError

PROMPTS = PromptFile(
    "NVIDIA/RULER",
    "c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a",
    "scripts/data/synthetic/constants.py",
    "6296e901d495ec6200dc3f68993ea13d8282e3c0dbe1a8c47967f111105d1fde",
)
_CONTEXT = "{context}"
_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))


class Parts(NamedTuple):
    """One prompt with what it asks for; the prompt is the first three together."""

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.context + self.question + self.answer_prefix


@dataclass(frozen=True)
class Template:
    """One family's template.

    Args:
        head: text before the context.
        gap: the space between context and question.
        tail: the question.
        prefix: how the answer begins.
        new_tokens: that an answer may take.
    """

    head: str
    gap: str
    tail: str
    prefix: str
    new_tokens: int

    def singular(self) -> Template:
        """As RULER rewrites it where there is one value to say: text by text, inside longer words too."""
        head, tail, prefix = (_singular(text) for text in (self.head, self.tail, self.prefix))
        return Template(head, self.gap, tail, prefix, self.new_tokens)

    def filled(self, context: str, answers: tuple[str, ...], before: str = "", **names: Any) -> Parts:
        """The prompt.

        Args:
            context: stands as it is; braces in it mean nothing.
            answers: go with it.
            before: a worked example that stands in front.
            names: values of the other placeholders.

        Raises:
            DataError: a placeholder that has no value.
        """
        head, tail, prefix = (_filled(text, names) for text in (self.head, self.tail, self.prefix))
        return Parts(before + head + context + self.gap, tail, prefix, answers)


def _singular(text: str) -> str:
    for several, one in _SINGULAR:
        text = text.replace(several, one)
    return text


def _filled(text: str, names: dict[str, Any]) -> str:
    try:
        return text.format(**names)
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"{PROMPTS.path}: the template {text[:60]!r} can't be filled in ({error!r}); known are context, "
            f"{', '.join(names)}"
        ) from error


def read_templates(prompt_dir: str | None) -> dict[str, Template]:
    """The templates by family.

    Args:
        prompt_dir: a checkout of RULER; None takes the pinned file.

    Raises:
        DataError: the file can't be had, or is not what it should be.
    """
    tasks = PROMPTS.literals(prompt_dir).get("TASKS")
    if not isinstance(tasks, dict):
        raise DataError(f"{PROMPTS.path} of {PROMPTS.repository} has no dictionary TASKS of literals")
    return {family: _read(family, entry) for family, entry in tasks.items()}


def _read(family: str, entry: Any) -> Template:
    where = f"{PROMPTS.path} of {PROMPTS.repository}: TASKS[{family!r}]"
    try:
        text, prefix, new_tokens = entry["template"], entry["answer_prefix"], entry["tokens_to_generate"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} lacks {error}") from error
    if not (isinstance(text, str) and isinstance(prefix, str) and isinstance(new_tokens, int)):
        raise DataError(f"{where} must hold two texts and a number")
    if text.count(_CONTEXT) != 1:
        raise DataError(f"{where}: the template must have {_CONTEXT} once")
    head, _, rest = text.partition(_CONTEXT)
    tail = rest.lstrip()
    return Template(head, rest[: len(rest) - len(tail)], tail, prefix, new_tokens)
