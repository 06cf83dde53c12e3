"""Run a transfer recipe, stage by stage, and write a run folder.

    backbone -> head -> train on scenes -> store -> score on test scenes -> time -> report

As in `vitrim.run.pipeline`, each stage writes its file under a temporary name and renames it, so a run resumes at the
first missing file, also in the middle of training.
"""

import contextlib
import datetime
import functools
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from vitrim import __version__, report
from vitrim.data import Input, SceneLoader, Scenes, open_scenes, scene_splits
from vitrim.deploy import store
from vitrim.deploy.parent import open_parent
from vitrim.families import describe
from vitrim.families._segmentor import segmentor
from vitrim.measure import latency
from vitrim.nn.weights import fingerprint, home_of
from vitrim.run.job import check_folder, full_disk, leaving_nothing
from vitrim.run.lock import holding
from vitrim.run.log import logger
from vitrim.run.machine import device_of, on_machine
from vitrim.run.recipe import write_recipe
from vitrim.run.transfer.objective import PixelObjective
from vitrim.run.transfer.picture import colours, side_by_side
from vitrim.run.transfer.recipe import SceneData, TransferRecipe
from vitrim.run.transfer.score import Scores, by_class, confusion, score
from vitrim.train import Task, fit, ranks
from vitrim.train.fit import check_batch
from vitrim.train.leading import check_alike, led, together
from vitrim.words.costs import cost_of
from vitrim.words.errors import DataError, RunError
from vitrim.words.plain import dump, read_json, write_json, write_text, writing
from vitrim.words.private import hide_passwords

__all__ = ["Transferred", "transfer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """The result of a transfer.

    Attributes:
        model: the segmentation model, images `(B, 3, R, C)` to logits `(B, K, R, C)`, in evaluation mode.
        measured: record of ``measured.json``; `miou` in percent.
        classes: records of ``classes.json``: `name colour iou recall pixels` of each class.
        folder: the run folder.
    """

    model: nn.Module
    measured: dict[str, Any]
    classes: list[dict[str, Any]]
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    recipe: TransferRecipe
    model: nn.Module
    train: Scenes
    test: Scenes
    input: Input
    folder: Path
    say: Callable[[str], None]


def transfer(
    recipe: TransferRecipe,
    folder: Path,
    *,
    backbone: nn.Module | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Transferred:
    """Run a transfer recipe and write its run folder, or continue a run that was stopped.

    Args:
        recipe: the recipe.
        folder: the run folder; may exist if it contains the same recipe.
        backbone: a model to use instead of the one that the recipe names; not modified.
        say: called with a line of text at the start of each stage.

    Raises:
        VitrimError: one sentence on what must hold, what came, and the way out.
    """
    ranks.join()
    with full_disk(folder), contextlib.ExitStack() as stack:
        recipe = led(lambda: _entered(recipe, folder, stack))
        job = together(lambda: _prepare(recipe, folder, backbone, say))
        check_alike({"weights": fingerprint(job.model), "scenes": job.train.fingerprint()} if ranks.count() > 1 else {})
        led(lambda: _begin(job))
        model = _train(job)
        measured, classes = _measure(job, model)
    return Transferred(model=model.eval(), measured=measured, classes=classes, folder=folder)


def _entered(recipe: TransferRecipe, folder: Path, stack: contextlib.ExitStack) -> TransferRecipe:
    """Return the recipe with all its settings, and hold its folder until `stack` ends."""
    recipe = on_machine(recipe, folder)
    check_folder(folder, recipe)
    stack.enter_context(leaving_nothing(folder))
    stack.enter_context(holding(folder))
    return recipe


def _begin(job: _Job) -> None:
    if not (job.folder / "recipe.toml").is_file():
        write_recipe(job.folder / "recipe.toml", job.recipe)


def _prepare(recipe: TransferRecipe, folder: Path, backbone: nn.Module | None, say: Callable[[str], None]) -> _Job:
    """Open model and scenes and raise all errors that can be found before the first file is written."""
    train, test = _scenes(recipe.data, say)
    if recipe.train.epochs:
        check_batch(recipe.train, "train")
    confusion(test.classes)  # raises an error now, not after training, if the package is missing
    say(f"opening {recipe.model.name}")
    if backbone is None:
        backbone = open_parent(**dump(recipe.model), seed=recipe.seed, say=say)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = segmentor(backbone, train.classes, recipe.head, size=recipe.data.size)
    chosen = {key: value for key in ("mean", "std") if (value := getattr(recipe.data, key)) is not None}
    device = device_of(recipe.device)
    return _Job(
        recipe=recipe,
        model=model.to(device).eval(),
        train=train,
        test=test,
        input=Input.of(model, **chosen),
        folder=folder,
        say=say,
    )


def _scenes(data: SceneData, say: Callable[[str], None]) -> tuple[Scenes, Scenes]:
    """Open training and test scenes; every mask is read once.

    Raises:
        DataError: if a mask is invalid, or training and test scenes have different classes.
    """
    say(f"reading masks of {data.train}")
    train = open_scenes(data.train, "train", ignore=data.ignore)
    test = open_scenes(data.test or data.train, _test_split(data), ignore=data.ignore)
    if train.names != test.names:
        raise DataError(
            f"{test.source}: training and test scenes must have one list of classes, but have "
            f"{', '.join(train.names)} and {', '.join(test.names)}"
        )
    train.checked()
    test.checked()
    say(f"{train.line()}; test: {test.line()}")
    return train, test


def _test_split(data: SceneData) -> str | None:
    divided = scene_splits(data.test or data.train)
    if not divided and data.test is None:
        raise DataError(
            f"{data.train}: must be divided into train and test folders where no test source is given, but is not; "
            "give --test SRC"
        )
    return data.split if divided else None


def _train(job: _Job) -> nn.Module:
    """Train the segmentation model, or read an earlier run's."""
    path = job.folder / "model.safetensors"
    if led(path.is_file):
        return _stored(job, path)
    model, seconds = job.model, 0.0
    if job.recipe.train.epochs:
        job.say(f"training on {len(job.train)} scenes for epochs={job.recipe.train.epochs:g}")
        fitted = fit(
            model,
            job.train,
            job.recipe.train,
            input=job.input,
            seed=job.recipe.seed,
            folder=job.folder / "training",
            log=logger(job.folder / "log.jsonl"),
            stage="train",
            device=home_of(model)[0],
            task=Task(loader=functools.partial(_loader, job), objective=PixelObjective),
        )
        model, seconds = fitted.ema if fitted.ema is not None else fitted.model, fitted.seconds
    given = {"recipe": hide_passwords(dump(job.recipe)), "classes": list(job.train.names), "seconds": seconds}
    led(lambda: store.save(model.eval(), path, provenance=given) and None)
    # Continue with what a resumed run would read.
    return _stored(job, path)


def _stored(job: _Job, path: Path) -> nn.Module:
    """Return the stored model, which the first process reads and sends to the others."""
    data = led(lambda: path.read_bytes() if ranks.count() > 1 else b"")
    with tempfile.TemporaryDirectory() as place:
        if not ranks.first():
            path = Path(place) / store.FILE
            path.write_bytes(data)
        return store.load(path, device=home_of(job.model)[0])


def _loader(job: _Job, scenes: Scenes, input: Input, _: Any, **rest: Any) -> SceneLoader:
    return SceneLoader(scenes, input, job.recipe.augment, **rest)


def _measure(job: _Job, model: nn.Module) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the records of ``measured.json`` and ``classes.json``; of several processes, each scores its scenes."""
    if led((job.folder / "measured.json").is_file):
        return led(lambda: _finish(job.folder))
    job.say(f"evaluating on {len(job.test)} scenes")
    shown = np.linspace(0, len(job.test) - 1, min(job.recipe.test.pictures, len(job.test))).round().astype(int)
    keep = [int(place) for place in shown]
    scores, kept = score(model, job.test, job.input, job.recipe.test, keep=keep, shared=True)
    led(lambda: _written(job, model, scores, kept))
    return led(lambda: _finish(job.folder))


def _written(job: _Job, model: nn.Module, scores: Scores, kept: dict[int, torch.Tensor]) -> None:
    palette = colours(job.test.classes)
    for place, said in kept.items():
        picture, mask = job.test[place]
        sheet = side_by_side(picture, np.asarray(mask), said.numpy(), palette)
        with writing(job.folder / "pictures" / f"{place:06d}.png") as part:
            sheet.save(part, format="PNG", optimize=True)
    write_json(job.folder / "classes.json", by_class(scores, job.test.names, palette))
    backbone: Any = model.backbone
    spec = describe(model)
    cost = cost_of(spec)
    measured = {
        "task": "segmentation",
        "model": job.recipe.model.name,
        "head": job.recipe.head.kind,
        "epochs": job.recipe.train.epochs,
        "seed": job.recipe.seed,
        "miou": scores.miou,
        "accuracy": scores.accuracy,
        "data": f"{job.train.line()}; test: {job.test.line()}",
        "test_scenes": scores.scenes,
        "classes": job.test.classes,
        "image": f"{spec.image[0]} x {spec.image[1]}",
        "mode": job.recipe.test.mode,
        "macs": cost.macs,
        "macs_head": spec.host.macs - describe(backbone).host.macs,
        "params": cost.params,
        "seconds": store.given(job.folder / "model.safetensors").get("seconds"),
        **_time(job, model),
        "vitrim": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    (job.folder / "report.html").unlink(missing_ok=True)
    write_json(job.folder / "measured.json", measured)


def _time(job: _Job, model: nn.Module) -> dict[str, Any]:
    settings = job.recipe.measure
    if not settings.latency:
        return {"latency_ms": None, "device": str(next(model.parameters()).device)}
    job.say("timing the whole segmentation model")
    taken = latency(
        model,
        batch=settings.batch,
        threads=settings.threads,
        seconds=settings.seconds,
        as_stored=settings.as_stored,
    )
    return {
        "latency_ms": 1e3 * taken.seconds,
        "device": taken.device,
        "threads": taken.threads,
        "batch": taken.batch,
        "dtype": taken.dtype,
    }


def _finish(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write the report and delete the files that only a resumed run would need; return the records."""
    if not (folder / "report.html").is_file():
        write_text(folder / "report.html", report.html([folder]))
    shutil.rmtree(folder / "training", ignore_errors=True)
    return read_json(folder / "measured.json", RunError), read_json(folder / "classes.json", RunError)
