"""Compress without training and without labels: calibrate once, then cut to any budget.

B images, N tokens, D width, H heads, M hidden neurons.

Our own method, built from published parts. A few hundred images are run through the dense model once. Each kind of cut
is made alone in each block and compensated, and the change of the output is recorded. For any budget, patches to merge
and widths to keep are then chosen with the least sum of losses, and the model is cut block by block with closed-form
compensation (`vitrim.cut.compensate`).

Sources: Bolya et al., "Token Merging", ICLR 2023 (merging, proportional attention); Hassibi and Stork, "Optimal Brain
Surgeon", 1992, and Frantar and Alistarh, "SparseGPT", 2023 (removal of neurons); ridge compensation as in GRAIL, CORP
and VBP. Ours: the joint low rank of queries and keys, schedules of merging, and the table used to trade tokens against
widths.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from vitrim.cut.compensate import compensated, importances
from vitrim.cut.surgery import apply
from vitrim.data import eval_loader
from vitrim.families import describe
from vitrim.methods import Data, Found
from vitrim.methods.post_training.budgets import check_reach, read_off
from vitrim.methods.post_training.calibration import Calibration, read_calibration, write_calibration
from vitrim.methods.post_training.schedule import Kind, merging, schedules
from vitrim.methods.post_training.sensitivity import calibrate
from vitrim.words.budget import Budget
from vitrim.words.errors import MethodError
from vitrim.words.plain import Node
from vitrim.words.plan import Plan
from vitrim.words.progress import progress
from vitrim.words.spec import Spec

__all__ = ["Method"]

FILE = "calibration.safetensors"


class Method(Node):
    """Merge patches, narrow heads and MLPs, and refit the remaining weights; nothing is trained.

    Attributes:
        merge: ``bipartite``: similar patches are merged, different ones in every image; ``grid``: neighbors are
            averaged, the same in every image, and a grid stays a grid; ``none``: no patches are merged. The last two
            are for dense prediction and for static graphs. ``auto``: bipartite if the model supports it (not in
            windows).
        widths: whether heads, their channels and neurons may be cut.
        only_prefix: whether the last block computes only the prefix tokens if the head reads nothing else, which
            changes no logit. None means yes only with bipartite merging, because patches may be needed otherwise.
        strength: strength of the ridge, as a share of the mean diagonal of a layer's Gram matrix.
        alpha: share of a refit's target that corrects the residual stream toward the dense one, in [0, 1]; used only
            without merging.
        probe: number of validation images on which single cuts are measured.
        batch: images per batch.
        calibration: a file that ``vitrim pareto`` wrote, to use instead of a new calibration.
    """

    needs: ClassVar[str] = "images"
    plans_by_time: ClassVar[bool] = True
    sentence: ClassVar[str] = "merges patches and narrows layers, compensated in closed form; no labels, no training"

    merge: Literal["auto", "bipartite", "grid", "none"] = "auto"
    widths: bool = True
    only_prefix: bool | None = None
    strength: NonNegativeFloat = 1e-2
    alpha: float = Field(default=0.3, ge=0, le=1)
    probe: PositiveInt = 80
    batch: PositiveInt = 32
    calibration: str | None = None

    @property
    def held_out(self) -> int:
        """Return the number of training images that cuts are measured on; 0 if a calibration is given."""
        return 0 if self.calibration is not None else self.probe

    def search(
        self,
        model: nn.Module,
        data: Data | None,
        budget: Budget,
        *,
        seed: int,
        teacher: nn.Module | None = None,
        folder: Path | None = None,
        log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Found:
        """See `vitrim.methods.Method.search`."""
        if data is None or data.calibration is None:
            raise MethodError("post_training must see images, but no data was given; give data or use magnitude")
        spec = describe(model)
        merge = self._merges(spec)
        exact = self._exact(merge)
        check_reach(spec, schedules(spec, merge, exact), exact, budget, self.widths)
        images, probe = self.images(data)
        calibration = self._calibration(model, data, images, probe, seed, folder)

        def read(budget: Budget) -> Found:
            found = self._read(model, calibration, budget, images, merge, seed)
            if log is not None:
                log(found.trials[0])
            return replace(found, again=read)

        return read(budget)

    def _read(
        self,
        model: nn.Module,
        calibration: Calibration,
        budget: Budget,
        images: Sequence[Tensor],
        merge: Kind,
        seed: int,
    ) -> Found:
        """Return the plan that a calibration gives for `budget`, with the weights that compensate for it."""
        spec, exact = describe(model), self._exact(merge)
        start = time.perf_counter()
        chosen = read_off(calibration, budget, merge=merge != "none", widths=self.widths, exact=exact)
        steps = merging(spec, chosen.merges, chosen.exact)
        base = apply(model, steps) if steps != Plan.keep(spec) else model
        merged = any(chosen.merges)
        worth = importances(base, images, seed=seed)
        with progress("compensation", len(chosen.choices)) as advance:
            widths, grafts = compensated(
                base,
                chosen.choices,
                images,
                worth,
                strength=self.strength,
                alpha=0.0 if merged else self.alpha,
                advance=advance,
            )
        plan = Plan.of(
            spec,
            [
                width.model_copy(update={"tokens": step.tokens, "only_prefix": step.only_prefix})
                for width, step in zip(widths.blocks(), steps.blocks(), strict=True)
            ],
        )
        record = {
            "stage": "post_training",
            "merges": list(chosen.merges),
            "predicted": chosen.loss,
            "calibration_seconds": calibration.seconds,
            "seconds": time.perf_counter() - start,
        }
        return Found(plan=plan, parent=model, grafts=grafts, trials=(record,))

    def _exact(self, merge: Kind) -> bool:
        return merge == "bipartite" if self.only_prefix is None else self.only_prefix

    def _merges(self, spec: Spec) -> Kind:
        able = len(spec.stages) == 1 and spec.stages[0].window is None
        if self.merge in ("bipartite", "grid") and not able:
            raise MethodError(
                f"merge={self.merge} must have one stage without windows, but this model has windows or several "
                "stages; use merge=none"
            )
        if self.merge == "auto":
            return "bipartite" if able else "none"
        return self.merge

    def images(self, data: Data) -> tuple[list[Tensor], list[Tensor]]:
        """Return batches for statistics, and batches of other images to measure cuts on; all in memory.

        Without validation images, the last fifth of the calibration images is used to measure cuts.
        """
        assert data.calibration is not None
        images = list(_few(data.calibration, data, self.batch, None))
        if data.validation is not None:
            return images, list(_few(data.validation, data, self.batch, self.probe))
        count = sum(map(len, images))
        keep = count - max(1, count // 5)
        if keep < 1:
            raise MethodError("calibration must have at least 2 images, but got 1; give more with data.calibration")
        return _divided(images, keep)

    def _calibration(
        self,
        model: nn.Module,
        data: Data,
        images: Sequence[Tensor],
        probe: Sequence[Tensor],
        seed: int,
        folder: Path | None,
    ) -> Calibration:
        """Return the calibration that is named, the one that a stopped run wrote, or a new one."""
        if self.calibration is not None:
            known = read_calibration(Path(self.calibration))
            known.check(model, data.input, self.calibration)
            wanted = self._merges(describe(model))
            if wanted not in ("none", known.merge):
                raise MethodError(
                    f"{self.calibration}: the calibration must hold schedules of merge={wanted}, but holds those of "
                    f"merge={known.merge}; calibrate again, or set method.merge={known.merge}"
                )
            return known
        path = folder / FILE if folder is not None else None
        if path is not None and path.is_file():
            return read_calibration(path)
        made = self.calibrated(model, data, images, probe, seed)
        if path is not None:
            write_calibration(path, made)
        return made

    def calibrated(
        self, model: nn.Module, data: Data, images: Sequence[Tensor], probe: Sequence[Tensor], seed: int
    ) -> Calibration:
        """Return a new calibration of `model`."""
        spec = describe(model)
        with progress("calibration", len(spec.blocks()) + 1) as advance:
            return calibrate(
                model,
                images,
                probe,
                data.input,
                seed=seed,
                strength=self.strength,
                merge=self._merges(spec),
                exact=self._exact(self._merges(spec)),
                advance=advance,
            )


def _few(dataset: Any, data: Data, batch: int, most: int | None) -> Iterator[Tensor]:
    """Yield batches of the first images."""
    left = len(dataset) if most is None else min(most, len(dataset))
    for x, _ in eval_loader(dataset, data.input, batch=batch):
        if left <= 0:
            return
        yield x[:left]
        left -= len(x)


def _divided(images: Sequence[Tensor], keep: int) -> tuple[list[Tensor], list[Tensor]]:
    first: list[Tensor] = []
    last: list[Tensor] = []
    for x in images:
        here, there = x[: max(keep, 0)], x[max(keep, 0) :]
        first += [here] if len(here) else []
        last += [there] if len(there) else []
        keep -= len(x)
    return first, last
