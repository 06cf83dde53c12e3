"""Closed forms of compensation: new weights of the channels that stay if others are removed, computed from moments.

C features before removal, K channels of a head, k of them kept, D width of the residual stream, M hidden neurons, m
kept.

All matrices are moments over tokens, in float64. Gram matrices (C, C) are centered unless stated otherwise, and
weighted by the importance of the tokens. A *metric* (D, D) is the mean of g g' over gradients g of the loss with
respect to a layer's output: ``e' metric e`` is the cost of an error e in that output.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992 (removal and the
update of what stays); Frantar and Alistarh, "SparseGPT", 2023 (the same on a layer's Gram matrix); ridge compensation
as in GRAIL and CORP, low rank weighted by activations as in ASVD. The joint treatment of queries and keys is new; it
uses that a softmax does not change if all keys are shifted.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vitrim.nn.feed import wide
from vitrim.words.errors import MethodError

__all__ = ["Moments", "least_squares_queries", "query_key_maps", "refit", "removal_order", "root", "value_map"]

_TINY = 1e-12
"""Added to the diagonal of Gram matrices before inversion, as a share of their mean diagonal."""

_CHUNK = 32
"""Number of removals between two updates of the full inverse; the resulting order does not depend on it."""


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
        f, t = wide(features.flatten(0, -2)), wide(targets.flatten(0, -2))
        w = weights.reshape(-1, 1).to(f.dtype)
        self.noise = torch.finfo(f.dtype).eps
        if self.origin is None or self.target_origin is None:
            self.origin, self.target_origin = (x.mean(0).cpu().double() * self.centred for x in (f, t))
        f, t = f - self.origin.to(f), t - self.target_origin.to(t)
        # Products of a batch have the model's type, or float32 if that is shorter. Sums over batches are float64, and
        # on the CPU because some devices have no float64.
        heavy = w * f
        parts = (heavy.sum(0), f.mT @ heavy, (w * t).sum(0), t.mT @ heavy)
        sums = [part.cpu().double() for part in parts]
        if not all(bool(torch.isfinite(part).all()) for part in sums):
            raise MethodError(
                f"{self.at}: activations must be finite on the calibration images, but some are NaN or infinite; "
                "check weights and normalization"
            )
        self.weight += float(w.double().sum()) if w.device.type != "mps" else float(w.sum())
        self.features, self.squares = self.features + sums[0], self.squares + sums[1]
        self.targets, self.products = self.targets + sums[2], self.products + sums[3]

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
        """Centered Gram matrix, divided by the weight, ``(C, C)``."""
        mean = self._mean
        return self.squares / self.weight - mean[:, None] * mean[None, :]

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


def damped(gram: Tensor, strength: float, at: str) -> Tensor:
    """Return `gram` with `strength` times its mean diagonal added to the diagonal.

    Raises:
        MethodError: if no feature varies, because then there is nothing to fit; the message names the path.
    """
    scale = float(gram.diagonal().mean())
    # Moments are centered before they are multiplied, so that whatever varies gives a positive number, however small.
    if not scale > torch.finfo(gram.dtype).tiny:
        raise MethodError(
            f"{at}: activations must vary over the calibration images, but all are constant; "
            "skip the branch, or give other images"
        )
    return gram + strength * scale * torch.eye(len(gram), dtype=gram.dtype)


def refit(gram: Tensor, cross: Tensor, start: Tensor, strength: float, at: str = "weights") -> Tensor:
    """Return the weights with the least squared error on the target, regularized towards `start`.

    They minimize ``mean |t - W f|^2 + strength * mean(diag gram) * |W - start|^2`` over centered targets and features.
    Their error is therefore never larger than that of `start`. If the error of `start` is zero, the result is `start`.

    Args:
        gram: ``(C, C)``.
        cross: ``(D, C)``.
        start: ``(D, C)``.
        strength: at least 0.
        at: path of the layer, for messages.

    Returns:
        ``(D, C)``.
    """
    missing = cross - start @ gram
    return start + _divided(missing, damped(gram, max(strength, _TINY), at))


def root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix; negative eigenvalues are taken as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    half: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return half


def _divided(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left right^-1``."""
    found: Tensor = torch.linalg.solve(right, left, left=False)
    return found


def removal_order(gram: Tensor, weight: Tensor, metric: Tensor, strength: float, at: str = "hidden") -> Tensor:
    """Return the order in which to remove neurons.

    The next neuron is always the one whose removal costs least after the remaining neurons have compensated for it.
    After each removal, the weights and the inverse of the Gram matrix are updated for the remaining neurons (Optimal
    Brain Surgeon), so the next choice takes the compensation into account.

    Args:
        gram: ``(M, M)``.
        weight: weight of the layer after the neurons, ``(D, M)``.
        metric: ``(D, D)``.
        strength: damping, as in `refit`.
        at: path of the layer, for messages.

    Returns:
        Indices of all M neurons, in order of removal.
    """
    inverse = torch.linalg.inv(damped(gram, max(strength, _TINY), at))
    rows = (root(metric) @ weight).mT.contiguous()
    size = len(gram)
    diagonal, alive = inverse.diagonal().clone(), torch.ones(size, dtype=torch.bool)
    order = torch.zeros(size, dtype=torch.long)
    lazy = torch.zeros(0, size, dtype=gram.dtype)
    for step in range(size):
        costs = rows.square().sum(1) / diagonal.clamp_min(1e-300)
        gone = int(torch.where(alive, costs, torch.inf).argmin())
        column = inverse[:, gone] - lazy.mT @ lazy[:, gone]
        pivot = float(column[gone].clamp_min(1e-300))
        rows = rows - (column / pivot)[:, None] * rows[gone]
        scaled = column / pivot**0.5
        lazy = torch.cat([lazy, scaled[None]])
        diagonal = diagonal - scaled.square()
        alive[gone], order[step] = False, gone
        if len(lazy) == _CHUNK:
            inverse, lazy = inverse - lazy.mT @ lazy, lazy[:0]
    return order


def query_key_maps(queries: Tensor, keys: Tensor, width: int, at: str = "qk") -> tuple[Tensor, Tensor]:
    """Approximate the products of one head's queries and keys with rank k.

    With moments Q of the queries and K of the keys, the best rank-k approximation of all products is given by the
    singular vectors of ``Q^(1/2) K^(1/2)``. New keys are the old ones in an orthonormal basis of the kept directions,
    which preserves distances between keys in this subspace (token merging compares keys). New queries are then the
    least-squares solution.

    Args:
        queries: ``(K, K)``, not centered: sum of w q q'.
        keys: ``(K, K)``: sum of c (k - m)(k - m)', where c is the attention that a key receives and m is the mean key
            of its image, because a softmax does not change if all keys are shifted.
        width: k, from 1 to K.
        at: path of the head, for messages.

    Returns:
        Maps of queries and of keys, each ``(K, k)``; new ones are ``map' old``.
    """
    left, right = root(queries), root(keys)
    kept = torch.linalg.svd(left @ right)[0][:, :width]
    # Directions without energy give columns of zeros; the QR decomposition completes them to an orthonormal basis.
    basis = torch.linalg.qr(left @ kept)[0]
    return least_squares_queries(keys, basis, at), basis


def least_squares_queries(keys: Tensor, basis: Tensor, at: str = "qk") -> Tensor:
    """Return the least-squares map of queries for keys that are mapped by `basis`, ``(K, k)``.

    It is ``K B (B' K B)^-1``. If all channels are kept, the products do not change.

    Args:
        keys: ``(K, K)``, as in `query_key_maps`.
        basis: ``(K, k)``; unit vectors if channels are kept unchanged.
        at: path of the head, for messages.
    """
    safe = damped(keys, _TINY, at)
    return _divided(safe @ basis, basis.mT @ safe @ basis)


def value_map(
    gram: Tensor, weight: Tensor, metric: Tensor, width: int, at: str = "v", noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Approximate the product of one head's values and its columns of the projection with rank k.

    Args:
        gram: Gram matrix of the head's outputs, ``(K, K)``.
        weight: the head's columns of the projection, ``(D, K)``.
        metric: ``(D, D)``.
        width: k, from 1 to K.
        at: path of the head, for messages.
        noise: relative error of `gram`; directions with less energy are not scaled up further.

    Returns:
        A map of values ``(K, k)``, where new values are ``map' old``, and the new columns of the projection ``(D, k)``.
    """
    safe = damped(gram, _TINY, at)
    values, vectors = torch.linalg.eigh(safe)
    # Rounding can make eigenvalues negative if activations hardly vary.
    values = values.clamp_min(max(_TINY, noise) * float(values.max()))
    half = (vectors * values.sqrt()) @ vectors.mT
    kept = torch.linalg.svd(half @ weight.mT @ root(metric))[0][:, :width]
    back = (vectors / values.sqrt()) @ (vectors.mT @ kept)
    return back, weight @ half @ kept
