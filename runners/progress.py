"""What a run shows while it works: one line a cell with live score and speed.

On a terminal it is a rich progress bar; elsewhere (a log file, CI) plain lines, about ten a cell.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType

from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hcache.records import Line

_PLAIN_SHARE = 0.1
_PLAIN_SECONDS = 30.0


class ConsoleHandler(logging.Handler):
    """Log lines on the console that has the progress bar, above it; conf/config.yaml puts it in place.

    What is only information is said once: one that comes with every example would fill the screen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line, never wrapped: a path stays whole."""
        text = self.format(record)
        if record.levelno <= logging.INFO and text in self._said:
            return
        self._said.add(text)
        get_console().print(text, markup=False, highlight=False, soft_wrap=True)


class CellProgress:
    """Progress of one cell over its examples; a context manager.

    Args:
        name: what the line begins with.
        total: examples of the whole cell.
        finished: lines of an earlier part of the run.
    """

    def __init__(
        self, name: str, total: int, finished: Sequence[Line], console: Console | None = None
    ) -> None:
        self._name, self._total = name, total
        self._console = console or get_console()
        self._scores = [line["score"] for line in finished]
        self._decode_ms, self._steps = 0.0, 0
        self._shown, self._shown_at = 0, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[live]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=len(self._scores), live="")

    def __enter__(self) -> CellProgress:
        self._bar.start()
        if not self._console.is_terminal:
            resumed = f", {len(self._scores)} done before" if self._scores else ""
            self._say(f"{self._name}: {self._total} examples{resumed}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, line: Line) -> None:
        """Count one more example."""
        self._scores.append(line["score"])
        self._decode_ms += line["decode_ms"]
        self._steps += line["decode_steps"]
        self._bar.update(self._task, completed=len(self._scores), live=self.live())
        if not self._console.is_terminal and self._due():
            self._shown, self._shown_at = len(self._scores), time.monotonic()
            self._say(f"{self._name}: {len(self._scores)}/{self._total}  {self.live()}")

    def live(self) -> str:
        """Score so far (0 to 100) and decoding speed of this part of the run."""
        score = f"score {100 * sum(self._scores) / len(self._scores):.1f}"
        return f"{score}  {self._decode_ms / self._steps:.1f} ms/token" if self._steps else score

    def _due(self) -> bool:
        done = len(self._scores)
        enough = done - self._shown >= _PLAIN_SHARE * self._total
        return done == self._total or enough or time.monotonic() - self._shown_at > _PLAIN_SECONDS

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
