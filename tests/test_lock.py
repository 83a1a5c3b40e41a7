"""The lock of a cell: refuses a second process, forgets a killed one, leaves nothing behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runners import lock
from runners.lock import LOCK_FILE, CellBusy, locked

HOLDER = """
import sys, time
from pathlib import Path
from runners.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(directory: Path) -> subprocess.Popen[str]:
    """A process that has the lock."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", HOLDER, str(directory)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(CellBusy, match=rf"{tmp_path} is being run by process {process.pid} on \S+"):
            locked(tmp_path).__enter__()
        assert (tmp_path / LOCK_FILE).exists(), "who is refused removes nothing"
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).exists(), "what a killed process leaves"
    with locked(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()
    assert list(tmp_path.iterdir()) == []


def test_other_directories_are_free(tmp_path: Path) -> None:
    """A cell and its shards are run side by side."""
    with locked(tmp_path), locked(tmp_path / "shards" / "0of2"), locked(tmp_path / "shards" / "1of2"):
        pass


def test_lock_ends_with_an_exception(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="broken"), locked(tmp_path):
        raise OSError("broken")
    with locked(tmp_path):
        pass


def test_file_removed_while_waiting_for_it_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before the last holder removed it, locked after: a third process would get a new file."""
    flock, calls = lock.fcntl.flock, []

    def removed_first(file: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        flock(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", removed_first)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(CellBusy):
            locked(tmp_path).__enter__()


def test_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with locked(tmp_path):
        assert "no locks on this file system" in caplog.text
