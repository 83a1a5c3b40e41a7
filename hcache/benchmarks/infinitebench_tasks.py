"""InfiniteBench's tasks, what published runs of them differ in, and whose prompts they have.

The tables are the paper's and the official code's; the card says more. Knows no row and no score.
"""

from __future__ import annotations

from dataclasses import dataclass

from hcache.benchmarks.prompt_files import PromptFile
from hcache.benchmarks.scoring.infinitebench import EARLY, LATE

OFFICIAL = PromptFile(
    "OpenBMB/InfiniteBench",
    "88b3daa6989da2fbe0077170d7a3c84c25d5ae58",
    "src/prompt.py",
    "d49a6891d6bc61522bb428d66a07b092a6bb6bc195aa0fe103eddd6bb39c7f10",
)
HETEROCACHE = PromptFile(
    "ponytaill/HeteroCache",
    "01dc7feea79756ef4dd1140158e02acf0585540b",
    "infinitebench/prompt.py",
    "5a78b7106512c63fa72ce8c3f659b635ad50c6366777d974457ad3b57d5f97cc",
)
TEMPLATES = "yarn_mistral_templates"
"""The templates of every open model."""


@dataclass(frozen=True)
class Task:
    """One of the twelve.

    Args:
        paper: its name in the paper.
        metric: name of its score.
        max_new_tokens: of an answer, in the official runs.
        long: the answer is long already, so that no protocol multiplies its tokens.
    """

    paper: str
    metric: str
    max_new_tokens: int
    long: bool = False


TABLE = {
    "passkey": Task("Retrieve.PassKey", "first_digits", 6),
    "number_string": Task("Retrieve.Number", "first_digits", 12),
    "kv_retrieval": Task("Retrieve.KV", "word", 50),
    "longbook_sum_eng": Task("En.Sum", "rouge_lsum", 1200, long=True),
    "longbook_qa_eng": Task("En.QA", "qa_f1", 40),
    "longbook_qa_chn": Task("Zh.QA", "character_f1", 40),
    "longbook_choice_eng": Task("En.MC", "choice", 40),
    "longdialogue_qa_eng": Task("En.Dia", "name", 40),
    "math_find": Task("Math.Find", "first_number", 3),
    "math_calc": Task("Math.Calc", "matching_prefix", 30000, long=True),
    "code_run": Task("Code.Run", "last_int", 5),
    "code_debug": Task("Code.Debug", "choice", 5),
}
TASKS = tuple(TABLE)
_NOT_IN_HETEROCACHE = ("kv_retrieval", "math_calc", "code_run")


@dataclass(frozen=True)
class Protocol:
    """What published runs differ in.

    Args:
        prompts: the file its templates are from.
        rules: of scoring.
        max_length: tokens of the prompt before the chat template; None for what the model holds.
        chat: prompts go into the chat template.
        factor, more: the official answer lengths are multiplied, unless they are long, and added to.
        tasks: those that are scored.
    """

    prompts: PromptFile
    rules: str
    max_length: int | None
    chat: bool
    factor: int = 1
    more: int = 0
    tasks: tuple[str, ...] = TASKS

    def max_new_tokens(self, task: str) -> int:
        """Tokens of an answer."""
        known = TABLE[task]
        return known.max_new_tokens * (1 if known.long else self.factor) + self.more


PROTOCOLS = {
    "official": Protocol(OFFICIAL, EARLY, 128 * 1024, chat=False),
    "heterocache": Protocol(
        HETEROCACHE,
        LATE,
        128_500,
        chat=True,
        factor=10,
        tasks=tuple(task for task in TASKS if task not in _NOT_IN_HETEROCACHE),
    ),
    "kvpress": Protocol(OFFICIAL, LATE, None, chat=True, more=20),
}
