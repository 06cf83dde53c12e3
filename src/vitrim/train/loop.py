"""The training loop: optimizer steps from the current state to the end of the run.

B images of a step over all processes and accumulated parts, b of one part on one process, C channels, (h, w) height and
width, K classes.

The random numbers of a step depend only on (seed, step): the loader seeds the order and augmentation of pictures, and
the loop seeds mixup and dropout. So a checkpoint contains no generator state, and a resumed run takes the same steps as
an uninterrupted one.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitrim.data import Input, Loader, TrainLoader, eval_loader, seeded
from vitrim.data.noise import numbers
from vitrim.nn.device import fitting
from vitrim.nn.feed import summing
from vitrim.train import ranks
from vitrim.train.checkpoint import Progressed, newest, pack, write
from vitrim.train.distill import Objective
from vitrim.train.evaluate import evaluate
from vitrim.train.guard import Interrupts
from vitrim.train.machine import autocast, compiling
from vitrim.train.optim import learning_rate, set_learning_rate
from vitrim.train.settings import Train
from vitrim.words.errors import TrainError
from vitrim.words.progress import Work
from vitrim.words.stopping import Terminated, stopped

__all__ = ["AfterStep", "Log", "Loop", "Penalty", "Stop"]

Log = Callable[[Mapping[str, Any]], None]
Penalty = Callable[[nn.Module], Tensor]
AfterStep = Callable[[nn.Module, int], None]

_MIX, _DROP = 3, 4

_HEARD = 4
"""Steps after which processes tell each other of signals; a launcher gives them 30 seconds to end."""


class Stop(Exception):
    """Raised by `after_step` to end training after the current step.

    No checkpoint is written after that step, so a resumed run repeats it and stops at the same step.
    """


@dataclasses.dataclass(kw_only=True)
class Loop:
    """Everything that a step needs, and the state of the run.

    Attributes:
        model: the model that the caller passed.
        wrapped: the same model, wrapped so that gradients are averaged over processes; its forward is called.
        loader: training batches.
        settings: settings of the training loop.
        objective: task loss and teacher.
        optimizer: see `vitrim.train.optim.optimizer`.
        scaler: loss scaler for fp16, disabled otherwise.
        ema: averaged weights, or None.
        accelerator: processes.
        device: where the steps are taken.
        classes: K.
        input: input of the model, for the validation pictures.
        seed: seed of all random numbers.
        stage: name in records, errors and files.
        steps: number of steps of the whole run.
        run: settings that a checkpoint must match.
        penalty: added to the loss once per step, or None.
        after_step: called after each step while the gradients are still set, or None.
        folder: folder for checkpoints, or None.
        log: called with each record, or None.
        validation: pictures to evaluate on after each epoch, or None.
        state: progress of the run.
        cycle: steps of a whole cycle of the learning rate, if it is longer than the run; 0 if the run is a whole cycle.
        before: steps of the cycle before the first step of the run.
    """

    model: nn.Module
    wrapped: nn.Module
    loader: TrainLoader
    settings: Train
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    accelerator: Accelerator
    device: torch.device
    classes: int
    input: Input
    seed: int
    stage: str
    steps: int
    run: dict[str, Any]
    penalty: Penalty | None
    after_step: AfterStep | None
    folder: Path | None
    log: Log | None
    validation: Dataset[Any] | None
    state: Progressed
    cycle: int = 0
    before: int = 0

    def __post_init__(self) -> None:
        self.dtype = next(self.model.parameters()).dtype
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.warmup = round(self.settings.warmup_epochs * len(self.loader))
        self.mixup = self._mixup()
        self.window = self._sums(self.state.window)
        self.epoch_sums = self._sums(self.state.epoch)
        self.whole, self.saved = True, self.state.step
        self.pending: tuple[Tensor, torch.cuda.Event | None, int] | None = None
        self.rate = 0.0
        self.validating: Loader | None = None
        self.layout = torch.channels_last if self.settings.channels_last is True else torch.contiguous_format

    def _sums(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=summing(self.device), device=self.device)

    def _mixup(self) -> Mixup | None:
        if not self.settings.mixes:
            return None
        return Mixup(
            mixup_alpha=self.settings.mixup,
            cutmix_alpha=self.settings.cutmix,
            label_smoothing=self.settings.smoothing,
            num_classes=max(2, self.classes),
        )

    def go(self, advance: Work) -> None:
        """Take the remaining steps; on ctrl-C and SIGTERM, write a checkpoint of the last complete step.

        Args:
            advance: shows the progress.

        Raises:
            TrainError: a loss or gradient is not finite.
            RunError: a checkpoint cannot be written.
            KeyboardInterrupt: ctrl-C was pressed.
            vitrim.words.stopping.Terminated: SIGTERM came.
        """
        advance.resume(self.state.step)
        with Interrupts() as interrupts:
            try:
                if self._late():  # a resumed run that has already used its minutes
                    self.steps = self.state.step
                while self.state.step < self.steps:
                    self._epoch(advance, interrupts)
                self._check_pending()
            except Stop:
                self._check_pending()
            except (KeyboardInterrupt, Terminated):
                if self.whole:
                    self._save()
                raise

    def _epoch(self, advance: Work, interrupts: Interrupts) -> None:
        epoch, first = divmod(self.state.step, len(self.loader))
        self.model.train()
        parts = self.loader.epoch(epoch, first)
        for _ in range(min(len(self.loader) - first, self.steps - self.state.step)):
            start = time.perf_counter()
            with (
                fitting(f"{self.table}.batch", self.part, self.device, self._smaller()),
                compiling(self.settings.compile),
            ):
                self._step(parts)
            self.state.seconds += time.perf_counter() - start
            came = self._agreed(interrupts.came)
            if self._late():
                self.steps = self.state.step
            advance.total = self._horizon()
            advance(1)
            self._report(epoch, advance)
            if came:
                self._pool()
                raise stopped(came)
            if self.state.step == self.steps:
                return

    def _agreed(self, came: int) -> int:
        """Return the signal that came to any process; all hear of it after the same step, and use the first's clock."""
        alone = self.accelerator.num_processes == 1
        if alone or (self.settings.minutes is None and self.state.step % _HEARD and self.state.step < self.steps):
            return came if alone else 0
        worst, seconds = ranks.agreed(came, self.state.seconds if ranks.first() else 0.0)
        self.state.seconds = seconds
        return int(worst)

    def _late(self) -> bool:
        """Whether the time limit is reached; the same on all processes."""
        return self.settings.minutes is not None and self.state.seconds >= 60 * self.settings.minutes

    def _horizon(self) -> int:
        """Return the expected total number of steps: those of the epochs, or fewer by the time limit."""
        if self.settings.minutes is None or not self.state.step:
            return self.steps
        allowed = round(60 * self.settings.minutes * self.state.step / max(self.state.seconds, 1e-9))
        return min(self.steps, max(allowed, self.state.step + 1))

    def _step(self, parts: Iterator[tuple[Tensor, Tensor]]) -> None:
        step = self.state.step
        self.rate = self._rate(step)
        set_learning_rate(self.optimizer, self.rate)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros_like(self.window)
        sums[2] = 1
        for part in range(self.settings.accumulate):
            pictures, labels = next(parts)
            last = part == self.settings.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                sums[:2] += self._part(pictures, labels, step, part)
        self._guard(sums[0] + sums[1], self._clip(), step)
        self.whole = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=self.before + step + 1)
        self.window += sums
        self.epoch_sums += sums
        self.state.step += 1
        if self.after_step is not None:
            self.after_step(self.model, step)
        self.whole = True

    def _rate(self, step: int) -> float:
        return learning_rate(self.before + step, self.cycle or self._horizon(), self.warmup, self.settings)

    def _part(self, pictures: Tensor, labels: Tensor, step: int, part: int) -> Tensor:
        """Add the gradients of one part, and return its contribution to task loss and penalty, `(2,)`."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        count = len(labels)
        pictures = pictures.to(self.dtype, memory_format=self.layout)
        labels = labels if self.objective.labelled else labels.clamp_min(0)
        if self.mixup is not None:
            # Every part and process uses the same random numbers, because shares keep mixup's pairs together, see
            # `vitrim.data.loader.share`.
            with seeded(self.seed, step, _MIX):
                pictures, labels = self.mixup(pictures, labels)
        key = numbers(self.seed, step, part * world + rank, _DROP)
        torch.manual_seed(int(key.integers(2**63)))
        with autocast(self.device, self.settings.precision):
            teacher = self.objective.ask(pictures)
            outputs = self.wrapped(pictures)
        # Gradients are averaged over processes, so a part is weighted by `world` times its share of the batch.
        task = self.objective.loss(outputs, labels, teacher) * (count * world / self.loader.size)
        total = task
        penalty = task.new_zeros(())
        if self.penalty is not None:
            # The penalty is the same on every process, so averaging over processes counts it once.
            penalty = self.penalty(self.model) / self.settings.accumulate
            total = task + penalty
        self.scaler.scale(total).backward()
        return torch.stack([task.detach(), penalty.detach().to(task.dtype)]).to(self.window.dtype)

    def _clip(self) -> Tensor:
        """Clip the gradients, and return their norm before clipping, scalar."""
        self.scaler.unscale_(self.optimizer)
        if self.settings.clip is not None:
            return nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _guard(self, loss: Tensor, norm: Tensor, step: int) -> None:
        """Raise if the loss or the gradient norm is not finite.

        On a CPU this is checked before the step is taken. On another device it is checked one step later, on a copy
        that was sent to the host meanwhile, so that the host does not wait for the device.
        """
        if self.device.type != "cpu":
            self._check_pending()
        both = torch.stack([loss, norm.to(loss.dtype)])
        both = both.to("cpu", non_blocking=self.device.type != "mps")
        sent = None
        if self.device.type == "cuda":
            sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.record()
        self.pending = both, sent, step
        if self.device.type == "cpu":
            self._check_pending()

    def _check_pending(self) -> None:
        if self.pending is None:
            return
        (both, sent, step), self.pending = self.pending, None
        if sent is not None:
            sent.synchronize()
        # Gradients in fp16 may overflow occasionally; the loss scaler skips such a step.
        kinds = ("loss",) if self.scaler.is_enabled() else ("loss", "gradient")
        for kind, value in zip(kinds, both.tolist(), strict=False):
            if not math.isfinite(value):
                raise TrainError(
                    f"{self.stage}: the {kind} must be finite, but is {value:g} at step {step}; "
                    f"lower {self.table}.lr, set {self.table}.clip or lengthen the warm-up; {self._kept()}"
                )

    @property
    def table(self) -> str:
        """The table of a recipe that holds these settings."""
        return "train" if self.stage == "train" else "method.train"

    @property
    def part(self) -> int:
        """The number of images of one part of a step on one process."""
        processes: int = self.accelerator.num_processes
        return max(1, self.settings.batch // (self.settings.accumulate * processes))

    def _smaller(self) -> str:
        ways = [f"raise {self.table}.accumulate above {self.settings.accumulate}", f"lower {self.table}.batch"]
        return ", or ".join(ways if self.settings.checkpointing else [*ways, f"set {self.table}.checkpointing"])

    def _kept(self) -> str:
        found = newest(self.folder, self.stage) if self.folder is not None else None
        return f"the last good checkpoint is kept at {found}" if found else "no checkpoint was written yet"

    def _report(self, epoch: int, advance: Work) -> None:
        step = self.state.step
        ends = step % len(self.loader) == 0 or step == self.steps
        if step % self.settings.log_every == 0 or ends:
            record = self._record("step", epoch, self.window)
            advance(0, loss=record["loss"])
            self._send(record)
            self.window.zero_()
        if ends:
            record = self._record("epoch", epoch, self.epoch_sums)
            self.epoch_sums.zero_()
            record |= self._measure(step == self.steps)
            self.state.history.append(record)
            self._send(record)
        if ends or step % (self.settings.checkpoint_every or step + 1) == 0:
            self._pool()
            self._save()

    def _pool(self) -> None:
        """Give all processes the mean of their sums, because a checkpoint holds those of the first."""
        for sums in (self.window, self.epoch_sums):
            sums.copy_(ranks.summed(sums) / ranks.count())

    def _record(self, event: str, epoch: int, sums: Tensor) -> dict[str, Any]:
        task, penalty, count = (ranks.summed(sums) / ranks.count()).tolist()
        return {
            "stage": self.stage,
            "event": event,
            "epoch": epoch + 1,
            "step": self.state.step,
            "loss": (task + penalty) / count,
            "task": task / count,
            "penalty": penalty / count,
            "lr": self.rate,
            "seconds": round(self.state.seconds, 3),
        }

    def _measure(self, last: bool) -> dict[str, float | None]:
        if self.validation is None:
            return {}
        if self.validating is None:
            # Twice the images of a part need no more memory than training, because no gradients are stored.
            workers = self.settings.workers
            mine = ranks.part(len(self.validation))  # type: ignore[arg-type]
            self.validating = eval_loader(
                self.validation, self.input, batch=2 * self.part, workers=workers, device=self.device, places=mine
            )
        how: dict[str, Any] = {"precision": self.settings.precision, "tf32": self.settings.tf32, "shared": True}
        found = {"top1": evaluate(self.model, self._typed(self.validating), **how).top1}
        if last and self.ema is not None:
            found["top1_ema"] = evaluate(self.ema.module, self._typed(self.validating), **how).top1
        return found

    def _typed(self, loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for pictures, labels in loader:
            yield pictures.to(self.dtype), labels

    def _send(self, record: dict[str, Any]) -> None:
        if self.log is not None and self.accelerator.is_main_process:
            self.log(record)

    def _save(self) -> None:
        """Write a checkpoint, unless there is one of this step or no folder; raise first if the loss is not finite."""
        self._check_pending()
        if self.folder is None or self.saved == self.state.step or not self.accelerator.is_main_process:
            return
        self.state.window = self.window.tolist()
        self.state.epoch = self.epoch_sums.tolist()
        self.state.scaler = self.scaler.state_dict()
        ema = self.ema.module if self.ema is not None else None
        tensors = pack(self.model, ema, self.optimizer)
        write(self.folder, self.stage, tensors, self.state, self.run, self.settings.keep)
        self.saved = self.state.step
