"""MDC: cut heads, neurons and tokens together, by dependence scores and a Gaussian process over policies.

L blocks, H heads, M hidden neurons, N tokens.

Sources: Hou and Kung, "Multi-Dimensional Model Compression of Vision Transformer", ICME 2022, arXiv 2201.00043, and
"Multi-Dimensional Vision Transformer Compression via Dependency Guided Gaussian Process Search", CVPR Workshops 2022.
Heads and neurons are ranked once by how much the output depends on them (`vitrim.methods.mdc.scores`). A policy is one
ratio of neurons and one of heads for each block, and one of tokens for three blocks that select tokens
(`vitrim.methods.mdc.decode`). Policies that use up the budget are measured on held-out training images with the
parent's own weights, and a Gaussian process proposes the next policy (`vitrim.methods.mdc.bayes`). The model is cut by
the best measured policy.

Where we differ from the authors' published code, on purpose:

- It ranks neurons by nine parts of activation size and one of dependence, and so ranks large constants highest
  (`neurons_by = "released"`). Here neurons are ranked by dependence alone, as in the paper.
- Its estimator is biased: noise of large amplitude outranks a signal of small amplitude. Ours is unbiased, with the
  median bandwidth.
- It scores in training mode, on augmented images, and candidates on the very images that are reported; here scores are
  taken in evaluation mode, and candidates on training images that were held out.
- Its rounding takes a head from every block at any ratio above 0 (`rounding = "floor"`).
- Its removed heads still vote on which tokens stay. Here they are gone, in the search as in the child. At the published
  policies the logits are 0.07 to 0.10 apart, so a ``preset`` is not the network behind the published figures.
- It accepts policies up to 2 % over the budget, and leaves stem, head and fused tokens out of the cost.
- It ranks again before the final training, on other images; here the model is cut by the ranking of the search.
- Its kept tokens are in the order of their scores, which moves a distillation token; here they stay in order.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from vitrim.cut.outputs import as_classes, divergence, logits_of
from vitrim.cut.spend import Policies, Scaled, scaled, spend
from vitrim.data import eval_loader
from vitrim.families import describe
from vitrim.methods import Data, Found
from vitrim.methods._init import calibrates, closed_form, compensation, few, few_for
from vitrim.methods.mdc.bayes import Objective, Proposal, Trial, best_of, search, trials_of
from vitrim.methods.mdc.decode import PRESETS, Bounds, Frame, Rounding, natural, selection_blocks
from vitrim.methods.mdc.scores import Settings, score
from vitrim.methods.mdc.share import Chooser, Shared
from vitrim.methods.mdc.steps import too_costly
from vitrim.methods.mdc.study import joined, kept, open_study, reachable
from vitrim.methods.mdc.valued import first
from vitrim.nn.copying import copied
from vitrim.nn.modes import evaluating
from vitrim.nn.weights import fingerprint, home_of
from vitrim.train import Distill, Train, evaluate, fit, ranks, reference_logits
from vitrim.train.evaluate import Evaluated
from vitrim.train.leading import led
from vitrim.train.machine import settled
from vitrim.words.budget import Budget
from vitrim.words.errors import MethodError
from vitrim.words.plain import Node, dump
from vitrim.words.progress import Work, counted, progress
from vitrim.words.spec import Spec, why_not_mixed

__all__ = ["Method"]

Ratio = Annotated[float, Field(ge=0, lt=1)]


class Method(Node):
    """Search a policy of heads, neurons and tokens.

    Attributes:
        heads, neurons: largest ratio that a block may lose; 0 does not cut them.
        head_blocks: blocks whose heads may be cut. ``measured``: those whose first head costs less than the neurons and
            tokens that it saves at this budget (`vitrim.methods.mdc.steps`), on at most 64 calibration images; ``all``
            is the published search.
        tokens: largest ratio that a selection may drop; 0 does not cut tokens; None is 0.5 if tokens can be cut.
        trials: total number of policies to measure, by all processes that share the search.
        initial: number of these trials that are drawn before the Gaussian process proposes.
        corners: whether the first policies, before any is drawn, cut mainly one dimension each, and the others only as
            far as the budget needs; with ``gp``. The published search has no such policies: of 25 ratios drawn at
            random, practically none is 0.
        proposal: ``gp``; ``random``: only random draws; ``even``: one share of every bound, without a search.
        preset: a published policy to use instead of a search.
        measure: how a policy is measured on held-out images: ``loss``: the cross-entropy with the labels, or if an
            image has none, the divergence from the dense model's output; it has a finer resolution than a share of few
            images. ``top1``; ``agreement`` with the dense model; ``auto``: top1 if all images have labels, agreement
            otherwise. The published search maximizes top1.
        neurons_by: ``hsic``, or the published code's mix with activation size.
        heads_by: ``released``: relevance less a tenth of the mean redundancy; ``greedy``: one after another by what
            each adds to those chosen; only ``greedy`` detects copies.
        init: ``published``: heads and neurons are ranked as `heads_by` and `neurons_by` say, and policies are masked to
            be measured. ``closed_form``: they are ranked by what is lost if they are removed and the others compensate
            (`vitrim.cut.compensate.losses`), each policy is cut and compensated on at most 64 calibration images before
            it is measured, and the child starts from the compensated weights. The first policies are those that cut
            what loses least for its cost. Masks alone prefer cuts of tokens, which lose least at once; compensation
            makes up for neurons and hardly for tokens.
        tokens_by: ``cls_attn``: by the class token's attention; ``hsic_attn``: at the first selection, that attention
            times the dependence of the grid position. At later selections positions are ranks without meaning.
        estimator: ``unbiased_median``, or the published code's ``biased_multi``.
        target: the variable whose dependence on components is measured: the dense model's ``output``, or ``labels``.
        rounding: see `vitrim.methods.mdc.decode.Frame`.
        fused: whether the dropped tokens are replaced by one token, their mean.
        batch: number of calibration images per estimate; estimates are averaged.
        train: weight sharing before the search, each step on one policy drawn within the budget; 0 epochs: none. The
            paper gives no length; 10 epochs on ImageNet at a tenth of the final learning rate are our reading.
        storage: URL of an Optuna storage, to share the search with other processes; None for a file in the run folder.
        study: name of the study in its storage.
    """

    needs: ClassVar[str] = "images"
    plans_by_time: ClassVar[bool] = True
    sentence: ClassVar[str] = (
        "searches how much of heads, neurons and tokens to keep, with a Gaussian process over measured policies"
    )

    heads: Ratio = 0.5
    neurons: Ratio = 0.5
    head_blocks: Literal["measured", "all"] = "measured"
    tokens: Ratio | None = None
    trials: PositiveInt = 100
    initial: PositiveInt = 40
    corners: bool = True
    proposal: Proposal | Literal["even"] = "gp"
    preset: Literal["deit_small_60", "deit_base_60"] | None = None
    measure: Literal["auto", "top1", "agreement", "loss"] = "loss"
    neurons_by: Literal["hsic", "released"] = "hsic"
    heads_by: Literal["released", "greedy"] = "released"
    init: Literal["published", "closed_form"] = "published"
    tokens_by: Literal["cls_attn", "hsic_attn"] = "cls_attn"
    estimator: Literal["unbiased_median", "biased_multi"] = "unbiased_median"
    target: Literal["output", "labels"] = "output"
    rounding: Rounding = "nearest"
    fused: bool = True
    batch: Annotated[int, Field(ge=4)] = 64
    train: Train = Train(
        epochs=0, batch=256, lr=2e-5, weight_decay=0.05, warmup_epochs=0, distill=Distill(kind="soft", alpha=0.5)
    )
    storage: str | None = None
    study: str = "mdc"

    @property
    def held_out(self) -> float:
        """Return the share of the training images that policies are compared on; 0 if nothing is searched."""
        return 0.0 if self.preset is not None or self.proposal == "even" else 0.1

    def passes(self, spec: Spec, calibration: int, validation: int) -> float:
        """See `vitrim.methods.Method`: scores, and a measurement of each policy on the held-out images."""
        steps = (1 + len(spec.blocks())) * min(calibration, _FEW) if self._measures_heads else 0
        each = validation + (4.0 * min(calibration, few_for(spec)) if self.init == "closed_form" else 0.0)
        return 3.0 * calibration + steps + (self.trials * each if self.held_out else 0.0)

    @property
    def _measures_heads(self) -> bool:
        return self.head_blocks == "measured" and bool(self.heads) and self.preset is None

    @model_validator(mode="after")
    def _searched(self) -> Self:
        if not self.heads and not self.neurons and self.tokens == 0:
            raise ValueError("heads, neurons or tokens must be above 0, but all are 0; leave one out")
        return self

    def calibrates(self, spec: Spec) -> int:
        """See `vitrim.methods.Method`."""
        return calibrates(spec, self.init)

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
            raise MethodError("mdc must have images, but no data was given; give data or use magnitude")
        spec, bounds = describe(model), self._bounds(describe(model))
        frame = Frame(spec, natural(spec), budget, bounds, self.rounding)
        url, study = joined(lambda url: self._open(model, data, budget, seed, url), self.storage, folder)
        with reachable(url or "memory"):
            ranking, places, losses = led(lambda: self._scores(model, spec, data, study, seed))
        frame = Frame(spec, ranking, budget, bounds, self.rounding)
        chooser, whole = Chooser(frame, self.fused, places), np.zeros(len(frame.space.names))
        if frame.space.spent(whole[None])[0] <= 1:
            return Found(plan=chooser.plan(whole), parent=model)
        if self._measures_heads:
            with reachable(url or "memory"):
                costly = led(lambda: self._costly(model, frame, chooser, data, study))
            frame = Frame(spec, ranking, budget, bounds, self.rounding, costly)
            chooser, whole = Chooser(frame, self.fused, places), np.zeros(len(frame.space.names))
        if self.preset is not None or self.proposal == "even":
            preset = None if self.preset is None else frame.policy(PRESETS[self.preset])
            policy = scaled(frame.space, frame.space.upper) if preset is None else preset
            return Found(plan=chooser.plan(policy), parent=model, trials=(chooser.told(policy),))
        parent = self._share(model, chooser, data, seed, teacher, folder, log)
        with reachable(url or "memory"), progress("policies", self.trials) as advance:
            if study is not None:
                search(
                    study,
                    frame.space,
                    self._objective(parent, model, chooser, data, seed),
                    trials=self.trials,
                    initial=self.initial,
                    seed=seed,
                    proposal="gp" if self.proposal == "gp" else "random",
                    first=first(frame, losses, self.corners) if self.proposal == "gp" else None,
                    alone=self.storage is None and ranks.count() == 1,
                    told=functools.partial(_tell, log, advance),
                )
            trials = led(lambda: trials_of(study, frame.space))
        best = best_of(trials)
        told = [{"trial": t.number, "score": t.value, "best": t.number == best.number} | dict(t.notes) for t in trials]
        plan = spend(spec, Scaled(lambda _: frame.space, chooser.plan, best.policy), budget)
        grafts = compensation(parent, plan, data, seed) if self.init == "closed_form" else {}
        return Found(plan=plan, parent=parent, grafts=grafts, trials=tuple(told))

    def _bounds(self, spec: Spec) -> Bounds:
        whole = len(spec.stages) == 1 and why_not_mixed(spec.stages[0]) is None
        whole = whole and not any(block.tokens or block.only_prefix for _, _, block in spec.blocks())
        tokens = (0.5 if whole else 0.0) if self.tokens is None else self.tokens
        return Bounds(heads=self.heads, neurons=self.neurons, tokens=tokens)

    def _open(self, model: nn.Module, data: Data, budget: Budget, seed: int, url: str | None) -> Any:
        """Open the study; raise an error if it is for another model, space or choice of images."""
        if url is not None and self.storage is None:
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        settings = dump(self)
        for free in ("trials", "storage", "study"):
            settings.pop(free)
        images = [len(part) if isinstance(part, Sized) else 0 for part in (data.calibration, data.validation)]
        identity = {
            "model": _identity(model),
            "space": json.dumps({"budget": str(budget), "seed": seed, "images": images, **settings}, sort_keys=True),
        }
        return open_study(url, self.study, identity)

    def _scores(
        self, model: nn.Module, spec: Spec, data: Data, study: Any, seed: int
    ) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Policies]]:
        """Return rankings, scores of grid positions, and losses of closed forms; read from the study if it has them."""
        images = data.calibration
        assert images is not None
        wanted = [f"ranking.{path}" for path in natural(spec)]
        weighed = self.tokens_by == "hsic_attn" and self._bounds(spec).tokens > 0
        blocks = [path for path, _, _ in spec.blocks()]
        settings = Settings(
            neurons_by=self.neurons_by,
            heads_by=self.heads_by,
            estimator=self.estimator,
            target=self.target,
            place=blocks[selection_blocks(len(blocks))[0]] if weighed else None,
        )

        def made() -> dict[str, Any]:
            count = len(images) if isinstance(images, Sized) else self.batch
            batches = self._loader(model, images, data, _even(count, self.batch))
            with progress("scores", len(batches)) as advance:
                found = score(model, counted(batches, advance), settings)
            ranking = dict(found.ranking)
            fits = closed_form(model, data, seed) if self.init == "closed_form" else {}
            ranking |= {path: one.best for path, one in fits.items() if path in ranking}
            values: dict[str, Any] = {f"ranking.{path}": best.tolist() for path, best in ranking.items()}
            values["losses"] = {path: one.losses.tolist() for path, one in fits.items()}
            return values | {"places": None if found.places is None else found.places.tolist()}

        known = kept(study, made, [*wanted, "losses", "places"])
        places, losses = known.pop("places"), {path: np.array(each) for path, each in known.pop("losses").items()}
        ranking = {path.removeprefix("ranking."): torch.tensor(best) for path, best in known.items()}
        return ranking, None if places is None else torch.tensor(places), losses

    def _costly(self, model: nn.Module, frame: Frame, chooser: Chooser, data: Data, study: Any) -> list[str]:
        """Return the ratios of heads that are not searched, read from the study if it contains them."""

        def made() -> dict[str, Any]:
            images = [next(iter(self._loader(model, data.calibration, data, _FEW)))[0]]
            with evaluating(model), progress("heads", 1 + len(frame.places)) as advance:
                dense = as_classes(logits_of(model, images))

                def loses(policy: Policies) -> float:
                    with chooser.chosen(model, policy):
                        found = divergence(dense, as_classes(logits_of(model, images)))
                    advance(1)
                    return found

                return {"costly": too_costly(frame, loses)}

        found: list[str] = kept(study, made, ["costly"])["costly"]
        return found

    def _share(
        self,
        model: nn.Module,
        chooser: Chooser,
        data: Data,
        seed: int,
        teacher: nn.Module | None,
        folder: Path | None,
        log: Callable[[Mapping[str, Any]], None] | None,
    ) -> nn.Module:
        """Return the model to measure policies with: the model itself, or a copy trained on all policies."""
        if not self.train.epochs:
            return model
        if data.train is None:
            raise MethodError("train.epochs must be 0 without training images, but weights are to be shared; give data")
        shared = Shared(copied(model), chooser, seed)
        fit(
            shared,
            data.train,
            self.train,
            input=data.input,
            seed=seed,
            teacher=model if teacher is None else teacher,
            folder=folder,
            log=log,
            stage="share",
            after_step=shared.taken,
            device=home_of(model)[0],
        )
        return shared.model.train(model.training)

    def _objective(self, parent: nn.Module, dense: nn.Module, chooser: Chooser, data: Data, seed: int) -> Objective:
        """Return a function that measures a policy on the held-out images, with the parent's weights."""
        images = data.validation
        if images is None or (isinstance(images, Sized) and not len(images)):
            raise MethodError(
                "mdc must compare policies on held-out training images, but there are none; set data.validation above 0"
            )
        loader: Any = self._loader(dense, images, data)
        if isinstance(images, Sized) and len(images) * math.prod(data.input.size) * 12 <= _HELD:
            loader = list(loader)
        how: dict[str, Any] = {"precision": self._precision(dense), "tf32": self.train.tf32}
        labeled = self.measure != "loss" or evaluate(dense, loader, **how).loss is not None
        theirs = (
            reference_logits(dense, loader, **how) if self.measure in ("auto", "agreement") or not labeled else None
        )

        some = few(describe(dense), data) if self.init == "closed_form" else []

        def objective(policy: Policies) -> tuple[float, dict[str, Any]]:
            told = dict(chooser.told(policy))
            with chooser.child(parent, policy, some, seed) as child:
                if theirs is not None and not labeled:
                    with evaluating(child):
                        found = as_classes(logits_of(child, [x for x, _ in loader]))
                    return -divergence(as_classes(theirs), found), told | {"measure": "divergence"}
                name, value = self._value(evaluate(child, loader, reference=theirs, **how))
            if value is None:
                raise MethodError(f"measure={name} must have labels, but some are missing; use loss or agreement")
            return value, told | {"measure": name}

        return objective

    def _loader(self, model: nn.Module, images: Any, data: Data, batch: int = 64) -> Any:
        """Return a loader of images for `model`, with the workers of `train`."""
        return eval_loader(images, data.input, batch=batch, workers=self.train.workers, device=home_of(model)[0])

    def _precision(self, model: nn.Module) -> Any:
        return settled(self.train, home_of(model)[0]).precision

    def _value(self, found: Evaluated) -> tuple[str, float | None]:
        """Return what is measured and its value, larger is better; None without the labels that it needs."""
        if self.measure == "loss":
            return "loss", None if found.loss is None else -found.loss
        if self.measure == "agreement" or (self.measure == "auto" and found.top1 is None):
            return "agreement", found.agreement
        return "top1", found.top1


_FEW = 64
"""Largest number of calibration images on which first heads are measured."""

_HELD = 2**29
"""Bytes of held-out images that are cached in memory; beyond it, images are read again for each policy."""


def _even(count: int, batch: int) -> int:
    """Return a batch size, at most `batch`, for which the last batch has at least 4 images."""
    size = min(batch, count)
    while size > 4 and 0 < count % size < 4:
        size -= 1
    return max(size, 1)


def _identity(model: nn.Module) -> str:
    """Return a text that identifies a model, including its weights."""
    return fingerprint(model, json.dumps(dump(describe(model)), sort_keys=True).encode())[:16]


def _tell(log: Callable[[Mapping[str, Any]], None] | None, advance: Work, trial: Trial) -> None:
    advance(1, score=trial.value, best=max(trial.value, advance.figures.get("best", trial.value)))
    if log is not None:
        log({"stage": "policies", "event": "trial", "step": trial.number, "score": trial.value, **trial.notes})
