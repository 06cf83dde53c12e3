"""A run goes on with what it began with, alone in its folder."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.test_run import QUIET, SHORT, TINY, class_folders, tiny
from vitrim.data import Images, Input
from vitrim.data.images import SAMPLE, spread
from vitrim.run import pipeline
from vitrim.run.lock import FILE, holding
from vitrim.run.pipeline import run
from vitrim.run.recipe import Recipe
from vitrim.train import Train, fit
from vitrim.words.errors import RunError
from vitrim.words.plain import load, read_json
from vitrim.words.plan import read_made_from
from vitrim.words.stopping import Terminated


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Images of two splits, and the weights of parent and teacher."""
    for split, each in (("train", 4), ("test", 2)):
        class_folders(tmp_path / "images" / split, classes=4, each=each)
    for seed, name in enumerate(("parent", "teacher")):
        save_file(tiny(seed, num_classes=4).state_dict(), tmp_path / f"{name}.safetensors")
    return tmp_path


def asked(place: Path, **changes) -> Recipe:
    model = {"name": "test_vit", "arguments": TINY | {"num_classes": 4}}
    base = {
        "model": {**model, "weights": str(place / "parent.safetensors")},
        "teacher": {**model, "weights": str(place / "teacher.safetensors")},
        "data": {"train": str(place / "images"), "calibration": 8},
        "method": {"name": "magnitude"},
        "budget": "macs=0.6",
        "train": {**SHORT, "epochs": 2},
        "measure": QUIET,
        "device": "cpu",
    }
    return load(Recipe, base | changes)


def stop_in(monkeypatch, stage: str) -> None:
    """Press ctrl-C at the third step of the training, or before it."""
    if stage == "plan":
        monkeypatch.setattr(pipeline, "_train", lambda *_: signal.raise_signal(signal.SIGINT))
        return
    real = pipeline.fit

    def stopped(*arguments, **more):
        def hook(model, step):
            if step == 2:
                signal.raise_signal(signal.SIGINT)

        return real(*arguments, **more, after_step=hook)

    monkeypatch.setattr(pipeline, "fit", stopped)


def other_weights(place: Path, name: str = "parent") -> None:
    state = load_file(place / f"{name}.safetensors")
    save_file({key: value * 1.01 for key, value in state.items()}, place / f"{name}.safetensors")


def other_teacher(place: Path) -> None:
    other_weights(place, "teacher")


def other_images(place: Path) -> None:
    Image.new("RGB", (32, 32), (1, 2, 3)).save(place / "images" / "train" / "class2" / "1.png")


def other_test_images(place: Path) -> None:
    Image.new("RGB", (32, 32), (1, 2, 3)).save(place / "images" / "test" / "class0" / "1.png")


def swapped(place: Path) -> None:
    one, two = (place / "images" / "train" / f"class{label}" for label in (0, 1))
    one.rename(place / "aside")
    two.rename(one)
    (place / "aside").rename(two)


@pytest.mark.parametrize("stage", ["plan", "training"])
@pytest.mark.parametrize("change", [other_weights, other_teacher, other_images, other_test_images, swapped])
def test_a_run_goes_on_with_what_it_began_with(stage, change, place, monkeypatch):
    stop_in(monkeypatch, stage)
    with pytest.raises(KeyboardInterrupt):
        run(asked(place), place / "run")
    monkeypatch.undo()
    left = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    assert bool(list((place / "run").glob("training/*"))) == (stage == "training")
    change(place)
    what = {other_weights: "weights", other_teacher: "teacher"}.get(change, "images")
    with pytest.raises(RunError, match=rf"must resume with the {what} that it began with"):
        run(asked(place), place / "run")
    assert {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()} == left


def test_workers_and_a_copy_of_the_images_go_on(place, monkeypatch):
    whole = run(asked(place), place / "whole").model.state_dict()
    stop_in(monkeypatch, "training")
    with pytest.raises(KeyboardInterrupt):
        run(asked(place), place / "run")
    monkeypatch.undo()
    images = place / "images"
    shutil.copytree(images, place / "copy")
    shutil.rmtree(images)
    (place / "copy").rename(images)  # other times and inodes, the same images
    result = run(asked(place, train={**SHORT, "epochs": 2, "workers": 1}), place / "run")
    assert all(torch.equal(value, whole[name]) for name, value in result.model.state_dict().items())
    made = read_made_from(place / "run" / "plan.json")
    assert sorted(made) == ["images", "model", "teacher"]
    assert made == read_made_from(place / "whole" / "plan.json")


def test_a_checkpoint_knows_what_it_was_made_from(tmp_path):
    """Also where no run folder is around it."""
    pictures = [Image.new("RGB", (32, 32), (9 * n, 5, 7)) for n in range(16)]

    def images(count=16, first=pictures[0]):
        held = [first, *pictures[1:]]
        return Images(lambda n: held[n], [n % 4 for n in range(count)], classes=4, fixed=True)

    def go(dataset, epochs=2, at=3, seed=0):
        def hook(model, step):
            if step == at:
                signal.raise_signal(signal.SIGTERM)

        model = tiny(seed, num_classes=4)
        settings = Train(epochs=epochs, batch=4, checkpoint_every=2)
        return fit(model, dataset, settings, input=Input.of(model), seed=0, folder=tmp_path, after_step=hook)

    with pytest.raises(Terminated):
        go(images())
    with pytest.raises(RunError, match="must resume with the images that it began with"):
        go(images(first=pictures[5]))
    with pytest.raises(RunError, match="must resume with the weights that it began with"):
        go(images(), seed=1)
    assert go(images(), at=-1).steps == 8


def test_a_fingerprint_is_of_labels_and_pixels():
    def images(count=1000, fixed=True, change=None, label=None):
        labels = [n % 4 if n != label else 3 for n in range(count)]
        read = lambda n: Image.new("RGB", (8, 8), (n % 256, n // 256, int(n == change)))  # noqa: E731
        return Images(read, labels, classes=4, fixed=fixed)

    known = images().fingerprint()
    assert known == images().fingerprint() == images(1001).pick(range(1000)).fingerprint()
    assert known not in (images(change=0).fingerprint(), images(label=500).fingerprint(), images(999).fingerprint())
    assert images(fixed=False, change=0).fingerprint() == images(fixed=False).fingerprint() != known
    assert (spread(3), len(spread(5000)), spread(5000)[-1]) == ([0, 1, 2], SAMPLE, 4999)
    draw = np.random.default_rng(0).permutation(200)
    assert images(200).fingerprint() != images(200).pick(draw).fingerprint()


def _second(folder: Path, answer) -> None:
    try:
        with holding(folder):
            answer.send("held")
    except RunError as problem:
        answer.send(str(problem))


def other_process(folder: Path) -> str:
    mine, theirs = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=_second, args=(folder, theirs))
    other.start()
    found: str = mine.recv()
    other.join()
    return found


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_one_run_at_a_time(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with holding(folder):
        about = read_json(folder / FILE)
        assert about["process"] == os.getpid()
        told = other_process(folder)
        assert f"process {os.getpid()} on {about['host']}, since {about['since']}, does; wait for it" in told
        with pytest.raises(RunError, match="one run at a time"), holding(folder):
            pass
        monkeypatch.setenv("RANK", "1")  # another process of the same run
        with holding(folder):
            pass
        monkeypatch.delenv("RANK")
    assert list(folder.iterdir()) == []
    (folder / FILE).write_text(json.dumps(about))  # as a killed process leaves it
    assert other_process(folder) == "held"
    with holding(None):
        pass


def test_a_run_whose_folder_is_held_changes_nothing(place):
    with holding(place / "run"), pytest.raises(RunError, match="one run at a time may write to a folder, but process"):
        run(asked(place), place / "run")
    assert run(asked(place, train={"epochs": 0}), place / "run").folder == place / "run"
    assert FILE not in {path.name for path in (place / "run").iterdir()}
