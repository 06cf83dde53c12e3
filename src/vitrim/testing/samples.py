"""Small models, images, data and plans at random, on which laws are tried; all are functions of a seed.

B images, C channels of an image, (h, w) its height and width, N tokens.
"""

import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitrim import families
from vitrim.data import Images, Input, split
from vitrim.families import adopt, describe
from vitrim.methods import Data
from vitrim.words.block import why_not_read
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Conv, Form, Mixture, Skip, Spec, Stage
from vitrim.words.spec import Block as BlockSpec
from vitrim.words.steps.drop import Drop

__all__ = [
    "apart",
    "digits",
    "keeps_constants",
    "kept_widths",
    "masks_of",
    "places",
    "random_data",
    "random_images",
    "random_plan",
    "sample_model",
    "small_model",
]


def sample_model(family: str, preset: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A preset of a family, as its makers build it, with random weights that all matter: no zero biases, no unit norms.

    Args:
        family: name of a family.
        preset: one of its ``TEST_PRESETS``.
        dtype: floating-point type of the weights.

    Returns:
        A model that is not adopted, in evaluation mode; the same at every call.
    """
    module = families.get(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = module.example(**module.TEST_PRESETS[preset])
        for parameter in (p for p in model.parameters() if p.requires_grad):
            centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            nn.init.normal_(parameter, centre, 0.25)
    return model.to(dtype).eval()


def small_model(family: str) -> nn.Module:
    """The first preset of a family, adopted, with random weights in float32."""
    return adopt(sample_model(family, next(iter(families.get(family).TEST_PRESETS)), torch.float32))


def random_images(spec: Spec, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal random images ``(count, C, h, w)`` of the size that a model takes."""
    channels = int(spec.host.arguments.get("in_chans", 3))
    return torch.randn(count, channels, *spec.image, generator=torch.Generator().manual_seed(7), dtype=dtype)


def digits(model: nn.Module) -> Data:
    """Pictures of digits, sized as `model` takes them: 64 to train on, 32 to calibrate on and 32 to compare on.

    They are scikit-learn's, for a model of 10 classes.
    """
    parts = split("digits", calibration=32, validation=32, seed=0)
    few = parts.train.pick(range(64))
    return Data(train=few, calibration=parts.calibration, validation=parts.validation, input=Input.of(model))


def random_data(model: nn.Module, count: int = 64, seed: int = 0) -> Data:
    """Pictures of noise for a model of any number of classes and of 1 or 3 channels.

    Args:
        model: what the pictures are for.
        count: pictures to train on; half as many of them to calibrate on, and half as many others to compare on.
        seed: of pixels and labels.
    """
    input, classes = Input.of(model), max(describe(model).classes, 1)
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (count + count // 2, *input.size, 3), dtype=np.uint8)
    labels = draw.integers(0, classes, len(pixels))

    def read(index: int) -> Image.Image:
        return Image.fromarray(pixels[index])

    everything = Images(read, labels, classes=classes, source="noise")
    return Data(
        train=everything.pick(range(count)),
        calibration=everything.pick(range(0, count, 2)),
        validation=everything.pick(range(count, len(pixels))),
        input=input,
    )


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry of `b`."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def random_plan(
    spec: Spec,
    seed: int,
    skips: bool = True,
    drops: Literal["", "exact", "mixed"] = "",
    convs: Literal["", "folded", "mixed"] = "",
    widths: bool = False,
) -> Plan:
    """A plan of every kind of cut that the form of each block allows.

    Args:
        spec: the parent.
        seed: the same seed gives the same plan.
        skips: whether branches are skipped too.
        drops: whether tokens are dropped too, ``exact`` with one key for those missing, ``mixed`` with and without.
        convs: whether attentions become convolutions too, ``folded``, or ``mixed`` in any state and folded further.
        widths: whether the residual width is cut too, where the family says how.
    """
    rng = random.Random(seed)
    blocks = [_random_block(rng, stage.form, block, skips) for _, stage, block in spec.blocks()]
    if drops and spec.stages[0].window is None and not spec.host.arguments.get("dynamic_img_size"):
        steps = _random_drops(random.Random(seed + 1000), spec, drops == "exact")
        blocks = [block.model_copy(update={"tokens": step}) for block, step in zip(blocks, steps, strict=True)]
    if convs:
        dynamic, rng = bool(spec.host.arguments.get("dynamic_img_size")), random.Random(seed + 2000)
        blocks = [
            _with_conv(rng, stage, block, decision, convs, dynamic)
            for (_, stage, block), decision in zip(spec.blocks(), blocks, strict=True)
        ]
    rng = random.Random(seed + 3000)
    cut = widths and bool(spec.host.channels)
    return Plan.of(spec, blocks, [_some(rng, stage.width, 1) if cut else None for stage in spec.stages])


def _with_conv(
    rng: random.Random, stage: Stage, block: BlockSpec, decision: BlockPlan, convs: str, dynamic: bool
) -> BlockPlan:
    mixer, form = block.mixer, stage.form
    firsts: tuple[Any, ...] = ("norm", "zero", "mean")
    firsts += ("attention",) if why_not_read(form, stage.prefix) is None else ()
    if isinstance(mixer, Conv):
        states = {(mixer.mixture, mixer.norm), (None, mixer.norm), (None, False)}
        mixture, norm = rng.choice(sorted(states, key=str))
        later = mixer.model_copy(update={"mixture": mixture, "norm": norm})
        return decision.model_copy(update={"mixer": rng.choice((None, later, Skip(leaves="norm")))})
    if not isinstance(mixer, Attention) or not mixer.v or decision.tokens or form.mixed_norm or rng.random() < 0.4:
        return decision
    if rng.random() < 0.15:
        return decision.model_copy(update={"mixer": Skip(leaves="norm"), "qk": None, "v": None})
    if rng.random() < 0.2:
        kernel: Literal[1, 3] = 1 if dynamic else rng.choice((1, 3))
        linear = Conv(kernel=kernel, width=rng.randint(1, 32), prefix=rng.choice(firsts[2:]), act="none")
        return decision.model_copy(update={"mixer": linear, "qk": None, "v": None})
    width = rng.randint(1, min(mixer.v))
    v = [tuple(sorted(rng.sample(range(n), width))) if rng.random() < 0.8 else () for n in mixer.v]
    v[0] = v[0] or tuple(range(width))
    heads = sum(map(bool, v))
    temperature, slots = rng.choice((0.01, 1.0, 100.0)), rng.choice(("columns", "centre"))
    mixed: Mixture | None = Mixture(heads=heads, temperature=temperature, slots=slots)
    if convs == "folded" or rng.random() < 0.4:
        mixed = None
    conv = Conv(
        kernel=1 if dynamic else rng.choice((1, 3)),
        width=width,
        prefix=rng.choice(firsts),
        mixture=mixed,
        norm=mixed is not None or (convs != "folded" and rng.random() < 0.5),
    )
    return decision.model_copy(update={"mixer": conv, "qk": None, "v": tuple(v)})


def _random_drops(rng: random.Random, spec: Spec, exact: bool) -> list[Drop | None]:
    steps: list[Drop | None] = []
    here = set(range(spec.stages[0].patches))
    anchor = places(spec)[-1] - spec.stages[0].prefix  # what is left of every block must not be nothing
    for _, _, block in spec.blocks():
        mine = here & set(block.tokens.kept) if isinstance(block.tokens, Drop) else here
        step = None
        if rng.random() < 0.6:
            kept = sorted({anchor, *rng.sample(sorted(mine), rng.randint(1, len(mine)))})
            one_key = (exact or rng.random() < 0.5) and spec.stages[0].form.one_key_for_zeros
            step, mine = Drop(kept=tuple(kept), exact=one_key), set(kept)
        steps.append(step)
        here = mine
    return steps


def places(spec: Spec) -> list[int]:
    """Where the tokens that leave the last block stand among those of the dense model, prefix tokens first."""
    stage = spec.stages[-1]
    last = stage.blocks[-1].tokens
    kept: Sequence[int] = last.kept if isinstance(last, Drop) else range(stage.patches)
    return [*range(stage.prefix), *(stage.prefix + place for place in kept)]


def _some(rng: random.Random, size: int, least: int = 0) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(size), rng.randint(min(least, size), size))))


def _random_block(rng: random.Random, form: Form, block: BlockSpec, skips: bool) -> BlockPlan:
    fields: dict[str, Any] = {}
    if skips and rng.random() < 0.12:
        fields["mixer"] = Skip()
    elif isinstance(block.mixer, Attention) and block.mixer.v and rng.random() < 0.9:
        fields |= _random_heads(rng, form, block.mixer)
    if skips and rng.random() < 0.12:
        fields["mlp"] = Skip()
    elif block.hidden and form.hidden_norm is None and rng.random() < 0.9:
        fields["hidden"] = () if rng.random() < 0.15 else _some(rng, block.hidden, 1)
    return BlockPlan(**fields)


def _random_heads(rng: random.Random, form: Form, mixer: Attention) -> dict[str, tuple[tuple[int, ...], ...]]:
    tied_qk, tied_v = form.ties_qk, form.mixed_norm is not None
    dead = not tied_v and rng.random() < 0.15
    qk, v = [], []
    for a, b in zip(mixer.qk, mixer.v, strict=True):
        gone = dead or (not tied_v and rng.random() < 0.25)
        qk.append(() if gone else tuple(range(a)) if tied_qk else _some(rng, a, 1))
        v.append(() if gone else tuple(range(b)) if tied_v else _some(rng, b, 1))
    return {"qk": tuple(qk), "v": tuple(v)}


def kept_widths(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The kept channels that `vitrim.cut.width.keeping` takes, by path, for what `plan` cuts."""
    return {f"stages.{i}.width": kept for i, kept in enumerate(plan.widths()) if kept is not None}


def keeps_constants(first: Plan, second: Plan, spec: Spec) -> bool:
    """Whether `first` and `second` in a row leave the same constants in place of branches as one plan does.

    Not if norms follow the branches, `first` takes all channels of a branch, and `second` cuts the residual width.
    """
    pairs = zip(spec.stages, first.child(spec).stages, second.widths(), strict=True)
    return not any(
        stage.form.post_norm and width is not None and _constants(small) != _constants(stage)
        for stage, small, width in pairs
    )


def _constants(stage: Stage) -> list[tuple[bool, bool]]:
    return [(isinstance(b.mixer, Attention) and not b.mixer.v, b.hidden == 0) for b in stage.blocks]


def masks_of(spec: Spec, plan: Plan) -> dict[str, Tensor]:
    """The 0/1 masks in float64 that `vitrim.cut.observe.masked` takes, by path, for what `plan` cuts."""
    masks = {}
    for path, stage, block in plan.child(spec).blocks():
        if isinstance(block.tokens, Drop):
            whole = (tuple(range(stage.prefix)), block.tokens.kept)
            masks[f"{path}.tokens"] = _mask((stage.prefix, stage.patches), whole)
    for (path, _, node), decision in zip(spec.blocks(), plan.blocks(), strict=True):
        if decision.mixer is not None:
            masks[f"{path}.mixer"] = torch.zeros(1, dtype=torch.float64)
        elif isinstance(node.mixer, Attention) and (decision.qk is not None or decision.v is not None):
            qk, v = decision.heads(node.mixer)
            masks[f"{path}.qk"] = _mask(node.mixer.qk, qk)
            masks[f"{path}.v"] = _mask(node.mixer.v, v)
        if decision.mlp is not None:
            masks[f"{path}.mlp"] = torch.zeros(1, dtype=torch.float64)
        elif decision.hidden is not None:
            masks[f"{path}.hidden"] = _mask((node.hidden or 0,), (decision.hidden,))
    return masks


def _mask(groups: Sequence[int], kept: Sequence[Sequence[int]]) -> Tensor:
    parts = []
    for size, indices in zip(groups, kept, strict=True):
        part = torch.zeros(size, dtype=torch.float64)
        part[list(indices)] = 1
        parts.append(part)
    return torch.cat(parts)
