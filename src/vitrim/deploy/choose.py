"""Select the one state dict of a weights file that fits a model.

Nested containers and name prefixes are handled in the same way. In ``model_ema.module.blocks.0.norm1.weight``, the
prefix is everything before the model's own name. So no list of containers or wrappers, or of their order, is needed.
Words such as ``ema`` only decide between several copies of one model.
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
"""Words in a prefix that mark the optimizer state of each weight, stored under the weight's own name."""

_COPY = 0.9
"""Two state dicts are copies of one model if the worse fit is at least this share of the better one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One state dict of a file.

    Attributes:
        prefix: the part before its names, with the last dot; empty if there is none.
        state: its tensors, without the prefix.
        outside: all other tensors of the file, under their full names.
        remark: which of several copies this is, for the log; empty if there was only one.
        copies: prefixes of the other copies.
    """

    prefix: str
    state: dict[str, Tensor]
    outside: dict[str, Tensor]
    remark: str = ""
    copies: tuple[str, ...] = ()

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors outside this state dict, grouped by their name up to where it differs from our prefix."""
        ours, found = self.prefix.split("."), dict[str, dict[str, Tensor]]()
        for name, value in self.outside.items():
            words = name.split(".")
            shared = next((i for i, (a, b) in enumerate(zip(words, ours, strict=False)) if a != b), 0)
            found.setdefault(".".join(words[: shared + 1]), {})[name] = value
        return found


def read_weights(path: Path, wanted: Collection[str] = (), *, key: str | None = None) -> dict[str, Tensor]:
    """Read the state dict of a file whose names fit best (see `choose`), or all tensors if no names are given.

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
    """Choose the state dict with the most of a model's names; if several have them, the averaged one.

    Args:
        held: all tensors of a file, see `vitrim.deploy.checkpoint.read_checkpoint`.
        wanted: names of the model's parameters and buffers with their shapes. Shapes only break ties between names.
        source: the file, for messages.
        key: the state dict to choose, as a part of the dotted prefix: ``model_ema``, or ``checkpoint.teacher``.
        shown: converts a state dict to the model's names, for known other naming schemes.

    Raises:
        WeightsError: if nothing in the file fits, `key` selects nothing that fits, or several state dicts fit and it is
            not clear which one is averaged.
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
        # Consider all that fit at all, because the requested one may fit less well than another one.
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
    """Return, for each prefix with any match, how many names and shapes under it are the model's."""
    votes: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    for name in held:
        for root in _prefixes(name):
            sizes[root] += 1
            votes[root] += name.removeprefix(root) in wanted
    most = max(votes.values(), default=0)
    # Weights under another naming scheme match no names, so every large enough group is converted and tried too.
    tried = [root for root in sizes if (votes[root] and votes[root] >= most / 2) or sizes[root] >= len(wanted) / 2]
    scores = {}
    for root in tried:
        found = shown({name.removeprefix(root): value for name, value in held.items() if name.startswith(root)})
        names = [name for name in found if name in wanted]
        if names:
            scores[root] = len(names) + sum(tuple(found[name].shape) == wanted[name] for name in names)
    return scores


def _prefixes(name: str) -> list[str]:
    """Return every prefix of a dotted name with its last dot, starting with the empty one."""
    return ["", *(name[: dot.end()] for dot in re.finditer(r"\.", name))]


def _copies(scores: Mapping[str, int]) -> list[str]:
    """Return the prefixes that fit about as well as the best; of nested ones the better, or the inner if equal."""
    least = _COPY * max(scores.values())
    kept: list[str] = []
    for root in sorted(scores, key=lambda root: (-scores[root], -len(root))):
        if scores[root] >= least and not any(root.startswith(other) or other.startswith(root) for other in kept):
            kept.append(root)
    return [root for root in scores if root in kept]


def _one_of(roots: list[str], held: Mapping[str, Tensor], source: str) -> tuple[str, str]:
    """Return the averaged one of several prefixes, and a line about the choice."""
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
    """Return whether a prefix contains a word for averaging, or `torch.optim.swa_utils.AveragedModel`'s counter."""
    return bool(_AVERAGED & set(_words(root))) or any(f"{above}n_averaged" in held for above in _prefixes(root))


def _one_storage(roots: list[str], held: Mapping[str, Tensor]) -> bool:
    """Return whether all prefixes refer to the same memory, as when a module is an attribute twice."""
    places = [
        {name.removeprefix(root): value.data_ptr() for name, value in held.items() if name.startswith(root)}
        for root in roots
    ]
    return all(place == places[0] for place in places)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.lower())


def _name(root: str) -> str:
    return root.removesuffix(".") or "the top level"


_TRANSFORMERS = "a model of Hugging Face transformers"

_WHOSE = {
    "encoder.layers.encoder_layer_": "torchvision's VisionTransformer",
    "attention.attention.query.": _TRANSFORMERS,
    "attention.self.query.": _TRANSFORMERS,
    "self_attn.q_proj.": _TRANSFORMERS,
    "Transformer/encoderblock_": "Google's own ViT in JAX",
}
"""Parts of names that identify models of other libraries."""


def _whose(held: Mapping[str, Tensor]) -> str:
    """Return a clause on which library these names come from, or an empty string if that is not known."""
    known = (whose for part, whose in _WHOSE.items() if any(part in name for name in held))
    whose = next(known, None)
    if whose == _TRANSFORMERS:
        return f"; they are those of {whose}: give the folder with its config.json as the model, without --weights"
    return "" if whose is None else f"; they are those of {whose}, and weights must be in timm's names"


def listed(names: Collection[str], most: int = 6) -> str:
    """Return names joined as in a sentence; those beyond `most` are only counted."""
    shown = list(dict.fromkeys(names))
    if len(shown) > most:
        return f"{', '.join(shown[:most])} and {len(shown) - most} more"
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)
