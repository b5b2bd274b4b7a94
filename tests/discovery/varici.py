"""Latents, mixing and interventions as in the simulations of Varici et al. 2025 (JMLR 26:112, section 7)."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

Floats = np.ndarray


class Latents:
    """Programs in causal order, each pair joined with probability 1/2, noise variances of .5 to 1.5.

    linear: weights of size .5 to 1.5; quadratic: u_k = |B u_pa| + noise, B uniform in -1 to 1. Program of
    intervention k is ``target[k]``.
    """

    def __init__(self, p: int, seed: int, linear: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self.p = p
        self.graph = np.triu(self.rng.random((p, p)) < 0.5, 1)
        self.variance = self.rng.uniform(0.5, 1.5, p)
        self.weights = self.rng.choice([-1, 1], (p, p)) * self.rng.uniform(0.5, 1.5, (p, p)) * self.graph
        self.roots = [self._root(int(n)) for n in self.graph.sum(0)]
        self.linear = linear
        self.target = self.rng.permutation(p)

    def _root(self, n: int) -> Floats:
        """B, redrawn until no direction of the parents has a weight below .3: the paper redraws models without impact too."""
        while True:
            found = self.rng.uniform(-1, 1, (n, n))
            if n == 0 or np.linalg.svd(found, compute_uv=False)[-1] >= 0.3:
                return found

    def draw(self, n: int, hit: tuple[int, ...] = (), scale: float = 0.25, kept: float = 0.0) -> Floats:
        """(n, p) cells, in which the programs ``hit`` keep a share of what their parents do and have noise of another scale."""
        u = self.rng.normal(size=(n, self.p)) * np.sqrt(self.variance)
        for k in range(self.p):
            parents = np.flatnonzero(self.graph[:, k])
            if self.linear:
                caused = u[:, parents] @ self.weights[parents, k]
            else:
                caused = np.linalg.norm(u[:, parents] @ self.roots[k].T, axis=1)
            if k in hit:
                u[:, k] *= np.sqrt(scale)
            u[:, k] += caused * (kept if k in hit else 1.0)
        return u

    def screen(self, n: int, hits: list[tuple[int, ...]], **changes: float) -> tuple[Floats, Floats]:
        """Latents (cells, p) and environments (cells,): n controls, and n cells of each of ``hits``."""
        u = np.concatenate([self.draw(n), *(self.draw(n, hit, **changes) for hit in hits)])
        return u, np.repeat(np.arange(len(hits) + 1), n)

    def one_each(self) -> list[tuple[int, ...]]:
        return [(int(k),) for k in self.target]

    def edges(self) -> Floats:
        """(p, p) in the numbering of the interventions."""
        return self.graph[np.ix_(self.target, self.target)]

    def mixing(self, q: int) -> Floats:
        """(p, q): a random subspace, within it a matrix of condition number up to 10; columns with a largest entry of 1."""
        while True:
            inner = self.rng.uniform(-0.5, 0.5, (self.p, self.p))
            if np.linalg.cond(inner) <= 10:
                break
        found = np.linalg.qr(self.rng.normal(size=(q, q)))[0][:, : self.p] @ inner
        return (found / np.abs(found).max(0)).T


def components(x: Floats, p: int) -> Floats:
    """The first p principal components."""
    centred = x - x.mean(0)
    return centred @ np.linalg.eigh(centred.T @ centred)[1][:, -p:]


def distance(found: np.ndarray, truth: np.ndarray) -> int:
    """Structural Hamming distance; a reversed edge counts once."""
    apart = found != truth
    return int(np.triu(apart | apart.T).sum())


def mcc(found: Floats, truth: Floats) -> float:
    """Mean absolute correlation of matched columns."""
    p = truth.shape[1]
    between = np.abs(np.corrcoef(found.T, truth.T)[:p, p:])
    return float(between[linear_sum_assignment(-between)].mean())
