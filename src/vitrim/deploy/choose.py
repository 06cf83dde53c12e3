"""Take out of a weights file the one state dict that fits a model.

Nested containers and prefixes of names are one thing here: in ``model_ema.module.blocks.0.norm1.weight`` the prefix is
what stands before the name that the model has. So no list of containers or wrappers is needed, in whatever order they
come; words such as ``ema`` only decide between several copies of one model.
"""

import collections
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vitrim.deploy.checkpoint import read_checkpoint
from vitrim.words.errors import WeightsError

__all__ = ["Chosen", "choose", "listed", "read_weights"]

_AVERAGED = frozenset({"averaged", "average", "avg", "ema", "momentum", "shadow", "swa", "target", "teacher"})
"""Words in a prefix that mark averaged weights."""

_STATISTICS = frozenset({"buffer", "exp", "grad", "grads", "gradients", "optim", "optimizer", "optimizers", "sq"})
"""Words in a prefix that mark what an optimizer keeps of every weight, under the weight's own name."""

_COPY = 0.9
"""Two state dicts of a file are copies of one model if each fits it at least so well, relative to the better one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One state dict of a file.

    Attributes:
        prefix: what stood before its names, with the last dot; empty if nothing did.
        state: its tensors, without the prefix.
        outside: all other tensors of the file, under their whole names.
        remark: which of several copies this is, for the log; empty if there was no choice.
        copies: prefixes of the others.
    """

    prefix: str
    state: dict[str, Tensor]
    outside: dict[str, Tensor]
    remark: str = ""
    copies: tuple[str, ...] = ()

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """What of the file is not this state dict, by the part of each name up to where it leaves our prefix."""
        ours, found = self.prefix.split("."), dict[str, dict[str, Tensor]]()
        for name, value in self.outside.items():
            words = name.split(".")
            shared = next((i for i, (a, b) in enumerate(zip(words, ours, strict=False)) if a != b), 0)
            found.setdefault(".".join(words[: shared + 1]), {})[name] = value
        return found


def read_weights(path: Path, wanted: Collection[str] = (), *, key: str | None = None) -> dict[str, Tensor]:
    """Read from a file the state dict whose names fit best, see `choose`; all tensors if no names are given.

    Raises:
        WeightsError: if the file is missing, damaged, no weights file, or holds nothing that fits.
    """
    held = read_checkpoint(path)
    return choose(held, dict.fromkeys(wanted, ()), source=str(path), key=key).state if wanted else held


def choose(
    held: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    key: str | None = None,
    shown: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = lambda state: state,
) -> Chosen:
    """Choose the state dict that has most of a model's names; of several that have them the averaged one.

    Args:
        held: all tensors of a file, see `vitrim.deploy.checkpoint.read_checkpoint`.
        wanted: names of the model's parameters and buffers with their shapes. Shapes only break ties between names.
        source: the file, for messages.
        key: what to take, as a part of the dotted prefix: ``model_ema``, or ``checkpoint.teacher``.
        shown: gives a state dict under the model's names, where other names are known.

    Raises:
        WeightsError: if nothing in the file fits, `key` names nothing that does, or several state dicts fit and it is
            not plain which of them is the averaged one.
    """
    scores = _scores(held, wanted, shown)
    if not scores:
        raise WeightsError(
            f"{source}: weights must be under the model's names, but none of theirs is one: "
            f"{listed(list(held), 3)}{_whose(held)}"
        )
    fitting = _copies(scores)
    usable = [root for root in fitting if not _STATISTICS & set(_words(root))] or fitting
    if key is not None:
        # Among all that fit at all, for what is asked for may fit less well than what lies beside it.
        below = {root: score for root, score in scores.items() if f".{key.strip('.')}." in f".{root}"}
        if not below:
            raise WeightsError(
                f"{source}: the weights key must name weights of this model, but '{key}' does not; "
                f"there is {listed([_name(root) for root in usable])}"
            )
        usable = _copies(below)
    root, remark = _one_of(usable, held, source)
    return Chosen(
        prefix=root,
        state={name.removeprefix(root): value for name, value in held.items() if name.startswith(root)},
        outside={name: value for name, value in held.items() if not name.startswith(root)},
        remark=remark,
        copies=tuple(other for other in usable if other != root),
    )


def _scores(
    held: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[int, ...]],
    shown: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
) -> dict[str, int]:
    """How many names and shapes of what lies behind each prefix are the model's; only prefixes that have any."""
    votes: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    for name in held:
        for root in _prefixes(name):
            sizes[root] += 1
            votes[root] += name.removeprefix(root) in wanted
    most = max(votes.values(), default=0)
    # Foreign names are no votes, so whatever is large enough is tried too.
    tried = [root for root in sizes if (votes[root] and votes[root] >= most / 2) or sizes[root] >= len(wanted) / 2]
    scores = {}
    for root in tried:
        found = shown({name.removeprefix(root): value for name, value in held.items() if name.startswith(root)})
        names = [name for name in found if name in wanted]
        if names:
            scores[root] = len(names) + sum(tuple(found[name].shape) == wanted[name] for name in names)
    return scores


def _prefixes(name: str) -> list[str]:
    """Every prefix of a dotted name with its last dot, from none on."""
    return ["", *(name[: dot.end()] for dot in re.finditer(r"\.", name))]


def _copies(scores: Mapping[str, int]) -> list[str]:
    """The prefixes that fit about as well as the best one; of those that lie in each other the best, or the inner."""
    least = _COPY * max(scores.values())
    kept: list[str] = []
    for root in sorted(scores, key=lambda root: (-scores[root], -len(root))):
        if scores[root] >= least and not any(root.startswith(other) or other.startswith(root) for other in kept):
            kept.append(root)
    return [root for root in scores if root in kept]


def _one_of(roots: list[str], held: Mapping[str, Tensor], source: str) -> tuple[str, str]:
    """The averaged one of several prefixes, and a line on the choice."""
    if len(roots) == 1 or _one_storage(roots, held):
        return roots[0], ""
    averaged = [root for root in roots if _is_averaged(root, held)]
    if len(averaged) != 1:
        which = "several are averaged" if averaged else "none is averaged"
        keys = [_name(root) for root in averaged or roots if root]
        raise WeightsError(
            f"{source}: weights must be one copy of the model, but {listed([_name(root) for root in roots])} are there "
            f"and {which}; give --weights-key {keys[0]}"
        )
    others = listed([_name(root) for root in roots if root != averaged[0]])
    return averaged[0], f"took {_name(averaged[0])}, the averaged weights; --weights-key takes {others} instead"


def _is_averaged(root: str, held: Mapping[str, Tensor]) -> bool:
    """Whether words say so, or the counter of `torch.optim.swa_utils.AveragedModel` lies beside."""
    return bool(_AVERAGED & set(_words(root))) or any(f"{above}n_averaged" in held for above in _prefixes(root))


def _one_storage(roots: list[str], held: Mapping[str, Tensor]) -> bool:
    """Whether all prefixes name the same memory, as where a module is an attribute twice."""
    places = [
        {name.removeprefix(root): value.data_ptr() for name, value in held.items() if name.startswith(root)}
        for root in roots
    ]
    return all(place == places[0] for place in places)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.lower())


def _name(root: str) -> str:
    return root.removesuffix(".") or "the top level"


_WHOSE = {
    "encoder.layers.encoder_layer_": "torchvision's VisionTransformer",
    "attention.attention.query.": "a model of Hugging Face transformers",
    "attention.self.query.": "a model of Hugging Face transformers",
    "self_attn.q_proj.": "a model of Hugging Face transformers",
    "Transformer/encoderblock_": "Google's own ViT in JAX",
}
"""Parts of names by which others' models are known."""


def _whose(held: Mapping[str, Tensor]) -> str:
    """Whose names these are, for the end of a sentence, where it is known."""
    known = (whose for part, whose in _WHOSE.items() if any(part in name for name in held))
    whose = next(known, None)
    return "" if whose is None else f"; they are those of {whose}, and weights must be in timm's names"


def listed(names: Collection[str], most: int = 6) -> str:
    """Names as a sentence lists them; those beyond `most` are counted."""
    shown = list(dict.fromkeys(names))
    if len(shown) > most:
        return f"{', '.join(shown[:most])} and {len(shown) - most} more"
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)
