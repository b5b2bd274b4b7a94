"""Structural models of four programs: their exact moments by `LatentSCM`, and cells drawn from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.config import InterventionKind
from crlseq.discovery.moments import DTYPE, Moments
from crlseq.model.scm import LOG_SCALE_BOUND, LatentSCM, Mechanism

P, Q = 4, 7
TARGETS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
SHIFTS = torch.tensor([2.0, -1.5, 1.5, -2.5, 2.0, -1.0, -2.0, 1.5], dtype=DTYPE)
LOG_SCALES = torch.tensor([-0.4, -0.2, -0.4, 0.1, -0.3, -0.4, 0.2, -0.4], dtype=DTYPE)
RETENTIONS = torch.tensor([0.2, 0.4, 0.3, 0.5, 0.2, 0.4, 0.3, 0.4], dtype=DTYPE)
# 0 -> 1 -> 2 and 0 -> 3
GRAPH = torch.zeros(P, P, dtype=DTYPE)
GRAPH[0, 1], GRAPH[1, 2], GRAPH[0, 3] = 1.0, -0.9, 0.8
NO_EDGES = torch.zeros(P, P, dtype=DTYPE)
CHAIN = torch.diag(torch.tensor([1.0, -0.9, 0.8], dtype=DTYPE), 1)
AROUND = CHAIN.clone()  # with an edge around 1, of the sign of the chain's product, and none around 2
AROUND[0, 2] = -0.6


@dataclass(frozen=True)
class Truth:
    """A structural model with linear mixing: ``y = u W + offset`` plus noise of variance ``noise``."""

    scm: LatentSCM
    mechanism: Mechanism
    W: Tensor
    offset: Tensor
    noise: float

    def moments(self, count: float) -> Moments:
        """Exact moments: the SCM is affine in its noise, so 0 gives the mean and unit vectors give the map."""
        basis = torch.cat([torch.zeros(1, P, dtype=DTYPE), torch.eye(P, dtype=DTYPE)])
        u = self.scm(basis.expand(len(TARGETS) + 1, -1, -1), self.mechanism)
        total = (u[:, 1:] - u[:, :1]) @ self.W
        noise = self.noise * torch.eye(Q, dtype=DTYPE)
        counts = torch.full((len(total),), count, dtype=DTYPE)
        return Moments(u[:, 0] @ self.W + self.offset, total.mT @ total + noise, counts)

    def cells(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Values and environments: ``n`` cells of each perturbation, four times as many controls."""
        generator = torch.Generator().manual_seed(seed)
        values, environment = [], []
        for c in range(len(TARGETS) + 1):
            own = Mechanism(self.mechanism.retention[c], self.mechanism.log_scale[c], self.mechanism.shift[c])
            z = torch.randn(n if c else 4 * n, P, generator=generator, dtype=DTYPE)
            noise = self.noise**0.5 * torch.randn(len(z), Q, generator=generator, dtype=DTYPE)
            values.append(self.scm(z, own) @ self.W + self.offset + noise)
            environment.append(torch.full((len(z),), c))
        return torch.cat(values), torch.cat(environment)


@torch.no_grad()
def truth(kind: InterventionKind = "hard", graph: Tensor = GRAPH, noise: float = 0.05, seed: int = 0) -> Truth:
    """Programs 0 to 3, each with two perturbations, under interventions of ``kind``; ``graph`` is upper triangular."""
    generator = torch.Generator().manual_seed(seed)
    scm = LatentSCM(P, len(TARGETS), kind).double()
    scm.graph.copy_(graph)
    scm.shift.copy_(SHIFTS)
    scm.log_scale.copy_(LOG_SCALE_BOUND * torch.atanh(LOG_SCALES / LOG_SCALE_BOUND))
    scm.retention_logit.copy_(RETENTIONS.logit())
    scm.requires_grad_(False)
    conditions = torch.arange(-1, len(TARGETS))[:, None]  # -1: no perturbation, the control
    weights = torch.nn.functional.one_hot(TARGETS[conditions.clamp_min(0)], P).to(DTYPE)
    W = torch.randn(P, Q, generator=generator, dtype=DTYPE)
    offset = torch.randn(Q, generator=generator, dtype=DTYPE)
    return Truth(scm, scm.mechanism(conditions, weights), W, offset, noise)


def matched(adjacency: Tensor, targets: Tensor) -> Tensor:
    """Absolute weights (p, p) with programs in the order of the truth, by the targets found for its perturbations."""
    place = targets[::2]
    assert torch.equal(place.repeat_interleave(2), targets) and len(set(place.tolist())) == P
    return adjacency[place][:, place].abs()
