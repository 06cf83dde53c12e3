"""Open models that SPViT's authors have released, by the names of their parameters.

d channels of a head, D width.

Three kinds of files are supported: from a search (weights and gates), from fine-tuning (mixtures and batch norms), and
folded ones (plain kernels and batch norms). Names are those of github.com/ziplab/SPViT at commit ae19b0d; no released
file was available for a test.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from vitrim import families
from vitrim.cut.surgery import apply
from vitrim.deploy.checkpoint import read_checkpoint
from vitrim.deploy.choose import choose
from vitrim.deploy.fit import load_weights_
from vitrim.families import adopt, describe
from vitrim.methods.spvit import gates
from vitrim.methods.spvit.planning import planned
from vitrim.methods.spvit.search import Layout, layout
from vitrim.words.errors import WeightsError
from vitrim.words.plan import Plan
from vitrim.words.spec import Conv, Spec

__all__ = ["open_released"]

_SEARCHED = ("kernel_thresholds", "kernel_thresholds_full")
_RENAMED = {"head_probs": "mix", "bconv.0": "conv", "bconv.1": "bn", "bconv.3": "proj"}
_LEFT = ("ffn_thresholds", "assigned_indicator_index", *_SEARCHED)


def open_released(
    model: str | nn.Module,
    weights: str | Path | Mapping[str, Tensor],
    *,
    leaves: Literal["zero", "norm"] | None = None,
) -> nn.Module:
    """Open a released search, fine-tuned or folded checkpoint; names and shapes determine which kind it is.

    A search checkpoint is returned as the network that its gates choose, with the weights, mixtures and batch norms
    that the search has trained.

    Args:
        model: the dense model that it was made from, or its timm name (``deit_tiny_patch16_224``); not modified.
        weights: a file, or a state dict.
        leaves: the output of a skipped attention. None for what the file was trained with: zero (``zero``) in a search,
            the normed input (``norm``) in fine-tuned and folded files.

    Returns:
        An adopted model in evaluation mode, not yet folded; see `vitrim.cut.surgery.fold`.

    Raises:
        WeightsError: if the file is damaged, or does not fit the model.
    """
    source = "weights" if isinstance(weights, Mapping) else str(weights)
    held = dict(weights) if isinstance(weights, Mapping) else read_checkpoint(Path(weights))
    source_model: nn.Module = timm.create_model(model) if isinstance(model, str) else model
    # The dense model's names are enough to find the state dict of a training file: stem, norms and MLPs keep them.
    shapes = {name: tuple(value.shape) for name, value in source_model.state_dict().items()}
    state = choose(held, shapes, source=source).state
    head = state.get("head.weight")
    if isinstance(model, str) and head is not None:
        source_model = timm.create_model(model, num_classes=len(head))
    dense = adopt(source_model).eval()
    spec = describe(dense)
    prefixes = [name for name, module in dense.named_modules() if hasattr(module, "drop_path1")]
    parts = [
        {name.removeprefix(f"{at}."): value for name, value in state.items() if name.startswith(f"{at}.")}
        for at in prefixes
    ]
    rest = {name: value for name, value in state.items() if not name.startswith(tuple(f"{at}." for at in prefixes))}
    searched = any(_gate(part) is not None for part in parts)
    how = layout(spec, leaves=leaves or ("zero" if searched else "norm"))
    paths = [path for path, _, _ in spec.blocks()]
    plan = _plan(spec, how, dict(zip(paths, parts, strict=True)), source)
    target = dense if searched else apply(dense, plan)
    for at, part, (_, _, block) in zip(prefixes, parts, describe(target).blocks(), strict=True):
        rest |= {f"{at}.{name}": value for name, value in _named(part, block.mixer).items()}
    load_weights_(target, families.convert(target, _known(rest, target)), source)
    if not searched:
        return target
    grafts: dict[str, Tensor] = {}
    for at, part, (_, _, block) in zip(prefixes, parts, plan.child(spec).blocks(), strict=True):
        if isinstance(block.mixer, Conv):
            made = _named(part, block.mixer)
            grafts |= {
                f"{at}.{name}": value
                for name, value in made.items()
                if name == "attn.mix" or name.startswith("attn.bn.")
            }
    return apply(dense, plan, grafts=grafts)


def _gate(part: Mapping[str, Tensor]) -> Tensor | None:
    """Return the ordered gates of a block, or None if the checkpoint has none."""
    return next((part[f"attn.{name}"] for name in _SEARCHED if f"attn.{name}" in part), None)


def _plan(spec: Spec, how: Layout, parts: Mapping[str, Mapping[str, Tensor]], source: str) -> Plan:
    """Return the plan that cuts the dense model to the checkpoint's structure."""
    levels = {path: _level(part) for path, part in parts.items()}
    neurons: dict[str, Tensor] = {}
    for path, _, block in spec.blocks():
        part, hidden = parts[path], block.hidden or 0
        if "mlp.fc1.weight" not in part:
            raise WeightsError(f"{source}: weights must have an MLP in each block, but {path} has none; name the model")
        gate = part.get("mlp.ffn_thresholds")
        count = len(part["mlp.fc1.weight"])
        keep = torch.arange(hidden) < count if gate is None else gates.hard(gate).bool()
        if len(keep) != hidden or count > hidden:
            raise WeightsError(
                f"{source}: weights must be of the dense model or of a smaller one, but {path} has {count} neurons of "
                f"{hidden}; name the model that it was searched from"
            )
        neurons[f"{path}.hidden"] = keep
    plan = planned(spec, how, levels, neurons)
    folded = [any(name.startswith("attn.bconv.") for name in part) for part in parts.values()]
    # Folded checkpoints contain kernels, but also batch norms.
    blocks = [
        block.model_copy(update={"mixer": block.mixer.model_copy(update={"mixture": None})})
        if plain and isinstance(block.mixer, Conv)
        else block
        for block, plain in zip(plan.blocks(), folded, strict=True)
    ]
    return Plan.of(spec, blocks)


def _level(part: Mapping[str, Tensor]) -> int:
    """Return how many of the ordered gates of a block are open."""
    gate = _gate(part)
    if gate is not None:
        return int(gates.opened(gates.hard(gate)).sum())
    if "attn.bconv.0.weight" in part:
        return 2 if part["attn.bconv.0.weight"].shape[-1] == 3 else 1
    if "attn.bn_3x3.weight" in part or "attn.bn_1x1.weight" in part:
        return 2 if "attn.bn_3x3.weight" in part else 1
    return 3 if "attn.qk.weight" in part or "attn.qkv.weight" in part else 0


def _named(part: Mapping[str, Tensor], mixer: Any) -> dict[str, Tensor]:
    """Return the tensors of one block under our names; `_known` later drops those that its `mixer` does not use."""
    found: dict[str, Tensor] = {}
    norm = f"bn_{mixer.kernel}x{mixer.kernel}." if isinstance(mixer, Conv) else None
    for name, value in part.items():
        inside = name.removeprefix("attn.")
        if inside == name or (inside.startswith(("qk.", "v.")) and norm is None):
            found[name] = value
            continue
        for theirs, ours in _RENAMED.items():
            if inside == theirs or inside.startswith(f"{theirs}."):
                inside = ours + inside[len(theirs) :]
        if norm is not None and inside.startswith(norm):
            inside = f"bn.{inside[len(norm) :]}"
        pointwise = isinstance(mixer, Conv) and mixer.kernel == 1
        found[f"attn.{inside}"] = value.flatten(1) if pointwise and value.dim() == 4 else value
    for leaf in ("weight", "bias"):
        pair = [found.get(f"attn.{name}.{leaf}") for name in ("qk", "v")]
        if norm is None and pair[0] is not None and pair[1] is not None:
            found[f"attn.qkv.{leaf}"] = torch.cat([pair[0], pair[1]])
    return found


def _known(state: Mapping[str, Tensor], target: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without the search's own tensors and without those of removed parts."""
    mine = set(target.state_dict())
    gone = ("norm1.", "attn.qk.", "attn.v.", "attn.bn", "attn.mix", "attn.relative_position")
    counters = {name: value for name, value in target.state_dict().items() if name.endswith("num_batches_tracked")}
    kept = {
        name: value
        for name, value in state.items()
        if name in mine or not (name.endswith(_LEFT) or any(part in name for part in gone))
    }
    return counters | kept
