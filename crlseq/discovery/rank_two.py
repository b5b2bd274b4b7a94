"""The linear likelihood from what sets environments apart from controls: objective, gradient, products of the information.

All environments are those of the controls but for what their target receives. With T = (I - G)^-1, X = T W, target t with
retention r, noise scale e^s and shift c, h = T e_t - e_t, x = e_t' X, b = h' X (Sherman and Morrison 1950)

    S_c = S_0 + m x'x - k (b'x + x'b),     a = 1 / (1 + (1 - r) h_t),   k = (1 - r) a,   m = k^2 |h|^2 + (e^2s - 1) a^2
    m_c = o + c a x

so that inverse and determinant of S_c follow from those of S_0 by 2 x 2 matrices (Woodbury 1950), with M = (m, -k; -k, 0):

    L_c = L_0 - U' J U,     |S_c| = |S_0| |I + M Q|,     U = (x; b) L_0,   Q = U (x; b)',   J = (I + M Q)^-1 M

which costs p^2 q + K q^2 for K perturbations instead of K p^2 q. The expected information is the second derivative, where
the moments are the model's own: its products come from automatic differentiation, and it is never made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.discovery.moments import DTYPE, Moments

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parameters:
    """Of one model: ``graph`` (p, p), ``loadings`` (p, q), ``shift``, ``log_scale``, ``retention`` (K,), ``noise``
    variances (q,), ``offset`` (q,).
    """

    graph: Tensor
    loadings: Tensor
    shift: Tensor
    log_scale: Tensor
    retention: Tensor
    noise: Tensor
    offset: Tensor


@dataclass(frozen=True)
class RankTwo:
    """Means (C, q) of environments, covariance S_0 (q, q) of controls; ``rows`` (K, 2, q) x and b, ``inner`` (K, 2, 2) M."""

    means: Tensor
    control: Tensor
    rows: Tensor
    inner: Tensor

    def along(self, u: Tensor) -> Tensor:
        """``u S_c u'`` (K, 2, 2) of rows ``u`` (K, 2, q)."""
        across = u @ self.rows.mT
        return (u @ self.control) @ u.mT + across @ self.inner @ across.mT

    def pooled(self, weight: Tensor) -> Tensor:
        """Mean covariance (q, q) over environments of weights (C,)."""
        q = self.rows.shape[2]
        left = (self.inner * weight[1:, None, None]) @ self.rows
        return self.control * weight.sum() + self.rows.reshape(-1, q).T @ left.reshape(-1, q)


def rank_two(parameters: Parameters, targets: Tensor) -> RankTwo:
    """Environments under ``targets`` (K,)."""
    one = parameters
    eye = torch.eye(len(one.graph), dtype=DTYPE)
    total = torch.linalg.inv(eye - one.graph)
    effect = total - eye  # h of every program, in columns
    x = total @ one.loadings
    rows = torch.stack([x, effect.T @ x], 1)[targets]
    lost = 1 - one.retention
    a = 1 / (1 + lost * effect.diagonal()[targets])
    k = lost * a
    m = k**2 * (effect**2).sum(0)[targets] + (2 * one.log_scale).expm1() * a**2
    inner = torch.stack([m, -k, -k, torch.zeros_like(k)], 1).view(-1, 2, 2)
    means = torch.cat([one.offset[None], one.offset + (one.shift * a)[:, None] * rows[:, 0]])
    return RankTwo(means, x.T @ x + torch.diag(one.noise), rows, inner)


def objective(
    model: RankTwo, weight: Tensor, means: Tensor, pooled: Tensor, along: Callable[[Tensor], Tensor]
) -> Tensor:
    """Negative log-likelihood per cell, without constants, of environments with shares ``weight`` (C,) of the cells, ``means``
    (C, q), mean covariance ``pooled`` (q, q) and ``u C_c u'`` (K, 2, 2) for rows u (K, 2, q). Not finite where a
    covariance is not positive.
    """
    root, failed = torch.linalg.cholesky_ex(model.control)
    u = torch.cholesky_solve(model.rows.reshape(-1, len(root)).T, root).T.reshape(model.rows.shape)
    system = torch.eye(2, dtype=DTYPE) + model.inner @ (u @ model.rows.mT)
    d = means - model.means
    ud = u @ d[1:, :, None]
    j, determinant = _solved(system, model.inner)
    gained = (j * (along(u) + ud @ ud.mT)).sum((1, 2))
    second = pooled + (d * weight[:, None]).T @ d
    whole = 2 * root.diagonal().log().sum() + torch.cholesky_solve(second, root).diagonal().sum()
    value: Tensor = 0.5 * (whole + ((determinant.log() - gained) * weight[1:]).sum())
    return torch.where(failed > 0, torch.inf, value)


def _solved(system: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``system^-1 right`` of matrices (K, 2, 2), and the determinants (K,)."""
    (a, b), (c, d) = system[:, 0].unbind(1), system[:, 1].unbind(1)
    determinant = a * d - b * c
    inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / determinant[:, None, None]
    return inverse @ right, determinant


def seen_by(moments: Moments) -> Callable[[RankTwo], Tensor]:
    """The objective of moments, as a function of the model."""
    weight, pooled, covariances = moments.weight(), moments.pooled(), moments.covariances[1:]
    return lambda model: objective(model, weight, moments.means, pooled, lambda u: (u @ covariances) @ u.mT)


def own_to(model: RankTwo, weight: Tensor) -> Callable[[RankTwo], Tensor]:
    """The objective of moments that are those of ``model``: its second derivative there is the expected information."""
    pooled = model.pooled(weight)
    return lambda other: objective(other, weight, model.means, pooled, model.along)


def gradient(of: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient (P,) of a function of parameters (P,)."""
    at = theta.clone().requires_grad_()
    value = of(at)
    return value.detach(), torch.autograd.grad(value, at)[0]


def curvature(of: Callable[[Tensor], Tensor], theta: Tensor) -> Product:
    """Product of the second derivative of a function at parameters (P,) with a vector (P,)."""
    at = theta.clone().requires_grad_()
    (slope,) = torch.autograd.grad(of(at), at, create_graph=True)
    return lambda v: torch.autograd.grad(slope, at, v, retain_graph=True)[0]
