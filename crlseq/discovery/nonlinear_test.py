"""Linear or nonlinear structural equations under shifts: which do held-out cells prefer?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.discovery.moments import environment_moments
from crlseq.discovery.nonlinear import MAX_CELLS, NonlinearSolution, fit_nonlinear
from crlseq.storage.stage_cache import cached_on_disk


def misfit(solution: NonlinearSolution, values: Tensor, environment: Tensor, n_parameters: int = 0) -> float:
    """Deviance of the residuals from a free Gaussian per environment, over its expectation if the equations hold.

    1 where the residuals of every environment are independent, standard normal and centred; NaN without usable cells.
    """
    moments = environment_moments(solution.residuals(values, environment), environment)
    n, p = moments.counts, values.shape[1]
    usable = n > p + 1  # the others have no saturated likelihood
    second = moments.covariances.diagonal(dim1=1, dim2=2).sum(1) + (moments.means**2).sum(1)
    saturated = torch.linalg.slogdet(moments.covariances)[1] + p
    deviance = (n * (second - saturated))[usable].sum()
    order = torch.arange(1, p + 1)
    n = n[usable, None]
    expected = -(n * (torch.digamma((n - order) / 2) + (2 / n).log())).sum() - n_parameters
    return float(deviance / expected) if expected > 0 else math.nan


@cached_on_disk()
@dataclass(frozen=True)
class Preference:
    """Whether held-out cells prefer nonlinear equations: ``gain`` per cell and its standard ``error``, ``misfit`` of
    linear and nonlinear equations, the two fits (None where one failed) and the ``reason`` in words."""

    chosen: bool
    gain: float
    error: float
    misfit: tuple[float, float]
    nonlinear: NonlinearSolution | None
    linear: NonlinearSolution | None
    reason: str


def prefers_nonlinear(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    targets: Tensor | None = None,
    seed: int = 0,
    max_cells: int = MAX_CELLS,
) -> Preference:
    """Nonlinear against linear equations under shifts, fitted to ``train``, compared on ``test`` (values, environment).

    Chosen if the held-out log-likelihood per cell gains more than two standard errors and the equations explain
    more than half of the misfit of the linear ones beyond chance. The second guards against a nonlinear mixing, which
    bends components everywhere, so that any ReLU gains, but which no sparse DAG of ReLUs explains. What cannot be
    fitted (constant or collinear components, environments without cells) keeps linear equations.
    """
    try:
        linear = fit_nonlinear(*train, targets, seed, max_cells, relu=False)
        nonlinear = fit_nonlinear(*train, targets, seed, max_cells)
        parameters = linear.B.numel() + linear.B.shape[0] + len(linear.shift)
        kinks = int((nonlinear.adjacency != 0).any(1).sum())
        edges = int((nonlinear.adjacency != 0).sum())
        ratio = misfit(linear, *train, parameters), misfit(nonlinear, *train, parameters + edges + kinks)
        difference = linear.per_cell(*test) - nonlinear.per_cell(*test)
    except (ValueError, RuntimeError) as error:  # torch's errors of singular matrices are RuntimeErrors
        nan = math.nan
        return Preference(False, 0.0, nan, (nan, nan), None, None, f"Nonlinear equations cannot be fitted: {error}")
    gain, error_of_gain = float(difference.mean()), float(difference.std() / math.sqrt(max(1, len(difference))))
    explains = ratio[1] - 1 < 0.5 * (ratio[0] - 1)
    chosen = bool(edges and gain > 2 * error_of_gain and explains)
    if chosen:
        reason = "Held-out cells fit nonlinear equations better, and these explain most of what linear ones leave."
    elif not edges:
        reason = "No nonlinear effect is worth its parameter."
    elif not gain > 2 * error_of_gain:
        reason = "Held-out cells do not fit nonlinear equations better."
    else:
        reason = "Nonlinear equations leave most of the misfit: components bend in ways that no sparse graph explains."
    return Preference(chosen, gain, error_of_gain, ratio, nonlinear, linear, reason)
