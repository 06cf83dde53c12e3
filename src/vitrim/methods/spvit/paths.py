"""The convolutions made from an attention's weights, computed in parallel to the attention during a search.

B images, R x C rows and columns of the grid, P prefix tokens, D width, H heads, d channels of a head.

Source: He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", TPAMI 2024, arXiv 2111.11802.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn import Conv
from vitrim.nn.conv import EPS, mixed_back, slot_order, votes
from vitrim.words.errors import DataError
from vitrim.words.spec import Mixture

__all__ = ["FittedPaths", "Paths"]


class Paths(nn.Module):
    """A 1 x 1 and a 3 x 3 bottleneck convolution, computed from the values of an attention.

    Heads are mixed on values, not on kernels. Both give the same numbers, but this costs ``9 R C D`` instead of
    ``9 R C D d``. It runs as one convolution for each channel, whose nine taps are the head's mixture weights.
    Computing the nine mixtures one by one takes 15 times as long (62 against 4 ms, CPU, one thread, forward and
    backward, DeiT-Ti, 16 images), because they are nine maps instead of one.

    Args:
        width: d.
        mixture: H, temperature and slots.
        prefix: the output for prefix tokens, see `vitrim.words.spec.Conv`.
    """

    def __init__(self, width: int, mixture: Mixture, prefix: str = "norm") -> None:
        super().__init__()
        self.width, self.mixture, self.prefix = width, mixture, prefix
        self.mix = nn.Parameter(torch.ones(mixture.heads, 9))
        # First the norm of the 1 x 1 convolution, then that of the 3 x 3.
        self.bn = nn.BatchNorm1d(2 * width, EPS)

    def inner(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return both bottlenecks before bias and norm.

        Args:
            values: without bias, ``(B, R, C, H d)``.

        Returns:
            The bottlenecks of the 1 x 1 and of the 3 x 3 convolution, each ``(B, R, C, d)``.
        """
        share = votes(self.mix, self.mixture.temperature)
        heads = torch.unflatten(values, -1, (self.mixture.heads, self.width))
        kernel = share[:, slot_order(self.mixture)].view(-1, 1, 1, 3, 3).expand(-1, self.width, 1, 3, 3).flatten(0, 1)
        moved = F.conv2d(values.permute(0, 3, 1, 2), kernel, padding=1, groups=len(kernel))
        three = torch.unflatten(moved.permute(0, 2, 3, 1), -1, (self.mixture.heads, self.width)).sum(dim=-2)
        return share[:, self.mixture.centre] @ heads, three

    def forward(
        self,
        inner: tuple[Tensor, Tensor],
        bias: Tensor | None,
        out: tuple[Tensor, Tensor | None],
        one: Tensor,
        three: Tensor,
    ) -> Tensor:
        """Return the sum of the outputs of both convolutions, each times its gate.

        Gates multiply the output projections, which are small, so that one product computes both outputs.

        Args:
            inner: see `inner`.
            bias: bias of the values, ``(H d)``, or None.
            out: weight and bias of the attention's output projection, ``(D, H d)`` and ``(D)`` or None.
            one: gate of the 1 x 1 convolution, scalar.
            three: gate of the 3 x 3 convolution, scalar.

        Returns:
            ``(B, R, C, D)``.

        Raises:
            DataError: if a batch norm is to be trained on one image.
        """
        if self.training and len(inner[0]) == 1:
            raise DataError(
                "a search with batch norms must be trained on at least 2 images at a time, but got 1; raise "
                "method.train.batch or lower method.train.accumulate"
            )
        share = votes(self.mix, self.mixture.temperature)
        (first, narrow), (second, wide) = (mixed_back(share, bias, out[0], k, self.mixture) for k in (1, 3))
        both = torch.cat(inner, dim=-1)
        if first is not None and second is not None:
            both = both + torch.cat([first, second])
        both = self.bn(both.flatten(0, -2)).view_as(both).relu()
        back = torch.cat([one * narrow, three * wide], dim=1)
        return F.linear(both, back, None if out[1] is None else (one + three) * out[1])


class FittedPaths(nn.Module):
    """A 1 x 1 and a 3 x 3 bottleneck convolution with weights of their own, which start from a fit to the attention.

    Args:
        one: the 1 x 1 convolution.
        three: the 3 x 3 convolution.
    """

    def __init__(self, one: Conv, three: Conv) -> None:
        super().__init__()
        self.one, self.three = one, three

    def forward(self, x: Tensor, one: Tensor, three: Tensor) -> Tensor:
        """Return the sum of the outputs of both convolutions, each times its gate.

        Args:
            x: normed tokens, ``(B, N, D)`` or ``(B, R, C, D)``.
            one: gate of the 1 x 1 convolution, scalar.
            three: gate of the 3 x 3 convolution, scalar.
        """
        both: Tensor = one * self.one(x) + three * self.three(x)
        return both

    def conv(self, level: int) -> Conv:
        """Return the convolution that runs with the first `level` gates open, 1 or 2."""
        return self.one if level == 1 else self.three
