"""Several processes that do one run: their group, their devices, and what they tell each other.

The group is Accelerate's. Beside it stands a second one, on gloo, for everything but the gradients: the first process
may search or measure for hours while the others wait there, and a process that ends closes its connections, which the
others notice at once. Waiting is done in Python, so that signals are heard meanwhile. `vitrim.train.leading` says who
does what. R processes.
"""

import contextlib
import datetime
import os
import pickle
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from vitrim.words import launched
from vitrim.words.chain import behind
from vitrim.words.errors import RecipeError, RunError, VitrimError
from vitrim.words.plain import reason
from vitrim.words.stopping import Terminated

__all__ = [
    "Elsewhere",
    "LostError",
    "accelerator",
    "agreed",
    "count",
    "end",
    "first",
    "gathered",
    "join",
    "losing",
    "lost_before",
    "number",
    "on_one_machine",
    "part",
    "place",
    "same_",
    "spread",
    "summed",
    "tells",
]

_MINUTES = 12 * 60.0
"""Minutes that a process waits for another, unless ``VITRIM_WAIT`` says otherwise."""

_TRAINING = 30.0
"""The same within a training step, where nobody is away for long."""

_KEY = "vitrim/told"
_GRACE, _TURN = 3.0, 1.0
"""Seconds that a process which lost another waits for that one's own words, and that others leave to the first."""


class LostError(RunError):
    """Another process ended, or did not answer in time."""


class Elsewhere(RunError):
    """The error of another process, which prints it."""


_control: Any = None


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """Return R, the number of processes; 1 if nothing launched several."""
    return dist.get_world_size() if _joined() else launched.count()


def number() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _joined() else launched.number()


def on_one_machine() -> bool:
    """Return whether the launcher started all processes on this machine."""
    return launched.on_this_machine() == count()


def first() -> bool:
    """Return whether this is the process that searches, writes and prints."""
    return number() == 0


def part(size: int) -> range:
    """Return which of `size` things are this process's; each of them belongs to exactly one process."""
    return range(size * number() // count(), size * (number() + 1) // count())


def accelerator() -> Accelerator:
    """Return an Accelerator; the group of processes is made with the first one.

    Raises:
        LostError: the processes do not find each other.
        RecipeError: accelerate was launched with a precision other than fp16 or bf16.
        RunError: accelerate was set to more than data parallelism.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "fp16", "bf16"):
        raise RecipeError(
            f"accelerate must be launched with --mixed_precision no, fp16 or bf16, but was with {asked}; choose another"
        )
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_cpu = not cards or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if launched.count() > 1 and not on_cpu and launched.on_this_machine() > cards:
        raise RecipeError(
            f"each process must have a GPU of its own, but {launched.on_this_machine()} processes have {cards}; launch "
            f"{cards}, or set ACCELERATE_USE_CPU=true"
        )
    if launched.count() == 1 or _joined():
        made = _made()
    else:
        limit = InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=min(_TRAINING, _wait_minutes())))
        with losing():
            made = _made(cpu=on_cpu, kwargs_handlers=[limit])
    known = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if made.distributed_type not in known:
        raise RunError(
            f"training must run under plain data parallelism, but accelerate is set to {made.distributed_type}; leave "
            "its other plugins out"
        )
    return made


def _made(**how: Any) -> Accelerator:
    try:
        return Accelerator(**how)
    except ValueError as problem:
        raise RecipeError(
            f"accelerate must be launched with what this machine has, but says: {reason(problem)}; leave it out"
        ) from None


def join() -> None:
    """Meet the other processes, and refuse what accelerate was launched with if nothing can be trained with it.

    Raises:
        VitrimError: see `accelerator`.
    """
    if count() > 1:
        _group()
    elif os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        accelerator()


def _wait_minutes() -> float:
    text = os.environ.get("VITRIM_WAIT") or str(_MINUTES)
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise RecipeError(
            f"VITRIM_WAIT must be a number of minutes above 0, but is '{text}'; leave it out for 12 hours"
        )
    return minutes


def place(device: torch.device) -> torch.device:
    """Return where this process computes: of several with a bare ``cuda``, each has a card of its own.

    Raises:
        RecipeError: of several processes, the device is not of the kind that they were launched for.
    """
    if count() == 1:
        return device
    theirs: torch.device = accelerator().device
    if device.type != theirs.type:
        way = "set ACCELERATE_USE_CPU=true" if device.type == "cpu" else "launch one process"
        raise RecipeError(
            f"device must be {theirs.type} as the {count()} processes were launched, but is {device}; {way}, or leave "
            "device out"
        )
    return theirs if device.index is None else device


def _group() -> Any:
    global _control
    if _control is None:
        accelerator()
        with losing():
            _control = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=_wait_minutes()))
    return _control


@contextlib.contextmanager
def losing() -> Iterator[None]:
    """Turn what a collective raises where another process is gone into one sentence.

    Raises:
        LostError: another process ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as problem:
        if isinstance(problem, VitrimError) or count() == 1 or not _is_lost(problem):
            raise
        raise LostError(_lost(problem)) from problem


def lost_before(problem: BaseException) -> LostError | None:
    """Return the loss of another process that this one was handling when `problem`, such as a SIGTERM, came."""
    for each in behind(problem):
        if isinstance(each, LostError):
            return each
        if isinstance(each, RuntimeError) and _is_lost(each):
            return LostError(_lost(each))
    return None


def _is_lost(problem: RuntimeError) -> bool:
    texts = ("gloo", "nccl", "connection closed by peer", "connection reset", "socket", "process group")
    return isinstance(problem, dist.DistError) or any(text in str(problem).lower() for text in texts)


def _lost(problem: BaseException) -> str:
    late = "timed out" in str(problem).lower() or "timeout" in str(problem).lower()
    what = "did not answer in time" if late else "has ended"
    return (
        f"all {count()} processes must go on to the end, but another one {what}; see what it printed, and give the "
        "same command again to continue from the last checkpoint"
    )


def _waited(work: Any) -> None:
    pause = 2e-4
    try:
        while not work.is_completed():
            time.sleep(pause)
            pause = min(0.05, 1.2 * pause)
    except Terminated:
        # A launcher terminates all processes where one dies; then that is what is told.
        until = time.monotonic() + _TURN
        while not work.is_completed():
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
    with losing():
        work.wait()


def _broadcast(tensor: Tensor, source: int = 0) -> None:
    _waited(dist.broadcast(tensor, src=source, group=_group(), async_op=True))


def spread(value: Any, source: int = 0) -> Any:
    """Return on all processes the value of the process `source`; the others' values are not used. Sent with pickle.

    Raises:
        LostError: another process ended, or did not answer in time.
    """
    if count() == 1:
        return value
    mine = number() == source
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) if mine else torch.empty(0)
    size = torch.tensor([data.numel()])
    _broadcast(size, source)
    if not mine:
        data = torch.empty(int(size), dtype=torch.uint8)
    _broadcast(data, source)
    return value if mine else pickle.loads(data.numpy().tobytes())


def gathered(value: Any) -> list[Any]:
    """Return the values of all processes, in their order. Sent with pickle."""
    return [spread((value, None), source)[0] for source in range(count())]


def agreed(*values: float) -> list[float]:
    """Return the largest of each value over all processes."""
    if count() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64)
    _waited(dist.all_reduce(found, dist.ReduceOp.MAX, group=_group(), async_op=True))
    largest: list[float] = found.tolist()
    return largest


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on its device."""
    if count() == 1:
        return tensor
    whole = tensor.detach().to("cpu", copy=True)
    _waited(dist.all_reduce(whole, group=_group(), async_op=True))
    return whole.to(tensor.device)


@torch.no_grad()
def same_(*models: nn.Module | None) -> None:
    """Give the models of all processes the parameters and buffers of the first's, bit for bit."""
    if count() == 1:
        return
    for model in models:
        for tensor in () if model is None else (*model.parameters(), *model.buffers()):
            flat = tensor.detach().to("cpu", copy=True).contiguous().flatten()
            _broadcast(flat.view(torch.uint8))
            tensor.copy_(flat.view(tensor.shape))


def tells(problem: BaseException | None = None) -> bool:
    """Return whether this process is the one that prints why the command ended; of several that end, only one does.

    Args:
        problem: the error it would print.
    """
    if launched.count() == 1:
        return True
    if isinstance(problem, Elsewhere):
        return False
    key = _KEY + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*where, timeout=datetime.timedelta(seconds=5))  # type: ignore[attr-defined]
        until = time.monotonic() + (_GRACE if isinstance(problem, LostError) else 0.0 if first() else _TURN)
        while time.monotonic() < until and not store.add(key, 0):
            time.sleep(0.05)
        return bool(store.add(key, 1) == 1)
    except (RuntimeError, KeyError, ValueError):  # who held the store is gone
        return True


def end() -> None:
    """Leave the group of processes."""
    global _control
    if _joined():
        _control = None
        dist.destroy_process_group()
