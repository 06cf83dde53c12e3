"""The commands that are broken off, on tiny models and images, and the process that runs them."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.test_cli import CLASSES, TINY

__all__ = ["COMMANDS", "METHODS", "Ended", "arguments_of", "prepare", "results_of", "run", "start", "wait"]

LONGEST = 600.0
"""Seconds after which a process counts as hanging."""

SMALL = TINY | {"depth": 4, "dynamic_img_size": False}
"""Arguments of the model: methods that merge need blocks between which to do it, and those with convolutions a grid."""

_SETTINGS = {
    "random": {},
    "magnitude": {},
    "taylor": {},
    "post_training": {"method.probe": 4},
    "vit_slim": {"method.train.epochs": 1, "method.train.batch": 8, "method.train.checkpoint_every": 1},
    "cait": {"method.train.epochs": 1, "method.train.batch": 8, "method.train.checkpoint_every": 1},
    "spvit": {"method.train.epochs": 1, "method.train.batch": 8, "method.train.checkpoint_every": 1},
    "mdc": {"method.trials": 4, "method.initial": 2, "method.batch": 8, "data.validation": 8},
}
METHODS = ("taylor", "post_training", "vit_slim", "spvit", "cait", "mdc")

COMMANDS = (*METHODS, "pareto", "search", "transfer")
"""What is killed and goes on."""


def prepare(root: Path) -> None:
    """Write images, scenes, weights and a finished run below `root`."""
    draw = torch.Generator().manual_seed(0)
    for split, each in (("train", 8), ("test", 2)):
        for label in range(CLASSES):
            (root / "images" / split / f"class{label}").mkdir(parents=True)
            for number in range(each):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / "images" / split / f"class{label}" / f"{number}.png")
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("images", "masks"):
            (root / "scenes" / split / kind).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 256, (32, 48, 3), generator=draw, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / "scenes" / split / "images" / f"{number}.jpg")
            Image.fromarray((pixels[..., 0] // 100).copy()).save(root / "scenes" / split / "masks" / f"{number}.png")
    (root / "scenes" / "classes.txt").write_text("sky\nroad\ncar\n")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=CLASSES, **SMALL)
    save_file(model.state_dict(), root / "weights.safetensors")


def _settings(values: dict[str, Any]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def arguments_of(name: str, root: Path, out: Path) -> list[str]:
    """Return the command line of a command, which writes to `out`."""
    sizes = {f"model.arguments.{key}": value for key, value in SMALL.items()}
    model = ["test_vit", "--weights", str(root / "weights.safetensors"), "--classes", str(CLASSES)]
    quick = {"measure.latency": "false", "device": "cpu", "data.calibration": 24, "train.batch": 8}
    quick |= {"train.checkpoint_every": 1, "train.log_every": 1}
    data = ["--data", str(root / "images")]
    stored, run = str(root / "done" / "model.safetensors"), str(root / "done")
    if name in _SETTINGS:
        more = _settings(sizes | quick | _SETTINGS[name])
        return ["compress", *model, *data, "--out", str(out), "--method", name, "--budget", "macs=0.6",
                "--epochs", "1", *more]  # fmt: skip
    if name == "pareto":
        budgets = ["--budgets", "macs=0.8", "--budgets", "macs=0.6"]
        more = _settings(sizes | quick | {"data.validation": 8})
        return ["pareto", *model, *data, "--out", str(out), *budgets, *more]
    if name == "search":
        more = _settings(sizes | quick | _SETTINGS["mdc"])
        url = f"sqlite:///{out}/trials.db"
        return ["search", *model, *data, "--storage", url, "--budget", "macs=0.6", "--out", f"{out}/plan.json", *more]
    if name == "transfer":
        more = {"head.width": 32, "head.channels": 32, "device": "cpu", "measure.latency": "false", "test.align": 8}
        more |= {"train.batch": 3, "train.checkpoint_every": 1, "train.log_every": 1, "test.pictures": 1}
        return ["transfer", "seg", "--backbone", stored, "--data", str(root / "scenes"), "--out", str(out), "--size",
                "32x48", "--epochs", "2", *_settings(more)]  # fmt: skip
    return {
        "export .onnx": ["export", stored, "--out", f"{out}/model.onnx"],
        "export .pt2": ["export", stored, "--out", f"{out}/model.pt2"],
        "export --int8": ["export", stored, "--out", f"{out}/m.onnx", "--int8", *data, "--set", "data.calibration=8"],
        "push": ["push", run, "owner/name", "--license", "mit", "--folder", f"{out}/pushed"],
        "report": ["report", run, "--out", f"{out}/report.html", "--csv", f"{out}/report.csv"],
        "bench": ["bench", stored, "--out", f"{out}/bench.json", "--seconds", "0.1", "--threads", "1"],
    }[name]  # fmt: skip


WRITING = (*COMMANDS, "export .onnx", "export .pt2", "export --int8", "push", "report", "bench")
"""All commands that write files."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status (minus the signal's number), what it printed, and how long it took."""

    status: int
    out: str
    error: str
    seconds: float

    @property
    def sentence(self) -> str:
        """The sentence that it ended with."""
        return next((line for line in self.error.splitlines()[::-1] if line.strip()), "")

    def why_not_told(self) -> str | None:
        """Return what is wrong with how a refused process ended; None for exit 2 with one sentence."""
        told = [line for line in self.error.splitlines() if line.startswith("error ")]
        if self.status != 2 or "Traceback" in self.error or len(told) != 1:
            return f"status {self.status}: {self.error[-400:]}"
        return None


def start(arguments: list[str], place: Path) -> tuple[int, float]:
    """Fork a process that runs a command line and writes what it prints below `place`; return its id and the time."""
    place.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    pid = os.fork()
    if pid:
        return pid, began
    code = 1
    try:
        for number, name in ((1, "out"), (2, "error")):
            os.dup2(os.open(place / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["vitrim", *arguments]
        torch.set_num_threads(1)
        from vitrim import cli

        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, began: float, place: Path) -> Ended:
    """Wait for a process of `start`; one that hangs is killed and has the status -9."""
    while time.perf_counter() - began < LONGEST:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - began
    out, error = ((place / name).read_text(errors="replace") for name in ("out", "error"))
    return Ended(os.waitstatus_to_exitcode(status), out, error, seconds)


def run(arguments: list[str], place: Path, during: Callable[[int], None] | None = None) -> Ended:
    """Run a command line to its end; `during` is called with the id of its process."""
    pid, began = start(arguments, place)
    if during is not None:
        during(pid)
    return wait(pid, began, place)


def results_of(out: Path) -> dict[str, Any]:
    """Return what a command leaves that must not depend on where it was broken off: models and plans, by path."""
    return dict(_results(out))


def _results(out: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.name == "model.safetensors":
            yield name, {key: value.numpy().tobytes() for key, value in load_file(path).items()}
        elif path.name == "plan.json":
            yield name, path.read_bytes()
