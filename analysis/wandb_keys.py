"""What a run says of itself in W&B, key by key: where it stands, in which unit, and which way is better.

The names are those of runners/tracking.py and of result.json. Knows neither W&B's client nor its reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis.markdown import table

CONFIG, SUMMARY, HISTORY = "config", "summary", "history"


@dataclass(frozen=True)
class Key:
    """One key of a run.

    Args:
        name: dotted where it is nested; `<task>` stands for each task.
        where: config, summary (once a run) or history (once an example).
        means: in words, with its unit.
        better: higher, lower, or empty where neither is.
    """

    name: str
    where: str
    means: str
    better: str = ""


METHOD = Key("method.name", CONFIG, "the compression method")
KEPT_FRACTION = Key("budget.kept_fraction", CONFIG, "budget asked for: share of the prompt's KV bytes kept")
KEPT_TOKENS = Key("budget.kept_tokens", CONFIG, "budget asked for: tokens kept per head on average")
MODEL = Key("model.name", CONFIG, "the model")
BENCHMARK = Key("benchmark.name", CONFIG, "the benchmark")
SEED = Key("runtime.seed", CONFIG, "the seed")

STATUS = Key("status", SUMMARY, "completed; of runner=latency infeasible or failed as well")
SCORE = Key(
    "score", SUMMARY, "the benchmark's average of its tasks, 0 to 100 (lm_eval: as reported)", "higher"
)
TASK_SCORE = Key("tasks.<task>.score", SUMMARY, "mean over a task's examples, 0 to 100", "higher")
FRACTION = Key("budget.requested_fraction", SUMMARY, "as asked for; 1 for a method without a budget")
TOKENS = Key("budget.requested_tokens", SUMMARY, "as asked for; empty for budgets in fractions")
RESIDENT = Key(
    "budget.resident_fraction", SUMMARY, "measured: KV bytes on the device over the full cache's", "lower"
)
ATTENDED = Key(
    "budget.attended_fraction", SUMMARY, "measured: share of the prompt that a decode step reads", "lower"
)
DEVICE_BYTES = Key(
    "memory.device_kv_bytes", SUMMARY, "KV bytes kept on the device after prefill, mean of examples", "lower"
)
HOST_BYTES = Key("memory.host_kv_bytes", SUMMARY, "KV bytes kept on the host, mean of examples", "lower")
PREFILL = Key("latency.prefill_ms.median", SUMMARY, "milliseconds of a prefill, median of examples", "lower")
DECODE = Key(
    "latency.decode_ms_per_token.median", SUMMARY, "milliseconds a token, median of examples", "lower"
)

SCORE_OF_EXAMPLE = Key("score/all", HISTORY, "score of one example of any task, 0 to 100", "higher")
SCORE_IN_TASK = Key("score/<task>", HISTORY, "the same, of a task's own examples", "higher")
DECODE_OF_EXAMPLE = Key("decode_ms_per_token", HISTORY, "milliseconds a token of one example", "lower")

CONTEXT = Key("latency/context", HISTORY, "runner=latency: tokens in the cache, a row for each")
STEP_TIME = Key(
    "latency/decode_ms_batch_<n>",
    HISTORY,
    "runner=latency: ms a step of n sequences, median",
    "lower",
)

BUDGET = (KEPT_FRACTION, KEPT_TOKENS)
WHO = (MODEL, BENCHMARK, METHOD, *BUDGET)
CELL = (STATUS, SCORE, RESIDENT, ATTENDED, DEVICE_BYTES, HOST_BYTES, PREFILL, DECODE)
"""What a row of a table shows, after WHO."""

KEYS = (
    *(METHOD, *BUDGET, MODEL, BENCHMARK, SEED),
    *(STATUS, SCORE, TASK_SCORE, FRACTION, TOKENS, RESIDENT, ATTENDED),
    *(DEVICE_BYTES, HOST_BYTES, PREFILL, DECODE),
    *(SCORE_OF_EXAMPLE, SCORE_IN_TASK, DECODE_OF_EXAMPLE, CONTEXT, STEP_TIME),
)


def of_task(task: str) -> Key:
    """The score of one task."""
    return Key(TASK_SCORE.name.replace("<task>", task), SUMMARY, TASK_SCORE.means, TASK_SCORE.better)


def explained() -> str:
    """All keys as a Markdown table."""
    rows = [[f"`{key.name}`", key.where, key.means, key.better or "-"] for key in KEYS]
    return table(["key", "where", "what", "better"], rows)
