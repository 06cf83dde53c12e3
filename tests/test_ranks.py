"""Two processes of a launcher do every run that one process does, and end together."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import HANGS
from tests.steps import SETTINGS, check_draws, check_step, step, take
from vitrim import cli, cost, train
from vitrim.measure import Latency
from vitrim.run import cutting, pipeline
from vitrim.run.recipe import Recipe, write_recipe
from vitrim.train import ranks
from vitrim.train.loop import Loop
from vitrim.words.errors import RecipeError, RunError
from vitrim.words.plain import load, read_json
from vitrim.words.stopping import Terminated

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
SHORT = {"epochs": 1, "batch": 8, "lr": 1e-3, "warmup_epochs": 0, "augment": {"kind": "light"}, "workers": 0}
CAIT = {"merges": [], "cut": 0.5, "warmup": 0.1, "ramp_end": 0.4, "refresh": 1, "group_attention": 2,
        "floor_attention": 2, "group_mlp": 8, "floor_mlp": 8}  # fmt: skip
METHODS = {
    "taylor": ({}, SHORT | {"ema": 0.9, "mixup": 0.8, "accumulate": 2}),
    "post_training": ({"probe": 4, "batch": 8, "merge": "none", "candidates": 1, "swaps": 0}, {}),
    # Each process draws which branches it drops, so two draw more than one does.
    "vit_slim": ({"train": SHORT | {"drop_path": 0.0}, "token_l1": 1e-4}, {}),
    "cait": ({"train": SHORT, **CAIT}, {"augment": {"kind": "none"}, "workers": 0}),
    "mdc": ({"trials": 4, "initial": 4, "corners": False, "train": SHORT, "measure": "loss", "batch": 8}, SHORT),
    "spvit": ({"train": SHORT}, SHORT | {"epochs": 0.5}),
}
METHODS |= {
    f"{name}_closed": (METHODS[name][0] | {"name": name, "init": "closed_form"}, METHODS[name][1])
    for name in ("vit_slim", "cait", "spvit")
}
"""Settings of each kind of method, and of the training of its child."""

TIME = {"budget": "latency=0.6", "measure": {"latency": False, "seconds": 0.02, "batch": 1}, "train": {}}
LONG = {"train": SHORT | {"epochs": 2, "batch": 4}}


def recipe(pictures, name="taylor", **changes):
    own, train = METHODS[name]
    base = {
        "model": {"name": "vit_tiny_patch16_224", "random_weights": True, "arguments": TINY},
        "data": {"train": str(pictures), "calibration": 16, "validation": 0.2},
        "method": {"name": name, **own},
        "budget": {"spvit": "macs=0.95", "mdc": "macs=0.8"}.get(name.removesuffix("_closed"), "macs=0.6"),
        "train": train,
        "measure": {"latency": False},
        "device": "cpu",
    }
    return load(Recipe, base | changes)


def draw(root):
    """Write noise of four classes; 21 test pictures, which two processes cannot halve."""
    noise = np.random.default_rng(0)
    for split, each in (("train", 10), ("test", 5)):
        for label in range(4):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(each + (split == "test" and label == 0)):
                pixels = noise.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def timed(child, parent, settings):
    """Return a clock reading: the share of time is that of macs. Only the first process may time anything."""
    assert ranks.first()
    share = float(Fraction(cost(child)[0], cost(parent)[0]))
    how = {"batch": 1, "image": (3, 16, 16), "threads": 1, "dtype": "float32", "device": "cpu"}
    return Latency.of([[share] * 8, [1.0] * 8], **how)


def command(*words):
    """Run the command line in this process; return its exit code, what it printed on stderr, and its result."""
    kept, errors, code = [], io.StringIO(), 0
    real = pipeline.run
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(pipeline, "run", lambda *given, **how: kept.append(real(*given, **how)) or kept[-1])
        patch.setattr(sys, "argv", ["vitrim", *map(str, words)])
        patch.setattr(sys, "stdout", io.StringIO())
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return code, errors.getvalue(), kept[0] if kept else None


def kept(result):
    """What a result must have in common on all processes, and with that of one."""
    known = {name: result.measured[name] for name in ("macs", "params", "test_images", "top1", "top1_parent")}
    return {"plan": result.plan.model_dump_json(), "forward": "forward" in result.model.__dict__, **known}


class Script:
    """What each of two processes does; every run has a folder of the process's own, as on machines without one disk."""

    def __init__(self, root):
        self.root, self.number, self.told = root, ranks.number(), {}
        self.pictures = root / "pictures"

    def do(self, name, *words, recipe=None, out=None):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = name  # what is printed once is so for each attempt
        folder = self.root / f"{out or name}-{self.number}"
        written = self.root / f"{name}-{self.number}.toml"
        write_recipe(written, recipe)
        code, errors, result = command(words[0] if words else "run", written, "--out", folder, *words[1:])
        self.told[name] = {"code": code, "errors": errors, "folder": folder.exists()}
        if result is not None:
            self.told[name] |= kept(result)
            save_file(result.model.state_dict(), self.root / f"{name}-{self.number}.safetensors")

    def at_step(self, patch, step, number, signal_number):
        """Send a signal to one process at a step of the training."""
        real = Loop._report

        def report(loop, *given):
            real(loop, *given)
            if loop.state.step == step and self.number == number:
                os.kill(os.getpid(), signal_number)

        patch.setattr(Loop, "_report", report)

    def evaluate(self, model):
        """Measure a stored model, on all pictures and, with its own argument, on those of this process."""
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "evaluate"
        found, real = [], train.evaluate
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                train, "evaluate", lambda net, loader, **how: found.append(
                    (real(net, loader).count, real(net, loader, **how))
                ) or found[-1][1]
            )  # fmt: skip
            code, errors, _ = command("evaluate", model, "--data", self.pictures)
        ((own, whole),) = found
        self.told["evaluate"] = {"code": code, "errors": errors, "own": own, "count": whole.count, "top1": whole.top1}

    def main(self):
        for name in METHODS:
            self.do(name, recipe=recipe(self.pictures, name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cutting, "time_child", timed)
            self.do("time", recipe=recipe(self.pictures, **TIME))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
            AcceleratorState._reset_state()
            self.do("bf16", recipe=recipe(self.pictures))
        AcceleratorState._reset_state()
        with pytest.MonkeyPatch.context() as patch:
            self.at_step(patch, 2, number=1, signal_number=signal.SIGTERM)
            self.do("stopped", recipe=recipe(self.pictures, **LONG))
        left = (self.root / f"stopped-{self.number}" / "training").glob("*")
        self.told["stopped"]["checkpoints"] = [path.name for path in left]
        self.do("resumed", recipe=recipe(self.pictures, **LONG), out="stopped")
        plain = {"method": {"name": "magnitude"}, "train": {}}
        self.do("sweep", "sweep", "--set", "budget=macs=0.001,macs=0.6", recipe=recipe(self.pictures, **plain))
        self.do("odd", recipe=recipe(self.pictures, train=SHORT | {"batch": 9}))
        here = self.pictures if self.number == 0 else self.root / "nowhere"
        self.do("nowhere", recipe=recipe(here))
        here = self.pictures if self.number == 0 else self.root / "others"
        self.do("others", recipe=recipe(here))
        unreachable = {"name": "mdc", "storage": f"sqlite:///{self.root}/no/folder.db"}
        self.do("storage", recipe=recipe(self.pictures, "mdc", method=unreachable))
        self.evaluate(self.root / "taylor-0" / "model.safetensors")
        (self.root / f"told-{self.number}.json").write_text(json.dumps(self.told))


def script(root):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "end", lambda: None)
        patch.setattr(cli, "_leave", sys.exit)
        ranks.join()
        take(root)
        Script(root).main()
    with pytest.MonkeyPatch.context() as patch:
        Script(root).at_step(patch, 2, number=1, signal_number=signal.SIGKILL)
        patch.setattr(sys, "argv", ["vitrim", "run", str(root / "taylor-0.toml"), "--out", str(root / "killed")])
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "killed"
        cli.main()


def launched(root):
    """Return what one process did, what two said, and how their launcher ended."""
    alone = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRIM_CACHE", str(root / "cache"))  # so that all plan by one table of times
        patch.setattr(cutting, "time_child", timed)
        asked = {name: recipe(root / "pictures", name) for name in METHODS if not name.startswith("spvit")}
        asked |= {"time": recipe(root / "pictures", **TIME), "resumed": recipe(root / "pictures", **LONG)}
        for name, each in asked.items():
            result = pipeline.run(each, root / f"{name}-alone")
            alone[name] = kept(result), result.model.state_dict()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            patch.delenv(name)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        words = ["--nproc_per_node", "2", "--master_port", str(port), "-m", "tests.test_ranks", str(root)]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words],
            cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=HANGS, check=False,
        )  # fmt: skip
    files = root / "told-0.json", root / "told-1.json"
    assert all(path.is_file() for path in files), done.stderr[-3000:]
    return alone, [read_json(path, RunError) for path in files], done


def same_on_both(told, name):
    """Check that both processes had one result, which the first alone wrote and printed; return what it was."""
    first, second = ({key: value for key, value in each[name].items() if key != "errors"} for each in told)
    assert first.pop("folder")
    assert not second.pop("folder")
    assert first == second
    assert first["code"] is None
    assert told[1][name]["errors"] == ""
    return first


def weights_of(root, name):
    first, second = (load_file(root / f"{name}-{number}.safetensors") for number in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    return first


def check_run(root, alone, told, name):
    """Check a run of two processes against that of one."""
    found, weights = same_on_both(told, name), weights_of(root, name)
    stored = load_file(root / f"{'stopped' if name == 'resumed' else name}-0" / "model.safetensors")
    assert all(torch.equal(stored[key], value) for key, value in weights.items())
    assert found["test_images"] == 21
    if name.startswith("spvit"):  # each process draws gates of its own
        return
    known, theirs = alone[name]
    assert {key: found[key] for key in known} == known
    # A step moves a weight by 1e-3. Rounding shows in single weights, for Adam divides gradients by their own size.
    far = torch.cat([(value - theirs[key]).abs().flatten() for key, value in weights.items()])
    assert far.mean() < 1e-5


def check_shared_policies(root):
    records = (root / "mdc-0" / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in records] == [0, 1, 2, 3]
    logged = [json.loads(line) for line in (root / "mdc-0" / "log.jsonl").read_text().splitlines()]
    assert 0 < sum(record["stage"] == "policies" for record in logged) < 4  # the second process measured the others


def check_mixed_precision(root, told):
    assert not same_on_both(told, "bf16")["forward"]
    assert 'precision = "bf16"' in (root / "bf16-0" / "recipe.toml").read_text()
    exact, weights = weights_of(root, "taylor"), weights_of(root, "bf16")
    assert any(not torch.equal(weights[key], value) for key, value in exact.items())


def check_signal(root, told):
    """Check that a signal to the second process left a checkpoint in the middle of an epoch, and ended both."""
    logs = [(root / name / "log.jsonl").read_text().splitlines() for name in ("stopped-0", "resumed-alone")]
    halved, whole = ([json.loads(line)["loss"] for line in lines] for lines in logs)
    assert halved == pytest.approx(whole, abs=1e-5)
    assert [each["stopped"]["code"] for each in told] == [143, 143]
    assert told[0]["stopped"]["checkpoints"] == ["train-00000004.safetensors"]
    assert sum(each["stopped"]["errors"].count("error terminated") for each in told) == 1


REFUSED = {
    "sweep": "every run of a sweep must end well, but magnitude_macs=0.001_seed=0 did not: budget of macs must be",
    "odd": "train.batch must be a multiple of the 2 processes, but is 9; take 8 or 10, or launch another number",
    "nowhere": "nowhere: a source must exist",
    "others": "all processes must have the same train images, but process 1 has another than the first",
    "storage": "the storage must be reachable and free, but unable to open database file",
}
"""What two processes print together where they are refused, and where a sweep has gone on after one of its runs was."""


def check_refused(told, name):
    assert [each[name]["code"] for each in told] == [2, 2]
    errors = "".join(each[name]["errors"] for each in told)
    assert errors.count("error ") == 1
    assert REFUSED[name] in errors
    assert told[0][name]["folder"] == (name == "sweep")
    assert not told[1][name]["folder"]


def check_evaluation(told):
    """Each process measured a part of the pictures, and both know what the run of this model had measured on all."""
    first, second = (each["evaluate"] for each in told)
    assert (first["code"], second["code"]) == (None, None)
    assert (first["own"], second["own"]) == (10, 11)
    assert (first["count"], second["count"]) == (21, 21)
    assert first["top1"] == second["top1"] == told[0]["taylor"]["top1"]
    assert second["errors"] == ""


def test_two_processes_do_what_one_does(tmp_path):
    draw(tmp_path / "pictures")
    label = draw(tmp_path / "others") / "train"
    (label / "class0" / "0.png").write_bytes((label / "class1" / "0.png").read_bytes())
    alone, told, done = launched(tmp_path)
    for name in SETTINGS:
        check_step(tmp_path, name, step(name))
    check_draws(tmp_path)
    for name in [*METHODS, "time", "resumed"]:
        check_run(tmp_path, alone, told, name)
    check_shared_policies(tmp_path)
    check_mixed_precision(tmp_path, told)
    check_signal(tmp_path, told)
    check_evaluation(told)
    for name in REFUSED:
        check_refused(told, name)
    assert (tmp_path / "sweep-0" / "magnitude_macs=0.6_seed=0" / "report.html").is_file()
    # The second process was killed.
    assert done.returncode != 0
    assert done.stderr.count("error all 2 processes must go on to the end, but another one has ended; see what") == 1


def test_each_of_several_things_is_one_process_s(monkeypatch):
    for count, size in ((1, 5), (2, 21), (3, 2), (8, 50_000)):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        every = []
        for number in range(count):
            monkeypatch.setenv("RANK", str(number))
            every += ranks.part(size)
        assert every == list(range(size))


def terminated_by(problem):
    try:
        raise problem
    finally:
        raise Terminated


def test_a_loss_is_told_though_the_launcher_terminates_meanwhile(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for first, lost in ((RuntimeError("gloo: Connection closed by peer"), True), (RuntimeError("a bug"), False)):
        with pytest.raises(Terminated) as caught:
            terminated_by(first)
        assert (ranks.lost_before(caught.value) is not None) == lost


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", "launched with --mixed_precision no, fp16 or bf16, but was with fp8"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.precision must be bf16 as accelerate was launched with, but is"),
    ],
)
def test_precisions_are_refused_before_the_search(name, value, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    AcceleratorState._reset_state()
    with pytest.raises(RecipeError, match=sentence):
        pipeline.run(recipe(draw(tmp_path / "pictures"), train=SHORT | {"precision": "fp32"}), tmp_path / "run")
    AcceleratorState._reset_state()
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    script(Path(sys.argv[1]))
