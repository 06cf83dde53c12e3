"""One child of every kind that a plan can make: widths, branches, convolutions in all states, and token steps.

Weights that a child does not have from its parent (merges, mixtures, batch norms) are drawn, so that all of them
matter.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import nn

from tests.samples import FEW, WHOLE, adopted, random_plan
from vitrim.cut import surgery
from vitrim.families import describe
from vitrim.words.errors import PlanError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Conv, Mixture, Skip, Spec
from vitrim.words.steps.drop import Drop
from vitrim.words.steps.grid_merge import GridMerge
from vitrim.words.steps.merge import Merge
from vitrim.words.steps.top_k import TopK


def _each(spec: Spec, decide: Callable[[int, object, object], BlockPlan]) -> Plan:
    return Plan.of(spec, [decide(i, stage, block) for i, (_, stage, block) in enumerate(spec.blocks())])


def _first(spec: Spec, decide: Callable[[object, object], BlockPlan]) -> Plan:
    """A decision about the first block of each stage."""
    blocks = [
        decide(stage, block) if i == 0 else BlockPlan() for stage in spec.stages for i, block in enumerate(stage.blocks)
    ]
    return Plan.of(spec, blocks)


def _widths(spec: Spec, cut: Callable[[int, int], int]) -> Plan:
    """Keep ``cut(width, n)`` channels of head n and neurons, wherever no norm ties them."""

    def decide(i, stage, block):
        form, mixer, fields = stage.form, block.mixer, {}
        keep = [tuple(range(cut(k, h))) for h, k in enumerate(mixer.v)]
        if not form.ties_qk:
            fields["qk"] = tuple(keep)
        if form.mixed_norm is None:
            fields["v"] = tuple(keep)
        if form.hidden_norm is None:
            fields["hidden"] = tuple(range(cut(block.hidden, i)))
        return BlockPlan(**fields)

    return _each(spec, decide)


def _heads(spec: Spec) -> Plan:
    def decide(i, stage, block):
        if stage.form.mixed_norm is not None:
            raise PlanError("a norm over all heads ties them")
        gone = i % len(block.mixer.v)
        kept = tuple(() if h == gone else tuple(range(k)) for h, k in enumerate(block.mixer.v))
        return BlockPlan(qk=kept, v=kept)

    return _each(spec, decide)


def _unequal(spec: Spec) -> Plan:
    """Values of another width than queries and keys."""

    def decide(i, stage, block):
        if stage.form.mixed_norm is None:
            return BlockPlan(v=tuple(tuple(range(k - 3)) for k in block.mixer.v))
        return BlockPlan(qk=tuple(tuple(range(k - 3)) for k in block.mixer.qk))

    return _each(spec, decide)


def _dead(spec: Spec) -> Plan:
    """Branches that are their output bias: the attention, the MLP, both."""

    def decide(i, stage, block):
        fields = {}
        if i % 3 != 1 and stage.form.mixed_norm is None:
            fields |= {"qk": ((),) * len(block.mixer.qk), "v": ((),) * len(block.mixer.v)}
        if i % 3 != 0 and stage.form.hidden_norm is None:
            fields["hidden"] = ()
        if stage.form.mixed_norm is not None and stage.form.hidden_norm is not None:
            raise PlanError("norms tie all channels")
        return BlockPlan(**fields)

    return _each(spec, decide)


def _skips(spec: Spec) -> Plan:
    kinds = [{"mixer": Skip()}, {"mlp": Skip()}, {"mixer": Skip(leaves="norm")}, {"mixer": Skip(), "mlp": Skip()}]
    return _each(spec, lambda i, stage, block: BlockPlan(**kinds[i % 4]))


def _conv(spec: Spec, kernel: int, state: str, prefix: str) -> Plan:
    def decide(i, stage, block):
        if state == "linear":
            return BlockPlan(mixer=Conv(kernel=kernel, width=stage.width // 2 + 1, prefix=prefix, act="none"))
        width = min(block.mixer.v) - 1
        mixture = Mixture(heads=len(block.mixer.v), temperature=1.0) if state == "mixed" else None
        conv = Conv(kernel=kernel, width=width, prefix=prefix, mixture=mixture, norm=state != "folded")
        return BlockPlan(mixer=conv, v=(tuple(range(width)),) * len(block.mixer.v))

    return _each(spec, decide)


def _dropped(spec: Spec, exact: bool) -> Plan:
    drop = Drop(kept=tuple(range(0, spec.stages[0].patches, 2)), exact=exact)
    return _each(spec, lambda i, stage, block: BlockPlan(tokens=drop))


def _grid(spec: Spec, form: str, sized: bool) -> Plan:
    axes = ["w", "h"]
    steps = [GridMerge(axis=axis, form=form, size_bias=sized) for axis in axes]
    return _each(spec, lambda i, stage, block: BlockPlan(tokens=steps[i] if i < 2 else None))


def _grid_conv(spec: Spec) -> Plan:
    """A convolution on a merged grid, whose prefix tokens read tokens that count several times."""
    steps = GridMerge(axis="w", form="mean", size_bias=True)
    conv = Conv(kernel=1, width=spec.stages[0].width // 2, prefix="attention", act="none")
    decisions = [BlockPlan(tokens=steps), BlockPlan(mixer=conv)]
    return _each(spec, lambda i, stage, block: decisions[i] if i < 2 else BlockPlan())


def _merged(spec: Spec) -> Plan:
    """Merging in both forms, the second one with sizes."""
    steps = [Merge(count=3), Merge(count=3, by="tokens", keeps_norm=True)]
    return _each(spec, lambda i, stage, block: BlockPlan(tokens=steps[i] if i < 2 else None))


def _merged_conv(spec: Spec) -> Plan:
    """1 x 1 convolutions behind merged patches, whose prefix tokens read tokens of several patches."""
    merge = Merge(count=3, by="tokens", keeps_norm=True)
    conv = Conv(kernel=1, width=spec.stages[0].width // 2, prefix="attention", act="none")
    return _each(spec, lambda i, stage, block: BlockPlan(tokens=merge) if i == 0 else BlockPlan(mixer=conv))


def _merged_dead(spec: Spec) -> Plan:
    """Merging by the stream itself, between two branches that are constants."""
    if any(stage.form.mixed_norm or stage.form.hidden_norm for stage in spec.stages):
        raise PlanError("norms tie all channels")
    none = ((),) * len(spec.stages[0].blocks[0].mixer.v)
    return _first(spec, lambda stage, block: BlockPlan(qk=none, v=none, hidden=(), tokens=Merge(count=3)))


def _conv_dead(spec: Spec) -> Plan:
    """A convolution before an MLP that is a constant."""
    plan = _conv(spec, 1, "folded", "zero")
    if any(stage.form.hidden_norm for stage in spec.stages):
        raise PlanError("a norm ties all neurons")
    return Plan.of(spec, [block.model_copy(update={"hidden": ()}) for block in plan.blocks()])


def _top_k(spec: Spec, fused: bool, weighed: bool) -> Plan:
    stage = spec.stages[0]
    weights = tuple(0.5 + (7 * i % 5) / 5 for i in range(stage.patches)) if weighed else ()
    step = TopK(
        kept=stage.prefix + stage.patches // 2, fused=fused, weights=weights, by="hsic_attn" if weighed else "cls_attn"
    )
    return _first(spec, lambda stage, block: BlockPlan(tokens=step))


def _prefix(spec: Spec) -> Plan:
    last = len(spec.blocks()) - 1
    return _each(spec, lambda i, stage, block: BlockPlan(only_prefix=i == last))


KINDS: dict[str, Callable[[Spec], Plan]] = {
    "dense": Plan.keep,
    "even": lambda spec: _widths(spec, lambda width, _: width - 1 - width % 2),
    "free": lambda spec: _widths(spec, lambda width, n: max(1, width - 1 - (3 * n) % 5)),
    "heads": _heads,
    "unequal": _unequal,
    "dead": _dead,
    "skips": _skips,
    **{
        f"conv{kernel}-{state}-{prefix}": functools.partial(_conv, kernel=kernel, state=state, prefix=prefix)
        for kernel in (1, 3)
        for state in ("mixed", "normed", "folded")
        for prefix in ("norm", "zero")
    },
    **{
        f"conv{kernel}-{state}-{prefix}": functools.partial(_conv, kernel=kernel, state=state, prefix=prefix)
        for kernel in (1, 3)
        for state, prefix in (("linear", "mean"), ("linear", "attention"), ("mixed", "attention"))
    },
    "grid-conv1-read": _grid_conv,
    "dropped": functools.partial(_dropped, exact=False),
    "dropped-exact": functools.partial(_dropped, exact=True),
    **{
        f"grid-{form}{'-sized' * sized}": functools.partial(_grid, form=form, sized=sized)
        for form in ("linear", "mean", "channel")
        for sized in (False, True)
    },
    "conv1-dead": _conv_dead,
    "merged": _merged,
    "merged-dead": _merged_dead,
    "merged-conv1-read": _merged_conv,
    "top_k": functools.partial(_top_k, fused=True, weighed=False),
    "top_k-weighed": functools.partial(_top_k, fused=False, weighed=True),
    "only_prefix": _prefix,
    **{f"random-{seed}": functools.partial(random_plan, seed=seed, drops="mixed") for seed in range(2)},
    **{f"random-conv-{seed}": functools.partial(random_plan, seed=seed, convs="mixed") for seed in range(2)},
}
"""A plan for each kind, or `PlanError` where a model cannot have it."""

ONE_OF_EACH = (
    "dense",
    "free",
    "heads",
    "unequal",
    "dead",
    "skips",
    "conv1-folded-norm",
    "conv3-folded-zero",
    "conv1-linear-mean",
    "dropped",
    "dropped-exact",
    "grid-linear-sized",
    "merged",
    "top_k",
    "only_prefix",
    "random-0",
    "random-conv-0",
)
"""Kinds for presets but the first of a family: norms, widths and stems are others there, states of a kind are not."""

STEPS = {"dropped": Drop, "grid-linear": GridMerge, "merged": Merge, "top_k": TopK}
CHOOSING = ("merged", "merged-dead", "top_k", "top_k-weighed")
"""Kinds whose tokens are chosen image by image: a rounding may change the choice."""


def child_of(parent: nn.Module, kind: str) -> nn.Module | None:
    """The child of this kind, in evaluation mode; None where the model cannot have it."""
    spec = describe(parent)
    try:
        child = surgery.apply(parent, KINDS[kind](spec))
    except PlanError:
        return None
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, value in child.state_dict(keep_vars=True).items():
            if ".step." in name or name.endswith((".mix", ".bn.weight", ".bn.bias", ".bn.running_mean")):
                noise = torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value)
                value += 0.25 * noise / math.sqrt(value.shape[-1] if ".step.delta" in name else 1)
            elif name.endswith(".attn.bias"):
                value *= 40  # a constant branch that is large next to the stream changes which tokens are alike
            elif name.endswith(".bn.running_var"):
                value *= 0.5 + torch.rand(value.shape, generator=draw, dtype=torch.float64).to(value)
    return child.eval()


@functools.cache
def child(family: str, preset: str, kind: str) -> nn.Module | None:
    """The same of a preset, in float64; shared between tests, so it must be left as it is."""
    return child_of(adopted(family, preset), kind)


def has(spec: Spec, kind: str) -> bool:
    """Whether a child of `kind` has what the kind is named after."""
    blocks = [block for _, _, block in spec.blocks()]
    if kind.startswith("conv"):
        return any(isinstance(block.mixer, Conv) and block.mixer.kernel == int(kind[4]) for block in blocks)
    for name, step in STEPS.items():
        if kind.startswith(name.partition("-")[0]):
            return any(isinstance(block.tokens, step) for block in blocks)
    if kind == "dead":
        return any(isinstance(block.mixer, Attention) and not block.mixer.v for block in blocks)
    return True


def children(family: str, preset: str) -> list[tuple[str, nn.Module]]:
    """Every child that this preset can have, with its kind; one of each group of kinds where it is not the first."""
    kinds = KINDS if WHOLE or (family, preset) in FEW else ONE_OF_EACH
    return [(kind, model) for kind in kinds if (model := child(family, preset, kind)) is not None]
