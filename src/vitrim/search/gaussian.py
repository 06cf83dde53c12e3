"""The Gaussian process of a search: BoTorch's, with the prior that few trials in many dimensions need.

n points measured, P dimensions, S candidates.

Kernel: ``amplitude * Matern 5/2`` with one length for all dimensions, and noise; bounds as in shared length scales of
standardised problems. Lengths of their own for each dimension overfit below 100 trials (docs/mdc.md).
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

from vitrim.search.policy import Array

__all__ = ["fitted"]

_LENGTH, _AMPLITUDE, _NOISE = (0.05, 20.0), (1e-2, 1e2), (1e-6, 0.1)
_START = (1.0, 1.0, 1e-3)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What BoTorch and its libraries warn of (a fit that ended early, their own deprecations) changes no result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
    with _quiet():
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
        with _quiet(), torch.no_grad(), gpytorch.settings.fast_pred_var(False):
            # Each candidate by itself: a joint posterior of thousands would be a matrix of their pairs.
            found = model.posterior(torch.as_tensor(candidates, dtype=torch.float64)[:, None, :])
            mean, deviation = found.mean[:, 0, 0].numpy(), found.variance[:, 0, 0].clamp(min=0).sqrt().numpy()
        return np.asarray(mean), np.asarray(deviation)

    return predict
