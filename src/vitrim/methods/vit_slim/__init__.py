"""ViT-Slim: train gates on channels, neurons and tokens with an l1 penalty, and rank them over the whole network.

H heads, K channels of a head, M hidden neurons, P patches, N tokens including prefix tokens.

Source: Chavan et al., "Vision Transformer Slimming: Multi-Dimension Searching in Continuous Optimization Space", CVPR
2022, arXiv 2201.00814. One gate for each (block, head, channel), shared by query, key and value, one for each (block,
neuron) after the activation, and one for each (block, patch) on the outputs of both norms, squashed by tanh; weights
and gates are trained together with the task loss and
``attention_l1 * sum |z_attention| + mlp_l1 * sum |z_mlp| + token_l1 * sum |tanh p|``; each kind is ranked as one list
over all blocks.

A kind with a given share (`attention`, `mlp`, `tokens`) keeps that share of its list, as in the paper. The budget is
met by the other kinds: channels are filled, the token list is bisected, and both keep the same share if both are free.

Where we differ from the authors' code, on purpose:

- The code divides its penalty weights by the number of processes and then averages gradients, so its published command
  (four processes, 2e-4 and 5e-5) trains with a quarter of the given values. Ours are the effective weights for any
  number of processes.
- The code trains its final network with masks and cuts nothing. Ours is cut before it is trained again.
- The code drops the gates' values (`export = "binarize"`). Folding them into the weights keeps the function of the
  searched model, which is a better start for short training; `"binarize"` remains for the published protocol.
- Gates of a kind without penalty are not trained, and do not exist; the code leaves a factor 0.995 on all tokens.
- Gates of channels act through the weights, the same function with the same gradients (`vitrim.cut.observe.Gated`).
- The code gates, penalizes and may cut the class token; here prefix tokens are always kept, because the head reads
  them.
- The code masks tokens, but counts costs as if they were removed. Ours are removed (`dropping = "drop"`), which is
  another function: masked tokens still act as keys, with their biases. ``"drop_exact"`` keeps one key in their place.
- A token's gate cannot be folded into weights that all tokens share; those of kept tokens become 1 in either export.
- The weights of the penalty are measured on the model by default (`penalty`, `vitrim.methods.vit_slim.pressure`).
- The residual width may have gates, too (`width_l1`), wherever the stream is read; the paper cuts it nowhere.
- Shares count tokens before sets shrink with depth; the resulting numbers are in ``Found.trials``.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vitrim.cut.fill import Choice, fill, quantiles
from vitrim.cut.shares import (
    Rule,
    check_shares,
    check_spent,
    consistent,
    give_back,
    kept_count,
    largest,
    remains,
    share_plan,
    top,
    with_tokens,
)
from vitrim.data import Augment, eval_loader
from vitrim.families import describe
from vitrim.methods import Data, Found
from vitrim.methods._init import calibrates, closed_form, compensation, in_order
from vitrim.methods.vit_slim.gates import (
    TokenGated,
    gate_model,
    gate_scores,
    l1_penalty,
    set_apart,
    token_scores,
)
from vitrim.methods.vit_slim.pressure import PRESSURE, curvatures
from vitrim.nn.copying import copied
from vitrim.nn.weights import home_of
from vitrim.train import Distill, Train, fit, ranks
from vitrim.train.leading import led
from vitrim.words.budget import Budget
from vitrim.words.errors import MethodError, PlanError
from vitrim.words.plain import Node
from vitrim.words.plan import Plan
from vitrim.words.progress import counted, progress
from vitrim.words.spec import Spec
from vitrim.words.steps.drop import Drop

__all__ = ["Method", "TokenGated", "gate_model", "gate_scores", "l1_penalty", "token_scores"]

Share = Annotated[float, Field(ge=0, le=1)]

PUBLISHED = {"attention": 5e-5, "mlp": 1.25e-5, "token": 2.5e-5, "width": 5e-5}
"""Effective weights of the published search; that of the residual width is ours."""
_MEASURED, _PART = 256, 16
"""Largest number of images that penalties are measured on, and how many of them at a time."""


class Method(Node):
    """Train gates with an l1 penalty and keep the largest.

    Attributes:
        train: the search's own training; what is not given is the published one (50 epochs, AdamW, constant 5e-4).
        penalty: ``measured``: a kind whose weight below is the published one is penalized by half of the mean squared
            gradient of its gates, measured before the search on at most 256 calibration images (or training images if
            there are none), and other weights in proportion, so twice the published weight is twice that.
            ``published``: by the weights below as they are.
        attention_l1: weight of the sum of attention gates; 0 does not cut attention. Published: 5e-5.
        mlp_l1: weight of the sum of MLP gates; 0 does not cut MLPs. Published: 1.25e-5.
        token_l1: weight of the sum of token gates; 0 does not cut tokens. Published: 2.5e-5 (1e-4 over four processes).
        width_l1: weight of the sum of the gates on the residual width, which are not in the paper; 0 does not cut it.
            It counts as those of attention do.
        attention: share of head channels to keep; None to choose it by the budget.
        mlp: share of neurons to keep; None to choose it by the budget.
        tokens: share of (block, patch) pairs to keep; None to choose it by the budget.
        meet: what the share of tokens counts: ``nominal`` pairs before sets shrink (published), or ``realised`` after.
        consistency: how sets are made to shrink with depth, see `vitrim.cut.shares.Rule`.
        prefix: ``included`` gates, penalizes and counts prefix tokens as the authors' code does; they are kept anyway.
        dropping: ``drop`` removes tokens; ``drop_exact`` adds one key in their place, which equals the masked model.
        gate_lr: learning rate of the gates; None for that of the weights (published), too small for hundreds of steps.
        ranking: ``signed`` cuts the most negative gate first, as published; ``absolute`` the one nearest to 0.
        export: ``fold`` multiplies the gates into the weights, ``binarize`` drops them.
        choice: which widths are allowed, see `vitrim.cut.fill.Choice`; ``free`` is the published one.
        init: what the search starts from; the function of the model is the same. ``published``: all gates are 1.
            ``closed_form``: heads get channels in the order of their value (`vitrim.cut.compensate.turned`), and gates
            start between 0.9 and 1 in the order of what each channel loses if it alone is removed and the others
            compensate (`vitrim.cut.compensate.losses`), with the weights divided by them; what stays after the search
            compensates for the cut. For short searches.
    """

    needs: ClassVar[str] = "images"
    plans_by_time: ClassVar[bool] = True
    sentence: ClassVar[str] = "trains l1-penalized gates on channels together with the weights and keeps the largest"

    train: Train = Train(
        epochs=50,
        batch=1024,
        lr=5e-4,
        weight_decay=1e-3,
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
    penalty: Literal["measured", "published"] = "measured"
    attention_l1: Annotated[float, Field(ge=0)] = 5e-5
    mlp_l1: Annotated[float, Field(ge=0)] = 1.25e-5
    token_l1: Annotated[float, Field(ge=0)] = 0.0
    width_l1: Annotated[float, Field(ge=0)] = 0.0
    attention: Share | None = None
    mlp: Share | None = None
    tokens: Share | None = None
    meet: Literal["nominal", "realised"] = "nominal"
    consistency: Rule = "suffix_or"
    prefix: Literal["kept", "included"] = "kept"
    dropping: Literal["drop", "drop_exact"] = "drop"
    gate_lr: Annotated[float, Field(gt=0)] | None = None
    ranking: Literal["signed", "absolute"] = "signed"
    export: Literal["fold", "binarize"] = "fold"
    choice: Choice = "even"
    init: Literal["published", "closed_form"] = "published"

    @property
    def cuts_width(self) -> bool:
        """Return whether plans may cut the residual width."""
        return self.width_l1 > 0

    @model_validator(mode="after")
    def _searched(self) -> Self:
        for kind, share, weight in (
            ("attention", self.attention, self.attention_l1),
            ("mlp", self.mlp, self.mlp_l1),
            ("tokens", self.tokens, self.token_l1),
        ):
            if share is not None and share < 1 and not weight:
                name = kind.removesuffix("s")
                raise ValueError(f"{kind} must be 1 where it is not searched, but is {share:g}; set {name}_l1 above 0")
        if (self.attention is not None or self.mlp is not None) and self.choice != "free":
            raise ValueError(f"shares of channels need choice=free, but choice is {self.choice}; leave one out")
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
        if data is None or data.train is None:
            raise MethodError("vit_slim must train its gates, but no data was given; give data or use magnitude")
        start = in_order(model, data, seed) if self.init == "closed_form" else copied(model)
        gated = gate_model(
            start,
            attention=self.attention_l1 > 0,
            mlp=self.mlp_l1 > 0,
            tokens=self.token_l1 > 0,
            prefix=self.prefix == "included",
            width=self.width_l1 > 0,
        )
        if self.init == "closed_form":
            set_apart(gated, {path: one.losses for path, one in led(lambda: closed_form(start, data, seed)).items()})
        kinds = gate_scores(gated, self.ranking)[1]
        check_shares(describe(model), kinds, self._fixed(set(kinds.values())), budget, bool(gated.tokens))
        weights = led(lambda: self.weights(gated, data, seed))
        if log is not None and ranks.first():
            log({"stage": "gates", "event": "penalty"} | {f"{kind}_l1": weight for kind, weight in weights.items()})
        fit(
            gated,
            data.train,
            self.train,
            input=data.input,
            seed=seed,
            teacher=teacher,
            penalty=l1_penalty(**weights),
            groups=self._groups,
            folder=folder,
            log=log,
            validation=data.validation,
            stage="search",
            device=home_of(model)[0],
        )
        gates, parent = (copied(gated), gated.fold_()) if self.export == "fold" else (gated, gated.model)
        parent.train(model.training)

        def read(budget: Budget) -> Found:
            plan, trials = self.decide(describe(model), gates, budget)
            grafts = compensation(parent, plan, data, seed) if self.init == "closed_form" else {}
            return Found(plan=plan, parent=parent, grafts=grafts, trials=trials, again=read)

        return read(budget)

    def weights(self, gated: "TokenGated", data: Data, seed: int) -> dict[str, float]:
        """Return the weight of the penalty of each kind: ``attention``, ``mlp``, ``token``, ``width``.

        Args:
            gated: the gated model before its search; left as it was.
            data: images, for measured weights.
            seed: of the labels that the measurement draws from the model's own output.

        Raises:
            MethodError: if gradients of gates are to be measured, but are not finite or all zero.
        """
        given = {"attention": self.attention_l1, "mlp": self.mlp_l1, "token": self.token_l1, "width": self.width_l1}
        if self.penalty == "published":
            return given
        images: Any = data.train if data.calibration is None else data.calibration
        batches = itertools.islice(eval_loader(images, data.input, batch=_PART), _MEASURED // _PART)
        with progress("gradients of gates", 0) as advance:
            found = curvatures(gated, counted(batches, advance), seed=seed)
        return {
            kind: weight / PUBLISHED[kind] * PRESSURE * found[kind] if kind in found else 0.0
            for kind, weight in given.items()
        }

    def decide(self, spec: Spec, gated: "TokenGated", budget: Budget) -> tuple[Plan, tuple[dict[str, Any], ...]]:
        """Return the plan for the current gates, and records of how much of every block it keeps.

        Raises:
            BudgetError: if the shares cost more than the budget.
            MethodError: if the shares leave part of the budget unused, or a gate is not finite.
        """
        scores, kinds = gate_scores(gated, self.ranking)
        tokens = token_scores(gated, self.ranking)
        fixed = self._fixed(set(kinds.values()))
        rest = {path for path, kind in kinds.items() if kind not in fixed}
        parent, limits = budget.cost(spec), budget.limits(budget.cost(spec))

        def spent(keep: Mapping[str, Tensor]) -> float:
            """Return the share of the budget used with these tokens, and the same share of the free channels."""
            share = float(torch.cat(list(keep.values())).double().mean())
            shares = fixed | {kinds[path]: share for path in rest}
            plan = with_tokens(spec, share_plan(spec, scores, kinds, shares), self._steps(keep, spec))
            try:
                return budget.spent(budget.cost(plan.child(spec)), parent)
            except PlanError:
                return 0.0  # a block is empty, so the cost is below any budget

        best = top(tokens, self._count(tokens, spec, spent))
        if tokens and self.tokens is None and not rest:
            best = give_back(tokens, best, spent)
        plan = with_tokens(spec, share_plan(spec, scores, kinds, fixed), self._steps(best, spec))
        small = plan.child(spec)
        over = {name: float(limit) for name, limit in limits.items() if limit < getattr(budget.cost(small), name)}
        if over and rest:
            ranks = quantiles({path: scores[path] for path in scores if path in rest}, kinds)
            rests = fill(small, ranks, budget.bounded(over), choice=self.choice, by="score")
            plan = plan.then(rests, spec)
        child = plan.child(spec)
        check_spent(child, spec, budget, self.choice)
        return plan, remains(spec, child, {path: float(keep.double().mean()) for path, keep in best.items()})

    def _fixed(self, searched: set[str]) -> dict[str, float]:
        """Return the requested shares of channels, by kind."""
        given = {"attention": self.attention, "mlp": self.mlp}
        fixed = {kind: share for kind, share in given.items() if share is not None}
        for kind, share in fixed.items():
            if share < 1 and kind not in searched:
                raise MethodError(f"{kind} must be 1 for this model, whose norms tie its channels, but is {share:g}")
        return {kind: share for kind, share in fixed.items() if kind in searched}

    def _count(
        self, tokens: Mapping[str, Tensor], spec: Spec, spent: Callable[[Mapping[str, Tensor]], float] = lambda _: 0.0
    ) -> int:
        """Return the number of entries of the token list to keep, for the requested share or for the budget."""
        share, size = self.tokens, sum(values.numel() for values in tokens.values())
        if share is None:
            return largest(size, lambda count: spent(top(tokens, count)) <= 1)
        if self.meet == "nominal":
            return kept_count(size, share)
        pairs = spec.stages[0].patches * len(tokens)

        def fits(count: int) -> bool:
            return sum(len(step.kept) for step in self._steps(top(tokens, count), spec).values()) <= share * pairs

        return largest(size, fits)

    def _steps(self, best: Mapping[str, Tensor], spec: Spec) -> dict[str, Drop]:
        """Return the patches that each block runs on if the `best` of the token list are kept."""
        if not best:
            return {}
        patches, exact = spec.stages[0].patches, self.dropping == "drop_exact"
        sets = consistent(torch.stack([keep[-patches:] for keep in best.values()]), self.consistency)
        return {
            path: Drop(kept=tuple(row.nonzero().flatten().tolist()), exact=exact)
            for path, row in zip(best, sets, strict=True)
        }

    def _groups(self, gated: nn.Module) -> list[dict[str, Any]]:
        """Return parameter groups with the gates in their own group, because they decay (published), unlike norms."""
        assert isinstance(gated, TokenGated)
        group = {"params": [*gated.gates.values(), *gated.tokens.values()], "weight_decay": self.train.weight_decay}
        return [group if self.gate_lr is None else group | {"lr": self.gate_lr}]
