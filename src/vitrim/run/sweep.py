"""Run a grid of recipes, in one or several processes, on one or several machines that share the folder.

Each run is an ordinary run folder. Whoever works on a run holds the lock file beside it, which the operating system
releases when that process ends, however it ends. So the same command resumes a sweep that was stopped, and joins one
that another machine works on. A lock per run is used rather than a database of trials because it needs no server, also
works while some machines are offline, and leaves each run readable and resumable by itself; the shared folder must
support file locks (local disks and NFS from version 4 on do).
"""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from vitrim import report
from vitrim.run.grid import Planned, controls, grid
from vitrim.run.lock import HeldError
from vitrim.run.pipeline import run
from vitrim.run.recipe import Recipe
from vitrim.run.track import check_trackers
from vitrim.train import ranks
from vitrim.train.leading import check_shared, led
from vitrim.words.errors import RecipeError, RunError, VitrimError
from vitrim.words.plain import dump, load, raised, read_toml, reason, write_json, write_text

__all__ = ["FILE", "Ended", "Sweep", "sweep"]

FILE = "sweep.json"
"""The file in a sweep's folder that records its grid."""

_Task = tuple[str, Recipe, Path, Sequence[str]]

State = Literal["done", "failed", "elsewhere"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of one run of a sweep.

    Attributes:
        name: its name.
        folder: its folder.
        state: ``done``; ``failed``; or ``elsewhere``, if another process works on it.
        why: the error, if it failed.
    """

    name: str
    folder: Path
    state: State
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The result of `sweep`: all its runs, in the order of the grid, controls last."""

    runs: tuple[Ended, ...]
    folder: Path

    def named(self, state: State) -> list[Ended]:
        """Return the runs in this state."""
        return [one for one in self.runs if one.state == state]


def sweep(
    base: Mapping[str, Any],
    pairs: Sequence[str],
    folder: Path,
    *,
    control: bool = False,
    jobs: int = 1,
    at: str = "recipe",
    track: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """Run every combination of settings, except those that are finished or that another process works on.

    A run that fails does not stop the others. Writes a run folder for each run, ``sweep.json`` and, when nothing is
    left to do here, ``report.html`` over all finished runs.

    Args:
        base: tables of a `vitrim.run.recipe.Recipe`.
        pairs: settings with their values, such as ``seed=0,1,2``; see `vitrim.run.grid.values_of`.
        folder: the folder to write.
        control: whether to train the uncut model alike, too; see `vitrim.run.grid.controls`.
        jobs: number of processes on this machine; each gets its share of the CPU's threads, and its own GPU if there
            are several.
        at: what to call the recipe in error messages.
        track: experiment trackers, see `vitrim.run.track`.
        say: called with a line of text at the start of each stage of each run.

    Raises:
        RecipeError: if a setting is not valid, or there is nothing to do.
        RunError: if the runs have seen different images, or the folder holds something else.
    """
    if jobs < 1:
        raise RecipeError(f"jobs must be at least 1, but got {jobs}")
    if jobs > 1 and ranks.count() > 1:
        raise RecipeError(
            f"jobs must be 1 where a launcher started {ranks.count()} processes, which do each run together, but is "
            f"{jobs}; leave it out"
        )
    ranks.join()
    check_trackers(track, folder)
    planned = grid(base, pairs, at)
    planned += controls(planned) if control else []
    folder = folder.absolute()

    def begun() -> dict[str, Path]:
        places = _places(planned, folder)
        report.check_same_images(folder)
        write_json(folder / FILE, {"format": 1, "settings": list(pairs), "control": control, "runs": list(places)})
        return places

    places = led(begun)
    say(f"{len(planned)} runs in {folder}" + (f", {jobs} at a time" if jobs > 1 else ""))
    if jobs > 1 and any(one.recipe.measure.latency for one in planned):
        say("runs beside one another disturb their times; set measure.latency=false and time the models with bench")
    tasks = [(one.name, one.recipe, places[one.name], tuple(track)) for one in planned]
    ended = [_work(*task, say) for task in tasks] if jobs == 1 else _side_by_side(tasks, jobs)
    led(lambda: _reported(ended, folder))
    return Sweep(runs=tuple(ended), folder=folder)


def _reported(ended: Sequence[Ended], folder: Path) -> None:
    report.check_same_images(folder)
    if any(one.state == "done" for one in ended):
        write_text(folder / "report.html", report.html([folder]))


def _places(planned: Sequence[Planned], folder: Path) -> dict[str, Path]:
    """Return the folder of each run: the one that already holds its recipe, else one of its name.

    Raises:
        RunError: if the folder of a sweep is a file or a run folder.
    """
    if folder.is_file() or (folder / "recipe.toml").is_file():
        what = "a file" if folder.is_file() else "a run folder"
        raise RunError(f"{folder}: a sweep must have a folder of its own, but this is {what}; choose another --out")
    known: list[tuple[dict[str, Any], Path]] = []
    for path in sorted(folder.glob("*/recipe.toml")):
        # A recipe of another version or of a method that is gone is none of this sweep's.
        with contextlib.suppress(VitrimError):
            known.append((dump(load(Recipe, read_toml(path))), path.parent))
    return {
        one.name: next((path for stored, path in known if _matches(dump(one.recipe), stored)), folder / one.name)
        for one in planned
    }


def _matches(asked: Any, stored: Any) -> bool:
    """Return whether a run's recipe is the one that is asked for, with ``auto`` as its machine decided."""
    if isinstance(asked, Mapping) and isinstance(stored, Mapping):
        return asked.keys() == stored.keys() and all(_matches(asked[name], stored[name]) for name in asked)
    return asked in ("auto", stored)


@contextlib.contextmanager
def _mine(folder: Path) -> Iterator[bool]:
    """Hold the lock of a run folder inside the context; yields whether this process has it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    except OSError as problem:
        raise RunError(
            f"{folder.parent}: a sweep's folder must support file locks, but does not: {reason(problem)}; choose "
            "another --out"
        ) from None
    try:
        yield True
    finally:
        lock.release()


def _known(folder: Path, stack: contextlib.ExitStack) -> State | None:
    """Hold the lock of a run folder until `stack` ends; return the state of the run if there is nothing to do."""
    mine = stack.enter_context(_mine(folder))
    if (folder / "report.html").is_file():
        return "done"
    return None if mine else "elsewhere"


def _work(name: str, recipe: Recipe, folder: Path, track: Sequence[str], say: Callable[[str], None]) -> Ended:
    """Do one run, unless it is finished or another process works on it."""
    ended = partial(Ended, name=name, folder=folder)
    with contextlib.ExitStack() as stack:
        known = led(lambda: _known(folder, stack))
        if known is not None:
            return ended(state=known)
        try:
            say(f"-- {name}")
            run(recipe, folder, say=lambda line: say(f"{name}: {line}"), track=track)
        except HeldError:  # such as `vitrim run` in that folder
            return ended(state="elsewhere")
        except VitrimError as problem:
            check_shared(problem)
            return ended(state="failed", why=str(problem))
        except Exception as problem:
            check_shared(problem)
            traceback.print_exc()
            return ended(state="failed", why=f"the run ended with {raised(problem)}")
        return ended(state="done")


def _side_by_side(tasks: Sequence[_Task], jobs: int) -> list[Ended]:
    context = multiprocessing.get_context("spawn")
    count = context.Value("i", 0)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(count, jobs)) as pool:
        return list(pool.map(_told, tasks))


def _begin(count: Any, jobs: int) -> None:
    """Give a process its share of the CPU's threads, and a GPU of its own if there are several."""
    with count.get_lock():
        place = count.value
        count.value += 1
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    gpus = torch.cuda.device_count()
    if gpus > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % gpus)


def _told(task: _Task) -> Ended:
    return _work(*task, _print)


def _print(line: str) -> None:
    os.write(2, f"{line}\n".encode())
