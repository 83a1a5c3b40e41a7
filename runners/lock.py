"""One process a cell: a lock on the file `running` in the cell's directory.

The lock (flock) is the operating system's: it ends with the process that holds it, killed or not, so a file
that was left behind refuses nobody. What the file says, host and process, is for messages only. Several hosts
exclude each other where their file system passes locks on: NFS with its lock service does, for about a minute
after a host went down too; NFS mounted with `nolock` or `local_lock=flock` does not.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hcache import records

log = logging.getLogger(__name__)
LOCK_FILE = "running"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class CellBusy(RuntimeError):
    """Another process is at work on this cell; the message says which."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """While it is entered, no other process gets the lock of this directory.

    Raises:
        CellBusy: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_FILE
    file = _acquired(path)
    try:
        _sign(file)
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is given back: the next holder's file is another one
        file.close()


def _acquired(path: Path) -> TextIO:
    """The open file under our lock. Raises CellBusy."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
            if _is_at(file, path):
                return file
        except BlockingIOError as error:
            message = _busy(file, path)
            file.close()
            raise CellBusy(message) from error
        except OSError:
            file.close()
            raise
        file.close()  # its last holder removed it before we had it: the path is another file's by now


def _lock(file: TextIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        log.warning("%s: no locks on this file system (%s); run no cell twice at once", file.name, error)


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sign(file: TextIO) -> None:
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": records.now()}, file)
    file.flush()


def _busy(file: TextIO, path: Path) -> str:
    file.seek(0)
    who = _signed(file.read()) or "another process"  # which hasn't signed yet
    return f"{path.parent} is being run by {who}; wait for it, or end it and repeat the command"


def left_by(directory: Path) -> str | None:
    """Who had the lock last and never gave it back, in words; None if nobody is known."""
    try:
        return _signed((directory / LOCK_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _signed(text: str) -> str | None:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
