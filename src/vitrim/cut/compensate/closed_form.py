"""Compensation: what the channels that stay must become when others go. Tensors in, tensors out.

C features that stay or go, K channels of a head, k of them kept, D width of the residual stream, M hidden neurons, m
kept.

All matrices are moments over tokens, in float64: Gram matrices (C, C) are centred unless said, and weighted by how much
a token matters. A *metric* (D, D) is the mean of g g' over gradients g of the loss by a layer's output: ``e' metric e``
is what an error e there costs.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992 (removal and the
update of what stays); Frantar and Alistarh, "SparseGPT", 2023 (the same on a layer's Gram matrix); ridge compensation
as in GRAIL and CORP, low rank weighted by activations as in ASVD. Ours is the joint treatment of queries and keys,
which uses that a softmax ignores a shift of all keys.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vitrim.nn.feed import wide
from vitrim.words.errors import MethodError

__all__ = ["Moments", "least_squares_queries", "query_key_maps", "refit", "removal_order", "root", "value_map"]

_TINY = 1e-12
"""Added to Gram matrices that are inverted whole, as a share of their mean diagonal."""

_CHUNK = 32
"""Removals between two updates of the whole inverse; the order does not depend on it."""


@dataclass(eq=False)
class Moments:
    """Weighted first and second moments of features and of what they are to give.

    Attributes:
        at: the place, for error texts.
        centred: whether a bias takes up the means; without one moments are taken as they are.
        weight: sum of the weights.
        features: sum of w f, (C,).
        squares: sum of w f f', (C, C).
        targets: sum of w t, (D,).
        products: sum of w t f', (D, C).
    """

    at: str
    centred: bool = True
    weight: float = 0.0
    features: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    targets: Tensor = field(default_factory=lambda: torch.zeros(()))
    products: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, weights: Tensor, features: Tensor, targets: Tensor) -> None:
        """Count some tokens in.

        Args:
            weights: ``(B, N)``, at least 0.
            features: ``(B, N, C)``.
            targets: ``(B, N, D)``.

        Raises:
            MethodError: naming the place, if a value is not finite.
        """
        f, t = wide(features.flatten(0, -2)), wide(targets.flatten(0, -2))
        w = weights.reshape(-1, 1).to(f.dtype)
        # Products of a batch in the type of the model or float32, sums over batches in float64: on the CPU, which
        # every device has.
        heavy = w * f
        parts = (heavy.sum(0), f.mT @ heavy, (w * t).sum(0), t.mT @ heavy)
        sums = [part.cpu().double() for part in parts]
        if not all(bool(torch.isfinite(part).all()) for part in sums):
            raise MethodError(
                f"{self.at}: activations must be finite on the calibration images, but some are NaN or infinite; "
                "check weights and normalisation"
            )
        self.weight += float(w.double().sum()) if w.device.type != "mps" else float(w.sum())
        self.features, self.squares = self.features + sums[0], self.squares + sums[1]
        self.targets, self.products = self.targets + sums[2], self.products + sums[3]

    def of(self, index: Tensor) -> "Moments":
        """Those of some features alone, ``(c,)``."""
        squares = self.squares[index][:, index]
        return replace(self, features=self.features[index], squares=squares, products=self.products[:, index])

    @property
    def mean(self) -> Tensor:
        """Mean of the features, ``(C,)``; zero where there is no bias to take it up."""
        return self.features / self.weight * self.centred

    @property
    def target(self) -> Tensor:
        """Mean of the targets, ``(D,)``; zero where there is no bias to take it up."""
        return self.targets / self.weight * self.centred

    @property
    def gram(self) -> Tensor:
        """Centred Gram matrix, divided by the weight, ``(C, C)``."""
        mean = self.mean
        return self.squares / self.weight - mean[:, None] * mean[None, :]

    @property
    def cross(self) -> Tensor:
        """Centred products of targets and features, ``(D, C)``."""
        return self.products / self.weight - self.target[:, None] * self.mean[None, :]


def damped(gram: Tensor, strength: float, at: str) -> Tensor:
    """`gram` with `strength` times its mean diagonal added to the diagonal.

    Raises:
        MethodError: naming the place, if no feature varies, for then nothing can be learned from them.
    """
    scale = float(gram.diagonal().mean())
    if not scale > 1e-30:
        raise MethodError(
            f"{at}: activations must vary over the calibration images, but all are constant; "
            "skip the branch, or give other images"
        )
    return gram + strength * scale * torch.eye(len(gram), dtype=gram.dtype)


def refit(gram: Tensor, cross: Tensor, start: Tensor, strength: float, at: str = "weights") -> Tensor:
    """Weights with the least error on the target, shrunk towards `start`.

    They minimise ``mean |t - W f|^2 + strength * mean(diag gram) * |W - start|^2`` over centred targets and features,
    so their error is never above that of `start`; where `start` has none they are `start`.

    Args:
        gram: ``(C, C)``.
        cross: ``(D, C)``.
        start: ``(D, C)``.
        strength: at least 0.
        at: the place, for error texts.

    Returns:
        ``(D, C)``.
    """
    missing = cross - start @ gram
    return start + _divided(missing, damped(gram, max(strength, _TINY), at))


def root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix; roundings below zero count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    half: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return half


def _divided(left: Tensor, right: Tensor) -> Tensor:
    """``left right^-1``."""
    found: Tensor = torch.linalg.solve(right, left, left=False)
    return found


def removal_order(gram: Tensor, weight: Tensor, metric: Tensor, strength: float, at: str = "hidden") -> Tensor:
    """The order in which neurons go, each the one whose loss costs least once all that stay have made up for it.

    After each removal the weights and the inverse of the Gram matrix are those of the neurons that are left (Optimal
    Brain Surgeon), so the next choice knows what has been compensated.

    Args:
        gram: ``(M, M)``.
        weight: of the layer that reads the neurons, ``(D, M)``.
        metric: ``(D, D)``.
        strength: damping, as in `refit`.
        at: the place, for error texts.

    Returns:
        Places of all M neurons, the first to go first.
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
    """Low rank of the products of one head's queries and keys.

    With moments Q of the queries and K of the keys, the best rank-k form of all products is read off the singular
    vectors of ``Q^(1/2) K^(1/2)``. New keys are the old ones in an orthonormal basis of the kept directions, so that
    distances between keys stay what they were within it (token matching compares keys); new queries are the
    least-squares rest.

    Args:
        queries: ``(K, K)``, not centred: sum of w q q'.
        keys: ``(K, K)``: sum of c (k - m)(k - m)' with c the attention that a key receives and m the mean of its image;
            a softmax ignores what all keys share.
        width: k, from 1 to K.
        at: the place, for error texts.

    Returns:
        Maps of queries and of keys, each ``(K, k)``; new ones are ``map' old``.
    """
    left, right = root(queries), root(keys)
    kept = torch.linalg.svd(left @ right)[0][:, :width]
    # Directions without any energy leave columns of zeros, which a QR decomposition fills with some basis.
    basis = torch.linalg.qr(left @ kept)[0]
    return least_squares_queries(keys, basis, at), basis


def least_squares_queries(keys: Tensor, basis: Tensor, at: str = "qk") -> Tensor:
    """The map of queries that makes the best of keys mapped by `basis`, ``(K, k)``.

    It is ``K B (B' K B)^-1``; with all channels kept the products stay what they were.

    Args:
        keys: ``(K, K)``, as in `query_key_maps`.
        basis: ``(K, k)``; unit vectors where channels are kept as they are.
        at: the place, for error texts.
    """
    safe = damped(keys, _TINY, at)
    return _divided(safe @ basis, basis.mT @ safe @ basis)


def value_map(gram: Tensor, weight: Tensor, metric: Tensor, width: int, at: str = "v") -> tuple[Tensor, Tensor]:
    """Low rank of one head's values and its columns of the projection.

    Args:
        gram: of the head's outputs, ``(K, K)``.
        weight: the head's columns of the projection, ``(D, K)``.
        metric: ``(D, D)``.
        width: k, from 1 to K.
        at: the place, for error texts.

    Returns:
        A map of values ``(K, k)``, new ones are ``map' old``, and the columns of the projection for them ``(D, k)``.
    """
    safe = damped(gram, _TINY, at)
    values, vectors = torch.linalg.eigh(safe)
    # Roundings below zero, where activations hardly vary.
    values = values.clamp_min(_TINY * float(values.max()))
    half = (vectors * values.sqrt()) @ vectors.mT
    kept = torch.linalg.svd(half @ weight.mT @ root(metric))[0][:, :width]
    back = (vectors / values.sqrt()) @ (vectors.mT @ kept)
    return back, weight @ half @ kept
