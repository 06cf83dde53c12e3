"""Train a model on one CPU, one GPU or several processes, with or without a teacher.

B images, C channels, (h, w) height and width, K classes.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset

from vitrim.data import Images, Input, Scenes, TrainLoader, check_classes, train_loader
from vitrim.nn.modes import evaluating, modes_kept, moved_to
from vitrim.nn.weights import check_weights, fingerprint, home_of
from vitrim.train import ranks
from vitrim.train.checkpoint import MADE_FROM, Progressed, compare, newest, read, unpack
from vitrim.train.distill import Objective, two_heads
from vitrim.train.guard import drop_path
from vitrim.train.leading import led, training
from vitrim.train.loop import AfterStep, Log, Loop, Penalty
from vitrim.train.machine import in_layout, settled, tf32_allowed
from vitrim.train.optim import Groups, optimizer
from vitrim.train.recompute import recomputed
from vitrim.train.settings import Train
from vitrim.train.start import Start, averages_of
from vitrim.train.widen import narrow_, widen_
from vitrim.words.errors import DataError, RecipeError
from vitrim.words.plain import dump
from vitrim.words.progress import progress

__all__ = ["Fitted", "Task", "check_batch", "fit", "steps_of"]

# Settings that may change when a run is resumed, because they do not affect the result.
_FREE = {"checkpoint_every", "checkpointing", "keep", "log_every", "workers"}


@dataclasses.dataclass(frozen=True)
class Task:
    """Loader and objective of a training task. The default is classification of whole pictures.

    Attributes:
        loader: returns the batches; has the signature of `vitrim.data.train_loader`.
        objective: returns the loss; has the signature of `vitrim.train.distill.Objective`. Its loss must be a mean over
            the pictures of the batch, so that it does not depend on the number of processes and parts.
    """

    loader: Callable[..., TrainLoader] = train_loader
    objective: Callable[..., Objective] = Objective


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """Result of training.

    Attributes:
        model: the model that was passed in, trained, with its original train or eval modes, on the device that it was
            on before.
        ema: a copy with the averaged weights, in eval mode, on the same device; None if `settings.ema` is None.
        steps: number of optimizer steps, over all resumed parts.
        seconds: duration of these steps, over all resumed parts.
        history: the records of the epochs.
        averages: the optimizer's state of each parameter, by name, on the model's device.
    """

    model: nn.Module
    ema: nn.Module | None
    steps: int
    seconds: float
    history: tuple[dict[str, Any], ...]
    averages: dict[str, dict[str, torch.Tensor]]


def fit(
    model: nn.Module,
    dataset: Dataset[Any],
    settings: Train,
    *,
    input: Input,
    seed: int,
    teacher: nn.Module | None = None,
    penalty: Penalty | None = None,
    groups: Groups | None = None,
    folder: Path | None = None,
    log: Log | None = None,
    validation: Dataset[Any] | None = None,
    stage: str = "train",
    after_step: AfterStep | None = None,
    start: Start | None = None,
    until: float = 1.0,
    task: Task | None = None,
    device: torch.device | None = None,
) -> Fitted:
    """Train a model in place.

    The loss of a step is the mean task loss over its `settings.batch` images plus the penalty. It does not depend on
    the number of processes and parts. With a folder, the run writes checkpoints and resumes from the newest one. The
    result equals that of an uninterrupted run, bit for bit on a CPU. Buffers that are not in `state_dict` are not
    saved. A model in float16 or bfloat16 is trained in float32 and rounded to its own type at the end. Model and
    teacher are on the device that they were on before when this returns or raises.

    Args:
        model: a classifier, `(B, C, h, w)` to `(B, K)`, or to the input of the task's objective.
        dataset: map-style dataset of `(picture, label)`; if the labels are -1, only the teacher's outputs are learned.
        settings: settings of the training loop.
        input: what the model takes.
        seed: seed of order, augmentation, mixup and dropout, `>= 0`.
        teacher: returns logits `(B, K)` for the same pictures; run in eval mode, then restored to its modes.
        penalty: function from the model to a scalar; called once per part.
        groups: function from the model to extra parameter groups, see `vitrim.train.optim.parameter_groups`.
        folder: folder for checkpoints; None writes none. Of several processes, that of the first counts, and the others
            get the state that it resumes from.
        log: called with flat records of `stage event epoch step loss task penalty lr seconds`, and `top1` for epochs.
            `event` is `step` or `epoch`; `loss` is the mean since the last record of this kind. A resumed run repeats
            the records after its checkpoint.
        validation: pictures on which top-1 is measured after each epoch.
        stage: name in records, errors and checkpoint files.
        after_step: called with the model and the step number while the gradients are still set; may raise
            `vitrim.train.Stop` to end training after this step.
        start: state to continue from; the learning rate continues from there to the end of its cycle.
        until: fraction of the learning rate cycle at which this training ends, above `start.done`, at most 1.
        task: loader and objective; None is classification of whole pictures.
        device: where to train. None is the model's own device, or if that is the CPU, the one that Accelerate selects;
            of several processes, each trains on the one that Accelerate gives it.

    Returns:
        The trained model, the averaged weights if requested, and the history; the same on all processes.

    Raises:
        DataError: the data does not fit the model, or a picture is damaged.
        MethodError: an extra group is malformed.
        RecipeError: the settings do not fit the model or teacher.
        RunError: a checkpoint belongs to another run, is damaged, or cannot be written; a part of a batch does not
            fit into memory; or another process ended.
        TrainError: a loss or gradient is not finite.
        WeightsError: a weight of the given model is not finite, or has a type that cannot be trained.
    """
    home = home_of(model)[0]
    accelerator = ranks.accelerator()
    wanted = device or (None if home.type == "cpu" else home)
    place: torch.device = accelerator.device if wanted is None or accelerator.num_processes > 1 else wanted
    settings = settled(_as_launched(settings, accelerator), place)
    check_batch(settings, "train" if stage == "train" else "method.train")
    check_weights(model)
    generator = torch.get_rng_state()
    types = widen_(model)
    loop: Loop | None = None
    try:
        with training(stage), contextlib.ExitStack() as stack:
            stack.enter_context(modes_kept(model, teacher))
            stack.enter_context(moved_to(place, model, teacher))
            task = task or Task()
            loop = _prepare(
                model, dataset, settings, accelerator, place, input, seed, teacher, groups, stage, stack, task
            )
            loop = dataclasses.replace(
                loop, penalty=penalty, folder=folder, log=log, validation=validation, after_step=after_step
            )
            loop = _within_cycle(loop, start, until)
            if folder is not None and ranks.first():
                loop = dataclasses.replace(loop, run=loop.run | {MADE_FROM: _made_from(model, loop, dataset)})
            loop = _resume(loop, folder)
            loop.wrapped = _wrapped(loop, stack)
            advance = stack.enter_context(progress(stage, loop.steps, accelerator.is_main_process))
            loop.go(advance)
            # Statistics of batch norms are each process's own after a step.
            ranks.same_(model, None if loop.ema is None else loop.ema.module)
            averages = averages_of(model, loop.optimizer, home)
    finally:
        # The steps seed torch's global generator; the caller's state is restored.
        torch.set_rng_state(generator)
        narrow_(model, types)
    ema = loop.ema.module.to(home) if loop.ema is not None else None
    if ema is not None:
        narrow_(ema, types)
    return Fitted(model, ema, loop.state.step, loop.state.seconds, tuple(loop.state.history), averages)


def _wrapped(loop: Loop, stack: contextlib.ExitStack) -> nn.Module:
    """Return the model whose forward is called: with shared gradients, checkpoints and a compiler if asked for."""
    settings, model = loop.settings, loop.model
    stack.enter_context(tf32_allowed(loop.device, settings.tf32))
    for each in (model, loop.objective.teacher):
        stack.enter_context(in_layout(each, settings.channels_last is True))
    if settings.checkpointing:
        stack.enter_context(recomputed(model))
    wrapped = model
    if loop.accelerator.num_processes > 1:
        before = model.__dict__.get("forward")
        wrapped = loop.accelerator.prepare_model(model)
        stack.callback(_unwrap, loop.accelerator, wrapped, before)
    if settings.compile:
        wrapped = torch.compile(wrapped, dynamic=False)  # type: ignore[assignment]
    return wrapped


def _unwrap(accelerator: Accelerator, wrapped: nn.Module, before: Any) -> None:
    """Give a model its own forward back, which Accelerate replaces under mixed precision."""
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    model.__dict__.pop("forward", None)
    if before is not None:
        model.__dict__["forward"] = before


def check_batch(settings: Train, at: str) -> None:
    """Check that all processes get as many images of a batch.

    Args:
        settings: settings of the training loop.
        at: the table that they are in, for the error.

    Raises:
        RecipeError: the number of processes does not divide the batch.
    """
    batch, count = settings.batch, ranks.count()
    if batch % count:
        least = max(1, batch // count) * count
        raise RecipeError(
            f"{at}.batch must be a multiple of the {count} processes, but is {batch}; take {least} or {least + count}, "
            "or launch another number"
        )


def steps_of(dataset: Dataset[Any], settings: Train, input: Input) -> int:
    """Return the number of optimizer steps that `fit` takes over `dataset`."""
    return _steps(
        settings,
        train_loader(dataset, input, settings.augment, batch=settings.batch, seed=0, even=settings.mixes),
    )


def _steps(settings: Train, loader: TrainLoader) -> int:
    return math.ceil(settings.epochs * len(loader))


def _within_cycle(loop: Loop, start: Start | None, until: float) -> Loop:
    """Continue the learning rate and the averaged weights from `start`, and end the cycle at `until`."""
    done = 0.0 if start is None else start.done
    if not 0 <= done < until <= 1:
        raise RecipeError(f"a training must end later in its cycle than it starts, but runs from {done:g} to {until:g}")
    if start is not None:
        start.give_(loop.model, loop.optimizer, loop.ema.module if loop.ema is not None else None)
    if (done, until) == (0.0, 1.0):
        return loop
    cycle = round(loop.steps / (until - done))
    run = loop.run | {"cycle": {"start": done, "end": until}}
    return dataclasses.replace(loop, run=run, cycle=cycle, before=round(cycle * done))


def _as_launched(settings: Train, accelerator: Accelerator) -> Train:
    """Return the settings with the precision that accelerate was launched with, if it was and they leave it open."""
    launched = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    if launched == "fp32":
        return settings
    if settings.precision not in ("auto", launched):
        raise RecipeError(
            f"train.precision must be {launched} as accelerate was launched with, but is {settings.precision}"
        )
    return settings.model_copy(update={"precision": launched})


def _prepare(
    model: nn.Module,
    dataset: Dataset[Any],
    settings: Train,
    accelerator: Accelerator,
    device: torch.device,
    input: Input,
    seed: int,
    teacher: nn.Module | None,
    groups: Groups | None,
    stage: str,
    stack: contextlib.ExitStack,
    task: Task,
) -> Loop:
    assert settings.workers != "auto"
    loader = task.loader(
        dataset,
        input,
        settings.augment,
        batch=settings.batch,
        seed=seed,
        workers=settings.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        accumulate=settings.accumulate,
        even=settings.mixes,
        device=device,
    )
    objective = task.objective(settings.distill, settings.smoothing, teacher, loader.labelled)
    classes = _classes(model, input)
    headless = getattr(model, "num_classes", None) == 0
    if not headless:
        check_classes(dataset, classes)
    objective.judge(0 if headless else classes)
    if objective.teacher is not None:
        objective.teacher.eval()
        if _classes(objective.teacher, input) != classes:
            theirs = _classes(objective.teacher, input)
            raise RecipeError(f"the teacher must have the {classes} classes of the model, but has {theirs}")
    ema = ModelEmaV3(model, settings.ema, use_warmup=True) if settings.ema is not None else None
    stack.enter_context(drop_path(model, settings.drop_path))
    if objective.token:
        turn = two_heads(model)
        turn(True)
        stack.callback(turn, False)
    return Loop(
        model=model,
        wrapped=model,
        loader=loader,
        settings=settings,
        objective=objective,
        optimizer=optimizer(model, settings, groups),
        scaler=torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16"),
        ema=ema,
        accelerator=accelerator,
        device=device,
        classes=classes,
        input=input,
        seed=seed,
        stage=stage,
        steps=_steps(settings, loader),
        run=_run(settings, loader, input, seed, stage),
        penalty=None,
        after_step=None,
        folder=None,
        log=None,
        validation=None,
        state=Progressed(),
    )


def _classes(model: nn.Module, input: Input) -> int:
    """Return the number of outputs, measured on a blank picture because attributes of the model may be wrong."""
    first = next(model.parameters())
    blank = torch.zeros(1, input.channels, *input.size, device=first.device, dtype=first.dtype)
    with evaluating(model), torch.no_grad():
        try:
            logits = model(blank)
        except (AssertionError, RuntimeError) as problem:
            raise DataError(f"the model must take pictures of {tuple(blank.shape[1:])}, but {problem}") from problem
    return int(logits.shape[1])


def _run(settings: Train, loader: TrainLoader, input: Input, seed: int, stage: str) -> dict[str, Any]:
    kept = {name: value for name, value in dump(settings).items() if name not in _FREE}
    return {"train": kept, "input": dump(input), "seed": seed, "stage": stage, "images": loader.count}


def _made_from(model: nn.Module, loop: Loop, dataset: Dataset[Any]) -> dict[str, str]:
    """Return fingerprints of the model before the first step, of the teacher and of the images, as far as known."""
    found = {"model": fingerprint(model)}
    if loop.objective.teacher is not None:
        found["teacher"] = fingerprint(loop.objective.teacher)
    if isinstance(dataset, Images | Scenes):
        found["images"] = dataset.fingerprint()
    return found


def _resume(loop: Loop, folder: Path | None) -> Loop:
    """Load the newest checkpoint of this stage, if there is one; the first process reads it and sends it to the others.

    So no process writes or removes a checkpoint before all have it.
    """
    path = None if folder is None or not ranks.first() else newest(folder, loop.stage)

    def read_first() -> tuple[dict[str, torch.Tensor], Progressed] | None:
        if path is None:
            return None
        tensors, state, run = read(path)
        compare(path, run, loop.run)
        return tensors, state

    found = led(read_first)
    if found is None:
        return loop
    tensors, state = found
    ema = loop.ema.module if loop.ema is not None else None
    unpack(tensors, loop.model, ema, loop.optimizer, path or Path("the checkpoint of the first process"))
    if state.scaler:
        loop.scaler.load_state_dict(state.scaler)
    return dataclasses.replace(loop, state=state)
