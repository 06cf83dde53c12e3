"""Checkpoints: a killed run equals an uninterrupted one, and a checkpoint of another run is refused."""

import copy
import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import vitrim.train.checkpoint as checkpoint_module

# The fixture is used by being here.
from tests.conftest import HANGS
from tests.test_train_fit import INPUT, PLAIN, _one_thread, equal, images, stopped, timeless, vit  # noqa: F401
from vitrim.train import fit
from vitrim.words.errors import RunError

EPOCHS, STEPS = 40, 120

SCRIPT = """
import os, random, signal, sys, time, traceback, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tests.test_train_fit import FULL, INPUT, fit, images, vit

def start(folder):
    child = os.fork()
    if child:
        return child
    try:
        fit(vit(), images(), FULL.model_copy(update={"epochs": int(sys.argv[3])}), input=INPUT, seed=0, folder=folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

whole, killed, kills = start(Path(sys.argv[2]) / "whole"), Path(sys.argv[2]) / "killed", 0
for delay in (0.05, 0.4):
    before, deadline = set(killed.glob("*.safetensors")), time.monotonic() + 30
    child = start(killed)
    while set(killed.glob("*.safetensors")) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay + random.random() / 10)
    os.kill(child, signal.SIGKILL)
    kills += ended(child) == -signal.SIGKILL
sys.exit(0 if kills and ended(start(killed)) == ended(whole) == 0 else 1)
"""
"""Forks its runs, because each import of PyTorch and timm takes seconds."""


def test_a_killed_run_equals_an_uninterrupted_one(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1]), str(tmp_path), str(EPOCHS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    folder, name = tmp_path / "killed", f"train-{STEPS:08d}.safetensors"
    one, two = load_file(tmp_path / "whole" / name), load_file(folder / name)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(key.startswith("ema.") for key in one)
    assert any(key.startswith("optim.") for key in one)
    assert timeless(about(tmp_path / "whole" / name)["history"]) == timeless(about(folder / name)["history"])
    # Killed while writing, a run leaves a hidden file beside; never a broken checkpoint.
    assert len(list(folder.glob("*.safetensors"))) == 2


def about(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["vitrim"])["progressed"]


def interrupted(folder, settings=PLAIN):
    with pytest.raises(KeyboardInterrupt):
        fit(vit(), images(), settings, input=INPUT, seed=0, folder=folder, after_step=stopped(1))
    return folder


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"settings": PLAIN.model_copy(update={"lr": 0.5})}, "train.lr must be 0.001 .* but is 0.5"),
        ({"seed": 3}, "seed must be 0 to resume from this checkpoint, but is 3"),
        ({"dataset": images(25)}, "images must be 24 .* but is 25"),
        ({"input": INPUT.model_copy(update={"crop_pct": 0.9})}, "input.crop_pct must be 1.0 .* but is 0.9"),
        ({"model": vit(embed_dim=24)}, "must resume with the weights that it began with"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, text):
    interrupted(tmp_path)
    given = {"model": vit(), "dataset": images(), "settings": PLAIN, "input": INPUT, "seed": 0} | change
    before = copy.deepcopy(given["model"])
    with pytest.raises(RunError, match=text):
        fit(folder=tmp_path, **given)
    assert equal(before, given["model"])


def test_what_does_not_touch_the_result_may_change(tmp_path):
    interrupted(tmp_path)
    free = PLAIN.model_copy(update={"keep": 3, "checkpoint_every": 2, "log_every": 1})
    resumed = fit(vit(), images(), free, input=INPUT, seed=0, folder=tmp_path)
    assert equal(resumed.model, fit(vit(), images(), PLAIN, input=INPUT, seed=0).model)


def test_stages_share_a_folder(tmp_path):
    fit(vit(), images(), PLAIN, input=INPUT, seed=0, folder=tmp_path, stage="search")
    fit(vit(), images(), PLAIN, input=INPUT, seed=1, folder=tmp_path, stage="train")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "search-00000006.safetensors",
        "train-00000006.safetensors",
    ]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "train-00000002.safetensors"
    for data in (b"", b"\0" * 100, interrupted(tmp_path / "x").joinpath(path.name).read_bytes()[:-5]):
        path.write_bytes(data)
        with pytest.raises(RunError, match=r"a checkpoint must be whole, but .* remove it to start this stage again"):
            fit(vit(), images(), PLAIN, input=INPUT, seed=0, folder=tmp_path)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    interrupted(tmp_path)
    kept = (tmp_path / "train-00000002.safetensors").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.os, "fsync", full)
        text = r"room for a checkpoint of .* MiB, but the disk is full; the checkpoint .*2\.safetensors is unchanged"
        with pytest.raises(RunError, match=text):
            fit(vit(), images(), PLAIN, input=INPUT, seed=0, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000002.safetensors"]
    assert (tmp_path / "train-00000002.safetensors").read_bytes() == kept
    assert fit(vit(), images(), PLAIN, input=INPUT, seed=0, folder=tmp_path).steps == 6
