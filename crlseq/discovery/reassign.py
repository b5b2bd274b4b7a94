"""Which program a perturbation targets, given a fitted model: its own Gaussian likelihood, maximised in closed form.

Under target ``k`` the cells of a perturbation have mean ``o + a x / d`` and covariance ``B + (e^{2s} - 1) x'x``, where
``x`` is row ``k`` of ``D T_k W``, ``D`` the noise scales of the context (I without contexts), ``d`` that of ``k``, and
``B = W' T_k' D^2 T_k W + noise``. With ``h = x B^-1 x'``, ``g = x B^-1 (y - o)'`` and ``v = x B^-1 C B^-1 x'`` (``y``, ``C``:
mean and covariance of the cells) the maximum over shift and noise scale is

    a = d g / h,      1 + (e^{2s} - 1) h = v / h

since the rank-one update only rescales ``S^-1 x``: the shift does not depend on the scale, nor the scale on the shift.
A perturbation without effect goes to some program without parents: test for an effect before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.discovery.likelihood import MAX_FITTED_LOG_SCALE, LinearModel, Solution
from crlseq.discovery.moments import DTYPE, Moments

TRIED_RETENTIONS = (0.05, 0.275, 0.5, 0.725, 0.95)  # where they are learned: the likelihood is flat between
BORDER = 0.98  # of MAX_FITTED_LOG_SCALE, which the model's tanh reaches nowhere
MOVED_STEPS = 20  # of scoring after a round of moves


@dataclass(frozen=True)
class Assignment:
    """Best target of each of K perturbations, (K,), with ``shift``, ``log_scale`` and ``retention`` at that target.

    ``nll`` (K, p) is the negative log-likelihood per cell under every target, constants left out.
    """

    targets: Tensor
    shift: Tensor
    log_scale: Tensor
    retention: Tensor
    nll: Tensor


def assign_targets(model: LinearModel, theta: Tensor, moments: Moments) -> Assignment:
    """Targets by likelihood, of the model's own perturbations or others: the environments of ``moments`` after those of
    controls, which are not used.

    ``theta`` (1, P) is held fixed but for what belongs to a perturbation alone.
    """
    scale, n, groups = model.context_scale(model.unpack(theta))[0].exp(), moments.n_controls, list[Tensor]()
    parts = list[tuple[Tensor, Tensor, Tensor, Tensor]]()
    retention = torch.tensor(_tried(model), dtype=DTYPE)
    for c in range(n):
        own = torch.nonzero(moments.control == c)[:, 0]
        groups.append(own)
        parts.append(
            _at_targets(model, theta, scale[c], retention, moments.means[n + own], moments.covariances[n + own])
        )
    order = torch.cat(groups).argsort()
    nll, shift, log_scale, level = (torch.cat(each, 1)[:, order] for each in zip(*parts, strict=True))  # (p, K)
    targets = moments.together(nll.T * moments.counts[n:, None]).argmin(1)
    at = targets, torch.arange(len(targets))
    return Assignment(targets, shift[at], log_scale[at], retention[level[at]], nll.T)


def _tried(model: LinearModel) -> tuple[float, ...]:
    fixed = model.intervention.retention
    return TRIED_RETENTIONS if fixed is None else (fixed,)


def _at_targets(
    model: LinearModel, theta: Tensor, scale: Tensor, retention: Tensor, means: Tensor, covariances: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Negative log-likelihood, shift, log scale and place of the best ``retention`` (p, K) at every target of K perturbations
    of one context, in which programs' noise has this ``scale`` (p,).
    """
    w = model.unpack(theta)
    graph, loadings, offset = w["G"][0], w["W"][0], w["offset"][0]
    eye = torch.eye(model.p, dtype=DTYPE)
    column = 1 - eye * (1 - retention[:, None, None])  # (L, p, p): row k scales the columns of G under target k
    total = scale[:, None] * (torch.linalg.inv(eye - graph * column[:, :, None]) @ loadings)  # D T_k W (L, p, p, q)
    x = total.diagonal(dim1=1, dim2=2).transpose(1, 2)  # (L, p, q)
    base = total.transpose(2, 3) @ total + torch.diag(model.floor + w["psi"][0].exp())
    root = torch.linalg.cholesky(base)
    precision = torch.cholesky_inverse(root)
    u = (precision @ x[..., None])[..., 0]
    h = (u * x).sum(2)[..., None]  # (L, p, 1)
    delta = means - offset
    g = u @ delta.T  # (L, p, K)
    v = torch.einsum("lpa,kab,lpb->lpk", u, covariances, u)
    bound = BORDER * MAX_FITTED_LOG_SCALE if model.intervention.scales else 0.0
    grow = torch.tensor([-bound, bound], dtype=DTYPE).mul(2).expm1()  # e^{2s} - 1
    t = (v / h).clamp(1 + grow[0] * h, 1 + grow[1] * h)  # log t + v / (h t) falls, then rises: the clamp is exact
    trace = precision.flatten(2) @ (covariances + delta[:, :, None] * delta[:, None]).flatten(1).T
    log_determinant = 2 * root.diagonal(dim1=2, dim2=3).log().sum(2)[..., None] + t.log()
    nll = 0.5 * (log_determinant + trace - g**2 / h - (1 - 1 / t) * v / h)
    nll, level = nll.min(0)
    shift, log_scale = scale[:, None] * (g / h), 0.5 * torch.log1p((t - 1) / h)
    return nll, shift.gather(0, level[None])[0], log_scale.gather(0, level[None])[0], level


def move(model: LinearModel, theta: Tensor, found: Assignment, moved: Tensor) -> Tensor:
    """``theta`` (1, P) with shift, noise scale and retention of the perturbations ``moved`` (K,) as ``found``."""
    theta = theta.clone()
    raw = {"shift": found.shift, "scale": MAX_FITTED_LOG_SCALE * torch.atanh(found.log_scale / MAX_FITTED_LOG_SCALE)}
    if model.learns_retention:
        raw["retention"] = torch.logit(found.retention)
    for name, value in raw.items():
        theta[0, model.at[name]] = torch.where(moved, value, theta[0, model.at[name]])
    return theta


def reassign_targets(solution: Solution, rounds: int = 10) -> Solution:
    """Move every perturbation to the target of the best likelihood and refit (the first restart), until nothing moves.

    A program keeps the perturbation that gains least by leaving. The likelihood never falls.
    """
    model, now = solution.model, solution
    for _ in range(rounds):
        found = assign_targets(model, now.theta, model.moments)
        targets = _kept(found, now.targets[0], model.moments)
        moved = targets != now.targets[0]
        if not bool(moved.any()):
            break
        theta = move(model, now.theta, found, moved)
        trial = now.refitted(theta=theta, targets=targets[None], steps=MOVED_STEPS)
        if not bool(trial.nll[0] < now.nll[0]):
            break
        now = trial
    return now


def settle_targets(solution: Solution) -> Solution:
    """Targets moved until none gains by it; where that is another partition, it is fitted from a start of its own too.

    Parameters that were fitted to a wrong partition may lie in a valley that no step leads out of.
    """
    model, now = solution.model, reassign_targets(solution)
    while bool((now.targets != solution.targets).any()):
        solution = model.solve(model.start(now.targets), now.targets, now.mask)
        if not bool(solution.nll[0] < now.nll[0]):
            break
        now = reassign_targets(solution)
    return now


def _kept(found: Assignment, before: Tensor, moments: Moments) -> Tensor:
    """The targets found (K,), but no program that had a perturbation is left without."""
    targets = found.targets.clone()
    each = torch.arange(len(targets))
    loss = (found.nll[each, before] - found.nll[each, targets]) * moments.counts[moments.n_controls :]
    loss = moments.together(loss[:, None])[:, 0]
    for program in set(before.tolist()):
        if not bool((targets == program).any()):
            own = torch.nonzero(before == program)[:, 0]
            stays = own[loss[own].argmin()]
            targets[stays if moments.crossed is None else moments.crossed.gene == moments.crossed.gene[stays]] = program
    return targets
