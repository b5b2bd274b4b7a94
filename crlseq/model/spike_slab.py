"""Spike-and-slab lasso: a prior under which most masks are exactly 0 and the others hardly shrunk.

    w_gk ~ gamma_gk Laplace(slab) + (1 - gamma_gk) Laplace(spike),   gamma_gk ~ Bernoulli(eta_k),   eta_k ~ Beta(1, 1)

with rates ``spike`` >> ``slab`` (lambda_0 and lambda_1 of Rockova and George 2018, JASA 113, "The spike-and-slab
LASSO"; of a decoder: Moran, Sridhar, Wang, Blei 2022, TMLR, "Identifiable deep generative models via sparse
decoding"). EM: p*(w) is the probability that w is of the slab, lambda*(w) |w| the penalty that this makes, and eta_k
the mean of p* over genes.

Masks are in units of a gene's noise and of a program's standard deviation over control cells, so that n cells know one
to about 1 / sqrt(n). From this follow both rates (`SpikeSlab.of`): nothing is tuned to a screen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SLAB = 1.0  # a gene of a program moves by about its noise when the program moves by a standard deviation
SPIKE = 8.0  # times sqrt(n): a spike is an eighth of a standard error wide
MIN_SHARE = 1e-4  # of eta: a program that has lost all genes may still win one
INNER = 2  # steps to a mask's mode
SWEEPS, TOLERANCE = 50, 0.02  # of coordinate ascent; a change of the masks that ends it, in standard errors


@dataclass(frozen=True)
class SpikeSlab:
    """The prior's rates for n cells, in units of 1 / mask."""

    n: int
    slab: float
    spike: float

    @classmethod
    def of(cls, n_cells: int) -> SpikeSlab:
        """Slab 1, and a spike that n cells cannot tell from 0, 8 sqrt(n): masks are kept from about 4 standard errors
        on (`threshold`), which depends on the spike's rate by the square root of its logarithm alone.
        """
        return cls(n_cells, SLAB, max(SPIKE * math.sqrt(n_cells), 2 * SLAB))

    def annealed(self, sparsity: float) -> SpikeSlab:
        """A spike between the slab (0) and this prior's (1), on the way that starts from no sparsity."""
        return replace(self, spike=self.slab * (self.spike / self.slab) ** sparsity)

    def probability(self, w: Tensor, share: Tensor) -> Tensor:
        """p*(w): that masks w (G, p) are of the slab, for shares eta (p,)."""
        return torch.sigmoid(self.odds(share) + (self.spike - self.slab) * w.abs())

    def odds(self, share: Tensor) -> Tensor:
        """(p,) logarithm of the odds that a mask of 0 is of the slab, for shares eta (p,)."""
        return torch.logit(share) + math.log(self.slab / self.spike)

    def rate(self, size: Tensor, odds: Tensor) -> Tensor:
        """lambda*(w) (G, p): slope of the penalty at masks of this size, for `odds`."""
        p = torch.sigmoid(odds + (self.spike - self.slab) * size)
        return self.slab * p + self.spike * (1 - p)

    def shares(self, w: Tensor, share: Tensor) -> Tensor:
        """(p,) the next eta: mean of p* over genes, of masks w (G, p) and the present shares."""
        return self.probability(w, share).mean(0).clamp(MIN_SHARE, 1 - MIN_SHARE)

    def threshold(self, curvature: Tensor, share: Tensor) -> Tensor:
        """Size of the statistic z below which a mask is 0, of curvatures (..., p).

        For the likelihood ``z w - curvature w^2 / 2`` the mode is 0 up to ``sqrt(2 curvature log(1 / p*(0))) + slab``
        where the spike is steep enough, and elsewhere as far as its slope at 0 (Rockova and George 2018, theorem 3.1).
        """
        at_zero = torch.zeros_like(share)
        slope, p = self.rate(at_zero, self.odds(share)), self.probability(at_zero, share)
        jump = (-2 * curvature * p.log()).sqrt()
        steep = ((slope - self.slab) > jump) & (self.spike - self.slab > 2 * curvature.sqrt())
        return torch.where(steep, jump + self.slab, slope.expand_as(jump))


def fit_masks(
    prior: SpikeSlab, start: Tensor, share: Tensor, shape: Tensor, cross: Tensor, gram: Tensor
) -> tuple[Tensor, Tensor]:
    """Mode of masks and shares for genes that are sums of given functions of the programs: coordinate ascent and EM.

    With weights W = (mask[g, h % p] shape[g, h]) on features, in units of each gene's noise,

        maximise  sum_g  W_g cross_g - W_g gram W_g' / 2 + log prior(mask_g | eta).

    Masks ``start`` (G, p) and shares ``share`` (p,) to masks, many exactly 0, and shares. ``shape`` (G, H) are weights
    of the functions, H a multiple of p; ``cross`` (G, H) and ``gram`` (H, H) sums over cells of features times a gene,
    and of features times features.
    """
    w, p = start.clone(), start.shape[1]
    own = [slice(k, None, p) for k in range(p)]
    curvature = torch.stack([((shape[:, k] @ gram[k][:, k]) * shape[:, k]).sum(1) for k in own], 1).clamp_min(1e-12)
    linear = torch.stack([(shape[:, k] * cross[:, k]).sum(1) for k in own], 1)
    weight = w.repeat(1, shape.shape[1] // p) * shape
    for _ in range(SWEEPS):
        before = w.clone()
        threshold, odds = prior.threshold(curvature, share), prior.odds(share)
        for k, units in enumerate(own):
            others = ((weight @ gram[:, units]) * shape[:, units]).sum(1) - w[:, k] * curvature[:, k]
            z = linear[:, k] - others
            distance = z.abs()
            # The larger mode, from above: at a small mask the spike's slope would keep it where it is.
            size = (distance - prior.slab).clamp_min(0) / curvature[:, k]
            for _ in range(INNER):
                size = (distance - prior.rate(size, odds[k])).clamp_min(0) / curvature[:, k]
            w[:, k] = torch.where(distance > threshold[:, k], size.copysign(z), 0.0)
            weight[:, units] = w[:, k, None] * shape[:, units]
        share = prior.shares(w, share)
        if float((w - before).abs().max()) < TOLERANCE / prior.n**0.5:
            break
    return w, share
