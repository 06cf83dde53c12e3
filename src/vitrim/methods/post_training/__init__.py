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

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vitrim.data import eval_loader
from vitrim.families import describe
from vitrim.methods import Data, Found
from vitrim.methods._init import calibrates, few_for, first
from vitrim.methods.post_training.budgets import Reading, Tabled, check_reach
from vitrim.methods.post_training.calibration import Calibration, read_calibration, write_calibration
from vitrim.methods.post_training.look import Bench, clock_of, look, record_of, won
from vitrim.methods.post_training.notes import Notes
from vitrim.methods.post_training.operators import images_for, kernels_for
from vitrim.methods.post_training.options import Kinds
from vitrim.methods.post_training.probe import Precision
from vitrim.methods.post_training.schedule import Kind, merging, schedules
from vitrim.methods.post_training.sensitivity import calibrate
from vitrim.words.budget import Budget
from vitrim.words.errors import MethodError
from vitrim.words.plain import Node
from vitrim.words.plan import Plan
from vitrim.words.progress import progress
from vitrim.words.spec import Spec, why_not_mixed

__all__ = ["Method"]

FILE = "calibration.safetensors"
CELLS = "cells.jsonl"
"""File of the single losses of a calibration that is not finished."""

LOOKED = "looked.jsonl"
"""File of the trials that were measured, by which a search that was stopped goes on."""


class Method(Node):
    """Merge patches, narrow heads and MLPs, and refit the remaining weights; nothing is trained.

    Attributes:
        merge: ``bipartite``: similar patches are merged, different ones in every image; ``grid``: neighbors are
            averaged, the same in every image, and a grid stays a grid; ``none``: no patches are merged. The last two
            are for dense prediction and for static graphs. ``auto``: bipartite if the model supports it (not in
            windows).
        operators: whether a convolution, fitted to its output, may stand in place of an attention. None: where the grid
            is known and there are enough calibration images for the fits; True raises an error elsewhere.
        tokens: whether patches may be merged; False is the same as ``merge = "none"``.
        heads: whether whole heads may be cut, as long as one of a block is left.
        widths: whether channels of heads, and neurons, may be cut.
        depth: whether attention or MLP of a block, or both, may become a constant.
        only_prefix: whether the last block computes only the prefix tokens if the head reads nothing else, which
            changes no logit. None means yes only with bipartite merging, because patches may be needed otherwise.
        strength: strength of the ridge, as a share of the mean diagonal of a layer's Gram matrix.
        alpha: share of a refit's target that corrects the residual stream toward the dense one, in [0, 1]; used only
            without merging.
        probe: number of validation images on which single cuts and candidates are measured.
        precision: type of the passes that measure single cuts and weigh tokens: ``fp32`` is the model's own; ``bf16``
            rounds the inputs of products, and what this adds is measured and subtracted; ``auto``: bf16 on CPUs that
            multiply it in tiles (AMX), for models in float32.
        estimates: whether only the largest cut of each kind is measured in each block, and the losses of the smaller
            ones are estimated from the curvature of the divergence; False measures all.
        candidates: number of best choices, at most one for each schedule of merging, that are cut, compensated and
            measured, in time too if the budget bounds time; 0 takes the choice with the least predicted loss unseen.
        swaps: largest number of changes of the best candidate that are measured after that: one part of one block is
            cut in another way, and the rest of the budget is allocated again.
        look: number of calibration images with which candidates are compensated; the choice that wins is compensated
            with all of them.
        batch: images per batch.
        calibration: a file that ``vitrim pareto`` wrote, to use instead of a new calibration.
    """

    needs: ClassVar[str] = "images"
    plans_by_time: ClassVar[bool] = True
    sentence: ClassVar[str] = "merges patches and narrows layers, compensated in closed form; no labels, no training"

    merge: Literal["auto", "bipartite", "grid", "none"] = "auto"
    operators: bool | None = None
    tokens: bool = True
    heads: bool = True
    widths: bool = True
    depth: bool = True
    only_prefix: bool | None = None
    strength: NonNegativeFloat = 1e-2
    alpha: float = Field(default=0.3, ge=0, le=1)
    probe: PositiveInt = 80
    precision: Precision = "auto"
    estimates: bool = True
    candidates: NonNegativeInt = 8
    swaps: NonNegativeInt = 8
    look: PositiveInt = 64
    batch: PositiveInt = 32
    calibration: str | None = None

    def passes(self, spec: Spec, calibration: int, validation: int) -> float:
        """See `vitrim.methods.Method`; fitted to 89 s of calibration for a ViT-Ti at 58 images a second."""
        blocks, probe = len(spec.blocks()), min(self.probe, validation or calibration // 5)
        tables = 0.0 if self.calibration is not None else ((3.7 if self.estimates else 7.5) * blocks + 20.0) * probe
        looks = (self.candidates + self.swaps) * (3.0 * min(max(self.look, few_for(spec)), calibration) + probe)
        return tables + looks + 3.0 * calibration

    def calibrates(self, spec: Spec) -> int:
        """See `vitrim.methods.Method`."""
        return calibrates(spec, "closed_form")

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
        data, spec = _given(data), describe(model)
        merge = self._merges(spec)
        exact = self._exact(merge)
        images, probe = self.images(data)
        check_reach(spec, schedules(spec, merge, exact), exact, budget, self.kinds(spec, sum(map(len, images))))
        calibration = self._calibration(model, data, images, probe, seed, folder)

        def read(budget: Budget) -> Found:
            found = self._read(model, calibration, budget, images, probe, seed, folder)
            if log is not None:
                log(found.trials[0])
            return replace(found, again=read)

        return read(budget)

    def options(self, model: nn.Module, data: Data | None, *, seed: int) -> Tabled:
        """See `vitrim.methods.Method.options`."""
        images, probe = self.images(_given(data))
        return self._tabled(self._calibration(model, _given(data), images, probe, seed, None), images)

    def kinds(self, spec: Spec, images: int) -> Kinds:
        """Return the kinds of cuts that may be chosen besides tokens.

        Raises:
            MethodError: if convolutions are wanted that cannot be fitted.
        """
        kernels = kernels_for(spec, images, self.operators)
        looked = min(images, self._few(spec, kernels))
        return Kinds(operators=kernels, heads=self.heads, widths=self.widths, depth=self.depth, images=looked)

    def _few(self, spec: Spec, kernels: Sequence[int]) -> int:
        """Return the number of images, if there are as many, on which a candidate is compensated."""
        return max(self.look, few_for(spec), images_for(spec, kernels))

    def _tabled(self, calibration: Calibration, images: Sequence[Tensor]) -> Tabled:
        merge, kinds = self._merges(calibration.spec), self.kinds(calibration.spec, sum(map(len, images)))
        return Tabled(calibration, merge=merge != "none", exact=self._exact(merge), kinds=kinds)

    def _read(
        self,
        model: nn.Module,
        calibration: Calibration,
        budget: Budget,
        images: Sequence[Tensor],
        probe: Sequence[Tensor],
        seed: int,
        folder: Path | None,
    ) -> Found:
        """Return the plan that a calibration gives for `budget`, with the weights that compensate for it."""
        spec, start = describe(model), time.perf_counter()
        tabled = self._tabled(calibration, images)
        trials, best = self._looked(model, tabled, budget, images, probe, seed, folder)
        bench = self._bench(model, images, probe, seed)
        with progress("compensation", len(best.choices)) as advance:
            cut = bench.cut(best, advance)
        steps = merging(spec, best.merges, best.exact)
        plan = Plan.of(
            spec,
            [
                width.model_copy(update={"tokens": step.tokens, "only_prefix": step.only_prefix})
                for width, step in zip(cut.plan.blocks(), steps.blocks(), strict=True)
            ],
        )
        record = {
            "stage": "post_training",
            "merges": list(best.merges),
            "predicted": best.loss,
            "calibration_seconds": calibration.seconds,
            "seconds": time.perf_counter() - start,
        }
        return Found(plan=plan, parent=model, grafts=cut.grafts, trials=(record, *trials))

    def _looked(
        self,
        model: nn.Module,
        tabled: Tabled,
        budget: Budget,
        images: Sequence[Tensor],
        probe: Sequence[Tensor],
        seed: int,
        folder: Path | None,
    ) -> tuple[list[dict[str, Any]], Reading]:
        """Return a record of each trial, and the choice that won."""
        if not self.candidates:
            return [], tabled.best(budget, 1)[0]
        spec = tabled.calibration.spec
        few = first(images, self._few(spec, tabled.kinds.operators))
        clock = None if budget.table is None else clock_of(model, budget.table.machine)
        bench = self._bench(model, few, probe, seed, clock)
        with progress("candidates", self.candidates + self.swaps) as advance:
            trials = look(
                tabled,
                budget,
                bench,
                count=self.candidates,
                swaps=self.swaps,
                notes=Notes(None if folder is None else folder / LOOKED),
                advance=advance,
            )
        best = won(trials, budget)
        return [record_of(number, trial, trial is best, tabled) for number, trial in enumerate(trials)], best.reading

    def _bench(
        self,
        model: nn.Module,
        images: Sequence[Tensor],
        probe: Sequence[Tensor],
        seed: int,
        clock: Callable[[nn.Module], float] | None = None,
    ) -> Bench:
        given = {"seed": seed, "strength": self.strength, "alpha": self.alpha, "precision": self.precision}
        return Bench(model, images, probe, clock=clock, **given)  # type: ignore[arg-type]

    def _exact(self, merge: Kind) -> bool:
        return merge == "bipartite" if self.only_prefix is None else self.only_prefix

    def _merges(self, spec: Spec) -> Kind:
        able = len(spec.stages) == 1 and why_not_mixed(spec.stages[0]) is None
        if self.merge in ("bipartite", "grid") and not able:
            wrong = why_not_mixed(spec.stages[0]) or "it has several stages"
            raise MethodError(f"merge={self.merge} must fit the model, but it does not: {wrong}; use merge=none")
        if not self.tokens:
            return "none"
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
        notes = Notes(None if folder is None else folder / CELLS)
        made = self.calibrated(model, data, images, probe, seed, notes=notes)
        if path is not None:
            write_calibration(path, made)
            notes.forget()
        return made

    def calibrated(
        self,
        model: nn.Module,
        data: Data,
        images: Sequence[Tensor],
        probe: Sequence[Tensor],
        seed: int,
        *,
        notes: Notes | None = None,
    ) -> Calibration:
        """Return a new calibration of `model`.

        Args:
            model: an adopted model.
            data: the images' size and normalization.
            images: batches for statistics.
            probe: batches of other images, on which losses are measured.
            seed: seed of drawn labels.
            notes: losses that a stopped calibration has measured.
        """
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
                operators=self.operators,
                precision=self.precision,
                estimates=self.estimates,
                notes=notes or Notes(None),
            )


def _given(data: Data | None) -> Data:
    if data is None or data.calibration is None:
        raise MethodError("post_training must see images, but no data was given; give data or use magnitude")
    return data


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
