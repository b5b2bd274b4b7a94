"""How far a model is from the moments that it was fitted to: one number, 1 where the model holds.

    misfit = sum_c 2 n_c (nll_c - saturated_c) / (E - number of parameters)

over environments, ``saturated_c = (log|C_c| + q) / 2`` being a free Gaussian for each. E is the exact expectation of
the deviance if the model holds: with n C ~ Wishart(n - 1, S) the deviance of an environment has

    mean      -n sum_j ( digamma((n - j) / 2) + log(2 / n) ),      variance  n^2 sum_j polygamma(1, (n - j) / 2) - 2 n q

j = 1 .. q. Where a network mixes the latents misfits of 3 to 6 are common.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.discovery.likelihood import Solution
from crlseq.discovery.moments import Moments
from crlseq.discovery.thresholds import DESCRIBED
from crlseq.storage.stage_cache import cached_on_disk

CHANCE = 3.0  # standard deviations of chance that come on top


@cached_on_disk()
@dataclass(frozen=True)
class Misfit:
    """Deviance over its expectation, and its standard deviation under the model (infinite: nothing can be said)."""

    value: float
    error: float

    @property
    def describes(self) -> bool:
        """Whether the model describes the moments that it was fitted to, except for chance."""
        return self.value <= DESCRIBED + CHANCE * self.error

    @property
    def dispersion(self) -> float:
        """By which likelihood ratios are divided (quasi-likelihood): they count no more than the model's misfit allows."""
        return max(1.0, self.value)


def misfit(solution: Solution) -> Misfit:
    """Misfit of the first restart of a solution."""
    model = solution.model
    nll = model.per_environment(solution.theta, solution.targets, model.moments)[0]
    return misfit_of(nll, model.moments, float(model.free(solution.mask).sum()))


def misfit_of(nll: Tensor, moments: Moments, n_parameters: float) -> Misfit:
    """Misfit of a model with negative log-likelihoods ``nll`` (C,) per cell, without constants, of its own moments."""
    q = moments.means.shape[1]
    usable = moments.counts > q + 1  # the others have no saturated likelihood
    n = moments.counts[usable]
    saturated = 0.5 * (torch.linalg.slogdet(moments.covariances[usable])[1] + q)
    deviance = (2 * n * (nll[usable] - saturated)).sum()
    half = (n[:, None] - torch.arange(1, q + 1)) / 2
    expected = -(n * (torch.digamma(half) + (2 / n)[:, None].log()).sum(1)).sum()
    variance = (n**2 * torch.polygamma(1, half).sum(1) - 2 * n * q).sum()
    freedom = expected - n_parameters
    if freedom <= 0:
        return Misfit(1.0, math.inf)
    return Misfit(float(deviance / freedom), float(variance.sqrt() / freedom))
