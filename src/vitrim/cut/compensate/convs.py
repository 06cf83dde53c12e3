"""Fit convolutions to the output of one attention, by least squares.

B images, N tokens, P prefix tokens, R x C rows and columns of the grid, D width, d channels of the bottleneck, k side
of the kernel, F = k^2 D features of a patch: the normed tokens of its neighborhood, zeros beyond the border.

One block at a time, a convolution without activation is the low-rank linear map of F features that is nearest to what
the attention adds for the patches. The squared error is weighted by the importance of each token, and its directions by
the metric (`vitrim.cut.compensate.importance`). Prefix tokens, which have no neighborhood, keep the attention
(`vitrim.nn.read`) or get the mean of its output for them.

Source: reduced-rank regression, Izenman 1975. Its use for attention is new; SPViT (arXiv 2111.11802) starts its
convolutions as mixtures of the attention's own projections.

Memory: F x F in float64 (24 MiB for a 3 x 3 convolution of width 192), and one batch of F features for each patch.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrim.cut.compensate.balance import balanced, ratio_of
from vitrim.cut.compensate.closed_form import Moments, low_rank_fit
from vitrim.cut.compensate.hear import Mixed, mixed
from vitrim.cut.compensate.place import Place, part
from vitrim.nn import Attention, WindowBlock
from vitrim.nn.conv import EPS
from vitrim.nn.feed import exact
from vitrim.nn.stream import tokens_of
from vitrim.words.errors import MethodError
from vitrim.words.spec import Conv
from vitrim.words.steps import flow_of

__all__ = ["RIDGE", "ConvCut", "images_needed"]

RIDGE = 1e-3
"""Default strength of the ridge, as a share of the mean diagonal of the Gram matrix of the features."""

State = dict[str, Tensor]


def images_needed(width: int, patches: int, kernel: int) -> int:
    """Return the number of images for one token to each feature, the least that a fit is made of.

    Args:
        width: D.
        patches: patches of one image where the convolution stands.
        kernel: k.
    """
    return -(-(kernel**2 * width) // patches)


class ConvCut:
    """Convolutions of any kernel and width in place of the attention of one block.

    Activations and their moments are recorded once, and one system is solved for each kernel, whatever the widths.

    Args:
        place: the block; its first branch must read a norm.
        strength: strength of the ridge.

    Raises:
        MethodError: if the norm of the block follows the branch.
    """

    def __init__(self, place: Place, strength: float = RIDGE) -> None:
        block, stage = place.block, place.stage
        flow = flow_of(block.spec.tokens, place.arrives, stage.patches)
        here = stage.enters if stage.window is not None else flow.mixed
        if stage.form.post_norm:
            raise MethodError(
                f"{place.path}: a convolution is fitted where the norm comes before its branch, but here it follows; "
                "keep attention here"
            )
        self.place, self.strength, self.count, self.grid = place, strength, here.patches, here.grid or (0, 0)
        self.path, self.worth = f"{place.path}.mixer", place.worth[f"{place.path}.mixer"]
        self.biased = block.form.out_bias
        self._moments: dict[int, Moments] = {}
        self._fits: dict[int, Callable[[int], tuple[Tensor, Tensor]]] = {}

    def cut(self, conv: Conv) -> tuple[Conv, dict[str, object], State]:
        """Return the new mixer, its part of the plan, and its parameters and buffers by name, relative to the block.

        With a ReLU, the bottleneck is shifted so that it is positive for every calibration image, and the shift is
        taken back by the bias of the output: the function on these images is the one without ReLU. A batch norm has
        the statistics of these images, and changes nothing on average.

        Args:
            conv: kernel, width, prefix, norm and activation; without a mixture.

        Raises:
            MethodError: if there are too few images, naming how many are needed, or if a ReLU cannot be opened because
                the output has no bias.
        """
        if conv.mixture is not None:
            raise MethodError(
                f"{self.path}: a fitted convolution must have plain kernels, but a mixture is requested; leave it out"
            )
        if conv.act == "relu" and not self.biased:
            raise MethodError(
                f"{self.path}: a ReLU can only be opened where the output projection has a bias, but this one has "
                "none; use act='none'"
            )
        inner, start, back, bias = self._fitted(conv.kernel, conv.width)
        state: State = {}
        if conv.act == "relu":
            low, mean, square = self._ranges(conv.kernel, inner, start)
            spread = (square - mean.square()).clamp_min(0)
            # One standard deviation is left for images that were not seen.
            shift = torch.where(spread > 0, spread.sqrt(), 1.0) - low
            bias = None if bias is None else bias - back @ shift
            if conv.norm:
                state |= {"bn.weight": (spread + EPS).sqrt(), "bn.bias": mean + shift}
                state |= {"bn.running_mean": mean, "bn.running_var": spread}
                state["bn.num_batches_tracked"] = torch.zeros((), dtype=torch.long)
            else:
                start = start + shift
        state |= {"conv.weight": inner, "conv.bias": start, "proj.weight": back}
        if conv.kernel == 3:
            state["conv.weight"] = inner.view(len(inner), -1, 3, 3)
            state["proj.weight"] = back[:, :, None, None]
        if bias is not None:
            state["proj.bias"] = bias
        if conv.prefix == "mean" and self.place.stage.prefix:
            state["mean"] = self.constants
        attention = self.place.block.attn
        if conv.prefix == "attention" and isinstance(attention, Attention):
            state |= {f"read.{name}": value for name, value in attention.state_dict().items()}
        return conv, {"mixer": conv}, {f"attn.{name}": value for name, value in state.items()}

    def _fitted(self, kernel: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the kernel ``(d, F)`` and its bias, and the output layer ``(D, d)`` and its bias."""
        moments = self.moments(kernel)
        if kernel not in self._fits:
            metric = self.worth.metric
            self._fits[kernel] = low_rank_fit(moments.gram, moments.cross, metric, self.strength, self.path)
        inner, back = self._fits[kernel](width)
        inner, back = balanced(inner, back, self._ratio)
        if self.biased:
            return inner, -inner @ moments.mean, back, moments.target
        return inner[:, :-1].contiguous(), inner[:, -1].contiguous(), back, None

    @functools.cached_property
    def _ratio(self) -> float:
        """The norm of the attention's projection over that of its values; 1 if another operator stands in its place."""
        attention = self.place.block.attn
        if not isinstance(attention, Attention):
            return 1.0
        return ratio_of(attention.rows_of("v")[0].detach(), attention.proj.weight.detach())

    def moments(self, kernel: int) -> Moments:
        """Return the moments of the features of all patches and of the targets for them.

        Without a bias of the output, they are not centered, and the last feature is a one.

        Raises:
            MethodError: if there are too few images.
        """
        if kernel == 1 and 3 in self._moments and self.biased:
            # The features of a token are those in the middle of its neighborhood.
            middle = torch.arange(4, 9 * self.place.stage.width, 9, device=self._moments[3].squares.device)
            self._moments[1] = self._moments[3].of(middle)
        if kernel not in self._moments:
            self._check_images(kernel)
            moments = Moments(self.path, centred=self.biased)
            for heard, target, weights in self._batches():
                features = self._features(heard.normed, kernel)
                if not self.biased:
                    features = F.pad(features, (0, 1), value=1.0)
                moments.add(self._patches(weights[..., None])[..., 0], features, self._patches(target))
            self._moments[kernel] = moments
        return self._moments[kernel]

    @functools.cached_property
    def constants(self) -> Tensor:
        """Weighted mean of the targets for each prefix token, ``(P, D)``."""
        first, parts = self.place.stage.prefix, []
        for _, target, weights in self._batches():
            w = exact(weights[:, :first, None])
            parts.append(((w * exact(target[:, :first])).sum(0), w.sum(0)))
        sums, total = (torch.stack(column).sum(0) for column in zip(*parts, strict=True))
        return sums / total

    def _check_images(self, kernel: int) -> None:
        few = sum(len(tokens_of(batch)) for batch in self.place.streams)
        if kernel > 1 and self.grid == (0, 0):
            raise MethodError(
                f"{self.place.path}: a 3 x 3 convolution must have patches that fill a grid, but some were dropped or "
                "merged; keep attention here, or take a 1 x 1 convolution"
            )
        needed = images_needed(self.place.stage.width, self.count, kernel)
        if few < needed:
            raise MethodError(
                f"{self.path}: the fit of a {kernel} x {kernel} convolution must have at least {needed} images, but "
                f"got {few}; give more with data.calibration, or take a smaller kernel"
            )

    def _batches(self) -> Iterator[tuple[Mixed, Tensor, Tensor]]:
        """Yield activations, targets and token weights, ``(B, N)`` or ``(B, R, C)``, of each batch."""
        place = self.place
        for number, batch in enumerate(place.streams):
            heard = mixed(place.block, batch)
            target = heard.out
            if place.dense is not None:
                other = mixed(place.block, place.dense[number])
                target = place.toward(target, other.out, other.enters - heard.enters, 1)
            yield heard, target, self._weights(part(self.worth, place.streams, number))

    def _weights(self, weights: Tensor) -> Tensor:
        """Return the weights of tokens in the order of the output of the branch."""
        block = self.place.block
        if not isinstance(block, WindowBlock):
            return weights
        padded = torch.unflatten(weights, 1, block.window.padded(self.grid))
        return block.unrolled(padded[..., None], self.grid)[..., 0]

    def _patches(self, x: Tensor) -> Tensor:
        """Return the patches of tokens, ``(B, R C, ...)``."""
        return x.flatten(1, 2) if self.place.stage.window is not None else x[:, self.place.stage.prefix :]

    def _features(self, normed: Tensor, kernel: int) -> Tensor:
        """Return the neighborhood of each patch, ``(B, R C, F)``, in the order of a kernel's weights."""
        patches = self._patches(normed)
        if kernel == 1:
            return patches
        maps = torch.unflatten(patches, 1, self.grid).permute(0, 3, 1, 2)
        return F.unfold(maps, kernel, padding=kernel // 2).mT

    def _ranges(self, kernel: int, inner: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the least value, the mean and the mean square of each channel of the bottleneck."""
        parts, count = [], 0
        for heard, _, _ in self._batches():
            features = self._features(heard.normed, kernel).flatten(0, 1)
            found = exact(features @ inner.mT.to(features) + start.to(features))
            parts.append((found.amin(0), found.sum(0), found.square().sum(0)))
            count += len(found)
        low, sums, squares = (torch.stack(column) for column in zip(*parts, strict=True))
        return low.amin(0), sums.sum(0) / count, squares.sum(0) / count
