"""Parts of `vitrim.methods.cait`: the plan that merges neighbors, and the masks that are re-selected in training."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from vitrim.cut.observe import Gated, axes, key_of
from vitrim.words.errors import MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Spec, why_not_mixed
from vitrim.words.steps.grid_merge import GridMerge

__all__ = ["Channels", "Merge", "free_axes", "merge_plan", "thirds"]

Merge = tuple[int, Literal["w", "h"]]
"""The block after which to merge, counted from 1, and the axis that is halved."""


def thirds(spec: Spec) -> tuple[Merge, ...]:
    """Return merges of columns after 1/3 and rows after 2/3 of the blocks, if the grid allows: ours, not published."""
    depth, (rows, columns) = len(spec.blocks()), spec.stages[0].grid
    sites: list[Merge] = [(round(depth / 3), "w"), (round(2 * depth / 3), "h")]
    return tuple(
        site for site, places in zip(sites, (columns, rows), strict=True) if places > 1 and 0 < site[0] < depth
    )


def merge_plan(
    spec: Spec,
    merges: Sequence[Merge],
    form: Literal["linear", "mean", "channel"] = "linear",
    size_bias: bool = False,
) -> Plan:
    """Return the plan that merges neighbors and cuts nothing else.

    Args:
        spec: the parent.
        merges: positions and axes. A merge after block p acts at the input of block p + 1.
        form: see `vitrim.words.steps.GridMerge`.
        size_bias: see there.

    Raises:
        MethodError: if tokens of the model cannot be merged, or a position does not exist.
        PlanError: if the grid does not allow so many merges.
    """
    wrong = next((why for why in map(why_not_mixed, spec.stages) if why), None)
    if merges and wrong is not None:
        raise MethodError(f"merges must be empty for this model: {wrong}")
    depth = len(spec.blocks())
    sites = [after for after, _ in merges]
    if any(not 0 < after < depth for after in sites) or len(set(sites)) < len(sites):
        raise MethodError(f"merges must be between two of {depth} blocks, after 1 to {depth - 1}, but got {sites}")
    steps = {after: GridMerge(axis=axis, form=form, size_bias=size_bias) for after, axis in merges}
    plan = Plan.of(spec, [BlockPlan(tokens=steps.get(index)) for index in range(depth)])
    plan.child(spec)
    return plan


class Channels(Gated):
    """A model whose channels are masked, and may be unmasked again, during training.

    Masks multiply the weights of queries (not of keys, because one factor masks their product), of values, and of the
    layer that reads the neurons. So a masked channel's weights get no gradient and do not change. The mask itself gets
    a gradient, which is the first-order effect of unmasking the channel on the loss.

    Masks, gates and scores are buffers: checkpoints contain them, and optimizers do not update them.

    Args:
        model: an adopted model; trained in place.
        paths: axes to mask.
        scorer: see `vitrim.methods.cait.Method`.
        average: decay of the moving average of scores, in [0, 1).
        gate_lr: learning rate of the gates of ``resrep``.
        gate_l1: weight of the l1 penalty on the gates.
        momentum: momentum of the gates' steps.
    """

    count: Tensor
    revived: Tensor

    def __init__(
        self,
        model: nn.Module,
        paths: Iterable[str],
        *,
        scorer: Literal["taylor", "resrep"] = "taylor",
        average: float = 0.99,
        gate_lr: float = 0.01,
        gate_l1: float = 1e-4,
        momentum: float = 0.99,
    ) -> None:
        known = axes(model)
        self.paths = tuple(paths)
        super().__init__(model, {}, {path: path for path in self.paths}, once=True)
        self.scorer, self.average = scorer, average
        self.gate_lr, self.gate_l1, self.momentum = gate_lr, gate_l1, momentum
        like = next(model.parameters())
        for path in self.paths:
            for name, value in (("gate", 1.0), ("mask", 1.0), ("seen", 0.0)):
                buffer = torch.full((known[path].size,), value, device=like.device, dtype=like.dtype)
                self.register_buffer(f"{name}/{key_of(path)}", buffer)
        self.register_buffer("count", torch.zeros((), dtype=torch.long, device=like.device))
        self.register_buffer("revived", torch.zeros(len(self.paths), dtype=torch.long, device=like.device))
        self.leaves: dict[str, Tensor] = {}
        switch = getattr(model, "set_distilled_training", None)
        if switch is not None:
            self.set_distilled_training = switch

    def held(self, key: str) -> Tensor:
        """Return the gate that multiplies an axis; in training, a leaf that accumulates gradients during the step."""
        gate: Tensor = self.get_buffer(f"gate/{key}")
        if not (self.training and torch.is_grad_enabled()):
            return gate
        return self.leaves.setdefault(key, gate.detach().requires_grad_())

    def mask(self, path: str) -> Tensor:
        """Return 1 for each channel of an axis that is kept, 0 for the others."""
        return self.get_buffer(f"mask/{key_of(path)}")

    def masks(self) -> dict[str, Tensor]:
        """Return all masks by path, on the CPU."""
        if not self.paths:
            return {}
        return self._split(torch.cat([self.mask(path) for path in self.paths]).cpu())

    def revived_by_path(self) -> dict[str, int]:
        """Return, by path of an axis, how often a channel was unmasked again."""
        return dict(zip(self.paths, self.revived.tolist(), strict=True))

    def _split(self, joined: Tensor) -> dict[str, Tensor]:
        """Return the parts of a tensor that joins one for each axis: one transfer to or from a device for all."""
        sizes = [len(self.mask(path)) for path in self.paths]
        return dict(zip(self.paths, torch.split(joined, sizes), strict=True))

    @torch.no_grad()
    def learn(self) -> None:
        """Update the scores with the gradients of one step, averaged over all processes.

        ``taylor``: the moving average of their squares. ``resrep``: a step of the gates, in which masked gates get only
        the penalty; masks act only on gradients.
        """
        self.count += 1
        for path in self.paths:
            key = key_of(path)
            leaf = self.leaves.get(key)
            grad = None if leaf is None else leaf.grad
            gate, mask, seen = (self.get_buffer(f"{name}/{key}") for name in ("gate", "mask", "seen"))
            grad = torch.zeros_like(gate) if grad is None else grad
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(grad)
                grad /= distributed.get_world_size()
            if self.scorer == "taylor":
                seen.mul_(self.average).add_(grad.square(), alpha=1 - self.average)
            else:
                seen.mul_(self.momentum).add_(mask * grad + self.gate_l1 * gate.sign())
                gate.sub_(seen, alpha=self.gate_lr)
        self.leaves.clear()

    @torch.no_grad()
    def scores(self, hysteresis: float = 1.0) -> dict[str, Tensor]:
        """Return the score of each channel, by path; those of masked channels are multiplied by `hysteresis`.

        Raises:
            MethodError: before the first step, or if a score is not finite.
        """
        count = int(self.count)
        if not count:
            raise MethodError(
                "channels must be scored by training steps, but none was taken; raise method.train.epochs"
            )
        if not self.paths:
            return {}
        name = "seen" if self.scorer == "taylor" else "gate"
        joined = [torch.cat([self.get_buffer(f"{kind}/{key_of(p)}") for p in self.paths]) for kind in (name, "mask")]
        # In float64, because squares of small gradients underflow in shorter types.
        score, mask = torch.stack(joined).cpu().double()
        score = score / (1 - self.average**count) if self.scorer == "taylor" else score.abs()
        return self._split(torch.where(mask.bool(), score, hysteresis * score))

    @torch.no_grad()
    def keep(self, masks: Mapping[str, Tensor]) -> None:
        """Set the masks, and count by axis the channels that are unmasked again."""
        if not masks:
            return
        joined = torch.cat(list(masks.values())).to(self.mask(self.paths[0]))
        for path, new in zip(masks, torch.split(joined, [len(mask) for mask in masks.values()]), strict=True):
            mask = self.mask(path)
            self.revived[self.paths.index(path)] += ((new > 0) & (mask == 0)).sum()
            mask.copy_(new)
            if self.scorer == "taylor":
                self.get_buffer(f"gate/{key_of(path)}").copy_(new)

    @torch.no_grad()
    def fold_gates(self) -> nn.Module:
        """Multiply the gates of ``resrep`` into the model's weights, in place, and return the model.

        The gates of ``taylor`` are masks. They are not multiplied in, because the masked channels are cut.
        """
        return self.fold_() if self.scorer == "resrep" else self.model


def free_axes(model: nn.Module, attention: bool, mlp: bool) -> tuple[str, ...]:
    """Return the axes whose channels can be cut individually, which excludes axes that a norm ties together."""
    return tuple(
        path
        for path, axis in axes(model).items()
        if axis.scales and not axis.tied and (mlp if axis.name == "hidden" else attention)
    )
