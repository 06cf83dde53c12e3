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
  epoch is picked by hand. Here the search stops after the first epoch that meets the budget. Its structure is then
  projected onto the budget: one threshold over all gates, and the rest of the budget is filled with the next best.
- A skipped attention adds nothing in search and after (``skip = "zero"``). Theirs adds nothing in search and its own
  normed input afterwards; ``"norm"`` is for released weights.
- A Swin's 3 x 3 convolution reads the whole feature map in search and after. Theirs reads single windows in search
  (``windowed``); no released Swin has such a convolution.
- Gates of the cheaper choices are not detached if the more expensive ones are open: the gradient is zero anyway.
- Norms over channels, q/k norms, other grids and any number of prefix tokens are supported if they change nothing.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from vitrim.data import Augment
from vitrim.families import describe
from vitrim.methods import Data, Found
from vitrim.methods.spvit import gates
from vitrim.methods.spvit.planning import as_evaluated, check_reach, decide, grafts, planned, told
from vitrim.methods.spvit.published import check_budget, published
from vitrim.methods.spvit.search import Counting, Layout, SinglePath, layout, prices, times
from vitrim.nn.weights import home_of
from vitrim.train import Distill, Stop, Train, fit, steps_of
from vitrim.words.budget import Budget
from vitrim.words.errors import MethodError
from vitrim.words.plain import Node
from vitrim.words.spec import Spec, folded

__all__ = ["Method"]

_GATE_LR = 1e-3


class Method(Node):
    """Learn which attentions a convolution can replace, and which neurons can be cut.

    Attributes:
        train: the search's training; the published one by default. The gates are trained with it, and drawn once for
            each part of a step on each process. Batch norms normalize over the images of one part, ``batch /
            (accumulate * processes)`` of them. So ``accumulate = 4`` gives a different search (four draws per step,
            batch norms over a quarter of the images), and so does another number of processes.
        gate_lr: learning rate of the gates. None for the published 1e-3, with which a gate needs 1,500 steps to close,
            or for ``3 / steps`` in a search of less than 3,000 steps, in which gates would otherwise hardly change.
        pressure: weight of the penalty, for a cost in G; None for a weight that makes the penalty start at `first`.
        first: initial value of the penalty if no `pressure` is given; the authors advise slightly above the task loss.
        target: cost in G that the penalty pulls toward; None for the budget's.
        counting: how the penalty counts, see `vitrim.methods.spvit.search.Counting`; budgets always count every
            product.
        stop: whether to stop after the first epoch that meets the budget.
        temperature: of the mixture over heads; None for the published ones, 0.01, and 100 for Swin. Logits move by
            about the learning rate a step: at 0.01 each slot picks a head, at 100 all heads stay mixed alike.
        inherit: the weights that training starts from: ``dense``, the model's own weights, as published, or ``search``,
            the weights that the search has trained, with mixtures and batch norms.
        prefix: the output of a convolution for prefix tokens, see `vitrim.words.spec.Conv`.
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
    gate_lr: PositiveFloat | None = None
    pressure: Annotated[float, Field(ge=0)] | None = None
    first: PositiveFloat = 4.0
    target: PositiveFloat | None = None
    counting: Counting = "published"
    stop: bool = True
    temperature: PositiveFloat | None = None
    inherit: Literal["dense", "search"] = "dense"
    prefix: Literal["norm", "zero"] = "norm"
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
        return self

    @property
    def asks(self) -> str:
        """Return the data that this search needs; a released structure needs none."""
        return "nothing" if self.structure is not None else self.needs

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
        how = layout(spec, temperature=self.temperature, prefix=self.prefix, leaves=self.skip)
        if self.structure is not None:
            plan = published(self.structure, spec, how)
            check_budget(self.structure, plan.child(spec), spec, budget)
            return Found(plan=plan, parent=model)
        check_reach(spec, how, budget)
        if data is None or data.train is None:
            raise MethodError("spvit must train its gates, but no data was given; give data or use magnitude")
        single = SinglePath(copy.deepcopy(model), how, self.windowed)
        gate_lr = self.gate_lr or max(_GATE_LR, 2 * gates.START / max(1, steps_of(data.train, self.train, data.input)))
        fit(
            single,
            data.train,
            self.train,
            input=data.input,
            seed=seed,
            teacher=teacher,
            penalty=self.penalty(spec, how, budget),
            groups=lambda _: [{"params": single.gate_parameters(), "lr": gate_lr, "weight_decay": 0.0}],
            folder=folder,
            log=log,
            validation=data.validation,
            stage="search",
            after_step=self._stopper(spec, how, budget, data),
            device=home_of(model)[0],
        )
        single.model.train(model.training)

        def read(budget: Budget) -> Found:
            levels, neurons = decide(spec, single, how, budget)
            plan, trials = planned(spec, how, levels, neurons), told(spec, single, how, levels, neurons)
            if self.inherit == "dense":
                return Found(plan=plan, parent=model, trials=trials, again=read)
            return Found(plan=plan, parent=single.model, grafts=grafts(single, levels), trials=trials, again=read)

        return read(budget)

    def penalty(self, spec: Spec, how: Layout, budget: Budget) -> Callable[[nn.Module], Tensor]:
        """Return the penalty ``pressure * (F - target)^2`` of a `SinglePath`, F and target in G, or in seconds."""
        priced = prices(spec, how, self.counting) if budget.latency is None else times(spec, how, budget)
        whole = priced.constant + sum(map(sum, priced.steps.values()))
        whole += sum(priced.neurons[f"{path}.hidden"] * (block.hidden or 0)
                     for path, _, block in spec.blocks() if f"{path}.hidden" in priced.neurons)  # fmt: skip
        parent = budget.cost(spec)
        shares = [limit / getattr(parent, name) for name, limit in budget.limits(parent).items()]
        target = self.target if self.target is not None else min(shares) * whole / 1e9
        pressure = self.pressure
        if pressure is None:
            gap = whole / 1e9 - target
            pressure = self.first / gap**2 if gap > 0 else 0.0

        def penalty(single: nn.Module) -> Tensor:
            assert isinstance(single, SinglePath)
            return pressure * (priced.total(single) / 1e9 - target).square()

        return penalty

    def _stopper(self, spec: Spec, how: Layout, budget: Budget, data: Data) -> Callable[[nn.Module, int], None]:
        """Return a function that ends the search after the first epoch whose structure meets the budget."""
        assert data.train is not None
        steps = steps_of(data.train, self.train.model_copy(update={"epochs": 1}), data.input)
        parent = budget.cost(spec)

        def after(single: nn.Module, step: int) -> None:
            if not self.stop or (step + 1) % steps:
                return
            assert isinstance(single, SinglePath)
            levels, neurons = as_evaluated(single)
            child = folded(planned(spec, how, levels, neurons).child(spec))
            if budget.admits(budget.cost(child), parent):
                raise Stop

        return after
