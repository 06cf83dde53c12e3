"""Closed forms of compensation: new weights of the channels that stay if others are removed, computed from moments.

C features before removal, K channels of a head, k of them kept, D width of the residual stream.

All matrices are moments over tokens, in float64. Gram matrices (C, C) are centered unless stated otherwise, and
weighted by the importance of the tokens. A *metric* (D, D) is the mean of g g' over gradients g of the loss with
respect to a layer's output: ``e' metric e`` is the cost of an error e in that output.

Sources: ridge compensation as in GRAIL and CORP, low rank weighted by activations as in ASVD. The joint treatment of
queries and keys is new; it uses that a softmax does not change if all keys are shifted.

Matrices are symmetric and, with a ridge, positive definite, so they are factored by Cholesky, which takes half the
operations of the factors of a general matrix. These stay in float64: a factor in float32 with two steps of refinement
took 1.3 times as long as one in float64 for 3,456 features, because a residual costs as much as a solution.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vitrim.nn.feed import exact, uncast, wide
from vitrim.words.errors import MethodError

__all__ = [
    "TINY",
    "Moments",
    "damped",
    "directions",
    "divider",
    "least_squares_queries",
    "low_rank_fit",
    "query_key_maps",
    "refit",
    "root",
    "value_map",
]

TINY = 1e-12
"""Added to the diagonal of Gram matrices before inversion, as a share of their mean diagonal."""

_BLIND = 1e-3
"""Added to the diagonal of a metric before directions are ordered by it, as a share of its mean diagonal: a few hundred
images cannot show that an error in some direction costs nothing."""

_COLUMNS = 384
"""Columns of a Gram matrix that are multiplied at once; only those from the diagonal on are, the others are copied.
This takes 0.56 of the products of a matrix of 3,456 columns (a 3 x 3 convolution of width 384), and 0.63 for 1,536."""


@dataclass(eq=False)
class Moments:
    """Weighted first and second moments of the inputs (features) and the target outputs of a layer.

    Attributes:
        at: path of the layer, for messages.
        centred: whether moments are centered because the layer has a bias; without a bias they are not.
        noise: relative error of the products, which have the model's type.
        weight: sum of the weights.
        origin: what is subtracted from every f, (C,): the mean of the first batch if moments are centered, else zero.
            Without it, the difference of two large sums would be left of activations that vary little around their
            mean, and a Gram matrix in float32 could be negative.
        target_origin: the same for t, (D,).
        features: sum of w f, (C,).
        squares: sum of w f f', (C, C).
        targets: sum of w t, (D,).
        products: sum of w t f', (D, C).
    """

    at: str
    centred: bool = True
    noise: float = 0.0
    weight: float = 0.0
    origin: Tensor | None = None
    target_origin: Tensor | None = None
    features: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    targets: Tensor = field(default_factory=lambda: torch.zeros(()))
    products: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, weights: Tensor, features: Tensor, targets: Tensor) -> None:
        """Add the tokens of one batch.

        Args:
            weights: ``(B, N)``, at least 0.
            features: ``(B, N, C)``.
            targets: ``(B, N, D)``.

        Raises:
            MethodError: if a value is not finite; the message names the path.
        """
        with uncast(features.device):
            self._add(weights, features, targets)

    def _add(self, weights: Tensor, features: Tensor, targets: Tensor) -> None:
        f, t = wide(features.flatten(0, -2)), wide(targets.flatten(0, -2))
        root_w = weights.reshape(-1, 1).to(f.dtype).sqrt()
        self.noise = torch.finfo(f.dtype).eps
        if self.origin is None or self.target_origin is None:
            self.origin, self.target_origin = (exact(x.mean(0)) * self.centred for x in (f, t))
        f, t = f - self.origin.to(f), t - self.target_origin.to(t)
        # Products of a batch have the model's type, or float32 if that is shorter. Sums over batches are float64. Both
        # factors of a Gram matrix are the same numbers, so that it stays positive if products round their inputs.
        f, t = root_w * f, root_w * t
        squares = self.squares if self.squares.dim() else exact(f.new_zeros(f.shape[1], f.shape[1]))
        _add_gram(squares, f)
        sums = [exact(part) for part in ((root_w * f).sum(0), (root_w * t).sum(0), t.mT @ f)]
        # A sum in float64 is finite if and only if all its terms are. Nothing of a Gram matrix exceeds its diagonal.
        sound = torch.stack([part.sum() for part in (squares.diagonal(), *sums)]).isfinite().all()
        # One transfer for both, because each makes the host wait for the device.
        finite, weight = torch.stack([sound.double(), exact(weights).sum().to(sound.device)]).tolist()
        if not finite:
            raise MethodError(
                f"{self.at}: activations must be finite on the calibration images, but some are NaN or infinite; "
                "check weights and normalization"
            )
        self.weight += weight
        self.features, self.squares = self.features + sums[0], squares
        self.targets, self.products = self.targets + sums[1], self.products + sums[2]

    def of(self, index: Tensor) -> "Moments":
        """Return the moments of the features at `index`, ``(c,)``."""
        squares = self.squares[index][:, index]
        origin = None if self.origin is None else self.origin[index]
        return replace(
            self, origin=origin, features=self.features[index], squares=squares, products=self.products[:, index]
        )

    @property
    def mean(self) -> Tensor:
        """Mean of the features, ``(C,)``; zero if moments are not centered."""
        return self._mean + (0.0 if self.origin is None else self.origin)

    @property
    def target(self) -> Tensor:
        """Mean of the targets, ``(D,)``; zero if moments are not centered."""
        return self._target + (0.0 if self.target_origin is None else self.target_origin)

    @property
    def _mean(self) -> Tensor:
        return self.features / self.weight * self.centred

    @property
    def _target(self) -> Tensor:
        return self.targets / self.weight * self.centred

    @property
    def gram(self) -> Tensor:
        """Centered Gram matrix, divided by the weight, ``(C, C)``; zero if no feature varies by more than rounding."""
        mean = self._mean
        gram: Tensor = self.squares / self.weight - mean[:, None] * mean[None, :]
        rounding = (2 * self.noise * self.mean).square()
        return gram * (gram.diagonal() > rounding).any()

    @property
    def positive_gram(self) -> Tensor:
        """The Gram matrix without the negative eigenvalues that rounding leaves if tokens are fewer than features."""
        gram = self.gram
        values, vectors = torch.linalg.eigh(gram)
        if float(values[0]) >= 0:
            return gram
        found: Tensor = (vectors * values.clamp_min(0)) @ vectors.mT
        return found

    @property
    def cross(self) -> Tensor:
        """Centered products of targets and features, divided by the weight, ``(D, C)``."""
        return self.products / self.weight - self._target[:, None] * self._mean[None, :]


def _add_gram(squares: Tensor, features: Tensor) -> None:
    """Add ``f' f`` to `squares`, ``(C, C)`` in float64, in place.

    Args:
        squares: the sum, on the device of `exact`.
        features: f, ``(n, C)``.
    """
    for begin in range(0, len(squares), _COLUMNS):
        end = min(begin + _COLUMNS, len(squares))
        rows = (features[:, begin:end].mT @ features[:, begin:]).to(squares.device)
        squares[begin:end, begin:] += rows
        squares[end:, begin:end] += rows[:, end - begin :].mT


def damped(gram: Tensor, strength: float, at: str) -> Tensor:
    """Return Gram matrices with `strength` times the mean diagonal of each added to its diagonal.

    Raises:
        MethodError: if no feature varies, because then there is nothing to fit; the message names the path.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    # Moments are centered before they are multiplied, so that whatever varies gives a positive number, however small.
    if not bool((scale > torch.finfo(gram.dtype).tiny).all()):
        raise MethodError(
            f"{at}: activations must vary over the calibration images, but all are constant; "
            "skip the branch, or give other images"
        )
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram + strength * scale[..., None, None] * eye


def refit(
    gram: Tensor, cross: Tensor, start: Tensor, strength: float, at: str = "weights", *, passes: int = 1
) -> Tensor:
    """Return the weights with the least squared error on the target, regularized towards `start`.

    They minimize ``mean |t - W f|^2 + strength * mean(diag gram) * |W - start|^2`` over centered targets and features.
    Their error is therefore never larger than that of `start`. If the error of `start` is zero, the result is `start`.

    Args:
        gram: ``(C, C)``.
        cross: ``(D, C)``.
        start: ``(D, C)``.
        strength: at least 0.
        at: path of the layer, for messages.
        passes: how often to repeat it, each time from the weights found before, which weakens the regularization; the
            matrix is factored once.

    Returns:
        ``(D, C)``.
    """
    divide = divider(damped(gram, max(strength, TINY), at))
    for _ in range(passes):
        start = start + divide(cross - start @ gram)
    return start


def low_rank_fit(
    gram: Tensor, cross: Tensor, metric: Tensor, strength: float, at: str = "weights"
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return the linear maps of any rank d with the least weighted error on the target (reduced-rank regression).

    With the ridge solution ``B = X (G + ridge)^-1``, the error in `metric` of a map of rank d is least for the leading
    eigenvectors of ``metric^(1/2) B X' metric^(1/2)``. Both are computed once for all ranks.

    Args:
        gram: Gram matrix G of the features, ``(C, C)``.
        cross: products X of targets and features, ``(D, C)``.
        metric: ``(D, D)``.
        strength: strength of the ridge, as in `refit`.
        at: path of the layer, for messages.

    Returns:
        A function of d, at least 1, that returns two maps, ``(d, C)`` and ``(D, d)``, whose product is the map. The d
        channels between them are uncorrelated and have a variance of 1, up to the ridge; above the rank of B, channels
        of zeros are added.
    """
    full = divider(damped(gram, max(strength, TINY), at))(cross)
    mean = float(metric.diagonal().mean())
    half = root(metric + _BLIND * mean * torch.eye(len(metric), dtype=metric.dtype, device=metric.device))
    energy = half @ (full @ cross.mT) @ half
    rising, columns = torch.linalg.eigh((energy + energy.mT) / 2)

    def fit(width: int) -> tuple[Tensor, Tensor]:
        values, vectors = rising.flip(0)[:width], columns.flip(1)[:, :width]
        # The channels have the variances `values`; without energy a channel stays zero.
        scale = torch.where(values > TINY * values[:1].clamp_min(1e-300), values.clamp_min(1e-300).rsqrt(), 0.0)
        inner = scale[:, None] * ((half @ vectors).mT @ full)
        back = (cross @ inner.mT) * (scale > 0)
        more = max(0, width - len(values))
        return torch.nn.functional.pad(inner, (0, 0, 0, more)), torch.nn.functional.pad(back, (0, more))

    return fit


def root(matrix: Tensor) -> Tensor:
    """Return symmetric square roots of positive semidefinite matrices; negative eigenvalues are taken as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    half: Tensor = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT
    return half


def divider(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that divides rows by a symmetric matrix, ``left matrix^-1``; it is factored once.

    Args:
        matrix: ``(..., C, C)``. Rounding can leave it negative eigenvalues; then it is factored as a general matrix.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        factors = torch.linalg.lu_factor(matrix)
        return lambda left: torch.linalg.lu_solve(*factors, left, left=False)

    def divided(left: Tensor) -> Tensor:
        return torch.cholesky_solve(left.mT, lower).mT

    return divided


def directions(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the directions that matter for the products of a head's queries and keys, the best first.

    With moments Q of the queries and K of the keys, the best rank-k approximation of all products is given by the
    singular vectors of ``Q^(1/2) K^(1/2)``, whatever k.

    Args:
        queries: ``(..., K, K)``, not centered: sum of w q q'.
        keys: ``(..., K, K)``: sum of c (k - m)(k - m)', where c is the attention that a key receives and m is the mean
            key of its image, because a softmax does not change if all keys are shifted.

    Returns:
        ``(..., K, K)``; directions are columns.
    """
    left, right = root(queries), root(keys)
    found: Tensor = left @ torch.linalg.svd(left @ right)[0]
    return found


def query_key_maps(best: Tensor, keys: Tensor, width: int, at: str = "qk") -> tuple[Tensor, Tensor]:
    """Approximate the products of a head's queries and keys with rank k, for any number of heads at once.

    New keys are the old ones in an orthonormal basis of the kept directions, which preserves distances between keys in
    this subspace (token merging compares keys). New queries are then the least-squares solution.

    Args:
        best: the result of `directions`, ``(..., K, K)``.
        keys: as there, ``(..., K, K)``.
        width: k, from 1 to K.
        at: path of the heads, for messages.

    Returns:
        Maps of queries and of keys, each ``(..., K, k)``; new ones are ``map' old``.
    """
    # Directions without energy give columns of zeros; the QR decomposition completes them to an orthonormal basis.
    basis = torch.linalg.qr(best[..., :width])[0]
    return least_squares_queries(keys, basis, at), basis


def least_squares_queries(keys: Tensor, basis: Tensor, at: str = "qk") -> Tensor:
    """Return the least-squares map of queries for keys that are mapped by `basis`, ``(..., K, k)``.

    It is ``K B (B' K B)^-1``. If all channels are kept, the products do not change.

    Args:
        keys: ``(..., K, K)``, as in `query_key_maps`.
        basis: ``(..., K, k)``; unit vectors if channels are kept unchanged.
        at: path of the heads, for messages.
    """
    safe = damped(keys, TINY, at)
    return divider(basis.mT @ safe @ basis)(safe @ basis)


def value_map(gram: Tensor, weight: Tensor, half: Tensor, at: str = "v", noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rank the directions of one head's values by what its output and its columns of the projection lose without them.

    Args:
        gram: Gram matrix of the head's outputs, ``(..., K, K)``.
        weight: the head's columns of the projection, ``(..., D, K)``.
        half: square root of the metric, ``(D, D)``, see `root`.
        at: path of the heads, for messages.
        noise: relative error of `gram`; directions with less energy are not scaled up further.

    Returns:
        A map of values ``(..., K, K)``, where new values are ``map' old``, and the new columns of the projection,
        ``(..., D, K)``. The first k columns of both are the best approximation of rank k.
    """
    safe = damped(gram, TINY, at)
    values, vectors = torch.linalg.eigh(safe)
    # Rounding can make eigenvalues negative if activations hardly vary.
    values = torch.maximum(values, max(TINY, noise) * values.amax(-1, keepdim=True))[..., None, :]
    own = (vectors * values.sqrt()) @ vectors.mT
    # With fewer outputs than channels, all directions are asked for.
    best = torch.linalg.svd(own @ weight.mT @ half, full_matrices=weight.shape[-2] < weight.shape[-1])[0]
    back = (vectors / values.sqrt()) @ (vectors.mT @ best)
    return back, weight @ own @ best
