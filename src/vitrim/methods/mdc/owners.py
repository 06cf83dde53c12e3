"""Which process measures which trial, so that the trials of a killed one are known at once on its own machine.

Heartbeats tell the same to other machines, but only after `vitrim.methods.mdc.bayes.PATIENCE`. Until then a search
that was killed and started again would go on with another trial, and end elsewhere than an uninterrupted one.
"""

import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import optuna
import psutil
from optuna.trial import FrozenTrial

__all__ = ["own", "without_owner"]

_KEY = "owner "
_STARTING = 2.0
"""Seconds within which a process says that a trial is its own after it has begun it; it takes milliseconds."""


def own(study: optuna.Study, number: int) -> None:
    """Store in the study that this thread of this process measures the trial `number`."""
    here, pid, born = _machine(), os.getpid(), psutil.Process().create_time()
    study.set_user_attr(f"{_KEY}{here} {pid} {born:.2f} {threading.get_ident()}", number)


def without_owner(study: optuna.Study, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return those of the running trials whose process has ended; of processes on other machines nothing is known.

    A trial without a process in the study was begun a moment ago, or its process was killed in that moment. So this
    waits for up to two seconds if there is one.
    """
    if not running:
        return []
    started = {trial.number for trial in running}
    deadline = time.monotonic() + _STARTING
    while True:
        owners = _owners(study)
        unknown = started - owners.keys()
        still = {t.number for t in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))}
        if not unknown & still or time.monotonic() > deadline:
            return [t for t in running if t.number in unknown & still or _ended(owners.get(t.number, ""))]
        time.sleep(0.05)


def _owners(study: optuna.Study) -> dict[int, str]:
    return {value: key[len(_KEY) :] for key, value in study.user_attrs.items() if key.startswith(_KEY)}


def _ended(owner: str) -> bool:
    """Return whether the process of an owner is known to have ended."""
    if not owner:
        return False
    here, pid, born, _ = owner.rsplit(" ", 3)
    if here != _machine():
        return False
    try:
        process = psutil.Process(int(pid))
        another = abs(process.create_time() - float(born)) > 1
        return bool(another or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """Return what identifies this machine since it was started, and the container that numbers its processes."""
    parts = [socket.gethostname()]
    try:
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()]
        parts += [str(Path("/proc/self/ns/pid").readlink())]
    except OSError:  # not Linux
        parts += [f"{psutil.boot_time():.0f}"]
    return " ".join(parts)
