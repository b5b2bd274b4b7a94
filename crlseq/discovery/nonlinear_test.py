"""Linear or nonlinear structural equations under shifts: which do held-out cells prefer?"""

import math
from dataclasses import dataclass

from torch import Tensor

from crlseq.discovery.misfit import Misfit, misfit_of
from crlseq.discovery.moments import environment_moments
from crlseq.discovery.nonlinear import NonlinearSolution, fit_nonlinear
from crlseq.storage.stage_cache import cached_on_disk

EXPLAINED = 0.9  # share of the misfit


def misfit_of_equations(solution: NonlinearSolution, values: Tensor, environment: Tensor, n_parameters: int) -> Misfit:
    """Misfit of the residuals, which are independent, standard normal and centred in each environment if it is 1."""
    moments = environment_moments(solution.residuals(values, environment), environment)
    second = moments.covariances.diagonal(dim1=1, dim2=2).sum(1) + (moments.means**2).sum(1)
    return misfit_of(0.5 * second, moments, n_parameters)


@cached_on_disk()
@dataclass(frozen=True)
class Preference:
    """Whether held-out cells prefer nonlinear equations: ``gain`` per cell and its standard ``error``, ``misfit`` and
    fit of nonlinear equations (None where one of the fits failed).
    """

    chosen: bool
    gain: float
    error: float
    misfit: Misfit | None
    nonlinear: NonlinearSolution | None


def prefers_nonlinear(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int = 0) -> Preference:
    """Nonlinear against linear equations under shifts, fitted to ``train``, compared on ``test`` (values, environment).

    Chosen if the held-out log-likelihood per cell gains more than two standard errors and the equations explain
    `EXPLAINED` of the misfit of the linear ones beyond 1. The second guards against a nonlinear mixing, which
    bends components everywhere, so that any ReLU gains, but which no sparse DAG of ReLUs explains, and against background,
    of which a fit may explain half by chance of where it starts; where the equations hold 1 to 2 % are left. What cannot be
    fitted (constant or collinear components, environments without cells) keeps linear equations.
    """
    try:
        linear = fit_nonlinear(*train, seed, relu=False)
        nonlinear = fit_nonlinear(*train, seed)
        parameters = linear.B.numel() + linear.B.shape[0] + len(linear.shift)
        kinks = int((nonlinear.adjacency != 0).any(1).sum())
        edges = int((nonlinear.adjacency != 0).sum())
        before = misfit_of_equations(linear, *train, parameters)
        after = misfit_of_equations(nonlinear, *train, parameters + edges + kinks)
        difference = linear.per_cell(*test) - nonlinear.per_cell(*test)
    except (ValueError, RuntimeError):  # torch's errors of singular matrices are RuntimeErrors
        return Preference(False, 0.0, math.nan, None, None)
    gain, error_of_gain = float(difference.mean()), float(difference.std() / math.sqrt(max(1, len(difference))))
    explains = math.isfinite(after.error) and after.value - 1 < (1 - EXPLAINED) * (before.value - 1)
    chosen = bool(edges and gain > 2 * error_of_gain and explains)
    return Preference(chosen, gain, error_of_gain, after, nonlinear)
