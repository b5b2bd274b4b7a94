"""Gaussian interventional likelihood on sufficient statistics (linear causal disentanglement).

    minimise   (1/N) sum_c n_c / 2 * ( log|S_c| + tr S_c^-1 (C_c + (y_c - m_c)'(y_c - m_c)) )
    with       m_c = a_c T_c W + o,       S_c = W' T_c' D_c^2 T_c W + diag(floor + exp(psi))
               T_c = (I - G_c)^-1,        G_c = G with the target's column times the retention

over G (p, p), W (p, q), shifts a, log noise scales s, retentions, psi and o. ``y_c``, ``C_c``, ``n_c`` are mean,
covariance and count of the cells of environment ``c`` in ``q`` whitened components; environment 0 holds the
controls, environment ``i + 1`` perturbation ``i``, whose target is one latent. Row vectors; ``G[j, k]``: j -> k.
Where contexts are crossed, each has controls of its own, and ``D_c`` is what all programs' noise is scaled by in the
context (1 in the first) times what the perturbation scales its target's by.

Given targets (`crlseq.discovery.propose`) the likelihood is maximised by damped Fisher scoring
(`crlseq.discovery.scoring`), all restarts as one batch. The graph is fitted dense, without an acyclicity term: under
hard interventions it is identified, and `crlseq.discovery.edges` prunes it by likelihood ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from crlseq.config import InterventionKind
from crlseq.discovery.conjugate import Problem, search
from crlseq.discovery.moments import DTYPE, Moments
from crlseq.discovery.propose import leading_changes, propose_targets
from crlseq.discovery.rank_two import Parameters, Product, RankTwo, curvature, gradient, own_to, rank_two, seen_by
from crlseq.discovery.scoring import Implied, LinearScore, Score, solve
from crlseq.model.interventions import INTERVENTIONS
from crlseq.storage.stage_cache import cached_on_disk

MAX_FITTED_LOG_SCALE = 1.5  # |s| stays below: an unbounded scale drives a degenerate environment to infinity
EDGE_RIDGE = 1e-4  # on G, per cell: only decides directions that the data leave flat
PERTURBATION_RIDGE = 2e-5  # on the parameters of noise scales and retentions, per cell
LARGE_SHIFT = 5.0  # a shift's prior deviation: a program that control cells do not vary in keeps a scale
TURNED_PER_RESTART, TURNED_LEFT = 3, 8  # restarts that differ in loadings: how many, and how many after the race
MAX_TURN = math.pi / 4  # of a perturbation's leading change in a restart
INFORMATION_VALUES = 20_000_000  # that are held at once: restarts are solved together as far as these allow
RESTART_STEPS = 15  # after which restarts are far enough apart to go on with the best alone
FIXED_LOG_NOISE = -20.0
NEAR_END = 1.5  # |logit| at which a learned retention starts from a fixed one of 0 or 1


@cached_on_disk("moments", "p", "kind", "floor", "fit_noise")
class LinearModel:
    """The likelihood of one data set and kind of intervention; parameters packed as (R, P), R restarts.

    ``moments`` of the environments in float64; ``floor`` is measurement noise that every component has at least, and
    keeps a latent from taking a component whole; without ``fit_noise`` latents are observed (``psi`` fixed, tiny).
    """

    def __init__(
        self, moments: Moments, p: int, kind: InterventionKind, floor: float = 1e-4, fit_noise: bool = True
    ) -> None:
        self.moments, self.p, self.kind, self.floor, self.fit_noise = moments, p, kind, floor, fit_noise
        self.intervention = INTERVENTIONS[kind]
        self.learns_retention = self.intervention.retention is None
        self.q, self.n_controls = moments.means.shape[1], moments.n_controls
        self.k = len(moments.counts) - self.n_controls
        sizes = {"G": self.p**2, "W": self.p * self.q, "shift": self.k, "scale": self.k}
        sizes |= {"retention": self.k if self.learns_retention else 0, "psi": self.q, "offset": self.q}
        if self.n_controls > 1:
            sizes["context"] = (self.n_controls - 1) * self.p
        self.at: dict[str, slice] = {}
        self.size = 0
        for name, size in sizes.items():
            self.at[name] = slice(self.size, self.size + size)
            self.size += size

    def like(self, moments: Moments | None = None, kind: InterventionKind | None = None) -> LinearModel:
        """The same model of other moments, or of another kind of intervention."""
        return LinearModel(moments or self.moments, self.p, kind or self.kind, self.floor, self.fit_noise)

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
        if not self.intervention.scales:
            free[:, self.at["scale"]] = 0
        if not self.fit_noise:
            free[:, self.at["psi"]] = 0
        return free

    def retention(self, parameters: Tensor) -> Tensor:
        """Retentions (R, K) from their parameters."""
        fixed = self.intervention.retention
        return torch.sigmoid(parameters) if fixed is None else torch.full((len(parameters), self.k), fixed, dtype=DTYPE)

    def log_scale(self, parameters: Tensor) -> Tensor:
        """Log noise scales (R, K) from their parameters, bounded; 0 where the kind has none."""
        return _bounded(parameters) * self.intervention.scales

    def context_scale(self, named: dict[str, Tensor]) -> Tensor:
        """Log noise scales (R, L, p) of programs in each of L contexts, bounded; 0 in the first."""
        first = torch.zeros(len(named["W"]), 1, self.p, dtype=DTYPE)
        if self.n_controls == 1:
            return first
        return torch.cat([first, _bounded(named["context"]).reshape(-1, self.n_controls - 1, self.p)], 1)

    def context_of(self, moments: Moments) -> Tensor:
        """Context (C,) of each environment, controls first."""
        return torch.cat([torch.arange(self.n_controls), moments.control])

    def start(self, targets: Tensor, angles: Tensor | None = None) -> Tensor:
        """Initial values (R, P): each latent's loadings along the leading direction of what its perturbations change,
        each turned by an angle of ``angles`` (R, K) towards what it changes second most.
        """
        m, r = self.moments, len(targets)
        delta, count = m.shifts(), m.counts[m.n_controls :]
        change = leading_changes(m).in_components(torch.zeros(1, self.k, dtype=DTYPE) if angles is None else angles)
        change = change.expand(r, -1, -1)
        one = one_hot(targets, self.p).to(DTYPE)  # (R, K, p)
        scatter = torch.einsum("rka,k,rkp,rkb->rpab", change, count, one, change)
        cells = torch.einsum("k,rkp->rp", count, one).clamp_min(1)
        value, vector = torch.linalg.eigh(scatter / cells[..., None, None])
        loadings = vector[..., -1] * 0.5 * value[..., -1:].clamp_min(0).sqrt().clamp_min(0.02)
        along = torch.einsum("kq,rpq->rkp", delta, loadings) / (loadings**2).sum(2)[:, None]
        noise = torch.tensor(FIXED_LOG_NOISE)
        if self.fit_noise:
            noise = torch.linalg.eigvalsh(m.covariances[0])[0].clamp_min(1e-3).log()
        zero = torch.zeros(r, self.k, dtype=DTYPE)
        none = torch.zeros(r, (self.n_controls - 1) * self.p, dtype=DTYPE)
        return self.pack({
            "G": torch.zeros(r, self.p, self.p, dtype=DTYPE), "W": loadings, "shift": (along * one).sum(2), "scale": zero,
            "context": none, "retention": zero[:, : self.k if self.learns_retention else 0], "psi": noise.expand(r, self.q).clone(),
            "offset": m.means[:1].expand(r, -1).clone(),
        })  # fmt: skip

    def adopt(self, solution: Solution) -> Tensor:
        """A solution of this or another kind of intervention as a start (R, P): what the kinds share is taken over."""
        named = solution.model.unpack(solution.theta)
        named["G"] = named["G"] * solution.mask
        fixed = solution.model.intervention.retention
        if not self.learns_retention:
            named["retention"] = torch.zeros(len(solution.theta), 0, dtype=DTYPE)
        elif fixed is not None:
            named["retention"] = torch.full((len(solution.theta), self.k), NEAR_END * (2 * fixed - 1), dtype=DTYPE)
        return self.pack(named)

    def implied(self, theta: Tensor, targets: Tensor, mask: Tensor) -> Implied:
        """Means and covariances that parameters imply under targets (R, K) and a mask of edges, and their parts."""
        w, r, n = self.unpack(theta), len(theta), self.n_controls
        none = torch.zeros(r, n, dtype=DTYPE)  # what controls have of an intervention
        hit = pad(one_hot(targets, self.p).to(DTYPE), (0, 0, n, 0))  # (R, C, p)
        retention, log_scale = self.retention(w["retention"]), self.log_scale(w["scale"])
        bounded = torch.tanh(w["scale"] / MAX_FITTED_LOG_SCALE)
        column = 1 - hit * (1 - torch.cat([none + 1, retention], 1))[..., None]
        graph, eye, psi = w["G"] * mask, torch.eye(self.p, dtype=DTYPE), w["psi"].exp()
        inverse = torch.linalg.inv(eye - graph[:, None] * column[:, :, None])
        total = inverse @ w["W"][:, None]
        log_sd, context = hit * torch.cat([none, log_scale], 1)[..., None], self.context_scale(w)
        if n > 1:
            log_sd = log_sd + context[:, self.context_of(self.moments)]
        sd = torch.exp(log_sd)
        loading = sd[..., None] * total
        shift = (hit * torch.cat([none, w["shift"]], 1)[..., None])[:, :, None]
        mean = (shift @ total)[:, :, 0] + w["offset"][:, None]
        covariance = loading.transpose(2, 3) @ loading + torch.diag_embed(self.floor + psi)[:, None]
        tau, slope = (shift @ inverse)[:, :, 0], (1 - bounded**2) * self.intervention.scales
        target_scale = log_sd[:, n:].gather(2, targets[..., None])[..., 0]
        return Implied(
            mean, covariance, graph, column, inverse, total, sd, loading, tau, retention, target_scale, slope, psi,
            1 - (context / MAX_FITTED_LOG_SCALE) ** 2,
        )  # fmt: skip

    def environments(self, theta: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Means (R, C, q) and covariances (R, C, q, q) that the parameters imply."""
        implied = self.implied(theta, targets, torch.ones(len(theta), self.p, self.p, dtype=DTYPE))
        return implied.mean, implied.covariance

    def per_environment(self, theta: Tensor, targets: Tensor, moments: Moments) -> Tensor:
        """Negative log-likelihood per cell (R, C) of other cells of the same environments, without constants."""
        mean, covariance = self.environments(theta, targets)
        root = torch.linalg.cholesky(covariance)
        d = moments.means - mean
        second = moments.covariances + d[..., :, None] * d[..., None, :]
        trace = torch.cholesky_solve(second, root).diagonal(dim1=2, dim2=3).sum(2)
        value: Tensor = root.diagonal(dim1=2, dim2=3).log().sum(2) + 0.5 * trace
        return value

    def information(self, theta: Tensor, targets: Tensor, mask: Tensor) -> Score:
        """Objective (R,), gradient (R, P) and expected information (R, P, P), all per cell, with a weak ridge."""
        score = LinearScore(self.implied(theta, targets, mask), self.moments, targets, self.at)
        score.edges_and_loadings()
        score.shifts()
        score.scales()
        if self.learns_retention:
            score.retentions()
        score.noise()
        score.offset()
        if self.n_controls > 1:
            score.contexts(self.context_of(self.moments))
        return score.with_ridge(theta, self.ridge(), self.free(mask))

    def ridge(self) -> Tensor:
        """Weak penalties (P,), half of which times the parameters' squares the objective has."""
        ridge = torch.zeros(self.size, dtype=DTYPE)
        ridge[self.at["G"]] = 2 * EDGE_RIDGE
        for name in {"scale", "retention", "context"} & self.at.keys():
            ridge[self.at[name]] = PERTURBATION_RIDGE
        ridge[self.at["shift"]] = 1 / (LARGE_SHIFT**2 * self.moments.cells())
        return ridge

    def problem(self, targets: Tensor, mask: Tensor) -> Problem:
        """What `information` scores, for one restart with targets (K,) and edges (p, p), as products with the information."""
        ridge, free, seen = self.ridge(), self.free(mask[None])[0], seen_by(self.moments)

        def environments(theta: Tensor) -> RankTwo:
            w = self.unpack(theta[None])
            scale, retention = self.log_scale(w["scale"])[0], self.retention(w["retention"])[0]
            noise = self.floor + w["psi"][0].exp()
            one = Parameters(w["G"][0] * mask, w["W"][0], w["shift"][0], scale, retention, noise, w["offset"][0])
            return rank_two(one, targets)

        def value(theta: Tensor) -> Tensor:
            found = seen(environments(theta)) + 0.5 * (ridge * theta**2 * free).sum()
            return torch.where(torch.isfinite(found), found, torch.inf)

        def score(theta: Tensor) -> tuple[Tensor, Tensor]:
            at, slope = gradient(value, theta)
            return torch.where(torch.isfinite(slope).all(), at, torch.inf), slope * free

        def product(theta: Tensor) -> Product:
            own = own_to(environments(theta), self.moments.weight())
            times = curvature(lambda there: own(environments(there)), theta)
            return lambda v: times(v) * free + (ridge + 1e-10) * v

        def information(theta: Tensor) -> Tensor:
            return self.information(theta[None], targets[None], mask[None])[2][0]

        return Problem(value, score, product, information, free, self.at["psi"])

    def solve(self, theta: Tensor, targets: Tensor, mask: Tensor, steps: int = 100) -> Solution:
        """Damped scoring from ``theta`` (R, P), with targets (R, K) and allowed edges (R, p, p) held fixed. Where there is no room
        for two informations, `crlseq.discovery.conjugate.search` does with products of them, a start after the other, unless
        environments have several controls.
        """
        at_once = INFORMATION_VALUES // self.size**2
        ends = []
        if at_once < 2 and self.n_controls == 1:
            cells = float(self.moments.cells())
            for r in range(len(theta)):
                found = search(self.problem(targets[r], mask[r]), theta[r], cells, steps)
                ends.append(tuple(each[None] for each in found))
        else:
            for start, own, edges in zip(
                *(torch.split(each, max(at_once, 1)) for each in (theta, targets, mask)), strict=True
            ):

                def score(there: Tensor, own: Tensor = own, edges: Tensor = edges) -> Score:
                    return self.information(there, own, edges)

                end, (nll, _, _), converged = solve(score, start, self.free(edges), self.moments.cells(), steps)
                ends.append((end, nll, converged))
        theta, nll, converged = (torch.cat(each) for each in zip(*ends, strict=True))
        return Solution(self, theta, targets, mask, nll, converged)


@cached_on_disk()
@dataclass(frozen=True)
class Solution:
    """Maximum of the likelihood from R starts; ``nll`` (R,) per cell."""

    model: LinearModel
    theta: Tensor
    targets: Tensor
    mask: Tensor
    nll: Tensor
    converged: Tensor

    def best(self) -> Solution:
        """The restart with the best likelihood alone (R = 1)."""
        i = int(self.nll.argmin())
        return replace(self, **{f.name: getattr(self, f.name)[i : i + 1] for f in fields(self) if f.name != "model"})

    def refitted(
        self,
        *,
        theta: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        moments: Moments | None = None,
        kind: InterventionKind | None = None,
        steps: int = 100,
    ) -> Solution:
        """The maximum from here, or from ``theta``, with what is given in place of the solution's; other edges stay 0."""
        mask = self.mask if mask is None else mask
        targets = self.targets if targets is None else targets
        start = replace(self, theta=self.theta if theta is None else theta, mask=mask)
        model = self.model.like(moments, kind)
        return model.solve(model.adopt(start), targets, mask, steps)

    def directions(self) -> Tensor:
        """Read-out of latents (q, p), ``u = (y - offset) @ D``.

        Generalised least squares, ``D = psi^-1 W'(W psi^-1 W')^-1``: unbiased in every environment.
        """
        named = self.model.unpack(self.theta)
        w = named["W"][0]
        scaled = w / (self.model.floor + named["psi"][0].exp())
        gram = scaled @ w.T
        ridge = (1e-9 * gram.diagonal().mean() + 1e-12) * torch.eye(self.model.p, dtype=DTYPE)
        directions: Tensor = scaled.T @ torch.linalg.inv(gram + ridge)
        return directions

    def adjacency(self) -> Tensor:
        """``G`` (p, p) of the first restart, zero where the mask forbids an edge."""
        return self.model.unpack(self.theta)["G"][0] * self.mask[0]


def _bounded(parameters: Tensor) -> Tensor:
    """Log scales below `MAX_FITTED_LOG_SCALE`."""
    return MAX_FITTED_LOG_SCALE * torch.tanh(parameters / MAX_FITTED_LOG_SCALE)


def allowed_edges(n_latents: int, kind: InterventionKind) -> Tensor:
    """Mask (1, p, p) of a dense graph; empty for a kind whose likelihood is the same with any graph."""
    full = torch.ones(n_latents, n_latents, dtype=DTYPE) - torch.eye(n_latents, dtype=DTYPE)
    return (full * (INTERVENTIONS[kind].graph != "nothing"))[None]


def fit_linear(
    moments: Moments,
    n_latents: int,
    kind: InterventionKind = "hard",
    restarts: int = 6,
    seed: int = 0,
    noise_floor: float = 1e-4,
    fit_noise: bool = True,
    targets: Tensor | None = None,
    steps: int = 100,
    each: Callable[..., Iterable[Any]] = map,
) -> Solution:
    """Best of several restarts, with a dense graph, or with none where the data do not identify it.

    From the partitions ``targets`` (R, K), else the ``restarts`` best proposed; ``each`` is a map, or a parallel one.
    Where one partition alone is proposed, as with one perturbation a program, restarts differ in the loadings.
    """
    model = LinearModel(moments, n_latents, kind, noise_floor, fit_noise)
    if targets is None:
        targets, angles = _starts(moments, n_latents, restarts, torch.Generator().manual_seed(seed))
    else:
        angles = torch.zeros(targets.shape, dtype=DTYPE)
    mask, left = allowed_edges(n_latents, kind), TURNED_LEFT if bool(angles.any()) else 1

    def race(some: tuple[Tensor, Tensor]) -> Solution:
        theta = model.start(*some)
        return model.solve(theta, some[0], mask.expand(len(theta), -1, -1), min(RESTART_STEPS, steps))

    parts = min(2, len(targets))
    raced = each(race, zip(torch.tensor_split(targets, parts), torch.tensor_split(angles, parts), strict=True))
    theta, nll = (torch.cat(both) for both in zip(*((s.theta, s.nll) for s in raced), strict=True))
    ahead = nll.argsort(stable=True)[:left].tolist()
    ahead += [0] * (0 not in ahead)  # the best proposal is often right, and slower than others
    return model.solve(theta[ahead], targets[ahead], mask.expand(len(ahead), -1, -1), steps).best()


def _starts(moments: Moments, n_latents: int, restarts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Partitions (R, K) and the angles (R, K) of their loadings: 0, but where only one partition is proposed."""
    targets = propose_targets(moments, n_latents, restarts, generator)
    if restarts == 1 or bool((targets != targets[0]).any()):
        return targets, torch.zeros(targets.shape, dtype=DTYPE)
    targets = targets[:1].expand(TURNED_PER_RESTART * restarts, -1)
    angles = (2 * torch.rand(targets.shape, generator=generator, dtype=DTYPE) - 1) * MAX_TURN
    angles[0] = 0
    return targets, angles
