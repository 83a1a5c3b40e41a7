"""`lm_eval`: any task of lm-evaluation-harness, run by the library itself (Gao et al.).

The library has the prompts, the metrics and their averages; its requests are answered under the method and
budget of the cell (hcache.harness). Needs `pip install 'hcache[lm_eval]'`; the card beside this file says
what is compressed in which kind of task.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from hcache.benchmarks.base import BENCHMARKS, Benchmark, Example
from hcache.records import content_digest, text_digest

FEWSHOT_SEED = 1234
"""The library's own default."""


@BENCHMARKS.register("lm_eval")
@dataclass(frozen=True)
class LmEval(Benchmark):
    """Settings of the benchmark.

    Args:
        tasks: names of the library's tasks, groups or tags, patterns (`mmlu_*`), or paths of YAML files.
        num_fewshot: solved examples in front of each prompt; null is what the task says.
        fewshot_seed: of the draw of those examples.
        apply_chat_template: put prompts into the model's chat template.
        fewshot_as_multiturn: with the template, every solved example is a turn of its own.
        system_instruction: the system message there; null for none.
        gen_kwargs: changes a task's generation settings, as in the library: "max_gen_toks=512,temperature=0".
        max_length: positions for context and answer; null is the model's window.
        include_path: a directory with YAML files of tasks of your own.
        metadata: JSON object for tasks that make their data when they run, {"max_seq_lengths": [4096]}.
        confirm_run_unsafe_code: run tasks whose scoring runs the model's code on this machine.
    """

    by_library: ClassVar[bool] = True

    num_fewshot: int | None = None
    fewshot_seed: int = FEWSHOT_SEED
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    max_length: int | None = None
    include_path: str | None = None
    metadata: str | None = None
    confirm_run_unsafe_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"benchmark.tasks={list(self.tasks)} must name each task once")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"benchmark.num_fewshot={self.num_fewshot} must be at least 0, or null")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"benchmark.max_length={self.max_length} must be at least 2, or null")
        if self.protocol != "plain" or not self.query_aware or self.shard is not None:
            raise ValueError(
                "benchmark.protocol, benchmark.query_aware and benchmark.shard have no meaning for lm_eval, "
                "which has its prompts from the library and runs a task as a whole; leave them out"
            )
        self.task_metadata()

    def check(self) -> None:
        """Raise ValueError, with what to do, where no task is named or the library isn't installed."""
        if not self.tasks:
            raise ValueError("benchmark.tasks=[] names no task: set it, 'benchmark.tasks=[gsm8k]'")
        require_library()

    def task_metadata(self) -> dict[str, Any]:
        """`metadata` as an object. Raises ValueError."""
        if self.metadata is None:
            return {}
        try:
            found = json.loads(self.metadata)
        except json.JSONDecodeError as error:
            raise ValueError(f"benchmark.metadata={self.metadata!r} is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"benchmark.metadata={self.metadata!r} must be a JSON object")
        return found

    def identity(self) -> dict[str, Any]:
        """The library's version, and what the files of one's own tasks hold.

        Raises:
            ValueError: include_path is not a directory.
        """
        return {"library": library_version(), "task_content": self._task_content()}

    def _task_content(self) -> str | None:
        own = [Path(name) for name in self.tasks if Path(name).suffix == ".yaml" and Path(name).is_file()]
        digests = [content_digest([path]) for path in own]
        if self.include_path is not None:
            place = Path(self.include_path).expanduser()
            if not place.is_dir():
                raise ValueError(f"benchmark.include_path={self.include_path} is not a directory")
            files = [
                path
                for path in sorted(place.rglob("*"))
                if path.is_file() and "__pycache__" not in path.parts
            ]
            digests += [f"{path.relative_to(place)}:{content_digest([path])}" for path in files]
        return text_digest("\n".join(digests)) if digests else None

    def examples(self, tokenizer: Any | None) -> list[Example]:
        """There are none to hand out. Raises ValueError."""
        raise ValueError(
            "benchmark 'lm_eval': the library makes the prompts of its tasks and asks the model itself; "
            "run it with runner=evaluate"
        )

    def score(self, example: Example | str, prediction: str, answers: Any, **extra: Any) -> float:
        """The library scores what it has asked. Raises ValueError."""
        raise ValueError(
            "benchmark 'lm_eval': the library scores a task as a whole; its scores are in the record "
            "(result.json, `tasks`; predictions.jsonl, `metrics`)"
        )


def library_version() -> str | None:
    """The version of the library that is installed; None if it isn't."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        return None


def require_library() -> None:
    """Raise ValueError, with what to do, where the library isn't installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "benchmark=lm_eval needs lm-evaluation-harness, which is not installed; "
            "pip install 'hcache[lm_eval]'"
        )
