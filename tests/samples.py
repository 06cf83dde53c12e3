"""Models and plans that the laws are tried on: every preset of every family, and random plans for each."""

import functools
import random
from collections.abc import Callable

import torch

from vitrim import families
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Conv, Mixture, Skip, Spec
from vitrim.words.steps.drop import Drop

PRESETS = [(family, name) for family in families.names() for name in families.get(family).TEST_PRESETS]
IDS = [f"{family}-{name}" for family, name in PRESETS]


def without_data(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build on the meta device, or with data where timm cannot (before 1.0.21)."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):
        return build()


def timm_model(family: str, preset: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A random timm model in which every trained parameter matters (no zero biases, no unit norms)."""
    torch.manual_seed(1)
    module = families.get(family)
    model = module.example(**module.TEST_PRESETS[preset])
    for parameter in (p for p in model.parameters() if p.requires_grad):
        centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
        torch.nn.init.normal_(parameter, centre, 0.25)
    return model.to(dtype).eval()


@functools.cache
def _adopted(family: str, preset: str) -> torch.nn.Module:
    return families.adopt(timm_model(family, preset))


def adopted(family: str, preset: str) -> torch.nn.Module:
    """The same, adopted; shared between tests, so it must be left as it is."""
    return _adopted(family, preset)


def images(spec: Spec, count: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 3, *spec.image, generator=torch.Generator().manual_seed(7), dtype=dtype)


def random_plan(spec: Spec, seed: int, skips: bool = True, drops: str = "", convs: str = "") -> Plan:
    """A plan of every kind of cut that the form of each block allows.

    `drops`: whether tokens are dropped too, ``"exact"`` with one key for those missing, ``"mixed"`` with and without.
    `convs`: whether attentions become convolutions too, ``"folded"``, or ``"mixed"`` in any state and folded further.
    """
    rng = random.Random(seed)
    blocks = [_random_block(rng, stage.form, block, skips) for _, stage, block in spec.blocks()]
    if drops and spec.stages[0].window is None and not spec.host.arguments.get("dynamic_img_size"):
        steps = _random_drops(random.Random(seed + 1000), spec, drops == "exact")
        blocks = [block.model_copy(update={"tokens": step}) for block, step in zip(blocks, steps, strict=True)]
    if convs:
        dynamic, rng = bool(spec.host.arguments.get("dynamic_img_size")), random.Random(seed + 2000)
        blocks = [
            _with_conv(rng, stage.form, block, decision, convs, dynamic)
            for (_, stage, block), decision in zip(spec.blocks(), blocks, strict=True)
        ]
    return Plan.of(spec, blocks)


def _with_conv(rng, form, block, decision, convs, dynamic):
    mixer = block.mixer
    if isinstance(mixer, Conv):
        states = {(mixer.mixture, mixer.norm), (None, mixer.norm), (None, False)}
        mixture, norm = rng.choice(sorted(states, key=str))
        later = mixer.model_copy(update={"mixture": mixture, "norm": norm})
        return decision.model_copy(update={"mixer": rng.choice((None, later, Skip(leaves="norm")))})
    if not isinstance(mixer, Attention) or not mixer.v or decision.tokens or form.mixed_norm or rng.random() < 0.4:
        return decision
    if rng.random() < 0.15:
        return decision.model_copy(update={"mixer": Skip(leaves="norm"), "qk": None, "v": None})
    width = rng.randint(1, min(mixer.v))
    v = [tuple(sorted(rng.sample(range(n), width))) if rng.random() < 0.8 else () for n in mixer.v]
    v[0] = v[0] or tuple(range(width))
    heads = sum(map(bool, v))
    mixture = Mixture(heads=heads, temperature=rng.choice((0.01, 1.0, 100.0)), slots=rng.choice(("columns", "centre")))
    if convs == "folded" or rng.random() < 0.4:
        mixture = None
    conv = Conv(
        kernel=1 if dynamic else rng.choice((1, 3)),
        width=width,
        prefix=rng.choice(("norm", "zero")),
        mixture=mixture,
        norm=mixture is not None or (convs != "folded" and rng.random() < 0.5),
    )
    return decision.model_copy(update={"mixer": conv, "qk": None, "v": tuple(v)})


def _random_drops(rng, spec, exact):
    steps, here = [], set(range(spec.stages[0].patches))
    anchor = places(spec)[-1] - spec.stages[0].prefix  # what is left of every block must not be nothing
    for _, _, block in spec.blocks():
        mine = here & set(block.tokens.kept) if block.tokens else here
        step = None
        if rng.random() < 0.6:
            kept = sorted({anchor, *rng.sample(sorted(mine), rng.randint(1, len(mine)))})
            step, mine = Drop(kept=kept, exact=exact or rng.random() < 0.5), set(kept)
        steps.append(step)
        here = mine
    return steps


def places(spec: Spec) -> list[int]:
    """Where the tokens that leave the last block stand among those of the dense model."""
    stage = spec.stages[-1]
    last = stage.blocks[-1].tokens
    kept = range(stage.patches) if last is None else last.kept
    return [*range(stage.prefix), *(stage.prefix + place for place in kept)]


def _some(rng: random.Random, size: int, least: int = 0) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(size), rng.randint(min(least, size), size))))


def _random_block(rng, form, block, skips):
    fields = {}
    if skips and rng.random() < 0.12:
        fields["mixer"] = Skip()
    elif isinstance(block.mixer, Attention) and block.mixer.v and rng.random() < 0.9:
        fields |= _random_heads(rng, form, block.mixer)
    if skips and rng.random() < 0.12:
        fields["mlp"] = Skip()
    elif block.hidden and form.hidden_norm is None and rng.random() < 0.9:
        fields["hidden"] = () if rng.random() < 0.15 else _some(rng, block.hidden, 1)
    return BlockPlan(**fields)


def _random_heads(rng, form, mixer):
    tied_qk, tied_v = form.head_norm is not None, form.mixed_norm is not None
    dead = not tied_v and rng.random() < 0.15
    qk, v = [], []
    for a, b in zip(mixer.qk, mixer.v, strict=True):
        gone = dead or (not tied_v and rng.random() < 0.25)
        qk.append(() if gone else tuple(range(a)) if tied_qk else _some(rng, a, 1))
        v.append(() if gone else tuple(range(b)) if tied_v else _some(rng, b, 1))
    return {"qk": tuple(qk), "v": tuple(v)}


def masks_of(spec: Spec, plan: Plan) -> dict[str, torch.Tensor]:
    """The 0/1 masks at the taps that say what `plan` cuts."""
    masks = {}
    for path, stage, block in plan.child(spec).blocks():
        if block.tokens is not None:
            whole = (tuple(range(stage.prefix)), block.tokens.kept)
            masks[f"{path}.tokens"] = _mask((stage.prefix, stage.patches), whole)
    for (path, _, block), decision in zip(spec.blocks(), plan.blocks(), strict=True):
        if decision.mixer is not None:
            masks[f"{path}.mixer"] = torch.zeros(1, dtype=torch.float64)
        elif isinstance(block.mixer, Attention) and (decision.qk is not None or decision.v is not None):
            qk, v = decision.heads(block.mixer)
            masks[f"{path}.qk"] = _mask(block.mixer.qk, qk)
            masks[f"{path}.v"] = _mask(block.mixer.v, v)
        if decision.mlp is not None:
            masks[f"{path}.mlp"] = torch.zeros(1, dtype=torch.float64)
        elif decision.hidden is not None:
            masks[f"{path}.hidden"] = _mask((block.hidden,), (decision.hidden,))
    return masks


def _mask(groups, kept):
    parts = []
    for size, indices in zip(groups, kept, strict=True):
        part = torch.zeros(size, dtype=torch.float64)
        part[list(indices)] = 1
        parts.append(part)
    return torch.cat(parts)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
