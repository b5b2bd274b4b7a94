"""Gaussian interventional likelihood on sufficient statistics (linear causal disentanglement).

    minimise   (1/N) sum_c n_c / 2 * ( log|S_c| + tr S_c^-1 (C_c + (y_c - m_c)'(y_c - m_c)) )
    with       m_c = a_c T_c W + o,       S_c = W' T_c' D_c^2 T_c W + diag(floor + exp(psi))
               T_c = (I - G_c)^-1,        G_c = G with the target's column times the retention

over G (p, p), W (p, q), shifts a, log noise scales s, retentions, psi and o. ``y_c``, ``C_c``, ``n_c`` are mean,
covariance and count of the cells of environment ``c`` in ``q`` whitened components; environment 0 holds the
controls, environment ``i + 1`` perturbation ``i``, whose target is one latent. Row vectors; ``G[j, k]``: j -> k.

Targets come from k-lines on the whitened mean shifts (`crlseq.discovery.propose.propose_targets`): under one target all mean shifts lie on
one line through 0. Given targets the likelihood is maximised by Levenberg-damped Fisher scoring, all restarts as
one batch. Every derivative of ``S_c`` has the form ``a b' + b a'``, so that the expected information is a sum of
products of small Gram matrices and costs p^2 (p + q)^2 a environment and step. The graph is fitted dense, without
an acyclicity term: under hard interventions it is identified, and `crlseq.discovery.edges.select_edges` prunes it by likelihood ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from crlseq.discovery.moments import DTYPE, Moments
from crlseq.discovery.propose import propose_targets
from crlseq.storage.stage_cache import cached_on_disk

Kind = Literal["hard", "soft", "shift"]
MAX_LOG_SCALE = 1.5  # |s| stays below: an unbounded scale drives a degenerate environment to infinity
RIDGE = 1e-4  # on G, per cell: only decides directions that the data leave flat
RIDGE_SCALE = 2e-5
LARGE_SHIFT = 5.0  # a shift's prior deviation: a program that control cells do not vary in keeps a scale
RACE = 15  # steps after which restarts are far enough apart to go on with the best alone
MOST = 0.9  # share of the parameters that move, above which all are solved for
MAX_STEP = 1.5  # largest change of a parameter in one step
FIXED_LOG_NOISE = -20.0


@cached_on_disk("moments", "p", "kind", "floor", "fit_noise")
class LinearModel:
    """The likelihood of one data set and kind of intervention; parameters packed as (R, P), R restarts.

    Parameters
    ----------
    moments
        Of the environments, float64.
    n_latents
        ``p``.
    kind
        ``hard`` (retention 0), ``soft`` (learned) or ``shift`` (1, noise scales fixed at 1).
    noise_floor
        Measurement noise that every component has at least; keeps a latent from taking a component whole.
    fit_noise
        False: latents are observed (``psi`` fixed, tiny).
    """

    def __init__(
        self, moments: Moments, n_latents: int, kind: Kind, noise_floor: float = 1e-4, fit_noise: bool = True
    ) -> None:
        self.moments, self.p, self.kind, self.floor, self.fit_noise = moments, n_latents, kind, noise_floor, fit_noise
        self.q, self.k = moments.means.shape[1], len(moments.counts) - 1
        self.weight = moments.counts / moments.counts.sum()
        sizes = {"G": self.p**2, "W": self.p * self.q, "shift": self.k, "scale": self.k}
        sizes |= {"retention": self.k if kind == "soft" else 0, "psi": self.q, "offset": self.q}
        self.at: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self.at[name] = slice(end, end + size)
            end += size
        self.size = end

    def unpack(self, theta: Tensor) -> dict[str, Tensor]:
        """Named parameters; ``G`` (R, p, p) and ``W`` (R, p, q), the others (R, ·)."""
        named = {name: theta[:, place] for name, place in self.at.items()}
        named["G"] = named["G"].reshape(-1, self.p, self.p) * (1 - torch.eye(self.p, dtype=DTYPE))
        named["W"] = named["W"].reshape(-1, self.p, self.q)
        return named

    def pack(self, named: dict[str, Tensor]) -> Tensor:
        """Parameters (R, P) from `unpack`'s names."""
        return torch.cat([named[name].reshape(len(named["W"]), -1) for name in self.at], 1)

    def free(self, mask: Tensor) -> Tensor:
        """Which parameters may move (R, P), for edges allowed by ``mask`` (R, p, p)."""
        free = torch.ones(len(mask), self.size, dtype=DTYPE)
        free[:, self.at["G"]] = (mask * (1 - torch.eye(self.p, dtype=DTYPE))).reshape(len(mask), -1)
        if self.kind == "shift":
            free[:, self.at["scale"]] = 0
        if not self.fit_noise:
            free[:, self.at["psi"]] = 0
        return free

    def start(self, targets: Tensor) -> Tensor:
        """Initial values (R, P): each latent's loadings along the leading direction of its perturbations' shifts."""
        m, r = self.moments, len(targets)
        delta = m.means[1:] - m.means[0]
        one = torch.nn.functional.one_hot(targets, self.p).to(DTYPE)  # (R, K, p)
        scatter = torch.einsum("ka,k,rkp,kb->rpab", delta, m.counts[1:], one, delta)
        cells = torch.einsum("k,rkp->rp", m.counts[1:], one).clamp_min(1)
        value, vector = torch.linalg.eigh(scatter / cells[..., None, None])
        loadings = vector[..., -1] * 0.5 * value[..., -1:].clamp_min(0).sqrt().clamp_min(0.02)
        along = torch.einsum("kq,rpq->rkp", delta, loadings) / (loadings**2).sum(2)[:, None]
        noise = (
            torch.linalg.eigvalsh(m.covariances[0])[0].clamp_min(1e-3).log()
            if self.fit_noise
            else torch.tensor(FIXED_LOG_NOISE)
        )
        zero = torch.zeros(r, self.k, dtype=DTYPE)
        return self.pack({
            "G": torch.zeros(r, self.p, self.p, dtype=DTYPE), "W": loadings, "shift": (along * one).sum(2), "scale": zero,
            "retention": zero[:, : self.k if self.kind == "soft" else 0], "psi": noise.expand(r, self.q).clone(),
            "offset": m.means[:1].expand(r, -1).clone(),
        })  # fmt: skip

    def adopt(self, solution: Solution) -> Tensor:
        """A solution of this or another kind of intervention as a start (R, P): what the kinds share is taken over."""
        named = solution.model.unpack(solution.theta)
        named["G"] = named["G"] * solution.mask
        if self.kind == "soft" and solution.model.kind != "soft":
            level = {"hard": -1.5, "shift": 1.5}[solution.model.kind]
            named["retention"] = torch.full((len(solution.theta), self.k), level, dtype=DTYPE)
        if self.kind != "soft":
            named["retention"] = torch.zeros(len(solution.theta), 0, dtype=DTYPE)
        return self.pack(named)

    def keep(self, retention: Tensor) -> Tensor:
        """Retentions (R, K) from their parameters."""
        if self.kind == "soft":
            return torch.sigmoid(retention)
        return torch.full((len(retention), self.k), 0.0 if self.kind == "hard" else 1.0, dtype=DTYPE)

    def log_scale(self, scale: Tensor) -> Tensor:
        """Log noise scales (R, K) from their parameters, bounded; 0 for shifts."""
        return MAX_LOG_SCALE * torch.tanh(scale / MAX_LOG_SCALE) * (0 if self.kind == "shift" else 1)

    def environments(self, theta: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Means (R, C, q) and covariances (R, C, q, q) that the parameters imply."""
        parts = self._parts(theta, targets, torch.ones(len(theta), self.p, self.p, dtype=DTYPE))
        return parts["mean"], parts["covariance"]

    def per_environment(self, theta: Tensor, targets: Tensor, moments: Moments) -> Tensor:
        """Negative log-likelihood per cell (R, C) of other cells of the same environments, without constants."""
        mean, covariance = self.environments(theta, targets)
        root = torch.linalg.cholesky(covariance)
        d = moments.means - mean
        second = moments.covariances + d[..., :, None] * d[..., None, :]
        trace = torch.cholesky_solve(second, root).diagonal(dim1=2, dim2=3).sum(2)
        value: Tensor = root.diagonal(dim1=2, dim2=3).log().sum(2) + 0.5 * trace
        return value

    def _parts(self, theta: Tensor, targets: Tensor, mask: Tensor) -> dict[str, Tensor]:
        w, r = self.unpack(theta), len(theta)
        none = torch.zeros(r, 1, dtype=DTYPE)
        hit = torch.nn.functional.one_hot(targets, self.p).to(DTYPE)
        hit = torch.cat([torch.zeros(r, 1, self.p, dtype=DTYPE), hit], 1)  # (R, C, p)
        keep = self.keep(w["retention"])
        bounded = torch.tanh(w["scale"] / MAX_LOG_SCALE)
        scale = self.log_scale(w["scale"])
        column = 1 - hit * (1 - torch.cat([none + 1, keep], 1))[..., None]
        graph = w["G"] * mask
        eye = torch.eye(self.p, dtype=DTYPE)
        inverse = torch.linalg.inv(eye - graph[:, None] * column[:, :, None])  # T_c (R, C, p, p)
        total = inverse @ w["W"][:, None]  # T_c W (R, C, p, q)
        sd = torch.exp(hit * torch.cat([none, scale], 1)[..., None])  # D_c (R, C, p)
        loading = sd[..., None] * total
        shift = (hit * torch.cat([none, w["shift"]], 1)[..., None])[:, :, None]
        noise = torch.diag_embed(self.floor + w["psi"].exp())[:, None]
        return {
            "graph": graph, "keep": keep, "scale": scale, "slope": 1 - bounded**2, "column": column, "inverse": inverse,
            "total": total, "sd": sd, "loading": loading, "tau": (shift @ inverse)[:, :, 0], "psi": w["psi"].exp(),
            "mean": (shift @ total)[:, :, 0] + w["offset"][:, None],
            "covariance": loading.transpose(2, 3) @ loading + noise,
        }  # fmt: skip

    def information(self, theta: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Objective (R,), gradient (R, P) and expected information (R, P, P), all per cell.

        For ``dS = a b' + b a'`` and ``dm``: gradient ``a'Eb + e'dm``; information between two parameters
        ``(a'Lc)(b'Ld) + (a'Ld)(b'Lc) + dm'L dm'`` with ``L = S^-1``, weighted by ``n_c / N``.
        """
        p, q, k, at, r = self.p, self.q, self.k, self.at, len(theta)
        s = self._parts(theta, targets, mask)
        weight, n = self.weight, p + q
        root, failed = torch.linalg.cholesky_ex(s["covariance"])
        precision = torch.cholesky_inverse(root)
        d = self.moments.means - s["mean"]
        fitted = precision @ (self.moments.covariances + d[..., :, None] * d[..., None, :])
        nll = (
            (root.diagonal(dim1=2, dim2=3).log().sum(2) + 0.5 * fitted.diagonal(dim1=2, dim2=3).sum(2)) * weight
        ).sum(1)
        wide = weight[:, None, None]
        by_covariance = wide * (precision - fitted @ precision)  # E_c (R, C, q, q)
        by_mean = -weight[:, None] * (precision @ d[..., None])[..., 0]  # e_c (R, C, q)

        # G and W together, parameter (i, m): a = r_i, b = y_m, dm = tau_i y_m
        left = (s["loading"] * s["sd"][..., None]).transpose(2, 3) @ s["inverse"]  # r (R, C, q, p)
        eye = torch.eye(q, dtype=DTYPE).expand(r, k + 1, q, q)
        right = torch.cat([(s["column"][..., None] * s["total"]).transpose(2, 3), eye], 3)  # y (R, C, q, n)
        p_left, p_right = precision @ left, precision @ right
        rr = left.transpose(2, 3) @ p_left + s["tau"][..., :, None] * s["tau"][..., None, :]
        ry, yy = left.transpose(2, 3) @ p_right, right.transpose(2, 3) @ p_right
        g_edges = ((left.transpose(2, 3) @ by_covariance + s["tau"][..., None] * by_mean[:, :, None]) @ right).sum(1)
        first = ((rr * wide).flatten(2).transpose(1, 2) @ yy.flatten(2)).reshape(r, p, p, n, n).permute(0, 1, 3, 2, 4)
        second = ((ry * wide).flatten(2).transpose(1, 2) @ ry.flatten(2)).reshape(r, p, n, p, n).permute(0, 1, 4, 3, 2)
        gradient = torch.zeros(r, self.size, dtype=DTYPE)
        information = torch.zeros(r, self.size, self.size, dtype=DTYPE)
        parts = {"G": slice(p), "W": slice(p, n)}  # of y
        for name, columns in parts.items():
            gradient[:, at[name]] = g_edges[:, :, columns].flatten(1)
            for other, others in parts.items():  # where they go, without a copy of what may be gigabytes
                place = torch.unflatten(torch.unflatten(information[:, at[name], at[other]], 2, (p, -1)), 1, (p, -1))
                place.copy_(first[:, :, columns, :, others]).add_(second[:, :, columns, :, others])

        def put(a: str, b: str, block: Tensor) -> None:
            information[:, at[a], at[b]] = block
            if a != b:
                information[:, at[b], at[a]] = block.transpose(1, 2)

        def put_edges(a: str, block: Tensor) -> None:  # block (R, ·, p, n)
            for b, columns in parts.items():
                put(a, b, block[..., columns].flatten(2))

        # one parameter a perturbation; x is the target's row of the total loadings, u = L x
        x = s["total"][:, 1:].gather(2, targets[..., None, None].expand(-1, -1, 1, q))[:, :, 0]  # (R, K, q)
        w1, tau, psi = weight[1:], s["tau"][:, 1:], s["psi"]
        u = (precision[:, 1:] @ x[..., None])[..., 0]
        xx = (u * x).sum(2)
        rx, yx = (left[:, 1:] * u[..., None]).sum(2), (right[:, 1:] * u[..., None]).sum(2)  # (R, K, p), (R, K, n)
        gradient[:, at["shift"]] = (by_mean[:, 1:] * x).sum(2)  # dm = x
        put_edges("shift", w1[:, None, None] * tau[..., None] * yx[:, :, None])
        put("shift", "shift", torch.diag_embed(w1 * xx))
        put("shift", "offset", w1[:, None] * u)
        ds = (2 * s["scale"]).exp() * s["slope"] * (0 if self.kind == "shift" else 1)  # a = ds x, b = x
        gradient[:, at["scale"]] = ds * ((x[:, :, None] @ by_covariance[:, 1:])[:, :, 0] * x).sum(2)
        put_edges("scale", (w1 * ds)[..., None, None] * 2 * rx[..., None] * yx[:, :, None])
        put("scale", "scale", torch.diag_embed(2 * w1 * (ds * xx) ** 2))
        put("scale", "psi", (w1 * ds)[..., None] * u**2 * psi[:, None])
        if self.kind == "soft":  # a = dk R g (g the target's column of G), b = x, dm = dk (tau g) x
            dk = s["keep"] * (1 - s["keep"])
            into = s["graph"].transpose(1, 2)[torch.arange(r)[:, None], targets]  # (R, K, p)
            a = (left[:, 1:] * into[:, :, None]).sum(3)
            shift = (tau * into).sum(2)
            v = (precision[:, 1:] @ a[..., None])[..., 0]
            ax, aa, wk = (v * x).sum(2), (v * a).sum(2), w1 * dk
            ra, ya = (left[:, 1:] * v[..., None]).sum(2), (right[:, 1:] * v[..., None]).sum(2)
            slope = (a[:, :, None] @ by_covariance[:, 1:])[:, :, 0] + shift[..., None] * by_mean[:, 1:]
            gradient[:, at["retention"]] = dk * (slope * x).sum(2)
            pairs = (ra + shift[..., None] * tau)[..., None] * yx[:, :, None] + ya[:, :, None] * rx[..., None]
            put_edges("retention", wk[..., None, None] * pairs)
            put("retention", "retention", torch.diag_embed(wk * dk * ((aa + shift**2) * xx + ax**2)))
            put("retention", "shift", torch.diag_embed(wk * shift * xx))
            put("retention", "scale", torch.diag_embed(wk * ds * 2 * ax * xx))
            put("retention", "psi", wk[..., None] * v * u * psi[:, None])
            put("retention", "offset", (wk * shift)[..., None] * u)

        # noise: a = psi/2 e_i, b = e_i; offset: dm = e_i
        gradient[:, at["psi"]] = 0.5 * by_covariance.diagonal(dim1=2, dim2=3).sum(1) * psi
        by_component = (p_left * wide).permute(0, 2, 3, 1) @ p_right.permute(0, 2, 1, 3)  # (R, q, p, n)
        put_edges("psi", by_component * psi[..., None, None])
        put("psi", "psi", 0.5 * (precision**2 * wide).sum(1) * psi[:, :, None] * psi[:, None])
        gradient[:, at["offset"]] = by_mean.sum(1)
        outer = (s["tau"] * weight[:, None]).transpose(1, 2) @ p_right.flatten(2)  # (R, p, q n)
        put_edges("offset", outer.reshape(r, p, q, n).transpose(1, 2))
        put("offset", "offset", (precision * wide).sum(1))

        ridge = torch.zeros(self.size, dtype=DTYPE)
        ridge[at["G"]], ridge[at["scale"]], ridge[at["retention"]] = 2 * RIDGE, RIDGE_SCALE, RIDGE_SCALE
        ridge[at["shift"]] = 1 / (LARGE_SHIFT**2 * self.moments.counts.sum())
        free = self.free(mask)
        nll = nll + 0.5 * (ridge * theta**2 * free).sum(1)
        gradient = (gradient + ridge * theta) * free
        if not bool((free > 0).all()):
            information.mul_(free[:, :, None]).mul_(free[:, None])
        information.diagonal(dim1=1, dim2=2).add_(ridge + 1e-10 + (1 - free))
        broken = (failed > 0).any(1) | ~torch.isfinite(nll) | ~torch.isfinite(gradient).all(1)
        return torch.where(broken, torch.inf, nll), gradient, information

    def solve(
        self, theta: Tensor, targets: Tensor, mask: Tensor, steps: int = 100, tolerance: float = 0.01
    ) -> Solution:
        """Levenberg-damped scoring from ``theta`` (R, P), each restart with its own damping.

        Converged: the gain that the quadratic model expects of the next step is below ``tolerance`` log-likelihood
        units over all cells (a hundredth of what decides anything).
        """
        cells, damping = self.moments.counts.sum(), torch.full((len(theta),), 1e-2, dtype=DTYPE)
        moving = torch.nonzero((self.free(mask) > 0).any(0))[:, 0]  # the others would only lengthen the systems
        if len(moving) > MOST * self.size:  # and few of them by less than a copy costs
            moving = torch.arange(self.size)
        nll, gradient, information = self.information(theta, targets, mask)
        converged, given_up = torch.zeros(len(theta), dtype=torch.bool), torch.zeros(len(theta), dtype=torch.bool)
        for _ in range(steps):
            damped = information[:, moving][:, :, moving] if len(moving) < self.size else information.clone()
            damped.diagonal(dim1=1, dim2=2).mul_(1 + damping[:, None]).add_(1e-9)
            root, failed = torch.linalg.cholesky_ex(damped)
            step = torch.zeros_like(theta)
            step[:, moving] = -torch.cholesky_solve(gradient[:, moving, None], root)[..., 0]
            gain = -0.5 * (gradient * step).sum(1) * cells
            converged = converged | ((gain < tolerance) & (failed == 0) & torch.isfinite(nll))
            if bool((converged | given_up).all()):
                break
            step = step * (MAX_STEP / step.abs().max(1).values.clamp_min(MAX_STEP))[:, None]
            step = torch.where((converged | given_up | (failed > 0))[:, None], 0.0, step)
            new = self.information(theta + step, targets, mask)
            better = (new[0] < nll) & (failed == 0)
            if bool(better.all()):
                theta, (nll, gradient, information) = theta + step, new
            elif bool(better.any()):
                theta = torch.where(better[:, None], theta + step, theta)
                nll, gradient = torch.where(better, new[0], nll), torch.where(better[:, None], new[1], gradient)
                information = torch.where(better[:, None, None], new[2], information)
            damping = torch.where(better, damping / 4, damping * 6).clamp(1e-9, 1e9)
            given_up = given_up | (damping > 1e7)
        return Solution(self, theta, targets, mask, nll, information, converged)


@cached_on_disk()
@dataclass(frozen=True)
class Solution:
    """Maximum of the likelihood from R starts; ``nll`` (R,) per cell, ``information`` (R, P, P) per cell."""

    model: LinearModel
    theta: Tensor
    targets: Tensor
    mask: Tensor
    nll: Tensor
    information: Tensor
    converged: Tensor

    def best(self) -> Solution:
        """The restart with the best likelihood alone (R = 1)."""
        i = int(self.nll.argmin())
        tensors = {
            name: getattr(self, name)[i : i + 1]
            for name in ("theta", "targets", "mask", "nll", "information", "converged")
        }
        return replace(self, **tensors)

    def directions(self) -> tuple[Tensor, Tensor]:
        """Read-out of latents, ``u = (y - offset) @ D``: D (q, p) and its error variance (p,).

        Generalised least squares, ``D = psi^-1 W'(W psi^-1 W')^-1``: unbiased in every environment, and least squares
        of y on its latents gives W back, since the two share their errors.
        """
        named = self.model.unpack(self.theta)
        w = named["W"][0]
        scaled = w / (self.model.floor + named["psi"][0].exp())
        gram = scaled @ w.T
        ridge = (1e-9 * gram.diagonal().mean() + 1e-12) * torch.eye(self.model.p, dtype=DTYPE)
        inverse = torch.linalg.inv(gram + ridge)
        return scaled.T @ inverse, inverse.diagonal()

    def adjacency(self) -> Tensor:
        """``G`` (p, p) of the first restart, zero where the mask forbids an edge."""
        return self.model.unpack(self.theta)["G"][0] * self.mask[0]


def allowed_edges(n_latents: int, kind: Kind) -> Tensor:
    """Mask (1, p, p) of a dense graph; empty for shifts, whose likelihood is the same with any graph."""
    full = torch.ones(n_latents, n_latents, dtype=DTYPE) - torch.eye(n_latents, dtype=DTYPE)
    return (full * (0.0 if kind == "shift" else 1.0))[None]


def fit_linear(
    moments: Moments,
    n_latents: int,
    kind: Kind = "hard",
    restarts: int = 6,
    seed: int = 0,
    noise_floor: float = 1e-4,
    fit_noise: bool = True,
    targets: Tensor | None = None,
    steps: int = 100,
    each: Callable[..., Iterable[Any]] = map,
) -> Solution:
    """Best of several restarts, with a dense graph (``shift``: with none, since the data do not identify it).

    ``targets`` (R, K) are the partitions to start from; by default the ``restarts`` best of `propose_targets`.
    ``each`` is `map`, or does the same in parallel.
    """
    model = LinearModel(moments, n_latents, kind, noise_floor, fit_noise)
    if targets is None:
        targets = propose_targets(moments, n_latents, restarts, torch.Generator().manual_seed(seed))
    mask = allowed_edges(n_latents, kind)

    def race(some: Tensor) -> Solution:
        return model.solve(model.start(some), some, mask.expand(len(some), -1, -1), min(RACE, steps)).best()

    raced = min(each(race, torch.tensor_split(targets, min(2, len(targets)))), key=lambda s: float(s.nll[0]))
    return model.solve(raced.theta, raced.targets, raced.mask, steps)
