"""SPViT: replace attention by convolution where possible, in one search with shared weights.

T tokens, H heads, d channels of a head, M hidden neurons.

Source: He, Liu, Pan, Cai, Zhang, Tao, Zhuang, "Pruning Self-attentions into Convolutional Layers in Single Path", TPAMI
2024, doi 10.1109/TPAMI.2024.3355890, arXiv 2111.11802, and the authors' code (the paper's full text was not available).
Each attention has four choices, nothing < a 1 x 1 bottleneck convolution < a 3 x 3 one < attention, and the
convolutions are mixtures of its own value and output projections (`vitrim.nn.conv`). Three ordered gates for each
attention and one gate for each neuron are drawn at every step (Bernoulli, straight-through) and trained together with
the weights, with the task loss and ``pressure * (F - target)^2``. F is the cost in G under deterministic gates.

Where we differ from the authors' code, on purpose:

- A budget is met. Their penalty is two-sided and soft: released structures exceed their targets by 4 to 40 %, and the
  epoch is picked by hand. Here the search stops at the first step that meets the budget (every few are looked at). Its
  structure is then projected onto the budget: one threshold over all gates, and the rest of the budget is filled with
  the next best.
- Where the head reads prefix tokens alone and the gates leave the last block no attention, a structure that keeps it is
  compared, and the one nearer to the dense model is taken.
- A skipped attention adds nothing in search and after (``skip = "zero"``). Theirs adds nothing in search and its own
  normed input afterwards; ``"norm"`` is for released weights.
- A Swin's 3 x 3 convolution reads the whole feature map in search and after. Theirs reads single windows in search
  (``windowed``); no released Swin has such a convolution.
- Gates of the cheaper choices are not detached if the more expensive ones are open: the gradient is zero anyway.
- Convolutions may start from fits to their attention (``init = "closed_form"``, `vitrim.methods.spvit.fitted`), with
  weights of their own, and prefix tokens then keep the attention: what a class token reads in late blocks is what the
  classifier is made of. Published ones are mixtures of the attention's projections.
- Norms over channels, q/k norms, other grids and any number of prefix tokens are supported if they change nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.data import Subset

from vitrim.data import Augment, eval_loader
from vitrim.families import describe
from vitrim.methods import Data, Found
from vitrim.methods._init import calibrates
from vitrim.methods._ramp import ramped
from vitrim.methods.spvit import gates
from vitrim.methods.spvit.fitted import fits, refitted, start_
from vitrim.methods.spvit.planning import check_reach, close_, grafts, meets, nearest, planned, told
from vitrim.methods.spvit.prices import Counting, prices, times
from vitrim.methods.spvit.published import check_budget, published
from vitrim.methods.spvit.search import Layout, Prefix, SinglePath, layout
from vitrim.nn.copying import copied
from vitrim.nn.weights import home_of
from vitrim.train import Distill, Stop, Train, fit, ranks, steps_of
from vitrim.train.leading import led
from vitrim.words.block import why_not_read
from vitrim.words.budget import Budget
from vitrim.words.errors import MethodError
from vitrim.words.plain import Node
from vitrim.words.progress import progress
from vitrim.words.spec import Spec

__all__ = ["Method"]

_GATE_LR = 1e-3

_LONG = 3000
"""Steps from which a search has the published length of a gate's way, 1.5 at 1e-3, twice."""

_AIM = 0.95
"""Target of the penalty, as a share of the budget."""

_LOOK = 5
"""Steps between two looks at whether the budget is met."""

_WARMUP, _RAMP_END = 0.05, 0.8
"""Shares of a search between which a ramp closes gates."""

_OF_PENALTY = ("pressure", "first", "target", "counting", "stop")
"""Settings that only matter where the penalty closes gates."""

_PROBE, _BATCH = 80, 32
"""Number of images on which choices are measured, and images of a batch."""


class Method(Node):
    """Learn which attentions a convolution can replace, and which neurons can be cut.

    Attributes:
        train: the search's training; the published one by default. The gates are trained with it.
        init: what the convolutions start from. ``published``: mixtures of the attention's value and output projections,
            with a new batch norm. ``closed_form``: least-squares fits to the attention on the calibration images; the
            gates then start in the order of what each choice loses. A `structure` always has mixtures.
        rank: width of the bottleneck of fitted convolutions; None for that of a head.
        start: initial logit of the gates. None for the published 1.5, or for 4 in a search of less than 3,000 steps,
            which is too short to repair what the drawn gates of 1.5 destroy: such a network is 8 nats from the dense
            model, and one of 4 is 0.3 nats from it (ViT-Ti, no training).
        draws: draws of the gates in a step, over all of its parts and processes; the published searches average 4
            (DeiT-Ti) or 8, one for each process. Each draw has its own share of the images, and batch norms normalize
            over that share, ``batch / draws`` images, at least two.
        gate_lr: learning rate of the gates. None for the published 1e-3, with which a gate needs 1,500 steps to close,
            or for ``2 start / steps`` in a shorter search, in which gates would otherwise hardly change.
        closing: how gates come to meet the budget. ``penalty``: by gradients of the penalty, as published. ``ramp``: no
            penalty; from 0.05 to 0.8 of the search the budget falls along a cubic from the parent's cost to its own,
            and gates beyond it are closed, the lowest logits first. None for a ramp in a search of less than 3,000
            steps, unless `pressure`, `first`, `target`, `counting` or `stop` is not the default: in so few steps the
            penalty may not close enough gates, and the rest of the cut comes after the search, at once.
        pressure: weight of the penalty, for a cost in G; None for a weight that makes the penalty start at `first`.
        first: initial value of the penalty if no `pressure` is given; the authors advise slightly above the task loss.
        target: cost in G that the penalty pulls toward; None for 0.95 of the budget. All published recipes aim below
            what they keep, because the penalty balances the task loss and does not reach its target.
        counting: how the penalty counts, see `vitrim.methods.spvit.prices.Counting`; budgets always count every
            product.
        stop: whether to stop at the first step that meets the budget, if the penalty closes gates.
        temperature: of the mixture over heads; None for the published ones, 0.01, and 100 for Swin. Logits move by
            about the learning rate a step: at 0.01 each slot picks a head, at 100 all heads stay mixed alike.
        inherit: the weights that training starts from: ``dense``, the model's own weights, as published, or ``search``,
            the weights that the search has trained, with mixtures and batch norms. With fitted convolutions, ``dense``
            fits them again, together with the neurons that stay, to the structure that was found.
        prefix: the output of a convolution for prefix tokens, see `vitrim.words.spec.Conv`. None for their normed input
            (``norm``), as published, or, for fitted convolutions, ``attention``: they go on reading all tokens, for a
            hundredth of an attention's MACs. Where attention has norms or positions, that is a constant (``mean``).
        skip: the output of a skipped attention, see `vitrim.words.spec.Skip`.
        windowed: whether a Swin's 3 x 3 convolutions read single windows while searching, as published.
        structure: name of a released structure (``deit_ti``, ``swin_s`` …) to use instead of a search; see
            `vitrim.methods.spvit.published`.
        least_images: least number of images in a part of a training step, here and in the child's training, because of
            batch norms.
    """

    needs: ClassVar[str] = "images"
    least_images: ClassVar[int] = 2
    plans_by_time: ClassVar[bool] = True
    sentence: ClassVar[str] = (
        "learns which attentions can become convolutions made of their own weights, and which neurons to cut"
    )

    train: Train = Train(
        epochs=21,
        batch=1024,
        lr=1e-4,
        weight_decay=0.05,
        schedule="constant",
        warmup_epochs=0,
        clip=None,
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        drop_path=0.1,
        augment=Augment(kind="full"),
        distill=Distill(kind="none"),
    )
    init: Literal["published", "closed_form"] = "published"
    rank: PositiveInt | None = None
    start: PositiveFloat | None = None
    draws: PositiveInt = 4
    gate_lr: PositiveFloat | None = None
    closing: Literal["penalty", "ramp"] | None = None
    pressure: Annotated[float, Field(ge=0)] | None = None
    first: PositiveFloat = 4.0
    target: PositiveFloat | None = None
    counting: Counting = "published"
    stop: bool = True
    temperature: PositiveFloat | None = None
    inherit: Literal["dense", "search"] = "dense"
    prefix: Prefix | None = None
    skip: Literal["zero", "norm"] = "zero"
    windowed: bool = False
    structure: str | None = None

    @model_validator(mode="after")
    def _several(self) -> Self:
        if self.train.batch < 2 * self.train.accumulate:
            raise ValueError(
                f"train.batch must give batch norms at least 2 images at a time, but is {self.train.batch} in "
                f"{self.train.accumulate} parts; raise it, or lower train.accumulate"
            )
        if self.prefix == "mean" and self.init == "published":
            raise ValueError("prefix=mean must have fitted convolutions, but init is published; set init=closed_form")
        return self

    @property
    def asks(self) -> str:
        """Return the data that this search needs; a released structure needs none."""
        return "nothing" if self.structure is not None else self.needs

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
        """See `vitrim.methods.Method.search`.

        Raises:
            BudgetError: naming the least possible cost, if the budget cannot be met.
            MethodError: if no data is given.
            PlanError: naming the path, if an attention cannot become a convolution.
        """
        spec = describe(model)
        how = self.layout(spec)
        if self.structure is not None:
            plan = published(self.structure, spec, how)
            check_budget(self.structure, plan.child(spec), spec, budget)
            return Found(plan=plan, parent=model)
        check_reach(spec, how, budget)
        if data is None or data.train is None:
            raise MethodError("spvit must train its gates, but no data was given; give data or use magnitude")
        images, probe = _images(data)
        steps = steps_of(data.train, self.train, data.input)
        start = self.start or (gates.START if steps >= _LONG else gates.SURE)
        draws = math.ceil(self.draws / (self.train.accumulate * ranks.count()))
        single = SinglePath(copied(model), how, self.windowed, start=start, draws=draws)
        if how.fitted:
            self._start_(single, model, how, budget, start, images, probe, seed)
        gate_lr = self.gate_lr or max(_GATE_LR, 2 * start / max(1, steps))
        ramps = self._ramps(steps)
        fit(
            single,
            data.train,
            self.train,
            input=data.input,
            seed=seed,
            teacher=teacher,
            penalty=None if ramps else self.penalty(spec, how, budget),
            groups=lambda _: [{"params": single.gate_parameters(), "lr": gate_lr, "weight_decay": 0.0}],
            folder=folder,
            log=log,
            validation=data.validation,
            stage="search",
            after_step=self._ramp(spec, how, budget, steps, start) if ramps else self._stopper(spec, how, budget),
            device=home_of(model)[0],
        )
        single.model.train(model.training)

        def read(budget: Budget) -> Found:
            levels, neurons, tried = nearest(single, spec, how, budget, model, probe)
            plan = planned(spec, how, levels, neurons)
            first, *rest = told(spec, single, how, levels, neurons)
            trials = (first | tried, *rest)
            if self.inherit == "search":
                return Found(plan=plan, parent=single.model, grafts=grafts(single, levels), trials=trials, again=read)
            made = refitted(model, spec, how, levels, neurons, images, seed=seed) if how.fitted else {}
            return Found(plan=plan, parent=model, grafts=made, trials=trials, again=read)

        return read(budget)

    def layout(self, spec: Spec) -> Layout:
        """Return how the attentions of `spec` become convolutions under these settings."""
        if self.init == "published" or self.structure is not None:
            return layout(spec, temperature=self.temperature, prefix=self.prefix or "norm", leaves=self.skip)
        prefix = self.prefix
        if prefix is None:
            refused = any(why_not_read(stage.form, stage.prefix) for stage in spec.stages)
            prefix = "mean" if refused else "attention"
        return layout(spec, prefix=prefix, leaves=self.skip, fitted=True, rank=self.rank)

    def _start_(
        self,
        single: SinglePath,
        model: nn.Module,
        how: Layout,
        budget: Budget,
        start: float,
        images: Sequence[Tensor],
        probe: Sequence[Tensor],
        seed: int,
    ) -> None:
        """Give a search model its fitted convolutions, and gates that start in the order of what they lose."""
        spec = describe(model)
        if not images or not probe:
            raise MethodError(
                "spvit must fit its convolutions on images, but no calibration images were given; give "
                "data.calibration, or use method.init=published"
            )
        priced = prices(spec, how, "counted") if budget.latency is None else times(spec, how, budget)
        with progress("fits", len(spec.blocks())) as advance:
            found = led(lambda: fits(model, how, images, probe, seed=seed, advance=advance))
        start_(single, found, priced, start)

    def penalty(self, spec: Spec, how: Layout, budget: Budget) -> Callable[[nn.Module], Tensor]:
        """Return the penalty ``pressure * (F - target)^2`` of a `SinglePath`, F and target in G, or in seconds."""
        priced = prices(spec, how, self.counting) if budget.latency is None else times(spec, how, budget)
        whole = priced.constant + sum(map(sum, priced.steps.values()))
        whole += sum(priced.neurons[f"{path}.hidden"] * (block.hidden or 0)
                     for path, _, block in spec.blocks() if f"{path}.hidden" in priced.neurons)  # fmt: skip
        parent = budget.cost(spec)
        shares = [limit / getattr(parent, name) for name, limit in budget.limits(parent).items()]
        target = self.target if self.target is not None else _AIM * min(shares) * whole / 1e9
        pressure = self.pressure
        if pressure is None:
            gap = whole / 1e9 - target
            pressure = self.first / gap**2 if gap > 0 else 0.0

        def penalty(single: nn.Module) -> Tensor:
            assert isinstance(single, SinglePath)
            return pressure * (priced.total(single) / 1e9 - target).square()

        return penalty

    def _stopper(self, spec: Spec, how: Layout, budget: Budget) -> Callable[[nn.Module, int], None]:
        """Return a function that ends the search at the first step, of those looked at, that meets the budget."""

        def after(single: nn.Module, step: int) -> None:
            if not self.stop or (step + 1) % _LOOK:
                return
            assert isinstance(single, SinglePath)
            if meets(single, spec, how, budget):
                raise Stop

        return after

    def _ramps(self, steps: int) -> bool:
        """Return whether a search of so many steps closes gates along a ramp."""
        if self.closing is not None:
            return self.closing == "ramp"
        fields = type(self).model_fields
        return steps < _LONG and all(getattr(self, name) == fields[name].default for name in _OF_PENALTY)

    def _ramp(
        self, spec: Spec, how: Layout, budget: Budget, steps: int, start: float
    ) -> Callable[[nn.Module, int], None]:
        """Return a function that closes gates while the budget falls; closed ones are as sure as open ones were."""
        parent = budget.cost(spec)
        limits, last = budget.limits(parent), math.ceil(_RAMP_END * steps)

        def after(single: nn.Module, step: int) -> None:
            done = step + 1
            if done > _WARMUP * steps and (done % _LOOK == 0 or done in (last, steps)):
                assert isinstance(single, SinglePath)
                falling = {
                    name: math.floor(ramped(done / steps, getattr(parent, name), limit, _WARMUP, _RAMP_END))
                    for name, limit in limits.items()
                }
                close_(single, spec, how, budget.bounded(falling), start)

        return after


def _images(data: Data) -> tuple[list[Tensor], list[Tensor]]:
    """Return batches to fit on, and batches of other images to measure on; both empty without calibration images.

    Without validation images, the last fifth of the calibration images is used to measure.
    """
    if data.calibration is None:
        return [], []
    images = _read(data.calibration, data, None)
    if data.validation is not None:
        probe = _read(data.validation, data, _PROBE)
    else:
        images, probe = torch.tensor_split(images, [len(images) - max(1, len(images) // 5)])
    return [list(torch.split(part, _BATCH)) if len(part) else [] for part in (images, probe)]  # type: ignore[return-value]


def _read(dataset: Any, data: Data, most: int | None) -> Tensor:
    """Return the first images of a dataset, ``(B, C, h, w)``."""
    few = dataset if most is None or len(dataset) <= most else Subset(dataset, range(most))
    return torch.cat([x for x, _ in eval_loader(few, data.input, batch=_BATCH)])
