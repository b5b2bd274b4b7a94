"""Latents and mixing as in the simulations of Buchholz et al. 2023 (NeurIPS 2023, section 6)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

Floats = np.ndarray


class Curved:
    """p programs of average degree 2 with weights of .25 to 1 and noise variances of 1 to 2; hard interventions give a program
    a mean of 1 to 2 and another variance. Observed are q outputs of a random network of four hidden layers.
    """

    def __init__(self, p: int, q: int, seed: int) -> None:
        rng = self.rng = np.random.default_rng(seed)
        self.p, order = p, rng.permutation(p)
        weights = (
            rng.uniform(0.25, 1, (p, p)) * rng.choice([-1, 1], (p, p)) * np.triu(rng.random((p, p)) < 2 / (p - 1), 1)
        )
        self.adjacency = np.zeros((p, p))
        self.adjacency[np.ix_(order, order)] = weights
        self.variance, self.changed = rng.uniform(1, 2, (2, p))
        self.shift = rng.uniform(1, 2, p) * rng.choice([-1, 1], p)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [layer for a in (p, 512, 512, 512) for layer in (nn.Linear(a, 512), nn.LeakyReLU(0.2))]
            self.network = nn.Sequential(*layers, nn.Linear(512, q))

    def draw(self, n: int, hit: int | None) -> Floats:
        noise, graph = self.rng.normal(size=(n, self.p)) * np.sqrt(self.variance), self.adjacency.copy()
        if hit is not None:
            noise[:, hit] = self.rng.normal(size=n) * np.sqrt(self.changed[hit]) + self.shift[hit]
            graph[:, hit] = 0
        return noise @ np.linalg.inv(np.eye(self.p) - graph)

    @torch.no_grad()
    def screen(self, n: int) -> tuple[Floats, Floats, Floats]:
        """Latents, principal components of what is observed, and environments of n cells each."""
        u = np.concatenate([self.draw(n, hit) for hit in (None, *range(self.p))])
        x = self.network(torch.from_numpy(u).float()).double().numpy()
        centred = x - x.mean(0)
        y = centred @ np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
        return u, y, np.repeat(np.arange(self.p + 1), n)
