"""One run at a time in a folder: the second is told who holds it."""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from vitrim.words.errors import RunError
from vitrim.words.launched import first

__all__ = ["FILE", "HeldError", "holding"]

FILE = ".lock"
"""The file in a run folder that is locked while a run writes there. The system releases the lock of a process that was
killed, whatever the file says."""


class HeldError(RunError):
    """Another process holds a run folder."""


@contextlib.contextmanager
def holding(folder: Path | None) -> Iterator[None]:
    """Hold a run folder inside the block; it is created if missing.

    Of several processes of one run, the first holds it for all; the others have no folder.

    Raises:
        HeldError: naming the process that holds it.
        OSError: if the folder cannot be written to.
    """
    if folder is None or not first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    lock = FileLock(path, timeout=0, is_singleton=False)
    try:
        lock.acquire()
    except Timeout:
        raise HeldError(
            f"{folder}: one run at a time may write to a folder, but {_holder(path)} does; wait for it, or choose "
            "another --out"
        ) from None
    try:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        about = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            path.write_text(json.dumps(about) + "\n", encoding="utf-8")
        yield
    finally:
        # Removed while it is held: whoever waits for the old file finds that it is gone, and makes a new one.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"process {about['process']} on {about['host']}, since {about['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
