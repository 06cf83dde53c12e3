"""BoTorch's Gaussian process over a pool of feasible policies: the contender that `benchmarks/mdc_search.py` measures.

n points measured, P dimensions, S candidates. Needs ``pip install botorch``.

Kernel: ``amplitude * Matern 5/2`` with one length for all dimensions, and noise; targets standardised; candidates are
2,000 feasible draws and 500 neighbours of each of the three best, compared by log expected improvement.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.special import erfcx, ndtr

from vitrim.cut.spend import Policies as Array
from vitrim.cut.spend import Space
from vitrim.methods.mdc.policy import mutate, sample

__all__ = ["propose"]

POOL, NEIGHBOURS, BEST = 2000, 500, 3
_LENGTH, _AMPLITUDE, _NOISE = (0.05, 20.0), (1e-2, 1e2), (1e-6, 0.1)
_START = (1.0, 1.0, 1e-3)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What BoTorch and its libraries warn of (a fit that ended early, their own deprecations) changes no result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def propose(space: Space, policies: Array, values: Array, rng: np.random.Generator) -> Array:
    """The next policy, ``(P,)``, after `policies` ``(n, P)`` gave `values`."""
    best = np.argsort(-values, kind="stable")[:BEST]
    pool = np.concatenate([sample(space, POOL, rng), *[mutate(space, policies[i], NEIGHBOURS, rng) for i in best]])
    targets = (values - values.mean()) / (float(values.std()) or 1.0)
    inside, candidates = (space.realised(some) / space.upper for some in (policies, pool))
    mean, deviation = fitted(inside, targets, np.zeros((0, len(space.names))))(candidates)
    return np.asarray(pool[int(np.argmax(log_improvement(mean, deviation, float(targets.max()))))])


def log_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """``log(sigma (z Phi(z) + phi(z)))``, with Mills' ratio where that would underflow."""
    deviation = np.maximum(deviation, 1e-9)
    z = (mean - best) / deviation
    with np.errstate(divide="ignore", invalid="ignore"):
        plain = np.log(np.maximum(z * ndtr(z) + np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi), 0))
        bracket = np.where(z < -1e4, z**-2.0, 1 + z * np.sqrt(np.pi / 2) * erfcx(-z / np.sqrt(2)))
        tail = -0.5 * z**2 - 0.5 * np.log(2 * np.pi) + np.log(bracket)
    found: Array = np.log(deviation) + np.where(z < -1, tail, plain)
    return found


def fitted(points: Array, targets: Array, pending: Array) -> Callable[[Array], tuple[Array, Array]]:
    """Fit amplitude, length and noise by marginal likelihood.

    Args:
        points: ``(n, P)`` in [0, 1], n at least 1.
        targets: ``(n,)``, mean 0 and deviation 1.
        pending: points that others measure right now, ``(m, P)``; they are taken to come out as the mean says, so that
            nobody proposes their neighbours meanwhile.

    Returns:
        A function from candidates ``(S, P)`` to the mean and the standard deviation at each, without noise.
    """
    with quiet():
        import gpytorch
        from botorch.exceptions import ModelFittingError
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.constraints import Interval
        from gpytorch.kernels import MaternKernel, ScaleKernel
        from gpytorch.likelihoods import GaussianLikelihood

        length, amplitude, noise = (
            Interval(low, high, initial_value=start)
            for (low, high), start in zip((_LENGTH, _AMPLITUDE, _NOISE), _START, strict=True)
        )
        x, y = torch.as_tensor(points, dtype=torch.float64), torch.as_tensor(targets, dtype=torch.float64)
        model = SingleTaskGP(
            x,
            y[:, None],
            likelihood=GaussianLikelihood(noise_constraint=noise),
            covar_module=ScaleKernel(
                MaternKernel(nu=2.5, lengthscale_constraint=length), outputscale_constraint=amplitude
            ),
            outcome_transform=None,
        )
        with contextlib.suppress(ModelFittingError):
            fit_gpytorch_mll(gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model))
        model.eval()
        if len(pending):
            more = torch.as_tensor(pending, dtype=torch.float64)
            with torch.no_grad():
                believed = model.posterior(more).mean[:, 0]
            model.set_train_data(torch.cat([x, more]), torch.cat([y, believed]), strict=False)

    def predict(candidates: Array) -> tuple[Array, Array]:
        with quiet(), torch.no_grad(), gpytorch.settings.fast_pred_var(False):
            # Each candidate by itself: a joint posterior of thousands would be a matrix of their pairs.
            found = model.posterior(torch.as_tensor(candidates, dtype=torch.float64)[:, None, :])
            mean, deviation = found.mean[:, 0, 0].numpy(), found.variance[:, 0, 0].clamp(min=0).sqrt().numpy()
        return np.asarray(mean), np.asarray(deviation)

    return predict
