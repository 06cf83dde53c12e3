"""Apply a policy to a model in memory, as masks and token steps on shared weights, or as the equivalent plan.

P ratios of a policy, H heads, M hidden neurons, N tokens.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrim.cut.compensate import recovered
from vitrim.cut.observe import masked, stepping
from vitrim.cut.spend import Policies
from vitrim.cut.surgery import apply
from vitrim.methods.mdc.decode import Frame
from vitrim.methods.mdc.policy import sample
from vitrim.nn.steps.top_k import Chosen
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention
from vitrim.words.steps.top_k import TopK

__all__ = ["Chooser", "Shared"]


class Chooser:
    """Convert policies to the heads, neurons and tokens that they keep.

    Rankings are fixed, so what a policy keeps is a subset of what a policy with smaller ratios keeps.

    Args:
        frame: the policies.
        fused: whether the dropped tokens are replaced by one token, their mean.
        places: scores of the patches at the first selection, or None.
    """

    def __init__(self, frame: Frame, fused: bool = True, places: Tensor | None = None) -> None:
        self.frame, self.fused, self.places = frame, fused, places

    def kept(self, policy: Policies) -> dict[str, list[int]]:
        """Return, by path (``….heads``, ``….hidden``) of each cut, the kept indices in increasing order."""
        blocks, _ = self.frame.counts(policy[None])
        found = {}
        for place, (heads, hidden) in zip(self.frame.places, blocks, strict=True):
            for column, name, count in ((place.heads, "heads", heads), (place.hidden, "hidden", hidden)):
                best = self.frame.ranking.get(f"{place.path}.{name}")
                if column is not None and best is not None and int(count[0]) < len(best):
                    found[f"{place.path}.{name}"] = sorted(best[: int(count[0])].tolist())
        return found

    def steps(self, policy: Policies) -> dict[str, TopK]:
        """Return, by path of a block, the step that drops tokens there."""
        _, counts = self.frame.counts(policy[None])
        arriving, found = self.frame.spec.stages[0].tokens, {}
        for number, (index, (kept, left)) in enumerate(zip(self.frame.selecting, counts, strict=False)):
            if int(kept[0]) < arriving:
                weighed = number == 0 and self.places is not None
                found[self.frame.places[index].path] = TopK(
                    kept=int(kept[0]),
                    fused=self.fused,
                    by="hsic_attn" if weighed else "cls_attn",
                    weights=tuple(self.places.tolist()) if weighed and self.places is not None else (),
                )
            arriving = int(left[0])
        return found

    def plan(self, policy: Policies) -> Plan:
        """Return the plan of a policy."""
        kept, steps = self.kept(policy), self.steps(policy)
        blocks = []
        for path, _, block in self.frame.spec.blocks():
            fields: dict[str, Any] = {"tokens": steps.get(path), "hidden": kept.get(f"{path}.hidden")}
            if f"{path}.heads" in kept and isinstance(block.mixer, Attention):
                living = set(kept[f"{path}.heads"])
                for name, widths in (("qk", block.mixer.qk), ("v", block.mixer.v)):
                    fields[name] = tuple(tuple(range(w)) if h in living else () for h, w in enumerate(widths))
            blocks.append(BlockPlan(**fields))
        return Plan.of(self.frame.spec, blocks)

    def masks(self, policy: Policies, like: Tensor) -> dict[str, Tensor]:
        """Return the factors of the taps; the queries of a cut head are masked too, so it does not select tokens."""
        masks = {}
        for path, kept in self.kept(policy).items():
            block, _, name = path.rpartition(".")
            node = next(place.block for place in self.frame.places if place.path == block)
            widths = (1,) * (node.hidden or 0)
            if name == "hidden":
                masks[path] = _mask(widths, kept, like)
            elif isinstance(node.mixer, Attention):
                masks[f"{block}.v"] = _mask(node.mixer.v, kept, like)
                masks[f"{block}.qk"] = _mask(node.mixer.qk, kept, like)
        return masks

    @contextlib.contextmanager
    def chosen(self, model: nn.Module, policy: Policies) -> Iterator[None]:
        """Make `model` compute the outputs of the cut model, with its own weights; only token steps are built."""
        like = next(model.parameters())
        prefix = self.frame.spec.stages[0].prefix
        steps = {path: Chosen(step, prefix).to(like.device) for path, step in self.steps(policy).items()}
        with masked(model, self.masks(policy, like)), stepping(model, steps):
            yield

    @contextlib.contextmanager
    def child(self, parent: nn.Module, policy: Policies, images: Sequence[Tensor], seed: int) -> Iterator[nn.Module]:
        """Give the model of a policy: the parent as `chosen` makes it, or with images cut and compensated on them."""
        if images:
            plan = self.plan(policy)
            yield apply(parent, plan, grafts=recovered(parent, plan, images, seed=seed)).eval()
            return
        with self.chosen(parent, policy):
            yield parent

    def told(self, policy: Policies) -> Mapping[str, Any]:
        """Return what a policy keeps and costs, as a flat record."""
        blocks, counts = self.frame.counts(policy[None])
        cost = self.frame.costs(policy[None])
        return {
            "macs": int(cost.macs[0]),
            "params": int(cost.params[0]),
            **({} if self.frame.times is None else {"latency": int(cost.latency[0])}),
            "heads": [int(heads[0]) for heads, _ in blocks],
            "neurons": [int(hidden[0]) for _, hidden in blocks],
            "tokens": [int(left[0]) for _, left in counts],
        }


def _mask(widths: tuple[int, ...], kept: list[int], like: Tensor) -> Tensor:
    # Made on the CPU: repeating as often as a tensor on a GPU says makes the host wait for it.
    mask = torch.zeros(len(widths))
    mask[kept] = 1
    return mask.repeat_interleave(torch.tensor(widths)).to(like, non_blocking=True)


class Shared(nn.Module):
    """A model that runs, at each training step, one policy drawn within the budget, on shared weights.

    The policy of a step depends only on (seed, step), so all processes and resumed runs draw the same one.

    Args:
        model: the model; trained in place.
        chooser: converts the policies.
        seed: seed of the draws.
    """

    step: Tensor

    def __init__(self, model: nn.Module, chooser: Chooser, seed: int) -> None:
        super().__init__()
        self.model, self.chooser, self.seed = model, chooser, seed
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        # The number of the step on the host; None until it is known, for a checkpoint may have been loaded.
        self._step: int | None = None

    def forward(self, x: Tensor) -> Any:
        """Return the logits of this step's policy."""
        if self._step is None:
            self._step = int(self.step)
        rng = np.random.default_rng([self.seed, self._step])
        space = self.chooser.frame.space
        drawn = sample(space, 1, rng)
        policy = drawn[0] if len(drawn) else space.upper
        with self.chooser.chosen(self.model, policy):
            return self.model(x)

    def taken(self, _: nn.Module, step: int) -> None:
        """Count a finished step."""
        self._step = step + 1
        self.step.fill_(self._step)
