"""First-order Taylor scores: how much the loss would rise without a channel.

B images, N tokens, C channels of an axis.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. (8), taken at activations.
For one image the first-order change of the loss when channel c is cut is ``-sum_n a[n, c] * dL/da[n, c]``, the sum over
its tokens; the score is half the mean of its square over images. For ``qk`` only the query side is counted: cutting a
channel takes ``q_c k_c`` out of the logits once, and the query's gradient already holds the key.

Without labels the loss is the divergence from the dense model's own output. Its first derivative is zero there, and its
second-order term is the same mean of squares with labels drawn from the model's own softmax (the Fisher matrix), so
``target = "output"`` draws them. For models with one logit or without classes see `vitrim.cut.outputs`.

The residual width is scored in the same way wherever the stream is read (`vitrim.cut.width.readers`): a gate on one of
its channels multiplies what is read at all these places, so their changes are summed, over tokens and places, before
they are squared. That the norms' statistics change, too, is left out.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.cut.observe import axes, listening
from vitrim.cut.outputs import as_classes, gives_values, own_loss
from vitrim.cut.width import by_channel, check_narrowable, hearing, widths
from vitrim.data import eval_loader
from vitrim.families import describe
from vitrim.methods import Data, ScoreMethod
from vitrim.nn.feed import fed, summing, wide
from vitrim.nn.modes import evaluating
from vitrim.nn.weights import home_of
from vitrim.words.errors import MethodError
from vitrim.words.progress import counted, progress

__all__ = ["Method", "taylor_scores"]


class Method(ScoreMethod):
    """Keep channels whose absence would raise the loss.

    Attributes:
        target: ``labels``: cross-entropy on the labels; ``output``: divergence from the dense output, no labels;
            ``auto``: labels where the calibration images have them; ``distance``: squared distance from the dense
            output, for models whose outputs are values instead of classes; a model that is known to be of that kind is
            always scored so.
        choice: which widths are allowed, see `vitrim.cut.fill.Choice`.
        width: whether the residual width may be cut, too; without training afterwards that costs much accuracy.
        batch: images at a time.
    """

    needs: ClassVar[str] = "images"
    values: ClassVar[bool] = True
    sentence: ClassVar[str] = (
        "keeps channels whose absence would raise the loss, by one gradient pass over a few hundred images"
    )
    by: ClassVar[Literal["score", "density"]] = "density"

    target: Literal["auto", "labels", "output", "distance"] = "auto"
    width: bool = False
    batch: PositiveInt = 32

    def scores(self, model: nn.Module, data: Data | None, *, seed: int) -> Mapping[str, Tensor]:
        """See `taylor_scores`."""
        if data is None or data.calibration is None:
            raise MethodError("taylor must see images, but no data was given; give data or use magnitude")
        batches = eval_loader(data.calibration, data.input, batch=self.batch)
        with progress("scores", len(batches)) as advance:
            return taylor_scores(model, counted(batches, advance), target=self.target, seed=seed, width=self.width)


def taylor_scores(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    target: str = "auto",
    seed: int = 0,
    width: bool = False,
) -> dict[str, Tensor]:
    """Score every channel of `model` by one forward and one backward pass, without gradients of weights.

    Args:
        model: an adopted model; its weights, modes and gradients are left as they were.
        batches: images ``(B, 3, height, width)`` and labels ``(B,)``, -1 where unknown.
        target: as in `Method`.
        seed: for labels drawn from the model's own output.
        width: whether the channels of the residual stream are scored, too.

    Returns:
        By path of an axis, ``(C,)`` in float64, at least 0; scores add up.

    Raises:
        MethodError: if labels are asked for and missing, the loss is not finite, or the width cannot be cut.
    """
    streams = {}
    if width:
        check_narrowable(model)
        streams = widths(model)
    device = home_of(model)[0]
    sizes = {path: axis.size for path, axis in axes(model).items()} | streams
    scores = {path: torch.zeros(size, dtype=summing(device), device=device) for path, size in sizes.items()}
    draw = torch.Generator().manual_seed(seed)
    seen, classes = 0, describe(model).classes
    with evaluating(model, frozen=True):
        for x, y in batches:
            seen += len(x)
            _add(model, classes, fed(x, model), y, target, draw, scores)
    return {path: score.cpu().double() / seen for path, score in scores.items()}


def _add(
    model: nn.Module,
    classes: int,
    x: Tensor,
    y: Tensor,
    target: str,
    draw: torch.Generator,
    scores: Mapping[str, Tensor],
) -> None:
    heard: dict[str, Tensor] = {}
    norms: list[tuple[str, nn.Module, Tensor]] = []

    def keep_first(path: str) -> Callable[[Tensor], None]:
        def keep(activation: Tensor) -> None:
            heard.setdefault(path, activation)

        return keep

    values = target == "distance" or gives_values(classes, bool((y >= 0).all()))
    x = x.clone().requires_grad_()
    streams = any(path.endswith(".width") for path in scores)
    reading = hearing(model, lambda *told: norms.append(told)) if streams else contextlib.nullcontext()
    taps = {path: keep_first(path) for path in scores if not path.endswith(".width")}
    with torch.enable_grad(), listening(model, taps), reading:
        outputs = model(x)
        loss = _loss(wide(outputs), y, target, values, draw)
    if not bool(torch.isfinite(loss)):
        raise MethodError("the loss must be finite while scoring, but is not; check weights and normalisation")
    paths = list(heard)
    reached = [*(heard[path] for path in paths), *(out for _, _, out in norms)]
    gradients = torch.autograd.grad(loss, reached)
    changes = {
        path: (heard[path].detach() * gradient).sum(dim=1)
        for path, gradient in zip(paths, gradients[: len(paths)], strict=True)
    }
    for (path, norm, out), gradient in zip(norms, gradients[len(paths) :], strict=True):
        change = by_channel(out.detach() * gradient, norm, len(scores[path]))
        changes[path] = changes[path] + change if path in changes else change
    for path, change in changes.items():
        scores[path].add_(change.to(scores[path].dtype).square().sum(dim=0), alpha=0.5)


def _loss(outputs: Tensor, y: Tensor, target: str, values: bool, draw: torch.Generator) -> Tensor:
    known = bool((y >= 0).all()) and not values
    if target == "labels" and not known:
        why = "the model's outputs are no classes" if values and bool((y >= 0).all()) else "some are missing"
        raise MethodError(f"taylor with target=labels must have labels, but {why}; use target=output")
    if target != "output" and known:
        return F.cross_entropy(as_classes(outputs), y.to(outputs.device), reduction="sum")
    return own_loss(outputs, values=values, draw=draw)
