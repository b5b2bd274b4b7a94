"""A diffusion decoder of components given causal latents, deterministic both ways.

    y_t = sqrt(a_t) y + sqrt(1 - a_t) e,   e ~ N(0, 1);     e(y_t, t, u) is learned by   minimise  E |e - e(y_t, t, u)|^2

With e known, y_t moves along the curve of constant e: between neighbours s and t of a grid of times, in either direction,

    y_t = sqrt(a_t) (y_s - sqrt(1 - a_s) e_s) / sqrt(a_s) + sqrt(1 - a_t) e_s,

and so a cell is read to its noise y_T under its latents, and written from it under others: its counterfactual.

Source: DDIM (Song, Meng and Ermon 2021, arXiv 2010.02502); with causal latents Komanduri et al. 2024, "Causal diffusion
autoencoders" (CausalDiffAE), ECAI, arXiv 2404.17735.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTH, FREQUENCIES = 128, 8
TIMES = 100  # of the grid
LEAST, MOST = 1e-4, 0.9999  # of 1 - a_t, at both ends of the grid


class DiffusionDecoder(nn.Module):
    """Of q components, given p latents; components have about unit variance.

    ``y - line(u)`` is what is diffused: the decoder starts from a linear one, with ``loadings`` (p, q) and ``center`` (q,).
    """

    signal: Tensor

    def __init__(self, loadings: Tensor, center: Tensor) -> None:
        super().__init__()
        p, q = loadings.shape
        self.loadings, self.center = nn.Parameter(loadings.float()), nn.Parameter(center.float())
        angle = torch.linspace(math.asin(math.sqrt(LEAST)), math.asin(math.sqrt(MOST)), TIMES)
        self.register_buffer("signal", torch.cos(angle) ** 2)  # a_t
        self.network = nn.Sequential(
            nn.Linear(q + p + 2 * FREQUENCIES, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, q),
        )

    def line(self, u: Tensor) -> Tensor:
        """Linear part (n, q) of the decoder at latents (n, p)."""
        return u @ self.loadings + self.center

    def noise(self, y: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """e (n, q) of diffused components (n, q) at times (n,), int64, given latents (n, p)."""
        phase = torch.pi * (t + 1)[:, None] / TIMES * 2.0 ** torch.arange(FREQUENCIES, device=t.device)
        found: Tensor = self.network(torch.cat([y, u, phase.sin(), phase.cos()], 1))
        return found

    def loss(self, y: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
        """|e - e(y_t, t, u)|^2 / 2 (n,) of components (n, q) and latents (n, p), at times and with noise drawn for each cell."""
        t = torch.randint(TIMES, (len(y),), generator=generator)
        e, a = torch.randn(y.shape, generator=generator), self.signal[t][:, None]
        diffused = a.sqrt() * (y - self.line(u)) + (1 - a).sqrt() * e
        return 0.5 * ((e - self.noise(diffused, t, u)) ** 2).sum(1)

    @torch.no_grad()
    def read(self, y: Tensor, u: Tensor) -> Tensor:
        """Components (n, q) of latents (n, p) to their noise y_T."""
        return self._moved(y - self.line(u), u, range(TIMES))

    @torch.no_grad()
    def write(self, noise: Tensor, u: Tensor) -> Tensor:
        """Noise (n, q) and latents (n, p) to components; the inverse of `read` but for the size of its steps."""
        return self._moved(noise, u, range(TIMES - 1, -1, -1)) + self.line(u)

    def _moved(self, y: Tensor, u: Tensor, times: range) -> Tensor:
        for s, t in pairwise(times):
            a, b = self.signal[s], self.signal[t]
            e = self.noise(y, torch.full((len(y),), s), u)
            y = b.sqrt() * (y - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
        return y
