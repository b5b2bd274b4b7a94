"""Fisher scoring: a damped solve of any model of means and covariances, and the score of the linear one by block.

    minimise     sum_c w_c / 2 * ( log|S_c| + tr L_c (C_c + d_c' d_c) ),     d_c = y_c - m_c,  L_c = S_c^-1,  w_c = n_c / N
    gradient     sum_c  a' E_c b + e_c' dm                     for dS_c = a b' + b a' and dm_c
    information  sum_c w_c ( (a' L_c c)(b' L_c d) + (a' L_c d)(b' L_c c) + dm' L_c dm* )     for two parameters
    with         E_c = w_c (L_c - L_c (C_c + d_c' d_c) L_c),     e_c = -w_c L_c d_c

``y_c``, ``C_c``, ``n_c``: mean, covariance and count of environment ``c``. Every derivative of ``S_c`` in the linear
model has the form ``a b' + b a'``, so that the information is a sum of products of small Gram matrices and costs
p^2 (p + q)^2 per environment and step. All restarts are one batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from crlseq.discovery.moments import DTYPE, Moments

Score = tuple[Tensor, Tensor, Tensor]  # objective (R,), gradient (R, P), information (R, P, P), all per cell
MAX_STEP = 1.5  # largest change of a parameter in one step
WHOLE = 0.9  # share of the parameters that move, above which all are solved for: leaving few out costs a copy
TOLERANCE = 0.01  # log-likelihood units over all cells: a hundredth of what decides anything
NO_HOPE = 1e7  # damping at which a search gives up


def solve(
    score: Callable[[Tensor], Score], theta: Tensor, free: Tensor, cells: Tensor, steps: int = 100
) -> tuple[Tensor, Score, Tensor]:
    """Levenberg-damped scoring from ``theta`` (R, P): where it ends, the score there, and which converged (R,).

    ``score`` gives the score at parameters (R, P), restarts independent of each other. The objective is infinite where
    it is undefined. The information is positive semidefinite with a positive diagonal; gradient and off-diagonal
    information of parameters that are held fixed are 0. ``free`` (R, P) is positive for those that may move. The number
    of ``cells`` turns objective and information per cell into those of the data.
    """
    r, size = theta.shape
    moving = torch.nonzero((free > 0).any(0))[:, 0]  # the others would only lengthen the systems
    if len(moving) > WHOLE * size:
        moving = torch.arange(size)
    at = score(theta)
    damping = torch.full((r,), 1e-2, dtype=DTYPE)
    converged, given_up = torch.zeros(r, dtype=torch.bool), torch.zeros(r, dtype=torch.bool)
    for _ in range(steps):
        nll, gradient, information = at
        # Held until the next is made: memory that is given back and asked for again costs a fifth of a step.
        damped = information.clone() if len(moving) == size else information[:, moving][:, :, moving]
        damped.diagonal(dim1=1, dim2=2).mul_(1 + damping[:, None]).add_(1e-9)
        root, failed = torch.linalg.cholesky_ex(damped)
        solved = failed == 0
        step = torch.zeros_like(theta)
        step[:, moving] = -torch.cholesky_solve(gradient[:, moving, None], root)[..., 0]
        gain = -0.5 * (gradient * step).sum(1) * cells  # that the quadratic model expects of this step
        converged = converged | ((gain < TOLERANCE) & solved & torch.isfinite(nll))
        ended = converged | given_up
        if bool(ended.all()):
            break
        step = step * (MAX_STEP / step.abs().max(1).values.clamp_min(MAX_STEP))[:, None]
        step = torch.where((ended | ~solved)[:, None], 0.0, step)
        there, new = theta + step, score(theta + step)
        better = (new[0] < nll) & solved
        if bool(better.all()):
            theta, at = there, new
        elif bool(better.any()):
            theta = torch.where(better[:, None], there, theta)
            nll, gradient, information = (
                torch.where(better.view(-1, *[1] * (value.dim() - 1)), value, old)
                for value, old in zip(new, at, strict=True)
            )
            at = nll, gradient, information
        del new  # what may be gigabytes, before the next is made
        damping = torch.where(better, damping / 4, damping * 6).clamp(1e-9, 1e9)
        given_up = given_up | (damping > NO_HOPE)
    return theta, at, converged


class Deviations:
    """How environments deviate from means (R, C, q) and covariances (R, C, q, q) of a model: ``nll`` (R,) per cell,
    ``precision`` L (R, C, q, q), ``by_covariance`` E (R, C, q, q), ``by_mean`` e (R, C, q); ``failed`` (R,) where a
    covariance is not positive.
    """

    def __init__(self, moments: Moments, mean: Tensor, covariance: Tensor) -> None:
        weight = moments.weight()
        root, failed = torch.linalg.cholesky_ex(covariance)
        self.precision, self.failed = torch.cholesky_inverse(root), (failed > 0).any(1)
        d = moments.means - mean
        fitted = self.precision @ (moments.covariances + d[..., :, None] * d[..., None, :])
        half = root.diagonal(dim1=2, dim2=3).log().sum(2) + 0.5 * fitted.diagonal(dim1=2, dim2=3).sum(2)
        self.nll = (half * weight).sum(1)
        self.by_covariance = weight[:, None, None] * (self.precision - fitted @ self.precision)
        self.by_mean = -weight[:, None] * (self.precision @ d[..., None])[..., 0]


@dataclass(frozen=True)
class Implied:
    """What the linear model implies, and what its derivatives are made of; R restarts, C environments, K perturbations."""

    mean: Tensor  # (R, C, q)
    covariance: Tensor  # (R, C, q, q)
    graph: Tensor  # G (R, p, p)
    column: Tensor  # (R, C, p) by which the columns of G are multiplied in G_c
    inverse: Tensor  # T_c = (I - G_c)^-1 (R, C, p, p)
    total: Tensor  # T_c W (R, C, p, q)
    sd: Tensor  # D_c (R, C, p), the noise scales
    loading: Tensor  # D_c T_c W (R, C, p, q)
    tau: Tensor  # a_c T_c (R, C, p), of shifts a_c
    retention: Tensor  # (R, K)
    log_scale: Tensor  # (R, K) of the target's noise, that of its context included
    slope: Tensor  # (R, K) of the log scale by its parameter
    psi: Tensor  # (R, q) noise variances above the floor
    context_slope: Tensor  # (R, L, p) of the log scales of contexts by their parameters


class LinearScore:
    """Gradient and information of the linear model, filled in block by block.

    Each block of parameters writes its gradient and its information with itself and with the blocks written before;
    what no block writes is 0. ``at`` gives a block's place among the parameters, ``targets`` (R, K).
    """

    def __init__(self, s: Implied, moments: Moments, targets: Tensor, at: dict[str, slice]) -> None:
        (r, c, q), p, size = s.mean.shape, s.graph.shape[1], max(place.stop for place in at.values())
        self.s, self.at, self.targets, self.fit = s, at, targets, Deviations(moments, s.mean, s.covariance)
        self.weight, self.n = moments.weight(), moments.n_controls
        self.wide, self.w = self.weight[:, None, None], self.weight[self.n :]  # of all environments, of perturbations
        self.gradient = torch.zeros(r, size, dtype=DTYPE)
        self.information = torch.zeros(r, size, size, dtype=DTYPE)
        # G and W together, parameter (i, m): a = r_i, b = y_m, dm = tau_i y_m
        self.of_y = {"G": slice(p), "W": slice(p, p + q)}
        self.left = (s.loading * s.sd[..., None]).transpose(2, 3) @ s.inverse  # r (R, C, q, p)
        eye = torch.eye(q, dtype=DTYPE).expand(r, c, q, q)
        self.right = torch.cat([(s.column[..., None] * s.total).transpose(2, 3), eye], 3)  # y (R, C, q, p + q)
        self.p_left, self.p_right = self.fit.precision @ self.left, self.fit.precision @ self.right
        # x, the target's row of the total loadings, is what a perturbation's parameters act along; u = L x
        self.x = s.total[:, self.n :].gather(2, targets[..., None, None].expand(-1, -1, 1, q))[:, :, 0]  # (R, K, q)
        self.u = (self.fit.precision[:, self.n :] @ self.x[..., None])[..., 0]
        self.xx = (self.u * self.x).sum(2)
        self.rx = (self.left[:, self.n :] * self.u[..., None]).sum(2)  # (R, K, p)
        self.yx = (self.right[:, self.n :] * self.u[..., None]).sum(2)  # (R, K, p + q)
        self.ds = (2 * s.log_scale).exp() * s.slope
        self.into_target: Tensor | None = None  # dk a (R, K, q) of `retentions`

    def put(self, a: str, b: str, block: Tensor) -> None:
        """Information (R, ., .) of block ``a`` with block ``b``."""
        self.information[:, self.at[a], self.at[b]] = block
        if a != b:
            self.information[:, self.at[b], self.at[a]] = block.transpose(1, 2)

    def put_edges(self, a: str, block: Tensor) -> None:
        """Information (R, ., p, p + q) of block ``a`` with edges and loadings."""
        for b, columns in self.of_y.items():
            self.put(a, b, block[..., columns].flatten(2))

    def edges_and_loadings(self) -> None:
        """``dS = r_i' y_m + y_m' r_i``, ``dm = tau_i y_m``: row i, column m of G or W."""
        s, wide, left, right = self.s, self.wide, self.left, self.right
        r, p, n = len(s.graph), s.graph.shape[1], right.shape[3]
        slope = left.transpose(2, 3) @ self.fit.by_covariance + s.tau[..., None] * self.fit.by_mean[:, :, None]
        gradient = (slope @ right).sum(1)
        rr = left.transpose(2, 3) @ self.p_left + s.tau[..., :, None] * s.tau[..., None, :]
        ry, yy = left.transpose(2, 3) @ self.p_right, right.transpose(2, 3) @ self.p_right
        first = ((rr * wide).flatten(2).transpose(1, 2) @ yy.flatten(2)).reshape(r, p, p, n, n).permute(0, 1, 3, 2, 4)
        second = ((ry * wide).flatten(2).transpose(1, 2) @ ry.flatten(2)).reshape(r, p, n, p, n).permute(0, 1, 4, 3, 2)
        for a, rows in self.of_y.items():
            self.gradient[:, self.at[a]] = gradient[:, :, rows].flatten(1)
            for b, columns in self.of_y.items():  # where they go, without a copy of what may be gigabytes
                block = self.information[:, self.at[a], self.at[b]]
                place = torch.unflatten(torch.unflatten(block, 2, (p, -1)), 1, (p, -1))
                place.copy_(first[:, :, rows, :, columns]).add_(second[:, :, rows, :, columns])

    def shifts(self) -> None:
        """``dm = x``."""
        self.gradient[:, self.at["shift"]] = (self.fit.by_mean[:, self.n :] * self.x).sum(2)
        self.put_edges("shift", self.w[:, None, None] * self.s.tau[:, self.n :, :, None] * self.yx[:, :, None])
        self.put("shift", "shift", torch.diag_embed(self.w * self.xx))

    def scales(self) -> None:
        """``dS = 2 ds x' x``, ``ds`` the slope of half the variance of the target's noise."""
        x, ds = self.x, self.ds
        curve = (x[:, :, None] @ self.fit.by_covariance[:, self.n :])[:, :, 0]
        self.gradient[:, self.at["scale"]] = ds * (curve * x).sum(2)
        self.put_edges("scale", (self.w * ds)[..., None, None] * 2 * self.rx[..., None] * self.yx[:, :, None])
        self.put("scale", "scale", torch.diag_embed(2 * self.w * (ds * self.xx) ** 2))

    def retentions(self) -> None:
        """``dS = dk (a' x + x' a)`` with ``a = R g``, g the target's column of G; ``dm = dk (tau g) x``."""
        s, x, u, xx = self.s, self.x, self.u, self.xx
        dk, tau, left = s.retention * (1 - s.retention), s.tau[:, self.n :], self.left[:, self.n :]
        into = s.graph.transpose(1, 2)[torch.arange(len(s.graph))[:, None], self.targets]  # g (R, K, p)
        a = (left * into[:, :, None]).sum(3)
        shift = (tau * into).sum(2)
        v = (self.fit.precision[:, self.n :] @ a[..., None])[..., 0]
        self.into_target = dk[..., None] * a
        ax, aa, wk = (v * x).sum(2), (v * a).sum(2), self.w * dk
        ra, ya = (left * v[..., None]).sum(2), (self.right[:, self.n :] * v[..., None]).sum(2)
        slope = (a[:, :, None] @ self.fit.by_covariance[:, self.n :])[:, :, 0] + shift[..., None] * self.fit.by_mean[
            :, self.n :
        ]
        self.gradient[:, self.at["retention"]] = dk * (slope * x).sum(2)
        pairs = (ra + shift[..., None] * tau)[..., None] * self.yx[:, :, None] + ya[:, :, None] * self.rx[..., None]
        self.put_edges("retention", wk[..., None, None] * pairs)
        self.put("retention", "retention", torch.diag_embed(wk * dk * ((aa + shift**2) * xx + ax**2)))
        self.put("retention", "shift", torch.diag_embed(wk * shift * xx))
        self.put("retention", "scale", torch.diag_embed(wk * self.ds * 2 * ax * xx))
        self.put("retention", "psi", wk[..., None] * v * u * s.psi[:, None])
        self.put("retention", "offset", (wk * shift)[..., None] * u)

    def noise(self) -> None:
        """``dS = psi_i e_i' e_i``."""
        psi, precision = self.s.psi, self.fit.precision
        self.gradient[:, self.at["psi"]] = 0.5 * self.fit.by_covariance.diagonal(dim1=2, dim2=3).sum(1) * psi
        by_component = (self.p_left * self.wide).permute(0, 2, 3, 1) @ self.p_right.permute(0, 2, 1, 3)  # (R, q, p, n)
        self.put_edges("psi", by_component * psi[..., None, None])
        self.put("psi", "psi", 0.5 * (precision**2 * self.wide).sum(1) * psi[:, :, None] * psi[:, None])
        self.put("scale", "psi", (self.w * self.ds)[..., None] * self.u**2 * psi[:, None])

    def offset(self) -> None:
        """``dm = e_i``."""
        (r, _, p), (q, n) = self.s.tau.shape, self.right.shape[2:]
        self.gradient[:, self.at["offset"]] = self.fit.by_mean.sum(1)
        outer = (self.s.tau * self.weight[:, None]).transpose(1, 2) @ self.p_right.flatten(2)  # (R, p, q n)
        self.put_edges("offset", outer.reshape(r, p, q, n).transpose(1, 2))
        self.put("offset", "offset", (self.fit.precision * self.wide).sum(1))
        self.put("shift", "offset", self.w[:, None] * self.u)

    def contexts(self, context: Tensor) -> None:
        """``dS = 2 ds_k x_k' x_k`` for every program k, x_k its row of T_c W, in the environments of each ``context`` (C,)
        but the first.
        """
        s, others = self.s, range(1, self.n)
        u, ds = s.total @ self.fit.precision, s.sd**2 * s.context_slope[:, context]  # (R, C, p, q), (R, C, p)
        w = self.weight[:, None] * ds

        def summed(values: Tensor) -> Tensor:
            """Values (R, C, p, ...) over the environments of a context (R, (L - 1) p, ...)."""
            return torch.cat([values[:, context == each].sum(1) for each in others], 1)

        self.gradient[:, self.at["context"]] = summed(ds * ((s.total @ self.fit.by_covariance) * s.total).sum(3))
        rows, columns = 2 * w[..., None] * (u @ self.left), u @ self.right
        of_edges = [
            rows[:, own].permute(0, 2, 3, 1) @ columns[:, own].transpose(1, 2) for own in (context == c for c in others)
        ]
        self.put_edges("context", torch.cat(of_edges, 1))
        square = summed(2 * w[..., None] * ds[:, :, None] * (u @ s.total.transpose(2, 3)) ** 2)
        blocks = torch.diag_embed(torch.unflatten(square, 1, (self.n - 1, -1)).permute(0, 2, 3, 1))
        self.put("context", "context", blocks.permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2))
        self.put("context", "psi", summed(w[..., None] * u**2 * s.psi[:, None, None]))
        own = one_hot(context[self.n :], self.n)[:, 1:].to(DTYPE)  # (K, L - 1)
        along_x = 2 * w[:, self.n :] * (u[:, self.n :] @ self.x[..., None])[..., 0]  # (R, K, p)
        of_scale = self.ds[..., None] * along_x * (u[:, self.n :] @ self.x[..., None])[..., 0]
        self.put("scale", "context", (of_scale[:, :, None] * own[..., None]).flatten(2))
        if self.into_target is not None:
            of_retention = along_x * (u[:, self.n :] @ self.into_target[..., None])[..., 0]
            self.put("retention", "context", (of_retention[:, :, None] * own[..., None]).flatten(2))

    def with_ridge(self, theta: Tensor, ridge: Tensor, free: Tensor) -> Score:
        """The score with a penalty ``ridge theta^2 / 2`` (P,) on what is ``free`` (R, P); what is not free stays."""
        nll = self.fit.nll + 0.5 * (ridge * theta**2 * free).sum(1)
        gradient = (self.gradient + ridge * theta) * free
        if not bool((free > 0).all()):
            self.information.mul_(free[:, :, None]).mul_(free[:, None])
        self.information.diagonal(dim1=1, dim2=2).add_(ridge + 1e-10 + (1 - free))
        broken = self.fit.failed | ~torch.isfinite(nll) | ~torch.isfinite(gradient).all(1)
        return torch.where(broken, torch.inf, nll), gradient, self.information
