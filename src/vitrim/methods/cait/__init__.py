"""CAIT-style: merge neighboring patches of the grid, and cut channels evenly over heads, re-selected during training.

H heads, K channels of a head, M hidden neurons, P patches, T steps of the whole run.

Source: "CAIT: Triple-Win Compression towards High Accuracy, Fast Inference, and Favorable Transferability For ViTs",
Wang et al., arXiv 2309.15755 (v1 2023, v2 2025). **The method section could not be read.** The abstracts state that
neighboring tokens are integrated so that the spatial structure stays (ATME), that channels are pruned dynamically, and
those of attention uniformly (CDCP), and that both are applied together. Everything else here is our decision, so
results are "CAIT-style" and not the paper's.

Tokens: pairs of patches become one, along the columns after a third of the blocks and along the rows after two
thirds, by a linear map that starts as their mean (`vitrim.words.steps.GridMerge`). A grid stays a grid.

Channels: during training they are scored, masked, scored again and possibly unmasked. The same number of channels is
kept in all heads of a block, and of queries, keys and values (`vitrim.methods.cait.slots`), so attention stays one
dense call. The budget that masks are chosen for falls from the cost after merging to the requested budget.

The run of T steps is split at the cut (`cut`, 0.6 T). Before it is this search: warm-up without masks, the ramp, and a
hold in which masks may still change. After it is the run's own training of the child. Both share one learning rate
schedule, and the optimizer's averages and the averaged weights of all that is kept are passed on (``Found.start``). So
for a run of 30 epochs set ``method.train.epochs = 18`` and ``train.epochs = 12``, with the same rates and batch. Those
that a recipe's ``train`` leaves out are taken from ``method.train``, and other values raise an error (`Method.shared`).

Scores. ``taylor``: the average of the squared gradient of the loss with respect to the mask. For masked channels it is
the first-order effect of unmasking them. ``resrep`` (Ding et al., ICCV 2021, of the same group): gates with a penalty
that pulls them to zero; only unmasked gates get the gradient of the loss. The score is the gate's magnitude. The
paper's matrix is a diagonal here.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from vitrim.cut.surgery import apply, cut_tensors
from vitrim.data import Augment
from vitrim.families import describe
from vitrim.methods import Data, Found
from vitrim.methods._init import calibrates, in_order
from vitrim.methods._ramp import ramped
from vitrim.methods.cait.masks import Channels, Merge, free_axes, merge_plan, thirds
from vitrim.methods.cait.slots import Rules, allocate_slots, plan_of
from vitrim.methods.cait.told import block_records, choice_record
from vitrim.nn.copying import copied
from vitrim.nn.weights import home_of
from vitrim.train import RATES, Distill, Fitted, Start, Train, fit, ranks, steps_of
from vitrim.words.budget import SLACK, Budget
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plain import Node
from vitrim.words.plan import Plan
from vitrim.words.spec import Spec, why_not_mixed

__all__ = ["Method"]

Share = Annotated[float, Field(ge=0, le=1)]


class Method(Node):
    """Merge neighboring tokens and cut channels that are chosen during training.

    Attributes:
        train: the search's own training, up to the cut; see above for its epochs. The default is the short one.
        merges: pairs of (block after which to merge, counted from 1; ``w`` or ``h``); empty for none. None merges after
            one third and two thirds of the blocks on models without windows, and less if those merges alone would
            leave part of the budget unused.
        form: how neighbors are merged, see `vitrim.words.steps.GridMerge`.
        size_bias: whether attention weights merged patches by their size; for merging without training.
        scorer: see above.
        rank: whether groups are ranked by score per multiply-accumulate saved, or by score.
        equal_qkv: whether queries, keys and values of a head keep the same width.
        same_index: whether all heads keep the same channels.
        prune_attention: whether heads' channels are cut.
        prune_mlp: whether neurons are cut.
        group_attention, group_mlp: number of slots that are cut together.
        floor_attention, floor_mlp: least number of slots to keep.
        average: decay of the moving average of ``taylor`` scores.
        hysteresis: factor on the score of masked channels.
        warmup, ramp_end, cut: ends of the phases, as shares of the whole run.
        refresh: steps between two choices of masks; None for 200 (100 below 20,000 steps), with at least 20 choices on
            the ramp.
        init: what the search starts from; the function of the model is the same. ``published``: the model as it is.
            ``closed_form``: heads get channels in the order of their value (`vitrim.cut.compensate.turned`).
        order: ``joint`` merges from the beginning; ``channel_first`` scores and ranks channels on all tokens and merges
            at the cut.
        gate_lr: learning rate of the gates of ``resrep``; None for one with which a masked gate falls to zero within
            7 % of the run.
        gate_l1: weight of the l1 penalty on the gates.
        gate_momentum: momentum of the gates' steps.
    """

    needs: ClassVar[str] = "images"
    plans_by_time: ClassVar[bool] = True
    sentence: ClassVar[str] = (
        "CAIT-style: merges neighboring tokens and selects, during training, the same number of channels in all heads"
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
    init: Literal["published", "closed_form"] = "published"
    order: Literal["joint", "channel_first"] = "joint"
    gate_lr: Annotated[float, Field(gt=0)] | None = None
    gate_l1: Annotated[float, Field(ge=0)] = 1e-4
    gate_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99

    @property
    def shared(self) -> tuple[str, ...]:
        """Return the training settings that search and child share: all that determine a step's learning rate."""
        return RATES if self.cut < 1 else ()

    @model_validator(mode="after")
    def _phases(self) -> Self:
        if not self.warmup < self.ramp_end <= self.cut:
            raise ValueError(
                f"phases must follow one another, but warmup, ramp_end and cut are {self.warmup:g}, {self.ramp_end:g}, "
                f"{self.cut:g}"
            )
        if self.train.precision == "fp16":
            raise ValueError(
                "train.precision must be fp32 or bf16, because a loss scale would change scores, but is fp16"
            )
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
        """See `vitrim.methods.Method.search`; the result includes the state that training continues from.

        Raises:
            MethodError: if the model cannot have the requested merges, or they leave part of the budget unused.
            BudgetError: if the model with all merges and the smallest widths costs more than the budget.
        """
        if data is None or data.train is None:
            raise MethodError("cait must train, but no data was given; give data or use magnitude")
        spec = describe(model)
        steps = self.merging(spec, budget)
        counted = steps.child(spec)
        start = in_order(model, data, seed) if self.init == "closed_form" else model
        trained = copied(start) if self.order == "channel_first" else apply(start, steps)
        taken = steps_of(data.train, self.train, data.input)
        whole = round(taken / self.cut)
        channels = self._channels(trained, whole)
        fitted: Fitted | None = None
        if taken:

            def after_step(_: nn.Module, step: int) -> None:
                told = self.after_step(channels, step + 1, taken, whole, counted, spec, budget, steps)
                if told is not None and log is not None and ranks.first():
                    log(told)

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
                device=home_of(model)[0],
            )
        elif channels.paths:
            raise MethodError("cait must train to score channels, but method.train.epochs is 0; raise it")
        return self._found(channels, fitted, spec, steps, model.training)

    def merging(self, spec: Spec, budget: Budget) -> Plan:
        """Return the plan that merges tokens and cuts nothing else.

        Raises:
            MethodError: see `search`.
            BudgetError: see `search`.
        """
        whole, prunes = budget.cost(spec), self.prune_attention or self.prune_mlp

        def made(merges: tuple[Merge, ...]) -> tuple[Plan, float]:
            plan = merge_plan(spec, merges, self.form, self.size_bias)
            return plan, budget.spent(budget.cost(plan.child(spec)), whole)

        if self.merges is not None or any(map(why_not_mixed, spec.stages)):
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
        self,
        channels: Channels,
        done: int,
        taken: int,
        whole: int,
        counted: Spec,
        spec: Spec,
        budget: Budget,
        steps: Plan,
    ) -> dict[str, Any] | None:
        """Score channels, and choose new masks if this step is due; then return the record of the choice.

        Args:
            channels: the masked model, with the gradients of the step.
            done: number of steps taken.
            taken: number of steps of this search.
            whole: T.
            counted: spec of the merged model, used to count costs.
            spec: the parent.
            budget: limit on the child's cost.
            steps: the plan of the merges.
        """
        channels.learn()
        start = round(self.warmup * whole)
        if not channels.paths or (done < taken and (done < start or (done - start) % self._refresh(whole))):
            return None
        last, merged = done == taken, budget.cost(counted)
        share = 1.0 if last else done / whole
        limits = {
            name: ramped(share, max(getattr(merged, name), limit), limit, self.warmup, self.ramp_end)
            for name, limit in budget.limits(budget.cost(spec)).items()
        }
        ranked_at = spec if self.order == "channel_first" else None
        scores = channels.scores(self.hysteresis)
        masks = allocate_slots(counted, scores, limits, self.rules, ranked_at=ranked_at, fine=last, budget=budget)
        channels.keep(masks)
        return choice_record(done, limits, masks, spec, budget, steps)

    @property
    def rules(self) -> Rules:
        """Return the rules by which slots are formed and cut."""
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
        """Return the plan of the current masks, and the training state cut in the same way."""
        masks = channels.masks()
        plan = plan_of(spec, masks, steps)
        trials = block_records(spec, plan.child(spec), channels)
        parent = channels.fold_gates()
        parent.train(training)
        start = None
        if fitted is not None and self.cut < 1:
            averaged = None
            if fitted.ema is not None:
                assert isinstance(fitted.ema, Channels)
                averaged = apply(fitted.ema.fold_gates(), plan).state_dict()
            start = Start(done=self.cut, averages=_cut_averages(parent, plan, fitted.averages), ema=averaged)
        return Found(plan=plan, parent=parent, trials=trials, start=start)


def _cut_averages(
    parent: nn.Module, plan: Plan, averages: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state of the kept weights, by the child's names.

    Gates of ``resrep`` that were folded into the weights are not folded into their averages: kept gates stay near 1.
    """
    inner = {name.removeprefix("model."): state for name, state in averages.items()}
    cut: dict[str, dict[str, Tensor]] = {}
    for key in sorted({key for state in inner.values() for key in state}):
        values = {name: state[key] for name, state in inner.items() if key in state}
        for name, value in cut_tensors(parent, plan, values).items():
            cut.setdefault(name, {})[key] = value
    return cut
