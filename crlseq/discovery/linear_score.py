"""Objective, gradient and expected information of the linear model of `crlseq.discovery.likelihood`, by block.

Every derivative of ``S_c`` has the form ``a b' + b a'`` (`crlseq.discovery.scoring`), so that the information is a sum of
products of small Gram matrices. It costs p^2 (p + q)^2 per environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crlseq.discovery.moments import DTYPE, Moments
from crlseq.discovery.scoring import Deviations


@dataclass(frozen=True)
class Implied:
    """What the linear model implies, and what its derivatives are made of; R sets of parameters, C environments, K
    perturbations.
    """

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

    def first(self) -> Implied:
        """Those of the first set of parameters, without the dimension R."""
        return Implied(*(value[0] for value in vars(self).values()))


class LinearScore:
    """Objective ``nll``, ``gradient`` (P,) and information (M, M), per cell, at one set of parameters ``theta`` (P,).

    ``at`` gives a block's place among the parameters, ``targets`` (K,), ``free`` (P,) is positive for what may move.
    ``ridge`` (P,) is a penalty ``ridge theta^2 / 2`` on it. ``moving`` (M,) are the places of what may move: edges last,
    so that a factor of the information can lose them, the others as in ``at``.
    """

    def __init__(
        self, s: Implied, moments: Moments, targets: Tensor, at: dict[str, slice], theta: Tensor, ridge: Tensor, free: Tensor
    ) -> None:  # fmt: skip
        self.s, self.at, self.targets, self.ridge, self.theta = s, at, targets, ridge, theta
        self.fit, self.weight = Deviations(moments, s.mean, s.covariance), moments.weight()
        self.left = (s.loading * s.sd[..., None]).transpose(1, 2) @ s.inverse  # r (C, q, p)
        self.into = (s.column[..., None] * s.total).transpose(1, 2)  # y of edges (C, q, p)
        # x, the target's row of the total loadings, is what a perturbation's parameters act along
        self.x = s.total[torch.arange(1, len(s.mean)), targets]  # (K, q)
        self.ds = (2 * s.log_scale).exp() * s.slope
        self.learns_retention = at["retention"].stop > at["retention"].start
        self.free, self.searched = free, torch.ones_like(free, dtype=torch.bool)
        self.searched[at["shift"]] = self.searched[at["scale"]] = False
        self.nll = self.fit.nll + 0.5 * (ridge * theta**2 * free).sum()
        self.gradient = (self._gradient() + ridge * theta) * free
        if bool(self.fit.failed) or not bool(torch.isfinite(self.nll) & torch.isfinite(self.gradient).all()):
            self.nll = torch.full_like(self.nll, torch.inf)

    @property
    def moving(self) -> Tensor:
        """Places (M,) of the parameters that may move."""
        return self.places[0]

    @property
    def rows(self) -> dict[str, slice]:
        """Rows of each block in the information."""
        return self.places[1]

    @cached_property
    def places(self) -> tuple[Tensor, dict[str, slice]]:
        """`moving` and `rows`."""
        order = [name for name in self.at if name != "G"] + ["G"]
        places = [torch.nonzero(self.free[self.at[name]] > 0)[:, 0] + self.at[name].start for name in order]
        ends = torch.tensor([len(place) for place in places]).cumsum(0).tolist()
        rows = {name: slice(end - len(place), end) for name, place, end in zip(order, places, ends, strict=True)}
        return torch.cat(places), rows

    def _gradient(self) -> Tensor:
        s, e, x = self.s, self.fit.by_covariance, self.x
        slope = self.left.transpose(1, 2) @ e + s.tau[..., None] * self.fit.by_mean[:, None]  # (C, p, q)
        of_x, along = (x[:, None] @ e[1:])[:, 0], (self.fit.by_mean[1:] * x).sum(1)
        found = {
            "G": (slope @ self.into).sum(0),
            "W": slope.sum(0),
            "shift": along,
            "scale": self.ds * (of_x * x).sum(1),
            "psi": 0.5 * e.diagonal(dim1=1, dim2=2).sum(0) * s.psi,
            "offset": self.fit.by_mean.sum(0),
        }
        if self.learns_retention:
            a, shift, dk = self._of_retentions()
            found["retention"] = dk * ((of_x * a).sum(1) + shift * along)
        return torch.cat([found[name].flatten() for name in self.at if name in found])

    def _of_retentions(self) -> tuple[Tensor, Tensor, Tensor]:
        """a (K, q), tau g (K,) and dk (K,): ``dS = dk (a' x + x' a)`` with ``a = R g``, g the target's column of G, and
        ``dm = dk (tau g) x``.
        """
        s = self.s
        g = s.graph.T[self.targets]
        return (self.left[1:] @ g[..., None])[..., 0], (s.tau[1:] * g).sum(1), s.retention * (1 - s.retention)

    def information(self) -> Tensor:
        """Expected information (M, M) of what moves, with the ridge. The lower triangle alone is filled."""
        information = torch.zeros(len(self.moving), len(self.moving), dtype=DTYPE)
        tables = _Tables(self, information)
        tables.loadings()
        tables.edges()
        tables.perturbations()
        tables.noise_and_offset()
        information.diagonal().add_(self.ridge[self.moving] + 1e-10)
        return information


class _Tables:
    """Fills the information of a score block by block. Edges and loadings together: parameter (i, m), row i and column m of
    G or W, has ``dS = r_i' y_m + y_m' r_i`` and ``dm = tau_i y_m``.
    """

    def __init__(self, score: LinearScore, information: Tensor) -> None:
        s, precision = score.s, score.fit.precision
        self.score, self.information, self.rows = score, information, score.rows
        self.p, self.q = s.total.shape[1:]
        wide = score.weight[:, None, None]
        self.w = score.weight[1:]
        self.p_left = precision @ score.left  # L r (C, q, p)
        self.p_right = torch.cat([precision @ score.into, precision], 2)  # L y (C, q, p + q)
        self.rr = wide * (score.left.transpose(1, 2) @ self.p_left + s.tau[..., :, None] * s.tau[..., None, :])
        self.ry = score.left.transpose(1, 2) @ self.p_right  # (C, p, p + q)
        self.weighted_ry = self.ry * wide
        edges = score.moving[self.rows["G"]]  # G comes first among the parameters
        self.source, self.sink = edges // self.p, edges % self.p

    def put(self, a: str, b: str, block: Tensor) -> None:
        """Information of block ``a`` with block ``b``, which does not come after it."""
        self.information[self.rows[a], self.rows[b]] = block

    def put_with_edges_and_loadings(self, a: str, table: Tensor) -> None:
        """Information (., p, p + q) of block ``a`` with edges and loadings."""
        self.put(a, "W", table[:, :, self.p :].flatten(1))
        self.put("G", a, table[:, self.source, self.sink].T)

    def loadings(self) -> None:
        """W with W, one row of W at a time: what is made stays small."""
        p, q, ry = self.p, self.q, self.ry[:, :, self.p :]
        precision = self.score.fit.precision.flatten(1)
        for i in range(p):
            first = (self.rr[:, i, : i + 1].T @ precision).view(i + 1, q, q)  # (j, m, n)
            second = (self.weighted_ry[:, i, p:].T @ ry[:, : i + 1].flatten(1)).view(q, i + 1, q)  # (n, j, m)
            place = self.information[self.rows["W"]][i * q : (i + 1) * q, : (i + 1) * q].view(q, i + 1, q)
            torch.add(first.transpose(0, 1), second.permute(2, 1, 0), out=place)

    def edges(self) -> None:
        """G with W and with G, the edges of one source at a time."""
        p, n, start = self.p, self.p + self.q, self.rows["G"].start
        yy = self.score.into.transpose(1, 2) @ self.p_right  # (C, p, p + q)
        end = 0
        for i, size in enumerate(torch.bincount(self.source, minlength=p).tolist()):
            own, end = slice(end, end + size), end + size
            if not size:
                continue
            sinks = self.sink[own]
            first = (self.rr[:, i].T @ yy[:, sinks].flatten(1)).view(p, size, n)  # (j, m, n)
            second = (self.weighted_ry[:, i].T @ self.ry[:, :, sinks].flatten(1)).view(n, p, size)  # (n, j, m)
            table = first.transpose(0, 1) + second.permute(2, 1, 0)
            place = self.information[start:][own]
            place[:, self.rows["W"]] = table[:, :, p:].flatten(1)
            place[:, start : start + end] = table[:, self.source[:end], self.sink[:end]]

    def perturbations(self) -> None:
        """Shifts, ``dm = x``; noise scales, ``dS = 2 ds x' x``; retentions, see `LinearScore._of_retentions`."""
        score, w, x = self.score, self.w, self.score.x
        tau, ds, free = score.s.tau[1:], score.ds, self.rows
        left, p_right, precision = score.left[1:], self.p_right[1:], score.fit.precision[1:]
        u = (precision @ x[..., None])[..., 0]  # L x
        xx, rx = (u * x).sum(1), (left * u[..., None]).sum(1)
        yx = (p_right * x[..., None]).sum(1)  # (K, p + q)
        self.put_with_edges_and_loadings("shift", _outer(w[:, None] * tau, yx))
        self.put("shift", "shift", torch.diag(w * xx))
        self.put("offset", "shift", (w[:, None] * u).T)
        if free["scale"].stop > free["scale"].start:
            self.put_with_edges_and_loadings("scale", _outer((2 * w * ds)[:, None] * rx, yx))
            self.put("scale", "scale", torch.diag(2 * w * (ds * xx) ** 2))
            if free["psi"].stop > free["psi"].start:
                self.put("psi", "scale", ((w * ds)[:, None] * u**2 * score.s.psi).T)
        if score.learns_retention:
            a, shift, dk = score._of_retentions()
            v, wk = (precision @ a[..., None])[..., 0], w * dk
            ax, aa, ra = (v * x).sum(1), (v * a).sum(1), (left * v[..., None]).sum(1)
            ya = (p_right * a[..., None]).sum(1)
            table = _outer(wk[:, None] * (ra + shift[:, None] * tau), yx) + _outer(wk[:, None] * rx, ya)
            self.put_with_edges_and_loadings("retention", table)
            self.put("retention", "shift", torch.diag(wk * shift * xx))
            self.put("retention", "scale", torch.diag(wk * ds * 2 * ax * xx))
            self.put("retention", "retention", torch.diag(wk * dk * ((aa + shift**2) * xx + ax**2)))
            if free["psi"].stop > free["psi"].start:
                self.put("psi", "retention", (wk[:, None] * v * u * score.s.psi).T)
            self.put("offset", "retention", ((wk * shift)[:, None] * u).T)

    def noise_and_offset(self) -> None:
        """Noise, ``dS = psi_i e_i' e_i``; offsets, ``dm = e_i``."""
        score, (p, q), psi = self.score, (self.p, self.q), self.score.s.psi
        precision, weight = score.fit.precision, score.weight
        outer = (score.s.tau * weight[:, None]).T @ self.p_right.flatten(1)  # (p, q (p + q))
        self.put_with_edges_and_loadings("offset", outer.view(p, q, -1).transpose(0, 1))
        self.put("offset", "offset", (precision * weight[:, None, None]).sum(0))
        if self.rows["psi"].stop > self.rows["psi"].start:
            left = (self.p_left * weight[:, None, None]).permute(1, 2, 0)
            self.put_with_edges_and_loadings("psi", (left @ self.p_right.transpose(0, 1)) * psi[:, None, None])
            square = 0.5 * (precision**2 * weight[:, None, None]).sum(0)
            self.put("psi", "psi", square * psi[:, None] * psi)


def _outer(one: Tensor, other: Tensor) -> Tensor:
    """(K, p, n) of (K, p) and (K, n)."""
    return one[:, :, None] * other[:, None]
