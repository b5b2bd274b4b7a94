"""Differences of score functions: how the density of an environment's cells differs from that of control cells.

    d_c(y) = grad log p_c(y) - grad log p_0(y)

is the gradient of the log-odds that a cell y is one of environment c and not a control. Of Gaussian environments it is linear,
d_c(y) = Theta_0 (y - m_0) - Theta_c (y - m_c) with precisions Theta. Where that does not hold (`normal`), one classifier for all
environments is added, a network on top of the Gaussian log-odds: it is kept if it tells held-out cells apart better by more than
chance.

Source: classification for density ratios is Gutmann and Hyvarinen 2012, JMLR 13:307; their gradients for causal
representations are Varici et al. 2025, JMLR 26(112).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm
from torch import Tensor, nn

WIDTH = 64
BATCH = 512
LEARNING_RATE = 3e-3
STEPS = 1000
EVERY = 100  # steps between looks at the held-out cells
HELD_OUT = 5  # one cell in so many
GROUPS, FEWER_GROUPS = 10, 4  # of cells, that give score differences each for themselves; where each needs a network
BETTER = 3.0  # standard errors by which the network's log-odds must be better
CHANCE = 1e-3  # that Gaussian cells are taken for others

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LogOdds:
    """Log-odds of environments (C) against controls."""

    means: Floats  # (C + 1, q), environment 0 control
    precisions: Floats  # (C + 1, q, q)
    network: nn.Module | None  # (n, q) -> (n, C + 1) in coordinates in which controls are white; None: Gaussian
    whiten: Floats  # (q, q)

    def gaussian(self, y: Floats) -> Floats:
        """(n, C + 1) log densities of the Gaussians, up to a constant common to all."""
        found = []
        for mean, precision in zip(self.means, self.precisions, strict=True):
            centred = y - mean
            found.append(0.5 * np.linalg.slogdet(precision)[1] - 0.5 * ((centred @ precision) * centred).sum(1))
        return np.array(found).T

    def gradients(self, y: Floats) -> Floats:
        """(C, n, q) score differences at cells ``y`` (n, q)."""
        scores = np.array([(m - y) @ p for m, p in zip(self.means, self.precisions, strict=True)])
        found: Floats = scores[1:] - scores[0]
        if self.network is None:
            return found
        inputs = torch.from_numpy((y - self.means[0]) @ self.whiten).float().requires_grad_()
        odds = self.network(inputs)
        for c in range(len(found)):
            part = torch.autograd.grad((odds[:, c + 1] - odds[:, 0]).sum(), inputs, retain_graph=True)[0]
            found[c] += part.double().numpy() @ self.whiten.T
        return found


def precisions(y: Floats, environment: Ints, k: int, noise: float | None) -> Floats:
    """(k + 1, p, p) inverse covariances of the environments 0 to k, measurement noise taken off as far as they stay positive."""
    found = []
    for e in range(k + 1):
        covariance = np.cov(y[environment == e].T).reshape(y.shape[1], y.shape[1])
        least = float(np.linalg.eigvalsh(covariance)[0])
        found.append(np.linalg.inv(covariance - np.eye(y.shape[1]) * min(noise or 0.0, least / 2)))
    return np.array(found)


def groups_of(environment: Ints, n: int) -> Ints:
    """Numbers 0 to n - 1 of groups of cells, over which every environment is spread evenly."""
    group = np.empty(len(environment), dtype=np.int64)
    for e in np.unique(environment):
        own = np.flatnonzero(environment == e)
        group[own] = np.arange(len(own)) % n
    return group


@dataclass(frozen=True)
class Products:
    """Second moments of score differences over control cells, of every two groups of cells."""

    pairs: Floats  # (groups, groups, C, q, q), symmetric
    described: bool = True  # whether the log-odds that they come from describe the cells

    @property
    def n(self) -> int:
        """How many groups there are."""
        return len(self.pairs)

    def mean(self, without: int | None = None) -> Floats:
        """(C, q, q) E[d_c(y) d_c(y)'], from differences that other cells gave each time, so that their errors average out; of
        the groups but one.
        """
        kept = [g for g in range(self.n) if g != without]
        found: Floats = np.mean([self.pairs[a, b] for a in kept for b in kept if a != b], 0)
        return found


def products(y: Floats, environment: Ints, seed: int, noise: float | None = None) -> Products:
    """Of cells ``y`` (n, q) of environments (n,), in groups, all with a network or none."""
    described = normal(y, environment)
    groups = GROUPS if described else FEWER_GROUPS
    group, controls = groups_of(environment, groups), y[environment == 0]
    found = [_gaussian(y[group == g], environment[group == g], noise) for g in range(groups)]
    if not described:
        gains = list[Tensor]()
        for g in range(groups):
            found[g], gain = _with_network(found[g], y[group == g], environment[group == g], seed + g)
            gains.append(gain)
        described = _better(torch.cat(gains))
    each = np.array([odds.gradients(controls) for odds in found])
    pairs = np.einsum("acni,bcnj->abcij", each, each, optimize=True) / len(controls)
    return Products((pairs + pairs.swapaxes(-1, -2)) / 2, described)


def fit_log_odds(y: Floats, environment: Ints, seed: int, noise: float | None = None) -> LogOdds:
    """Log-odds from cells ``y`` (n, q) of environments (n,), 0 control; measurement ``noise`` is taken off the Gaussians'
    covariances as far as they stay positive.
    """
    plain = _gaussian(y, environment, noise)
    if normal(y, environment):
        return plain
    found, gain = _with_network(plain, y, environment, seed)
    return found if _better(gain) else plain


def normal(y: Floats, environment: Ints) -> bool:
    """Whether the log-odds of Gaussians describe cells ``y`` (n, q) of environments (n,), 0 control.

    For the true odds p_c / p_0 and pi = p_c / (p_0 + p_c), E_0[pi f] = E_c[(1 - pi) f] for all functions f, here 1, y_i and y_i y_j:
    the likelihood equations of a logistic regression. The largest difference, in standard errors, is compared with chance.
    These errors take the Gaussians as known, not as fitted to the same cells, so that chance differences are smaller than said.
    """
    odds = _gaussian(y, environment, None)
    densities, x = odds.gaussian(y), (y - odds.means[0]) @ odds.whiten
    first, second = np.triu_indices(x.shape[1])
    most = norm.isf(CHANCE / 2 / (len(odds.means) - 1) / (1 + x.shape[1] + len(first)))
    controls = environment == 0
    for c in range(1, len(odds.means)):
        own = environment == c
        share = expit(densities[:, c] - densities[:, 0])
        sides = []
        for cells, weight in ((controls, share), (own, 1 - share)):
            at, w = x[cells], weight[cells][:, None]
            sides.append(np.hstack([w, w * at, w * at[:, first] * at[:, second]]))
        apart = sides[0].mean(0) - sides[1].mean(0)
        error = np.sqrt(sum(side.var(0) / len(side) for side in sides))
        if (np.abs(apart) > most * error).any():
            return False
    return True


def _gaussian(y: Floats, environment: Ints, noise: float | None) -> LogOdds:
    theta = precisions(y, environment, int(environment.max()), noise)
    means = np.array([y[environment == e].mean(0) for e in range(len(theta))])
    return LogOdds(means, theta, None, np.linalg.cholesky(theta[0]))


def _with_network(plain: LogOdds, y: Floats, environment: Ints, seed: int) -> tuple[LogOdds, Tensor]:
    """With the network that is best on held-out cells, and what it adds to the log-likelihood of each of them."""
    network, gain = _train(plain, y, environment, seed)
    return replace(plain, network=network), gain


def _better(gain: Tensor) -> bool:
    """Whether cells gain (n,) by more than chance."""
    return float(gain.mean()) > BETTER * float(gain.std()) / math.sqrt(len(gain))


def _train(plain: LogOdds, y: Floats, environment: Ints, seed: int) -> tuple[nn.Module | None, Tensor]:
    """The network that is best on held-out cells, and their gains; None if the Gaussian log-odds do as well."""
    n_environments = len(plain.means)
    x = torch.from_numpy((y - plain.means[0]) @ plain.whiten).float()
    shares = np.bincount(environment, minlength=n_environments) / len(environment)
    offset = torch.from_numpy(plain.gaussian(y) + np.log(shares)).float()
    label = torch.from_numpy(environment)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    test, train = order[: len(y) // HELD_OUT], order[len(y) // HELD_OUT :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        last = nn.Linear(WIDTH, n_environments)
        network = nn.Sequential(nn.Linear(x.shape[1], WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), last)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    loss = nn.CrossEntropyLoss(reduction="none")

    @torch.no_grad()
    def on_held_out() -> Tensor:
        values: Tensor = loss(offset[test] + network(x[test]), label[test])
        return values.double()

    before = on_held_out()
    best, kept = float(before.mean()), None
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        rows = train[torch.randint(len(train), (BATCH,), generator=generator)]
        value = loss(offset[rows] + network(x[rows]), label[rows]).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            now = on_held_out()
            if float(now.mean()) < best:
                best, kept = float(now.mean()), {name: part.clone() for name, part in network.state_dict().items()}
    if kept is None:
        return None, torch.zeros_like(before)
    network.load_state_dict(kept)
    return network, before - on_held_out()
