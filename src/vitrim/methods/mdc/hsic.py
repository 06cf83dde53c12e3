"""Statistical dependence between features and outputs: the Hilbert-Schmidt independence criterion (HSIC).

n samples, F channels of a feature, C components that are scored side by side.

Source: Gretton et al., "Measuring Statistical Dependence with Hilbert-Schmidt Norms", ALT 2005 (biased estimator); Song
et al., "Feature Selection via Dependence Maximization", JMLR 2012, eq. (5) (unbiased estimator); Kornblith et al.,
"Similarity of Neural Network Representations Revisited", ICML 2019 (CKA). K and G are Gram matrices of features and of
outputs, J = I - 1/n the centering matrix:

    biased    <K, J G J> / (n - 1)^2
    unbiased  <K, U(G)> / (n (n - 3)),   U(G) as in `u_centred`, with a zero diagonal
    CKA       HSIC(K, G) / sqrt(HSIC(K, K) HSIC(G, G))

The Gram matrix of the outputs is centered once (`target`); each component then costs one Gram matrix and one
elementwise product. Compute each batch separately and average the results; never join Gram matrices of batches.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vitrim.nn.feed import wide
from vitrim.words.errors import MethodError

__all__ = [
    "BANDWIDTHS",
    "Estimator",
    "Kernel",
    "biased",
    "centred",
    "cka",
    "dependence",
    "gaussian",
    "hsic",
    "kernel_of",
    "linear",
    "median_gaussian",
    "squared_distances",
    "target",
    "u_centred",
    "unbiased",
]

Estimator = Literal["unbiased", "biased"]
Kernel = Callable[[Tensor], Tensor]
"""Maps features ``(..., n, F)`` to Gram matrices ``(..., n, n)``."""

BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Widths of the five Gaussians of MDC's published code, whose kernels are averaged."""

MEMORY = 2**23
"""Bytes that one chunk of components may take. Larger chunks leave the cache and are no faster (0.20 s a block of
DeiT-S at n = 64, one thread, from 4 to 16 MiB; 0.28 s at 64)."""

# A component that varies by less than this many rounding errors counts as constant: attention weights sum to 1 only up
# to rounding, and the median kernel, which is independent of amplitude, would treat that noise as a signal.
_ROUNDINGS = 64


def squared_distances(z: Tensor) -> Tensor:
    """Return squared Euclidean distances between samples, at least 0, and 0 on the diagonal.

    Args:
        z: ``(..., n, F)``; shorter types are computed in float32.

    Returns:
        ``(..., n, n)``.
    """
    z = wide(z)
    # Centering does not change distances, and avoids a loss of digits in the inner-product form.
    z = z - z.mean(dim=-2, keepdim=True)
    products = z @ z.transpose(-2, -1)
    halves = products.diagonal(dim1=-2, dim2=-1).clone()
    distances = products.mul_(-2).add_(halves[..., :, None]).add_(halves[..., None, :]).clamp_(min=0)
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances


def linear(z: Tensor) -> Tensor:
    """Return Gram matrices of the kernel ``<a, b>``."""
    z = wide(z)
    return z @ z.transpose(-2, -1)


def gaussian(*bandwidths: float) -> Kernel:
    """Return the mean of the kernels ``exp(-|a - b|^2 / (2 s^2))`` over the bandwidths s."""

    def kernel(z: Tensor) -> Tensor:
        distances = squared_distances(z)
        gram = torch.zeros_like(distances)
        for width in bandwidths:
            gram += torch.exp(distances * (-0.5 / width**2))
        return gram.div_(len(bandwidths))

    return kernel


def median_gaussian(z: Tensor) -> Tensor:
    """Return Gram matrices of ``exp(-|a - b|^2 / (2 m^2))``, m the median distance of a component's sample pairs.

    It does not vanish at any dimension and does not depend on the amplitude. If m is 0 (a constant component), the
    whole matrix is 0, so that its dependence on anything is exactly 0.

    Args:
        z: ``(..., n, F)``.
    """
    distances = squared_distances(z)
    pairs = _pairs(distances)
    middle = pairs.median(dim=-1).values
    size = wide(z).square().sum(dim=-1).mean(dim=-1)
    noise = (_ROUNDINGS * torch.finfo(distances.dtype).eps) ** 2 * size
    alive = middle > noise
    rate = torch.where(alive, -0.5 / middle.clamp(min=torch.finfo(distances.dtype).tiny), 0.0)
    return distances.mul_(rate[..., None, None]).exp_().mul_(alive[..., None, None])


def _pairs(distances: Tensor) -> Tensor:
    """Return the entries of every pair once, ``(..., n (n - 1) / 2)``."""
    n = distances.shape[-1]
    rows, columns = torch.triu_indices(n, n, 1, device=distances.device)
    return distances.flatten(-2).index_select(-1, rows * n + columns)


def kernel_of(name: Literal["median", "multi", "linear"]) -> Kernel:
    """Return the kernel called `name`: median Gaussian, five Gaussians, or linear."""
    return {"median": median_gaussian, "multi": gaussian(*BANDWIDTHS), "linear": linear}[name]


def centred(gram: Tensor) -> Tensor:
    """Return ``J G J``, ``(..., n, n)``."""
    rows = gram.mean(dim=-1, keepdim=True)
    return gram - rows - rows.transpose(-2, -1) + rows.mean(dim=-2, keepdim=True)


def u_centred(gram: Tensor) -> Tensor:
    """Return ``U(G) = G_ij - r_i / (n-2) - r_j / (n-2) + s / ((n-1) (n-2))``, ``(..., n, n)``, with a zero diagonal.

    r are the sums of the rows of G with a zero diagonal, s their total.

    Raises:
        MethodError: if there are fewer than 4 samples.
    """
    n = _enough(gram)
    off = gram.clone()
    off.diagonal(dim1=-2, dim2=-1).zero_()
    rows = off.sum(dim=-1, keepdim=True)
    total = rows.sum(dim=-2, keepdim=True)
    off = off - (rows + rows.transpose(-2, -1)) / (n - 2) + total / ((n - 1) * (n - 2))
    off.diagonal(dim1=-2, dim2=-1).zero_()
    return off


def _enough(gram: Tensor) -> int:
    n = gram.shape[-1]
    if n < 4:
        raise MethodError(f"dependence must be estimated on at least 4 images, but got {n}; give more")
    return n


def target(gram: Tensor, estimator: Estimator) -> Tensor:
    """Return the matrix whose elementwise product with a component's Gram matrix sums to the HSIC with the outputs.

    Args:
        gram: Gram matrices of the outputs, ``(..., n, n)``.
        estimator: the estimator.

    Raises:
        MethodError: if there are fewer than 4 samples, for which the unbiased estimator does not exist.
    """
    n = _enough(gram)
    found = centred(gram) / (n - 1) ** 2 if estimator == "biased" else u_centred(gram) / (n * (n - 3))
    # If the outputs are equal, only rounding errors are left, which must not decide a ranking.
    noise = _ROUNDINGS * torch.finfo(gram.dtype).eps * gram.abs().amax(dim=(-2, -1), keepdim=True) / n**2
    return found * (found.abs().amax(dim=(-2, -1), keepdim=True) > noise)


def biased(features: Tensor, outputs: Tensor) -> Tensor:
    """Return the biased HSIC of two Gram matrices, ``tr(K J G J) / (n - 1)^2``; needs at least 2 samples."""
    n = features.shape[-1]
    return (features * centred(outputs)).sum(dim=(-2, -1)) / (n - 1) ** 2


def unbiased(features: Tensor, outputs: Tensor) -> Tensor:
    """Return the unbiased HSIC of two Gram matrices, ``<K, U(G)> / (n (n - 3))``; its mean is 0 if independent."""
    return (features * target(outputs, "unbiased")).sum(dim=(-2, -1))


def hsic(features: Tensor, outputs: Tensor, estimator: Estimator) -> Tensor:
    """Return the HSIC of Gram matrices ``(..., n, n)``."""
    return (features * target(outputs, estimator)).sum(dim=(-2, -1))


def cka(features: Tensor, outputs: Tensor, estimator: Estimator) -> Tensor:
    """Return HSIC normalized by that of each side with itself; 0 if a side is constant, may be below 0 if unbiased."""
    whole = hsic(features, features, estimator) * hsic(outputs, outputs, estimator)
    found = hsic(features, outputs, estimator)
    tiny = torch.finfo(whole.dtype).tiny
    return torch.where(whole > tiny, found / whole.clamp(min=tiny).sqrt(), torch.zeros_like(found))


@torch.no_grad()
def dependence(
    activations: Tensor, against: Tensor, kernel: Kernel = median_gaussian, *, memory: int = MEMORY
) -> Tensor:
    """Return the HSIC of many components with one output.

    Args:
        activations: ``(n, F, C)``: F channels of each of C components; half precision is computed in float32.
        against: the result of `target` for the output, ``(n, n)``.
        kernel: kernel of the features.
        memory: bytes that one chunk of components may take, at least one component at a time. One copy of the
            activations, ordered by component, is held in addition.

    Returns:
        ``(C,)``, in the precision of the kernel.
    """
    samples, channels, components = activations.shape
    bytes_each = 4 * max(torch.finfo(activations.dtype).bits // 8, 4) * samples * (samples + channels)
    chunk = max(1, memory // bytes_each)
    parts = []
    by_component = activations.permute(2, 0, 1).contiguous()
    for start in range(0, components, chunk):
        gram = kernel(by_component[start : start + chunk])
        parts.append(torch.einsum("cij,ij->c", gram, against.to(gram.dtype)))
    return torch.cat(parts) if parts else activations.new_zeros(0)
