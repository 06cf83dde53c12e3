"""The ways to break a command off, each counted: killed, told to end, without room, without the right to write."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.reliability.commands import Ended, arguments_of, results_of, run

__all__ = ["full_disk", "read_only", "stopped"]

Say = Callable[[str], None]


def stopped(name: str, root: Path, place: Path, number: int, times: int, say: Say) -> dict[str, Any]:
    """End a command by a signal at random moments, run it again, and compare with a run that was left alone.

    Args:
        name: the command.
        root: what `commands.prepare` wrote.
        place: an empty folder.
        number: SIGKILL or SIGTERM.
        times: how often a signal is to meet a command that still runs; moments after its end are drawn again.
        say: called with what is wrong.

    Returns:
        ``times`` (commands started), ``early`` (ended before the signal), ``same`` (of the others, those with the same
        bits), ``wrong``.
    """
    whole = run(arguments_of(name, root, _new(place / "whole")), place / "told")
    if whole.status:
        return {"times": 0, "early": 0, "same": 0, "wrong": [f"{name} alone: {whole.error[-400:]}"]}
    wanted, draw = results_of(place / "whole"), random.Random(f"{name} {number}")
    # The first run also imports what no command before it did.
    seconds = min(whole.seconds, run(arguments_of(name, root, _new(place / "whole")), place / "told").seconds)
    early, same, wrong = 0, 0, []
    while same + len(wrong) < times and early < 2 * times:
        turn = early + same + len(wrong)
        out = _new(place / f"out{turn}")
        arguments, moment = arguments_of(name, root, out), draw.uniform(0, seconds)

        def end(pid: int, moment: float = moment) -> None:
            time.sleep(moment)
            os.kill(pid, number)

        first = run(arguments, place / "told", end)
        if first.status == 0:
            early += 1
            shutil.rmtree(out)
            continue
        told = _why_not_stopped(first, number)
        again = run(arguments, place / "told")
        if again.status:
            told = told or f"run again: {again.error[-400:]}"
        elif results_of(out) != wanted:
            told = told or "run again: other bits"
        same += told is None
        if told is not None:
            wrong.append(f"{name} at {moment:.2f} s: {told}")
            say(wrong[-1])
        shutil.rmtree(out)
    return {"times": early + same + len(wrong), "early": early, "same": same, "wrong": wrong}


def _why_not_stopped(ended: Ended, number: int) -> str | None:
    if number == signal.SIGKILL:
        return None if ended.status == -signal.SIGKILL else f"status {ended.status}: {ended.error[-400:]}"
    # A process that has not yet come to its own handler ends as the system ends it.
    if ended.status == -signal.SIGTERM:
        return None
    if ended.status != 143 or "Traceback" in ended.error or "terminated; the same command" not in ended.sentence:
        return f"status {ended.status}: {ended.error[-400:]}"
    return None


def _new(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _halves(root: Path) -> list[str]:
    """Names of files that only half of a writing leaves; checkpoints and folders of a run that goes on are none."""
    return [str(path.relative_to(root)) for path in root.rglob(".*") if path.name != ".lock" and path.is_file()]


def mounted(place: Path, size: int) -> None:
    """Mount a file system of `size` bytes in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(4096, size)}", "vitrim", str(place)], check=True)


def full_disk(name: str, root: Path, place: Path, sizes: Iterable[float], say: Say) -> dict[str, Any]:
    """Run a command on disks that are too small, then with room, and look at what it says and leaves.

    Args:
        name: the command.
        root: what `commands.prepare` wrote.
        place: an empty folder.
        sizes: shares of the bytes that the command takes at its peak.
        say: called with what is wrong.
    """
    mounted(_new(place / "disk"), 2**28)
    peak = 0

    def look(pid: int) -> None:
        nonlocal peak
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            used = os.statvfs(place / "disk")
            peak = max(peak, (used.f_blocks - used.f_bfree) * used.f_bsize)
            time.sleep(0.002)

    whole = run(arguments_of(name, root, _inside(place)), place / "told", look)
    if whole.status:
        _away(place)
        return {"times": 0, "told": 0, "wrong": [f"{name} alone: {whole.error[-400:]}"]}
    wanted = results_of(place / "disk" / "out")
    _away(place)
    count, told, fitted, wrong = 0, 0, 0, []
    for share in sizes:
        count += 1
        mounted(_new(place / "disk"), int(share * peak))
        arguments = arguments_of(name, root, _inside(place))
        ended = run(arguments, place / "told")
        why = None
        if ended.status == 0:
            fitted += 1
        else:
            why = ended.why_not_told() or _why_halves(place / "disk")
            subprocess.run(["mount", "-o", f"remount,size={2**28}", str(place / "disk")], check=True)
            again = run(arguments, place / "told")
            if why is None and again.status:
                why = f"with room again: {again.error[-400:]}"
            elif why is None and results_of(place / "disk" / "out") != wanted:
                why = "with room again: other bits"
            told += why is None
        if why is not None:
            wrong.append(f"{name} on {share:.2f} of its room: {why}")
            say(wrong[-1])
        _away(place)
    return {"times": count, "told": told, "fitted": fitted, "wrong": wrong}


def read_only(name: str, root: Path, place: Path, moments: Iterable[float], say: Say) -> dict[str, Any]:
    """Make the disk read-only at some moments of a command, then writable again.

    Args:
        name: the command.
        root: what `commands.prepare` wrote.
        place: an empty folder.
        moments: shares of the time that the command takes; 0 is before it begins.
        say: called with what is wrong.
    """
    mounted(_new(place / "disk"), 2**28)
    whole = run(arguments_of(name, root, _inside(place)), place / "told")
    wanted = results_of(place / "disk" / "out")
    _away(place)
    if whole.status:
        return {"times": 0, "told": 0, "wrong": [f"{name} alone: {whole.error[-400:]}"]}
    mounted(_new(place / "disk"), 2**28)
    # The first run also imports what no command before it did.
    seconds = min(whole.seconds, run(arguments_of(name, root, _inside(place)), place / "told").seconds)
    _away(place)
    count, told, fitted, wrong = 0, 0, 0, []
    for moment in moments:
        count += 1
        mounted(_new(place / "disk"), 2**28)
        arguments = arguments_of(name, root, _inside(place))

        def lock(_: int, moment: float = moment) -> None:
            time.sleep(moment * seconds)
            _set(place, "ro")

        if not moment:
            lock(0)
        ended = run(arguments, place / "told", lock if moment else None)
        _set(place, "rw")
        why = None
        if ended.status == 0:
            fitted += 1
        else:
            why = ended.why_not_told()
            again = run(arguments, place / "told")
            if why is None and again.status:
                why = f"writable again: {again.error[-400:]}"
            elif why is None and results_of(place / "disk" / "out") != wanted:
                why = "writable again: other bits"
            told += why is None
        if why is not None:
            wrong.append(f"{name} read-only at {moment:.2f}: {why}")
            say(wrong[-1])
        _away(place)
    return {"times": count, "told": told, "fitted": fitted, "wrong": wrong}


def _why_halves(disk: Path) -> str | None:
    halves = _halves(disk)
    return f"left {', '.join(halves[:3])}" if halves else None


def _inside(place: Path) -> Path:
    (place / "disk" / "out").mkdir()
    return place / "disk" / "out"


def _set(place: Path, how: str) -> None:
    """Make the disk read-only for whatever is opened from now on, or writable again.

    The system does not remount a disk on which a file is open for writing, and a run holds its log open. So the disk is
    mounted over itself, read-only; files that were open before stay writable.
    """
    disk = str(place / "disk")
    if how == "rw":
        subprocess.run(["umount", "-l", disk], check=True)
        return
    for _ in range(1000):
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        if subprocess.run(["mount", "-o", "remount,bind,ro", disk], capture_output=True).returncode == 0:
            return
        subprocess.run(["umount", "-l", disk], check=True)  # a file was opened for writing between the two
    raise TimeoutError("the disk could not be made read-only")


def _away(place: Path) -> None:
    subprocess.run(["umount", "-l", str(place / "disk")], check=True)
