"""CAIT-style: neighbours merged on the grid, and channels cut evenly over heads, chosen again and again while training.

H heads, K channels of a head, M hidden neurons, P patches, T steps of the whole run.

Source: "CAIT: Triple-Win Compression towards High Accuracy, Fast Inference, and Favorable Transferability For ViTs",
Wang et al., arXiv 2309.15755 (v1 2023, v2 2025). **The method section could not be read**: from the abstracts it is
known that neighbouring tokens are integrated so that the spatial structure stays (ATME), that channels are pruned
dynamically, and those of attention uniformly (CDCP), and that both are applied together. Everything else here is our
decision, so results are "CAIT-style" and not the paper's.

Tokens: pairs of patches become one, along the columns after a third of the blocks and along the rows after two
thirds, by a linear map that starts as their mean (`vitrim.words.steps.GridMerge`). A grid stays a grid.

Channels: during training they are scored, masked, scored again and possibly revived. The same number of channels is
kept in all heads of a block, and of queries, keys and values (`vitrim.methods.cait.slots`), so attention stays one
dense call. The budget that masks are chosen for falls from what merging leaves to the one asked for.

The run of T steps is split at the cut (`cut`, 0.6 T). What comes before is this search: warm-up without masks, the
ramp, a hold in which masks may still change. What comes after is the run's own training of the child. Both share one
cycle of the learning rate, and the optimiser's averages and averaged weights of what is kept are handed over
(``Found.start``). So for a run of 30 epochs ``method.train.epochs = 18`` and ``train.epochs = 12``, with the same
rates and batch: what a recipe's ``train`` leaves out of them is ``method.train``'s, and other values are refused
(`Method.shared`).

Scores. ``taylor``: the average of the squared gradient of the loss by the mask, also of masked channels, for which it
is the first-order effect of switching them on. ``resrep`` (Ding et al., ICCV 2021, of the same group): gates that are
pulled to zero and of which only the unmasked feel the loss; score is their size. Its matrix is a diagonal here.
"""

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from vitrim.cut.shares import remains
from vitrim.cut.surgery import apply, cut_tensors
from vitrim.data import Augment
from vitrim.families import describe
from vitrim.methods import Data, Found
from vitrim.methods.cait.masks import Channels, Merge, free_axes, merge_plan, ramped, thirds
from vitrim.methods.cait.slots import Rules, allocate_slots, plan_of
from vitrim.train import RATES, Distill, Fitted, Start, Train, fit, steps_of
from vitrim.words.budget import SLACK, Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plain import Node
from vitrim.words.plan import Plan
from vitrim.words.spec import Spec

__all__ = ["Method"]

GONE = 1e-5
"""A gate of ``resrep`` below this has gone."""

Share = Annotated[float, Field(ge=0, le=1)]


class Method(Node):
    """Merge neighbouring tokens and cut channels that training can do without.

    Attributes:
        train: the search's own training, up to the cut; see above for its epochs. The default is the short one.
        merges: (after which block, ``w`` or ``h``), from 1; empty for none. None puts them at the thirds, on models
            without windows, and fewer where those alone would leave the budget unspent.
        form: how neighbours are merged, see `vitrim.words.steps.GridMerge`.
        size_bias: whether attention counts merged patches; for merging without training.
        scorer: see above.
        rank: whether groups go by score for each multiply-accumulate saved, or by score.
        equal_qkv: whether queries, keys and values of a head keep the same width.
        same_index: whether all heads keep the same channels.
        prune_attention: whether heads' channels are cut.
        prune_mlp: whether neurons are.
        group_attention, group_mlp: slots that go together.
        floor_attention, floor_mlp: slots that stay.
        average: how slowly ``taylor`` scores follow.
        hysteresis: what a masked channel's score is multiplied by.
        warmup, ramp_end, cut: ends of the phases, as shares of the whole run.
        refresh: steps between two choices of masks; None for 200 (100 below 20,000 steps), and at least 20 choices on
            the ramp.
        order: ``joint`` merges from the beginning; ``channel_first`` scores and ranks channels on all tokens and merges
            at the cut.
        gate_lr: of ``resrep``; None lets a masked gate fall to zero within 7 % of the run.
        gate_l1: pull on its gates.
        gate_momentum: of their steps.
    """

    needs: ClassVar[str] = "images"
    sentence: ClassVar[str] = (
        "CAIT-style: merges neighbouring tokens, and re-chooses while training which channels all heads keep evenly"
    )

    train: Train = Train(
        epochs=18,
        batch=1024,
        lr=2e-4,
        weight_decay=0.05,
        warmup_epochs=1,
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        augment=Augment(kind="full"),
        distill=Distill(kind="hard", alpha=0.25),
    )
    merges: tuple[Merge, ...] | None = None
    form: Literal["linear", "mean", "channel"] = "linear"
    size_bias: bool = False
    scorer: Literal["taylor", "resrep"] = "taylor"
    rank: Literal["cost", "score"] = "cost"
    equal_qkv: bool = True
    same_index: bool = False
    prune_attention: bool = True
    prune_mlp: bool = True
    group_attention: PositiveInt = 8
    group_mlp: PositiveInt = 32
    floor_attention: PositiveInt = 8
    floor_mlp: PositiveInt = 32
    average: Annotated[float, Field(ge=0, lt=1)] = 0.99
    hysteresis: Annotated[float, Field(gt=0, le=1)] = 0.9
    warmup: Share = 0.05
    ramp_end: Share = 0.5
    cut: Annotated[float, Field(gt=0, le=1)] = 0.6
    refresh: PositiveInt | None = None
    order: Literal["joint", "channel_first"] = "joint"
    gate_lr: Annotated[float, Field(gt=0)] | None = None
    gate_l1: Annotated[float, Field(ge=0)] = 1e-4
    gate_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99

    @property
    def shared(self) -> tuple[str, ...]:
        """What search and child have in common: all that the learning rate of a step depends on."""
        return RATES if self.cut < 1 else ()

    @model_validator(mode="after")
    def _phases(self) -> Self:
        if not self.warmup < self.ramp_end <= self.cut:
            raise ValueError(
                f"phases must follow one another, but warmup, ramp_end and cut are {self.warmup:g}, {self.ramp_end:g}, "
                f"{self.cut:g}"
            )
        if self.train.precision == "fp16":
            raise ValueError("train.precision must be fp32 or bf16, for a loss scale would change scores, but is fp16")
        return self

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
        """See `vitrim.methods.Method.search`; also the state that training goes on from.

        Raises:
            MethodError: if merges are asked for that the model cannot have, or leave the budget unspent.
            BudgetError: if merges and floors cost more than the budget.
        """
        if data is None or data.train is None:
            raise MethodError("cait must train, but no data was given; give data or use magnitude")
        spec = describe(model)
        steps = self.merging(spec, budget)
        counted = steps.child(spec)
        trained = copy.deepcopy(model) if self.order == "channel_first" else apply(model, steps)
        taken = steps_of(data.train, self.train, data.input)
        whole = round(taken / self.cut)
        channels = self._channels(trained, whole)
        fitted: Fitted | None = None
        if taken:

            def after_step(_: nn.Module, step: int) -> None:
                self.after_step(channels, step + 1, taken, whole, counted, spec, budget)

            fitted = fit(
                channels,
                data.train,
                self.train,
                input=data.input,
                seed=seed,
                teacher=teacher,
                folder=folder,
                log=log,
                validation=data.validation,
                stage="search",
                after_step=after_step,
                until=self.cut,
            )
        elif channels.paths:
            raise MethodError("cait must train to score channels, but method.train.epochs is 0; raise it")
        return self._found(channels, fitted, spec, steps, model.training)

    def merging(self, spec: Spec, budget: Budget) -> Plan:
        """The plan that merges tokens, and cuts nothing else.

        Raises:
            MethodError: see `search`.
            BudgetError: see `search`.
        """
        whole, prunes = cost_of(spec), self.prune_attention or self.prune_mlp

        def made(merges: tuple[Merge, ...]) -> tuple[Plan, float]:
            plan = merge_plan(spec, merges, self.form, self.size_bias)
            return plan, budget.spent(cost_of(plan.child(spec)), whole)

        if self.merges is not None or any(stage.window is not None for stage in spec.stages):
            plan, spent = made(self.merges or ())
        else:
            both = thirds(spec)
            plan, spent = made(both)
            for fewer in (both[:1], both[1:], ()):
                if spent < 1 - SLACK:
                    plan, spent = made(fewer)
        if spent < 1 - SLACK:
            raise MethodError(
                f"merges must leave at least {1 - SLACK:.0%} of {budget} to spend, but cost {spent:.1%} of it; merge "
                "later or less, or lower the budget"
            )
        if spent > 1 and not prunes:
            raise BudgetError(
                f"budget must be met by merges alone, as no channel is cut, but they cost {spent:.1%} of {budget}; "
                "merge earlier or more, or raise it"
            )
        return plan

    def after_step(
        self, channels: Channels, done: int, taken: int, whole: int, counted: Spec, spec: Spec, budget: Budget
    ) -> None:
        """Score channels, and choose masks anew where it is time.

        Args:
            channels: the masked model, gradients still in place.
            done: steps taken.
            taken: steps of this search.
            whole: T.
            counted: the merged model, as it is counted.
            spec: the parent.
            budget: what the child may cost.
        """
        channels.learn()
        start = round(self.warmup * whole)
        if not channels.paths or (done < taken and (done < start or (done - start) % self._refresh(whole))):
            return
        last, merged = done == taken, cost_of(counted)
        share = 1.0 if last else done / whole
        limits = {
            name: ramped(share, max(getattr(merged, name), limit), limit, self.warmup, self.ramp_end)
            for name, limit in budget.limits(cost_of(spec)).items()
        }
        ranked_at = spec if self.order == "channel_first" else None
        scores = channels.scores(self.hysteresis)
        channels.keep(allocate_slots(counted, scores, limits, self.rules, ranked_at=ranked_at, fine=last))

    @property
    def rules(self) -> Rules:
        """How slots are made and taken."""
        return Rules(
            group_attention=self.group_attention,
            group_mlp=self.group_mlp,
            floor_attention=self.floor_attention,
            floor_mlp=self.floor_mlp,
            by_cost=self.rank == "cost",
            equal_qkv=self.equal_qkv,
            same_index=self.same_index,
        )

    def _refresh(self, whole: int) -> int:
        usual = self.refresh or (200 if whole >= 20_000 else 100)
        ramp = (self.ramp_end - self.warmup) * whole
        return usual if self.refresh else max(1, min(usual, math.floor(ramp / 20)))

    def _channels(self, model: nn.Module, whole: int) -> Channels:
        falls = max(1, round(0.07 * whole)) * max(self.gate_l1, 1e-12)
        return Channels(
            model,
            free_axes(model, self.prune_attention, self.prune_mlp),
            scorer=self.scorer,
            average=self.average,
            gate_lr=self.gate_lr or (1 - self.gate_momentum) / falls,
            gate_l1=self.gate_l1,
            momentum=self.gate_momentum,
        )

    def _found(self, channels: Channels, fitted: Fitted | None, spec: Spec, steps: Plan, training: bool) -> Found:
        """What the masks say, with the state of the training cut alike."""
        masks = channels.masks()
        left = _left(channels)
        plan = plan_of(spec, masks, steps)
        parent = channels.fold_gates()
        parent.train(training)
        start = None
        if fitted is not None and self.cut < 1:
            averaged = None
            if fitted.ema is not None:
                assert isinstance(fitted.ema, Channels)
                averaged = apply(fitted.ema.fold_gates(), plan).state_dict()
            start = Start(done=self.cut, averages=_cut_averages(parent, plan, fitted.averages), ema=averaged)
        told = {"revived": int(channels.revived), **left}
        child = plan.child(spec)
        tokens = [
            flow.leaves.patches / stage.patches
            for (_, stage, _), flow in zip(child.blocks(), child.flows(), strict=True)
        ]
        trials = tuple(
            {**record, "tokens": share, **told} for record, share in zip(remains(spec, child, {}), tokens, strict=True)
        )
        return Found(plan=plan, parent=parent, trials=trials, start=start)


@torch.no_grad()
def _left(channels: Channels) -> dict[str, Any]:
    """How many gates of ``resrep`` that are cut had not gone yet: only where none is left is the cut exact."""
    if channels.scorer != "resrep":
        return {}
    cut = [channels.scores()[path][channels.mask(path).cpu() == 0] for path in channels.paths]
    return {"gates_not_gone": sum(int((gates > GONE).sum()) for gates in cut)}


def _cut_averages(
    parent: nn.Module, plan: Plan, averages: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """The optimiser's state of what is kept, by the child's names.

    Gates of ``resrep`` that were folded into the weights are not folded into their averages: kept gates stay near 1.
    """
    inner = {name.removeprefix("model."): state for name, state in averages.items()}
    cut: dict[str, dict[str, Tensor]] = {}
    for key in sorted({key for state in inner.values() for key in state}):
        values = {name: state[key] for name, state in inner.items() if key in state}
        for name, value in cut_tensors(parent, plan, values).items():
            cut.setdefault(name, {})[key] = value
    return cut
