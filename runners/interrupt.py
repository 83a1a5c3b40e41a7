"""SIGTERM as a request: finish the batch at hand, leave a state that resumes, then end."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)
_asked = threading.Event()


class Interrupted(Exception):
    """The run was asked to stop and everything finished so far is on disk."""


class StopSignal:
    """While it is entered, SIGTERM is remembered instead of ending the process.

    The request outlives the cell: those after it don't begin. Elsewhere than in the main thread, where
    Python can't set handlers, the launcher's own handling stays.
    """

    def __enter__(self) -> StopSignal:
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    @staticmethod
    def _remember(number: int, frame: FrameType | None) -> None:
        log.warning("SIGTERM: stopping after this batch")
        _asked.set()

    @staticmethod
    def check() -> None:
        """Raise Interrupted if the process was asked to stop."""
        if _asked.is_set():
            raise Interrupted


def forget() -> None:
    """Take the request back: the process goes on to other work."""
    _asked.clear()
