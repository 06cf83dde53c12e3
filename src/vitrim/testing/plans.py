"""Hypothesis strategies that draw plans over every kind of cut: widths, branches, convolutions, token steps.

Nothing here knows how many kinds of token steps there are: a step is drawn from the fields of its class, so a kind that
is added is drawn because its file exists. Some of the plans that are drawn cannot be carried out; a test asks
``plan.child(spec)`` and expects a `vitrim.words.errors.PlanError` or a model that works.
"""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from pydantic import ValidationError

from vitrim.words.block import why_not_read
from vitrim.words.errors import PlanError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Block, Conv, Form, Mixture, Skip, Spec, Stage
from vitrim.words.steps import StepBase, kinds

__all__ = ["kinds_in", "plans", "steps"]


@st.composite
def plans(draw: st.DrawFn, spec: Spec, *, tokens: bool = True, convolutions: bool = True) -> Plan:
    """Plans for models of structure `spec`.

    Args:
        draw: given by hypothesis.
        spec: of the parent.
        tokens: whether token steps and `only_prefix` are drawn.
        convolutions: whether convolutions are drawn.
    """
    widths = draw(_widths(spec))
    decisions: list[BlockPlan] = []
    rows = spec.blocks()
    for index, (_, stage, block) in enumerate(rows):
        parts: list[dict[str, Any]] = [draw(_mlps(stage.form, block)), draw(_mixers(stage, block, convolutions))]
        if tokens and draw(st.booleans()):
            parts.append({"tokens": draw(steps(stage))})
        if tokens and index == len(rows) - 1:
            parts.append({"only_prefix": draw(st.booleans())})
        careless = draw(st.integers(0, 15)) == 0
        fields: dict[str, Any] = {}
        for part in draw(st.permutations(parts)):
            if careless or _accepted(spec, [*decisions, BlockPlan(**fields, **part)]):
                fields |= part
        decisions.append(BlockPlan(**fields))
    return Plan.of(spec, decisions, widths)


def _accepted(spec: Spec, decisions: list[BlockPlan]) -> bool:
    """Whether the first blocks can be cut so; most plans drawn without looking would be refused."""
    rest = [BlockPlan()] * (len(spec.blocks()) - len(decisions))
    try:
        Plan.of(spec, [*decisions, *rest]).child(spec)
    except PlanError:
        return False
    return True


def steps(stage: Stage) -> st.SearchStrategy[StepBase | None]:
    """Token steps of every kind, for a block of `stage`; None where the fields drawn contradict one another."""
    return st.sampled_from(sorted(kinds())).flatmap(lambda name: _step(kinds()[name], stage))


@st.composite
def _step(draw: st.DrawFn, kind: type[StepBase], stage: Stage) -> StepBase | None:
    fields = {
        name: draw(_values(field.rebuild_annotation(), stage))
        for name, field in kind.model_fields.items()
        if name != "kind" and (field.is_required() or draw(st.booleans()))
    }
    try:
        return kind(**fields)
    except ValidationError:
        return None


def _values(annotation: Any, stage: Stage) -> st.SearchStrategy[Any]:
    """Values of a field of a step, by its type: numbers of tokens, sets of places, one number for each patch, names."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], stage)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of(*(_values(one, stage) for one in arguments))
    if origin is tuple:
        inner = arguments[0]
        while get_origin(inner) is Annotated:
            inner = get_args(inner)[0]
        if inner is int:
            return st.sets(st.integers(0, stage.patches - 1)).map(lambda places: tuple(sorted(places)))
        numbers = st.lists(st.floats(0, 1, width=16), min_size=stage.patches, max_size=stage.patches).map(tuple)
        return st.one_of(st.just(()), numbers)
    simple = {
        bool: st.booleans(),
        int: st.one_of(st.integers(1, max(1, stage.patches // 3)), st.integers(1, stage.tokens)),
        float: st.floats(0, 1),
        type(None): st.none(),
    }
    if annotation not in simple:
        raise TypeError(f"a field of a step must be a number, a name, or a tuple of numbers, but is {annotation}")
    return simple[annotation]


@st.composite
def _widths(draw: st.DrawFn, spec: Spec) -> list[tuple[int, ...] | None]:
    """Kept channels of the residual stream of each stage, if the family says how they are cut."""
    cut = draw(st.booleans()) and (bool(spec.host.channels) or draw(st.integers(0, 15)) == 0)
    return [draw(_some(stage.width)) if cut and draw(st.booleans()) else None for stage in spec.stages]


@st.composite
def _mixers(draw: st.DrawFn, stage: Stage, block: Block, convolutions: bool) -> dict[str, Any]:
    """What becomes of the attention of a block, or of what stands in its place."""
    mixer, form = block.mixer, stage.form
    kind = draw(st.sampled_from(["keep", "heads", "heads", "dead", "skip", "norm", "conv", "conv"]))
    if kind == "skip":
        return {"mixer": Skip()}
    if kind == "norm":
        return {"mixer": Skip(leaves="norm")}
    if kind == "conv" and convolutions:
        return draw(_convolutions(mixer, stage))
    if kind == "keep" or not isinstance(mixer, Attention) or not mixer.v:
        return {}
    if kind == "dead":
        return {"qk": ((),) * len(mixer.qk), "v": ((),) * len(mixer.v)}
    qk, v = [], []
    for a, b in zip(mixer.qk, mixer.v, strict=True):
        gone = form.mixed_norm is None and draw(st.integers(0, 3)) == 0
        qk.append(() if gone else tuple(range(a)) if form.ties_qk else draw(_some(a)))
        v.append(() if gone else tuple(range(b)) if form.mixed_norm is not None else draw(_some(b)))
    return {"qk": tuple(qk), "v": tuple(v)}


@st.composite
def _convolutions(draw: st.DrawFn, mixer: Any, stage: Stage) -> dict[str, Any]:
    if isinstance(mixer, Conv):
        state = draw(st.sampled_from([(mixer.mixture, mixer.norm), (None, mixer.norm), (None, False)]))
        return {"mixer": mixer.model_copy(update={"mixture": state[0], "norm": state[1]})}
    if not isinstance(mixer, Attention) or not mixer.v:
        return {}
    reads = ["attention", "attention"] if why_not_read(stage.form, stage.prefix) is None else []
    kernel, prefix = draw(st.sampled_from([1, 3])), draw(st.sampled_from(["norm", "zero", "mean", *reads]))
    if draw(st.sampled_from([False, False, False, True])):
        rank = draw(st.integers(1, stage.width + 1))
        return {"mixer": Conv(kernel=kernel, width=rank, prefix=prefix, act="none")}
    width = draw(st.integers(1, min(mixer.v)))
    heads = draw(st.sets(st.integers(0, len(mixer.v) - 1), min_size=1))
    v = [tuple(range(n - width, n)) if head in heads else () for head, n in enumerate(mixer.v)]
    mixture = None
    if draw(st.booleans()):
        slots = draw(st.sampled_from(["columns", "centre"]))
        mixture = Mixture(heads=len(heads), temperature=draw(st.sampled_from([0.01, 1.0, 100.0])), slots=slots)
    norm = mixture is not None or draw(st.booleans())
    return {"mixer": Conv(kernel=kernel, width=width, prefix=prefix, mixture=mixture, norm=norm), "v": tuple(v)}


@st.composite
def _mlps(draw: st.DrawFn, form: Form, block: Block) -> dict[str, Any]:
    """What becomes of the MLP of a block."""
    kind = draw(st.sampled_from(["keep", "cut", "cut", "dead", "skip"]))
    if kind == "skip":
        return {"mlp": Skip()}
    if kind == "keep" or not block.hidden or (form.hidden_norm is not None and kind == "cut"):
        return {}
    return {"hidden": () if kind == "dead" else draw(_some(block.hidden))}


def _some(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    """A few of `size` channels, one at least, rising."""
    return st.builds(
        lambda first, step: tuple(range(first, size, step)), st.integers(0, size - 1), st.integers(1, max(1, size // 3))
    )


def kinds_in(spec: Spec) -> set[str]:
    """Names of the kinds of cuts that stand in `spec`, for a test to count that each one was drawn.

    A token step is named by its `kind`; then there are ``conv1``, ``conv3``, ``mixture``, ``linear``, ``reads`` (prefix
    tokens keep the attention beside a convolution), ``skip``, ``skip_norm``, ``dead_attention``, ``dead_mlp``,
    ``skipped_mlp`` and ``only_prefix``.
    """
    found: set[str] = set()
    for _, _, block in spec.blocks():
        mixer = block.mixer
        if isinstance(mixer, Conv):
            found |= {f"conv{mixer.kernel}"} | ({"mixture"} if mixer.mixture is not None else set())
            found |= {"linear"} if mixer.act == "none" else set()
            found |= {"reads"} if mixer.heads is not None else set()
        elif isinstance(mixer, Skip):
            found.add("skip" if mixer.leaves == "zero" else "skip_norm")
        elif not mixer.v:
            found.add("dead_attention")
        found |= {"skipped_mlp"} if block.hidden is None else {"dead_mlp"} if block.hidden == 0 else set()
        found |= {block.tokens.kind} if block.tokens is not None else set()
        found |= {"only_prefix"} if block.only_prefix else set()
    return found
