"""What every family must keep, whoever wrote it: laws that `check_family` tries on each of its presets."""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import families
from vitrim.cut import surgery
from vitrim.cut.observe import Gated, axes, masked
from vitrim.cut.width import keeping
from vitrim.deploy import store
from vitrim.families import describe
from vitrim.measure import counted
from vitrim.nn import Attention
from vitrim.testing._trying import Broken, broken, report
from vitrim.testing.samples import (
    apart,
    keeps_constants,
    kept_widths,
    masks_of,
    places,
    random_images,
    random_plan,
    sample_model,
)
from vitrim.testing.tolerance import EXACT, SINGLE
from vitrim.words.costs import cost_of
from vitrim.words.errors import PlanError, SpecError
from vitrim.words.plain import dump, load
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Host, Spec

__all__ = ["FAMILY_LAWS", "Sample", "check_family"]

SEEDS = range(4)


def check_family(family: ModuleType | str, *, presets: Iterable[str] | None = None) -> None:
    """Try every law of `FAMILY_LAWS` on small models of a family: dense, and cut by random plans.

    The family must be installed, as its entry point says, so that its models are found by their classes.

    Args:
        family: the module, or the name of its entry point.
        presets: some of its ``TEST_PRESETS``; None for all.

    Raises:
        AssertionError: with every law that does not hold, and the preset that it was tried on.
        SpecError: if the family lacks something, or two give one name.
    """
    name = family if isinstance(family, str) else _name_of(family)
    found: Broken = []
    for preset in families.get(name).TEST_PRESETS if presets is None else presets:
        found += broken(FAMILY_LAWS, Sample.of(name, preset), f"preset {preset} of {name}")
    report(found)


def _name_of(module: ModuleType) -> str:
    name = next((name for name in families.names() if families.get(name) is module), None)
    if name is None:
        raise AssertionError(
            f"{module.__name__}: a family must be found by its entry point, but none in {families.GROUP} names this "
            "module; declare it in pyproject.toml and install the package"
        )
    return name


@dataclass(frozen=True)
class Sample:
    """One preset of a family.

    Attributes:
        family: its name.
        preset: name of the preset.
        parent: `vitrim.testing.samples.sample_model`, adopted, in float64; laws leave it as it is.
    """

    family: str
    preset: str
    parent: nn.Module

    @classmethod
    def of(cls, family: str, preset: str) -> "Sample":
        """Build and adopt the preset."""
        return cls(family, preset, families.adopt(sample_model(family, preset)))

    @functools.cached_property
    def spec(self) -> Spec:
        """The structure of `parent`."""
        return describe(self.parent)

    @functools.cached_property
    def images(self) -> Tensor:
        """Two images, ``(2, C, h, w)``."""
        return random_images(self.spec)


def family_is_found(sample: Sample) -> Iterator[str]:
    """The family owns the class of its example, and the spec of it names the family."""
    found = families.name_of(sample.parent)
    if found != sample.family:
        yield f"a model of {type(sample.parent).__name__} must be of {sample.family}, but is found to be of {found}"
    if sample.spec.family != sample.family:
        yield f"the spec must name {sample.family}, but names {sample.spec.family}"


@torch.no_grad()
def adopting_keeps_logits_and_names(sample: Sample) -> Iterator[str]:
    """An adopted model has the class, the parameters and the logits of the one that came, and shares no memory."""
    theirs = sample_model(sample.family, sample.preset, torch.float32)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = families.adopt(theirs)
    if type(ours) is not type(theirs):
        yield f"an adopted model must stay a {type(theirs).__name__}, but is a {type(ours).__name__}"
    if list(ours.state_dict()) != list(before):
        odd = sorted(set(ours.state_dict()) ^ set(before))
        yield f"adopting must keep the names of parameters and their order, but {', '.join(odd) or 'the order'} differs"
    if not all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items()):
        yield "adopting must leave the model that came as it was, but changed its weights"
    if {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in theirs.parameters()}:
        yield "an adopted model must share no memory with the one that came, but does"
    x = random_images(describe(theirs), dtype=torch.float32)
    yield from _far("adopting must keep the logits", ours(x), theirs(x), SINGLE)


@torch.no_grad()
def mask_is_cut(sample: Sample) -> Iterator[str]:
    """0/1 masks at the taps and surgery give equal logits; norms over the residual stream run over what is kept."""
    for seed in SEEDS:
        plan = random_plan(sample.spec, seed, widths=seed % 2 == 1)
        with masked(sample.parent, masks_of(sample.spec, plan)), keeping(sample.parent, kept_widths(plan)):
            expected = sample.parent(sample.images)
        child = surgery.apply(sample.parent, plan)
        yield from _far(f"plan {seed}: a cut must equal a mask", child(sample.images), expected)


@torch.no_grad()
def mask_of_tokens_is_cut(sample: Sample) -> Iterator[str]:
    """Tokens in the exact form too, on those that stay: a head that pools patches sees fewer, another function."""
    stage = sample.spec.stages[0]
    if stage.window is not None or not stage.form.one_key_for_zeros:  # no token can be cut, or none in the exact form
        return
    for seed in SEEDS:
        plan = random_plan(sample.spec, seed, drops="exact")
        parent: Any = sample.parent
        with masked(parent, masks_of(sample.spec, plan)):
            expected = parent.forward_features(sample.images)[:, places(plan.child(sample.spec))]
        child: Any = surgery.apply(parent, plan)
        found = child.forward_features(sample.images)
        yield from _far(f"plan {seed}: dropped tokens must equal masked ones", found, expected)


def cost_is_counted(sample: Sample) -> Iterator[str]:
    """Arithmetic on the spec equals PyTorch's counter on a forward pass, exactly."""
    cut = [sample.parent]
    for seed in SEEDS:
        cut.append(surgery.apply(sample.parent, random_plan(sample.spec, seed, drops="mixed", widths=seed % 2 == 0)))
    for seed in (7, SEEDS[1]):
        cut.append(surgery.apply(sample.parent, random_plan(sample.spec, seed, convs="folded")))
    for number, model in enumerate(cut):
        priced, found = cost_of(describe(model)), counted(model)
        if priced != found:
            yield f"model {number}: a spec must cost what PyTorch counts, {found}, but costs {priced}"


@torch.no_grad()
def nothing_is_identity(sample: Sample) -> Iterator[str]:
    """A plan that keeps all gives the same spec and the same logits, bit for bit."""
    child = surgery.apply(sample.parent, Plan.keep(sample.spec))
    if not Plan.keep(sample.spec).child(sample.spec) == sample.spec == describe(child):
        yield "a plan that keeps all must give the same spec, but gives another"
    yield from _other("a plan that keeps all must keep the logits", child(sample.images), sample.parent(sample.images))


@torch.no_grad()
def plans_compose(sample: Sample) -> Iterator[str]:
    """Two plans one after the other are one plan, bit for bit.

    Plans that make convolutions cut no residual width here: a convolution is made from the channels that are there. So
    is the constant of a branch that a norm follows, see `vitrim.words.plan.Plan.then`.
    """
    for seed in range(5):
        for more in ({"drops": "mixed"}, {"convs": "mixed"}) if seed in SEEDS else ({"convs": "mixed"},):
            wide = {"widths": seed % 2 == 1 and "drops" in more}
            first = random_plan(sample.spec, seed, **more, **wide)  # type: ignore[arg-type]
            second = random_plan(first.child(sample.spec), seed + 100, **more, **wide)  # type: ignore[arg-type]
            steps = surgery.apply(surgery.apply(sample.parent, first), second)
            once = surgery.apply(sample.parent, first.then(second, sample.spec))
            if describe(steps) != describe(once):
                yield f"plans {seed} with {more}: two cuts must give the spec of one, but give another"
            if keeps_constants(first, second, sample.spec):
                rule = f"plans {seed} with {more}: two cuts must be one"
                yield from _other(rule, steps(sample.images), once(sample.images))


def paper_is_paper(sample: Sample) -> Iterator[str]:
    """Specs and plans that are stored and read are the same."""
    spec = sample.spec
    if load(Spec, dump(spec)) != spec:
        yield "a spec must be equal to what is read of it, but is not"
    for seed in SEEDS:
        for plan in (random_plan(spec, seed, drops="mixed", widths=True), random_plan(spec, seed, convs="mixed")):
            child = plan.child(spec)
            if load(Plan, dump(plan)) != plan or load(Spec, dump(child)) != child:
                yield f"plan {seed}: a plan and its child's spec must be equal to what is read of them, but are not"


@torch.no_grad()
def built_from_paper(sample: Sample) -> Iterator[str]:
    """A model is its spec and its weights: built from the spec, or loaded, it gives the same logits, bit for bit."""
    plans = [random_plan(sample.spec, 3, drops="mixed", widths=True), random_plan(sample.spec, 3, convs="mixed")]
    for child in (sample.parent, *(surgery.apply(sample.parent, plan) for plan in plans)):
        again = families.build(describe(child)).double().eval()
        again.load_state_dict(child.state_dict())
        with tempfile.TemporaryDirectory() as folder:
            stored = store.load(store.save(child, Path(folder) / "model.safetensors")).eval()
        for how, other in (("built from its spec", again), ("stored and loaded", stored)):
            if describe(other) != describe(child):
                yield f"a model that is {how} must have its spec, but has another"
            yield from _other(f"a model that is {how} must keep its logits", other(sample.images), child(sample.images))


@torch.no_grad()
def parent_is_untouched(sample: Sample) -> Iterator[str]:
    """Cutting leaves the parent alone, bit for bit, also where a plan is refused."""
    parent, spec = sample.parent, sample.spec
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    child = surgery.apply(parent, random_plan(spec, 2, drops="mixed"))
    for parameter in child.parameters():
        parameter.zero_()
    try:
        surgery.apply(parent, Plan.of(spec, [BlockPlan(hidden=(5, 5))] * len(spec.blocks())))
        yield "a plan that keeps a neuron twice must be refused, but was carried out"
    except PlanError:
        pass
    if describe(parent) != spec:
        yield "cutting must leave the parent's spec as it was, but changed it"
    if not all(torch.equal(value, before[name]) for name, value in parent.state_dict().items()):
        yield "cutting must leave the parent's weights as they were, but changed them"


@torch.no_grad()
def fused_is_unfused(sample: Sample) -> Iterator[str]:
    """Both paths of attention give the same logits after any cut."""
    for seed in SEEDS:
        child = surgery.apply(sample.parent, random_plan(sample.spec, seed, drops="mixed"))
        answers = []
        for fused in (True, False):
            for module in child.modules():
                if isinstance(module, Attention):
                    module.fused_attn = fused
            answers.append(child(sample.images))
        yield from _far(f"plan {seed}: fused attention must equal the unfused", answers[0], answers[1])


def gates_through_weights_are_gates_at_taps(sample: Sample) -> Iterator[str]:
    """Gates that multiply weights give the logits and gradients of gates on activations, and can be folded in."""
    parent, x = copy.deepcopy(sample.parent), sample.images
    draw = torch.Generator().manual_seed(0)
    gates = {
        path: torch.randn(axis.size, dtype=torch.float64, generator=draw)
        for path, axis in axes(parent).items()
        if axis.scales
    }
    gated = Gated(parent, gates)
    names = ("qkv.weight", "v_proj.weight")
    weights = [parameter for name, parameter in parent.named_parameters() if name.endswith(names)]
    taps = {path: gate.clone().requires_grad_() for path, gate in gates.items()}
    with masked(parent, taps):
        expected = parent(x)
    expected.square().mean().backward()
    wanted = [_gradient(weight).clone() for weight in weights]
    parent.zero_grad()
    found = gated(x)
    found.square().mean().backward()
    yield from _far("gates through the weights must give the logits of gates at the taps", found, expected)
    for weight, gradient in zip(weights, wanted, strict=True):
        yield from _far("gates through the weights must give weights the same gradients", _gradient(weight), gradient)
    for path, gate in taps.items():
        yield from _far(f"the gate of {path} must have one gradient", _gradient(gated.gate(path)), _gradient(gate))
    with torch.no_grad():
        yield from _far("folded gates must keep the logits", gated.fold_()(x), expected)


def arguments_are_closed(sample: Sample) -> Iterator[str]:
    """A host with an argument that the family does not declare, of another type, or with a name to fetch is refused."""
    spec = sample.spec
    known = dict(spec.host.arguments)
    first = sorted(known)[0]
    for what, changes in (
        ("an argument that loads a file", {"arguments": {**known, "checkpoint_path": "weights.pth"}}),
        ("a table in place of a value", {"arguments": {**known, first: {"a": 1}}}),
        ("a name to fetch", {"name": "hf-hub:owner/name"}),
        ("a path", {"name": "local-dir:/models"}),
    ):
        host = load(Host, {**dump(spec.host), **changes})
        try:
            families.build(spec.model_copy(update={"host": host}))
        except SpecError:
            continue
        yield f"a host with {what} must be refused, but was built"


FAMILY_LAWS: tuple[Callable[[Sample], Iterator[str]], ...] = (
    family_is_found,
    adopting_keeps_logits_and_names,
    mask_is_cut,
    mask_of_tokens_is_cut,
    cost_is_counted,
    nothing_is_identity,
    plans_compose,
    paper_is_paper,
    built_from_paper,
    parent_is_untouched,
    fused_is_unfused,
    gates_through_weights_are_gates_at_taps,
    arguments_are_closed,
)
"""Each takes a sample and gives a sentence for whatever does not hold."""


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _far(rule: str, found: Tensor, expected: Tensor, allowed: float = EXACT) -> Sequence[str]:
    """A sentence if two tensors are further apart than allowed, relative to the largest entry, or not finite."""
    if found.shape != expected.shape:
        return [f"{rule}, but shapes are {tuple(found.shape)} and {tuple(expected.shape)}"]
    difference = apart(found, expected)
    return [] if difference < allowed else [f"{rule} within {allowed:g}, but they differ by {difference:.1e}"]


def _other(rule: str, found: Tensor, expected: Tensor) -> Sequence[str]:
    """A sentence if two tensors are not equal, bit for bit."""
    if torch.equal(found, expected):
        return []
    return [f"{rule}, bit for bit, but they differ by {apart(found, expected):.1e}"]
