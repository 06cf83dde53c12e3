"""Cut a model: `apply(parent, plan) -> child`. All methods use this function.

D width, H heads, K channels of a head, M hidden neurons.

This module does not depend on the names of layers. It uses the axes of the parent's blocks, builds the child's blocks
from the child's spec, and slices each parameter along the dimensions that the axes index.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from vitrim.families import blocks_of, describe, family_of, host
from vitrim.families._channels import channels_of, kept_outside
from vitrim.nn import Axis, Block, Constant, computed, keep_settings, make_block
from vitrim.nn.conv import state_of
from vitrim.nn.modes import without_data
from vitrim.words.errors import PlanError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Conv, Skip, Stage, folded
from vitrim.words.spec import Block as BlockSpec
from vitrim.words.steps import Tokens

__all__ = ["apply", "cut_tensors", "fold", "kept_entries"]

Kept = tuple[tuple[int, ...], ...]
Width = tuple[int, ...] | None


def apply(parent: nn.Module, plan: Plan, *, grafts: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Cut `parent` according to `plan`.

    Args:
        parent: an adopted model; it is not changed.
        plan: what to cut.
        grafts: parameters and buffers of the child, by name, that are not slices of the parent's.

    Returns:
        A dense model of the parent's class, on the same device and in the same mode, without shared parameters.

    Raises:
        PlanError: if the plan does not fit the model; the message names the path.
        AdoptError: if the parent was not adopted.
    """
    spec = describe(parent)
    child = plan.child(spec)
    like = next(parent.parameters())
    blocks = [
        _cut(old, child_block, stage, decision, arriving, like, width)
        for (_, old), (_, stage, child_block), decision, arriving, width in zip(
            blocks_of(parent), child.blocks(), plan.blocks(), child.arrivals(), _by_block(plan), strict=True
        )
    ]
    model = host(parent, blocks, plan.widths())
    _graft(model, grafts or {})
    return model


def fold(model: nn.Module) -> nn.Module:
    """Fold every convolution of an adopted model into two plain layers with the same function in evaluation.

    Returns:
        `model` itself if there is nothing to fold, else a new model that shares no parameters with it.
    """
    spec = describe(model)
    plain = folded(spec)
    if plain == spec:
        return model
    pairs = zip(spec.blocks(), plain.blocks(), strict=True)
    blocks = [
        BlockPlan(mixer=new.mixer) if isinstance(new.mixer, Conv) and new != old else BlockPlan()
        for (_, _, old), (_, _, new) in pairs
    ]
    return apply(model, Plan.of(spec, blocks))


def _by_block(plan: Plan) -> list[Width]:
    """Return the kept channels of the residual stream of every block."""
    return [stage.width for stage in plan.stages for _ in stage.blocks]


def kept_entries(block: Block, plan: BlockPlan, width: Width = None) -> dict[str, dict[int, Tensor]]:
    """Return the entries of each parameter of `block` that a plan keeps.

    Args:
        block: a block of the parent.
        plan: the decision about it.
        width: kept channels of the residual stream; None keeps all.

    Returns:
        For each cut parameter (name relative to the block) and each cut dimension, the kept indices, increasing.
        Parameters that are not listed are kept whole, if their branch is kept.
    """
    runs: dict[str, dict[int, list[tuple[int, Tensor]]]] = {}
    for axis, kept in _decisions(block, plan):
        index = _flat(axis, kept)
        living = torch.tensor([group for group, indices in enumerate(kept) if indices], dtype=torch.long)
        for members, chosen in ((axis.members, index), (axis.group_members, living)):
            for member in members:
                runs.setdefault(member.parameter, {}).setdefault(member.dim, []).append((member.offset, chosen))
    if width is not None:
        for member in block.stream():
            kept_width = torch.tensor(width, dtype=torch.long)
            runs.setdefault(member.parameter, {}).setdefault(member.dim, []).append((member.offset, kept_width))
    entries: dict[str, dict[int, Tensor]] = {}
    for name, by_dim in runs.items():
        entries[name] = {
            dim: torch.cat([offset + index for offset, index in sorted(pieces, key=lambda piece: piece[0])])
            for dim, pieces in by_dim.items()
        }
    return entries


def cut_tensors(parent: nn.Module, plan: Plan, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut tensors with the shapes of the parent's parameters, such as an optimizer's averages, as `apply` cuts those.

    Args:
        parent: an adopted model.
        plan: what to cut.
        values: by name of the parameter; tensors without dimensions, such as counts, are not changed.

    Returns:
        The cut tensors by the child's names, without those of removed branches.
    """
    modules = {id(module): name for name, module in parent.named_modules()}
    names = {name for name, _ in parent.named_parameters()}
    cut = {name: value for name, value in values.items() if name in names}
    child = plan.child(describe(parent))
    for stage, kept in zip(channels_of(family_of(parent), parent), plan.widths(), strict=False):
        for name, dim, index in kept_outside(parent, stage, kept) if kept is not None else ():
            if name in cut and cut[name].dim():
                cut[name] = cut[name].index_select(dim, index.to(cut[name].device))
    rows = zip(blocks_of(parent), plan.blocks(), child.blocks(), _by_block(plan), strict=True)
    for (_, block), decision, (_, _, small), width in rows:
        prefix, entries = modules[id(block)], kept_entries(block, decision, width)
        gone = [name for name, kept in (("attn.", _attends(small)), ("mlp.", bool(small.hidden))) if not kept]
        for name in [name for name in cut if name.startswith(f"{prefix}.")]:
            inner = name.removeprefix(f"{prefix}.")
            if inner.startswith(tuple(gone)):
                del cut[name]
                continue
            for dim, index in entries.get(inner, {}).items():
                value = cut[name]
                cut[name] = value.index_select(dim, index.to(value.device)) if value.dim() else value
    return cut


def _attends(block: BlockSpec) -> bool:
    return isinstance(block.mixer, Attention) and bool(block.mixer.v)


def _decisions(block: Block, plan: BlockPlan) -> Iterator[tuple[Axis, Kept]]:
    mixer = block.spec.mixer
    kept: dict[str, Kept] = {}
    if isinstance(mixer, Attention):
        kept["qk"], kept["v"] = plan.heads(mixer)
    if plan.hidden is not None:
        kept["hidden"] = (plan.hidden,)
    for axis in block.axes():
        yield axis, kept.get(axis.name, tuple(tuple(range(size)) for size in axis.groups))


def _flat(axis: Axis, kept: Kept) -> Tensor:
    flat, start = [], 0
    for group, indices in zip(axis.groups, kept, strict=True):
        flat += [start + i for i in indices]
        start += group
    return torch.tensor(flat, dtype=torch.long)


@torch.no_grad()
def _cut(
    old: Block, spec: BlockSpec, stage: Stage, plan: BlockPlan, arriving: Tokens, like: Tensor, width: Width
) -> Block:
    with without_data():
        block = make_block(stage, spec, arriving)
    source = _kept(old, spec, plan, width)
    constants = {"attn.bias": (old.attn, old.leaving1), "mlp.bias": (old.mlp, old.leaving2)}
    wanted = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    for name, empty in block.state_dict(keep_vars=True).items():
        if name in source:
            value = source[name]
        elif block.step is not None and name.startswith("step."):
            value = block.step.initial(name.removeprefix("step."), like)
        else:
            value = _constant(*constants[name], width)
        if value.shape != empty.shape:
            raise PlanError(f"{name}: the plan must give {tuple(empty.shape)}, but gives {tuple(value.shape)}")
        owner, _, leaf = name.rpartition(".")
        value = value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(empty, nn.Parameter):
            value = nn.Parameter(value, requires_grad=_trained(name, wanted))
        setattr(block.get_submodule(owner), leaf, value)
    return keep_settings(computed(block), old)


def _kept(old: Block, spec: BlockSpec, plan: BlockPlan, width: Width) -> dict[str, Tensor]:
    """Return the sliced parameters and buffers of `old`; those of a convolution are made from the mixer it replaces."""
    entries, mixer = kept_entries(old, plan, width), spec.mixer
    source = old.state_dict(keep_vars=True)
    for name, cuts in entries.items():
        for dim, index in cuts.items():
            source[name] = source[name].index_select(dim, index.to(source[name].device))
    if isinstance(mixer, Conv) and not isinstance(old.spec.mixer, Skip):
        was = plan.attention(old.spec.mixer, old.form, "") if isinstance(old.spec.mixer, Attention) else old.spec.mixer
        have = {name[5:]: value for name, value in source.items() if name.startswith("attn.")}
        source = {name: value for name, value in source.items() if not name.startswith("attn.")}
        source |= {f"attn.{name}": value for name, value in state_of(mixer, was, have, old.prefix).items()}
    return source


def _trained(name: str, wanted: Mapping[str, bool]) -> bool:
    """Return whether a parameter of a child requires gradients, as the parent's parameter of the same name does.

    Args:
        name: the parameter, relative to the block.
        wanted: whether each parameter of the parent's block requires gradients.

    If the parent has no parameter of that name (a constant, a convolution, a step), the result is false if the whole
    branch from which it is made is frozen, or without such a branch, the whole block.
    """
    if name in wanted:
        return wanted[name]
    branch = [required for other, required in wanted.items() if other.startswith(name.partition(".")[0] + ".")]
    return any(branch or wanted.values()) or not wanted


def _constant(branch: nn.Module | None, leaving: Callable[[Tensor, Tensor | None], Tensor], width: Width) -> Tensor:
    """Return the constant that a branch without channels adds: its output bias after layer scale and later norms.

    Norms run over the kept channels. So where they follow the branches, a branch that is lost together with channels of
    the stream leaves another constant than one that is lost before them.
    """
    if branch is None or isinstance(branch, Constant):
        raise PlanError("a branch must have channels to lose, but it has none")
    last = branch.get_submodule(branch.last)  # type: ignore[arg-type]
    bias = last.bias
    assert isinstance(bias, Tensor)
    return leaving(bias, None if width is None else torch.tensor(width, dtype=torch.long))


def _graft(model: nn.Module, grafts: Mapping[str, Tensor]) -> None:
    parameters = model.state_dict(keep_vars=True)
    for name, value in grafts.items():
        if name not in parameters or parameters[name].shape != value.shape:
            have = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise PlanError(f"{name}: a graft must fit the child, which has {have}, but got {tuple(value.shape)}")
    with torch.no_grad():
        for name, value in grafts.items():
            parameters[name].copy_(value)
