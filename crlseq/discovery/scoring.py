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

from crlseq.discovery.moments import DTYPE, Moments

Score = tuple[Tensor, Tensor, Tensor | None]  # objective (R,), gradient (R, P), information (R, P, P), all per cell
MAX_STEP = 1.5  # largest change of a parameter in one step
WHOLE = 0.9  # share of the parameters that move, above which all are solved for: leaving few out costs a copy
TOLERANCE = 0.01  # log-likelihood units over all cells: a hundredth of what decides anything
NO_HOPE = 1e7  # damping at which a search gives up
KEPT_PARAMETERS, MOST_KEPT = 250, 25  # an information of so many parameters costs a gradient; most steps that it serves


def solve(
    score: Callable[[Tensor, bool], Score], theta: Tensor, free: Tensor, cells: Tensor, steps: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """Levenberg-damped scoring from ``theta`` (R, P): where it ends, the objective (R,) there, and which converged (R,).

    ``score`` gives the score at parameters (R, P), restarts independent of each other, with the information where it is
    asked for. The objective is infinite where it is undefined. The information is positive semidefinite with a positive
    diagonal; gradient and off-diagonal information of parameters that are held fixed are 0. ``free`` (R, P) is positive
    for those that may move. The number of ``cells`` turns objective and information per cell into those of the data.

    An information serves as many steps as it costs gradients, with BFGS updates (Nocedal 1980, Mathematics of Computation
    35), unless one leads nowhere. ``steps``: what may be computed, in informations.
    """
    r, size = theta.shape
    moving = torch.nonzero((free > 0).any(0))[:, 0]  # the others would only lengthen the systems
    if len(moving) > WHOLE * size:
        moving = torch.arange(size)
    serves = min(max(1, len(moving) // KEPT_PARAMETERS), MOST_KEPT)
    at, kept = score(theta, True), None
    damping = torch.full((r,), 1e-2, dtype=DTYPE)
    converged, given_up = torch.zeros(r, dtype=torch.bool), torch.zeros(r, dtype=torch.bool)
    computed = 0
    while computed < steps * serves:
        fresh = kept is None
        computed += serves if fresh else 1
        if kept is None:
            at = at if at[2] is not None else score(theta, True)
            kept = _Curvature(at[2], moving, damping)
        nll, gradient, _ = at
        step = -kept.solved(gradient)
        gain = -0.5 * (gradient * step).sum(1) * cells  # that the quadratic model expects of this step
        converged = converged | ((gain < TOLERANCE) & kept.positive & torch.isfinite(nll))
        ended = converged | given_up
        if bool(ended.all()):
            break
        step = step * (MAX_STEP / step.abs().max(1).values.clamp_min(MAX_STEP))[:, None]
        step = torch.where((ended | ~kept.positive)[:, None], 0.0, step)
        there, new = theta + step, score(theta + step, serves == 1)
        better = (new[0] < nll) & kept.positive
        if bool(better.all()):
            theta, at = there, new
        elif bool(better.any()):
            theta = torch.where(better[:, None], there, theta)
            at = _chosen(better, new, at)
        if fresh:
            damping = torch.where(better, damping / 4, damping * 6).clamp(1e-9, 1e9)
            given_up = given_up | (damping > NO_HOPE)
        kept.learn(better, step, new[1] - gradient)
        if len(kept.pairs) == serves or not bool((better | ended).all()):
            kept = None
        del new  # what may be gigabytes, before the next is made
    return theta, at[0], converged


def _chosen(better: Tensor, new: Score, old: Score) -> Score:
    """The score of each restart (R,): the new one where it is better."""
    nll, gradient = torch.where(better, new[0], old[0]), torch.where(better[:, None], new[1], old[1])
    if new[2] is None or old[2] is None:
        return nll, gradient, None
    return nll, gradient, torch.where(better[:, None, None], new[2], old[2])


class _Curvature:
    """A damped information (R, P, P) of what is ``moving``, and what steps since have shown beyond it."""

    def __init__(self, information: Tensor | None, moving: Tensor, damping: Tensor) -> None:
        assert information is not None
        whole = len(moving) == information.shape[2]
        damped = information.clone() if whole else information[:, moving][:, :, moving]
        damped.diagonal(dim1=1, dim2=2).mul_(1 + damping[:, None]).add_(1e-9)
        self.root, failed = torch.linalg.cholesky_ex(damped)
        self.moving, self.positive = moving, failed == 0
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def solved(self, gradient: Tensor) -> Tensor:
        """Its inverse times a gradient (R, P), by the two-loop recursion; 0 where nothing moves."""
        left, along = gradient, []
        for step, change, weight in reversed(self.pairs):
            along.append(weight * (step * left).sum(1, keepdim=True))
            left = left - along[-1] * change
        found = torch.zeros_like(gradient)
        found[:, self.moving] = torch.cholesky_solve(left[:, self.moving, None], self.root)[..., 0]
        for (step, change, weight), a in zip(self.pairs, reversed(along), strict=True):
            found = found + (a - weight * (change * found).sum(1, keepdim=True)) * step
        return found

    def learn(self, taken: Tensor, step: Tensor, change: Tensor) -> None:
        """What steps (R, P) changed of the gradient, in the restarts (R,) that took one."""
        product = (step * change).sum(1, keepdim=True)
        useful = taken[:, None] & (product > 0)
        self.pairs.append((step, torch.where(useful, change, 0.0), torch.where(useful, 1 / product, 0.0)))


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
    log_scale: Tensor  # (R, K)
    slope: Tensor  # (R, K) of the log scale by its parameter
    psi: Tensor  # (R, q) noise variances above the floor


class LinearScore:
    """Objective, gradient and information of the linear model, the latter filled in block by block.

    Each block of parameters writes its information with itself and with the blocks written before; what no block writes
    is 0. ``at`` gives a block's place among the parameters, ``targets`` (R, K).
    """

    def __init__(self, s: Implied, moments: Moments, targets: Tensor, at: dict[str, slice]) -> None:
        (r, c, q), p = s.mean.shape, s.graph.shape[1]
        self.s, self.at, self.targets, self.fit = s, at, targets, Deviations(moments, s.mean, s.covariance)
        self.weight = moments.weight()
        self.wide, self.w = self.weight[:, None, None], self.weight[1:]  # of all environments, of perturbations
        self.learns_retention = at["retention"].stop > at["retention"].start
        # G and W together, parameter (i, m): a = r_i, b = y_m, dm = tau_i y_m
        self.of_y = {"G": slice(p), "W": slice(p, p + q)}
        self.left = (s.loading * s.sd[..., None]).transpose(2, 3) @ s.inverse  # r (R, C, q, p)
        eye = torch.eye(q, dtype=DTYPE).expand(r, c, q, q)
        self.right = torch.cat([(s.column[..., None] * s.total).transpose(2, 3), eye], 3)  # y (R, C, q, p + q)
        # x, the target's row of the total loadings, is what a perturbation's parameters act along
        self.x = s.total[:, 1:].gather(2, targets[..., None, None].expand(-1, -1, 1, q))[:, :, 0]  # (R, K, q)
        self.ds = (2 * s.log_scale).exp() * s.slope

    def gradient(self) -> Tensor:
        """(R, P)."""
        s, e, x = self.s, self.fit.by_covariance, self.x
        slope = self.left.transpose(2, 3) @ e + s.tau[..., None] * self.fit.by_mean[:, :, None]
        of_y = (slope @ self.right).sum(1)
        found = {name: of_y[:, :, columns] for name, columns in self.of_y.items()}
        found["shift"] = (self.fit.by_mean[:, 1:] * x).sum(2)
        found["scale"] = self.ds * ((x[:, :, None] @ e[:, 1:])[:, :, 0] * x).sum(2)
        if self.learns_retention:
            a, shift, dk = self._of_retentions()
            slope = (a[:, :, None] @ e[:, 1:])[:, :, 0] + shift[..., None] * self.fit.by_mean[:, 1:]
            found["retention"] = dk * (slope * x).sum(2)
        found["psi"] = 0.5 * e.diagonal(dim1=2, dim2=3).sum(1) * s.psi
        found["offset"] = self.fit.by_mean.sum(1)
        return torch.cat([found[name].flatten(1) for name in self.at if name in found], 1)

    def _of_retentions(self) -> tuple[Tensor, Tensor, Tensor]:
        """a (R, K, q), tau g and dk (R, K): ``dS = dk (a' x + x' a)`` with ``a = R g``, g the target's column of G, and
        ``dm = dk (tau g) x``.
        """
        s = self.s
        into = s.graph.transpose(1, 2)[torch.arange(len(s.graph))[:, None], self.targets]  # g (R, K, p)
        a = (self.left[:, 1:] * into[:, :, None]).sum(3)
        return a, (s.tau[:, 1:] * into).sum(2), s.retention * (1 - s.retention)

    def information(self) -> Tensor:
        """(R, P, P)."""
        size = max(place.stop for place in self.at.values())
        self.filled = torch.zeros(len(self.x), size, size, dtype=DTYPE)
        precision, x = self.fit.precision, self.x
        self.p_left, self.p_right = precision @ self.left, precision @ self.right
        self.u = (precision[:, 1:] @ x[..., None])[..., 0]  # L x
        self.xx = (self.u * x).sum(2)
        self.rx = (self.left[:, 1:] * self.u[..., None]).sum(2)  # (R, K, p)
        self.yx = (self.right[:, 1:] * self.u[..., None]).sum(2)  # (R, K, p + q)
        self._edges_and_loadings()
        self._shifts_and_scales()
        if self.learns_retention:
            self._retentions()
        self._noise()
        self._offset()
        return self.filled

    def _put(self, a: str, b: str, block: Tensor) -> None:
        """Information (R, ., .) of block ``a`` with block ``b``."""
        self.filled[:, self.at[a], self.at[b]] = block
        if a != b:
            self.filled[:, self.at[b], self.at[a]] = block.transpose(1, 2)

    def _put_edges(self, a: str, block: Tensor) -> None:
        """Information (R, ., p, p + q) of block ``a`` with edges and loadings."""
        for b, columns in self.of_y.items():
            self._put(a, b, block[..., columns].flatten(2))

    def _edges_and_loadings(self) -> None:
        """``dS = r_i' y_m + y_m' r_i``, ``dm = tau_i y_m``: row i, column m of G or W."""
        s, wide, left, right = self.s, self.wide, self.left, self.right
        r, p, n = len(s.graph), s.graph.shape[1], right.shape[3]
        rr = left.transpose(2, 3) @ self.p_left + s.tau[..., :, None] * s.tau[..., None, :]
        ry, yy = left.transpose(2, 3) @ self.p_right, right.transpose(2, 3) @ self.p_right
        first = ((rr * wide).flatten(2).transpose(1, 2) @ yy.flatten(2)).reshape(r, p, p, n, n).permute(0, 1, 3, 2, 4)
        second = ((ry * wide).flatten(2).transpose(1, 2) @ ry.flatten(2)).reshape(r, p, n, p, n).permute(0, 1, 4, 3, 2)
        for a, rows in self.of_y.items():
            for b, columns in self.of_y.items():  # where they go, without a copy of what may be gigabytes
                block = self.filled[:, self.at[a], self.at[b]]
                place = torch.unflatten(torch.unflatten(block, 2, (p, -1)), 1, (p, -1))
                place.copy_(first[:, :, rows, :, columns]).add_(second[:, :, rows, :, columns])

    def _shifts_and_scales(self) -> None:
        """``dm = x``; ``dS = 2 ds x' x``, ``ds`` the slope of half the variance of the target's noise."""
        w, ds = self.w, self.ds
        self._put_edges("shift", w[:, None, None] * self.s.tau[:, 1:, :, None] * self.yx[:, :, None])
        self._put("shift", "shift", torch.diag_embed(w * self.xx))
        self._put_edges("scale", (w * ds)[..., None, None] * 2 * self.rx[..., None] * self.yx[:, :, None])
        self._put("scale", "scale", torch.diag_embed(2 * w * (ds * self.xx) ** 2))

    def _retentions(self) -> None:
        """See `_of_retentions`."""
        s, u, xx, tau, left = self.s, self.u, self.xx, self.s.tau[:, 1:], self.left[:, 1:]
        a, shift, dk = self._of_retentions()
        v = (self.fit.precision[:, 1:] @ a[..., None])[..., 0]
        ax, aa, wk = (v * self.x).sum(2), (v * a).sum(2), self.w * dk
        ra, ya = (left * v[..., None]).sum(2), (self.right[:, 1:] * v[..., None]).sum(2)
        pairs = (ra + shift[..., None] * tau)[..., None] * self.yx[:, :, None] + ya[:, :, None] * self.rx[..., None]
        self._put_edges("retention", wk[..., None, None] * pairs)
        self._put("retention", "retention", torch.diag_embed(wk * dk * ((aa + shift**2) * xx + ax**2)))
        self._put("retention", "shift", torch.diag_embed(wk * shift * xx))
        self._put("retention", "scale", torch.diag_embed(wk * self.ds * 2 * ax * xx))
        self._put("retention", "psi", wk[..., None] * v * u * s.psi[:, None])
        self._put("retention", "offset", (wk * shift)[..., None] * u)

    def _noise(self) -> None:
        """``dS = psi_i e_i' e_i``."""
        psi, precision = self.s.psi, self.fit.precision
        by_component = (self.p_left * self.wide).permute(0, 2, 3, 1) @ self.p_right.permute(0, 2, 1, 3)  # (R, q, p, n)
        self._put_edges("psi", by_component * psi[..., None, None])
        self._put("psi", "psi", 0.5 * (precision**2 * self.wide).sum(1) * psi[:, :, None] * psi[:, None])
        self._put("scale", "psi", (self.w * self.ds)[..., None] * self.u**2 * psi[:, None])

    def _offset(self) -> None:
        """``dm = e_i``."""
        (r, _, p), (q, n) = self.s.tau.shape, self.right.shape[2:]
        outer = (self.s.tau * self.weight[:, None]).transpose(1, 2) @ self.p_right.flatten(2)  # (R, p, q n)
        self._put_edges("offset", outer.reshape(r, p, q, n).transpose(1, 2))
        self._put("offset", "offset", (self.fit.precision * self.wide).sum(1))
        self._put("shift", "offset", self.w[:, None] * self.u)

    def with_ridge(self, theta: Tensor, ridge: Tensor, free: Tensor, informed: bool) -> Score:
        """The score with a penalty ``ridge theta^2 / 2`` (P,) on what is ``free`` (R, P); what is not free stays."""
        nll = self.fit.nll + 0.5 * (ridge * theta**2 * free).sum(1)
        gradient = (self.gradient() + ridge * theta) * free
        broken = self.fit.failed | ~torch.isfinite(nll) | ~torch.isfinite(gradient).all(1)
        nll = torch.where(broken, torch.inf, nll)
        if not informed:
            return nll, gradient, None
        information = self.information()
        if not bool((free > 0).all()):
            information.mul_(free[:, :, None]).mul_(free[:, None])
        information.diagonal(dim1=1, dim2=2).add_(ridge + 1e-10 + (1 - free))
        return nll, gradient, information
