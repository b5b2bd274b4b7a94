"""LatentSCM: the causal graph over programs, interventions on it, and its structural equations.

Row vectors throughout: a cell is a row, ``adjacency[j, k] != 0`` means j -> k. For control cells

    u_k = sum_j adjacency[j, k] phi(u_j) + z_k,        z_k ~ N(0, 1) independent,

and an intervention with target weights t (a point of the simplex over latents), shift a, log
noise scale s and retention r in [0, 1] changes its target's equation alone:

    u_k = (1 - t_k (1 - r)) sum_j adjacency[j, k] phi(u_j) + exp(t_k s) z_k + t_k a.

r = 1, s = 0 is a shift; r = 0 a hard (perfect) intervention that cuts the target from its parents;
between them it is soft. A combination multiplies retentions and adds shifts and log scales.
With shifts alone and phi the identity this is the causal layer of Zhang et al. 2023 (arXiv 2307.06250).
Equations of the kind ``flow`` have mean and log scale of `crlseq.model.mechanisms` in place of the sum over parents; r
multiplies both.
"""

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crlseq.config import InterventionKind
from crlseq.model.interventions import INTERVENTIONS
from crlseq.model.mechanisms import LocationScale

NEGATIVE_SLOPE = 0.2  # of the leaky ReLU in the networks, as published
LOG_SCALE_BOUND = 3.0  # of an intervention: an unbounded one lets one outlying cell explode a condition's variance


@dataclass(frozen=True)
class Mechanism:
    """What an intervention does to each latent's equation. All (..., p); broadcast over cells."""

    retention: Tensor  # multiplies the parents' contribution (1: untouched)
    log_scale: Tensor  # added to the log standard deviation of the noise
    shift: Tensor  # added to the latent


def product_over_parts(factors: Tensor) -> Tensor:
    """Product (C, ...) over the M parts of conditions, of factors (C, M, ...).

    The gradient of `torch.prod` counts zeros, for which the host waits on CUDA.
    """
    return functools.reduce(operator.mul, factors.unbind(1))


class LatentSCM(nn.Module):
    """Structural causal model over p programs with K learned interventions, of a kind of `INTERVENTIONS`.

    ``equations`` are ``linear`` or ``nonlinear``: phi is the identity or ReLU; or ``flow``. Without ``causal`` the graph stays
    empty: u = exp(t s) z + t a, the ablation of the paper. Of ``graph`` (p, p) only the strict upper triangle is used,
    so that the latents' order is topological. ``intercept`` (p,) is added to every latent; a buffer, 0 except with
    nonlinear equations, whose kinks have a place. ``shift``, ``log_scale``, ``retention_logit`` (K,): the last two are
    used by the kinds of intervention that have them.
    """

    def __init__(
        self, p: int, k: int, intervention: InterventionKind = "soft", equations: str = "linear", causal: bool = True
    ) -> None:
        super().__init__()
        self.intervention, self.kind, self.equations = intervention, INTERVENTIONS[intervention], equations
        self.graph = nn.Parameter(torch.empty(p, p).normal_(std=0.1), requires_grad=causal)
        if not causal:
            nn.init.zeros_(self.graph)
        self.intercept: Tensor
        self.register_buffer("intercept", torch.zeros(p))
        self.mechanisms = LocationScale(p) if equations == "flow" else None
        self.shift = nn.Parameter(torch.ones(k))
        self.log_scale = nn.Parameter(torch.zeros(k), requires_grad=self.kind.scales)
        # sigmoid(2) = 0.88: soft interventions start near a shift and earn their cuts.
        self.retention_logit = nn.Parameter(torch.full((k,), 2.0), requires_grad=self.kind.retention is None)

    @property
    def adjacency(self) -> Tensor:
        """(p, p) weights of j -> k, strictly upper triangular."""
        return torch.triu(self.graph, diagonal=1)

    def retention(self) -> Tensor:
        """(K,) share of the parents' contribution that an intervened latent keeps."""
        if self.kind.retention is None:
            return torch.sigmoid(self.retention_logit)
        return torch.full_like(self.shift, self.kind.retention)

    def mechanism(self, perturbations: Tensor, target_weights: Tensor) -> Mechanism:
        """Mechanisms, of fields (C, p), of conditions (C, M): int64 single perturbations, filled up with -1.

        ``target_weights`` (C, M, p) are those of each, from the intervention encoder.
        """
        index = perturbations.clamp_min(0)
        weight = target_weights * (perturbations >= 0).to(target_weights.dtype)[..., None]  # (C, M, p)
        retention = product_over_parts(1 - weight * (1 - self.retention()[index][..., None]))
        shift = (weight * self.shift[index][..., None]).sum(1)
        if not self.kind.scales:
            return Mechanism(retention, torch.zeros_like(shift), shift)
        log_scale = (weight * (LOG_SCALE_BOUND * torch.tanh(self.log_scale / LOG_SCALE_BOUND))[index][..., None]).sum(1)
        return Mechanism(retention, log_scale, shift)

    def forward(self, z: Tensor, mechanism: Mechanism | None = None) -> Tensor:
        """Exogenous noise z (..., B, p) to latents u of that shape; a mechanism per batch of B cells, None for controls."""
        if self.mechanisms is not None:
            return self._by_flow(z, mechanism)
        adjacency = self.adjacency
        if mechanism is None:
            source = z + self.intercept
        else:
            shift = self.intercept + mechanism.shift
            source = z * mechanism.log_scale.exp()[..., None, :] + shift[..., None, :]
            adjacency = adjacency * mechanism.retention[..., None, :]  # scales column k: what k receives
        if self.equations == "linear":
            # u (I - A) = source; A is strictly upper triangular, so the solve is exact and never singular.
            system = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device) - adjacency
            u: Tensor = torch.linalg.solve_triangular(system, source, upper=True, left=False, unitriangular=True)
            return u
        latents: list[Tensor] = []
        for k in range(z.shape[-1]):
            u_k = source[..., k]
            if k:
                parents = torch.relu(torch.stack(latents, -1))  # (..., B, k)
                u_k = u_k + (parents @ adjacency[..., :k, k, None]).squeeze(-1)
            latents.append(u_k)
        return torch.stack(latents, -1)

    def abduct(self, u: Tensor, mechanism: Mechanism | None = None) -> Tensor:
        """Exogenous noise z that gives latents u: the inverse of `forward`. Shapes as there."""
        if self.mechanisms is not None:
            mean, log_scale = self._of_parents(u, mechanism)
            return (u - mean) * torch.exp(-log_scale)
        adjacency = self.adjacency
        if mechanism is not None:
            adjacency = adjacency * mechanism.retention[..., None, :]
        phi = u if self.equations == "linear" else torch.relu(u)
        z = u - phi @ adjacency - self.intercept
        if mechanism is None:
            return z
        return (z - mechanism.shift[..., None, :]) * torch.exp(-mechanism.log_scale)[..., None, :]

    def log_density(self, u: Tensor, mechanism: Mechanism) -> Tensor:
        """log p(u) (..., B) of latents u (..., B, p), without constants: a DAG adds no determinant but that of the scales."""
        mean, log_scale = self._of_parents(u, mechanism)
        return -(0.5 * ((u - mean) * torch.exp(-log_scale)) ** 2 + log_scale).sum(-1)

    def _by_flow(self, z: Tensor, mechanism: Mechanism | None) -> Tensor:
        """`forward` of location-scale mechanisms: the k-th pass is exact for the first k latents, since order is causal."""
        u = torch.zeros_like(z)
        for _ in range(z.shape[-1]):
            mean, log_scale = self._of_parents(u, mechanism)
            u = mean + log_scale.exp() * z
        return u

    def _of_parents(self, u: Tensor, mechanism: Mechanism | None) -> tuple[Tensor, Tensor]:
        """Mean and log scale (..., B, p) of each latent, given latents u (..., B, p)."""
        if self.mechanisms is None:
            phi = u if self.equations == "linear" else torch.relu(u)
            mean, log_scale = phi @ self.adjacency, torch.zeros_like(u)
        else:
            mean, log_scale = self.mechanisms(u, self.adjacency)
        if mechanism is None:
            return mean + self.intercept, log_scale
        kept = mechanism.retention[..., None, :]
        mean = kept * mean + mechanism.shift[..., None, :] + self.intercept
        return mean, kept * log_scale + mechanism.log_scale[..., None, :]
