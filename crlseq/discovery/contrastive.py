"""A network of the components that makes two environments differ by one latent, trained as a classifier.

    minimise over f, head    sum_k [ mean_{environment b_k} log(1 + exp(-g_k(f(y)))) + mean_{environment a_k} log(1 + exp(g_k(f(y)))) ]
    g_k(u) = c_k + s_k u_k - (l_k u_k)^2 + (w_k (u_k - sum_j A_jk u_j))^2

g_k is the log-odds of cells of b_k against those of a_k when u is Gaussian with linear equations u = u A + noise, a_k are control
cells, and b_k those of an intervention on k. Without A it is that of two hard interventions on k.

Source: Buchholz et al. 2023, "Learning linear causal representations from interventions under general nonlinear mixing",
NeurIPS 2023, whose weights of the penalties these are. The linear part of f and the held-out cells that end the training are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

WIDTH = 256
BATCH = 512
STEPS = 3000
EVERY = 200  # steps between looks at the held-out cells
LEARNING_RATE = 1e-3
HELD_OUT = 5  # one cell in so many
L1, ACYCLIC, CENTRED = 1e-4, 1e-5, 0.1  # weights of the penalties
FLOOR = 1e-3  # of a component's standard deviation, relative to the largest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Embedding(nn.Module):
    """u = y W + f(y): (n, q) -> (n, p)."""

    def __init__(self, q: int, p: int) -> None:
        super().__init__()
        self.linear = nn.Linear(q, p)
        self.network = nn.Sequential(nn.Linear(q, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, p))

    @torch.no_grad()
    def start_linear(self, directions: Tensor) -> None:
        """u = y W with W' = ``directions`` (p, q)."""
        self.linear.weight.copy_(directions)
        for part in (self.linear.bias, *self.network[-1].parameters()):
            part.zero_()

    def forward(self, y: Tensor) -> Tensor:
        """Latents of components."""
        u: Tensor = self.linear(y) + self.network(y)
        return u


class QuadraticHead(nn.Module):
    """g_k(u) above; ``dependent``: with A."""

    def __init__(self, p: int, dependent: bool) -> None:
        super().__init__()
        self.constant, self.slope = nn.Parameter(torch.zeros(p)), nn.Parameter(torch.ones(p))
        self.inner, self.outer = nn.Parameter(torch.ones(p)), nn.Parameter(torch.ones(p))
        self.adjacency = nn.Parameter(torch.zeros(p, p), requires_grad=dependent)

    def weights(self) -> Tensor:
        """A (p, p), j -> k, with a diagonal of 0."""
        return self.adjacency - torch.diag(self.adjacency.diagonal())

    def forward(self, u: Tensor, k: Tensor) -> Tensor:
        """Log-odds (n,) of latents (n, p) for the pairs ``k`` (n,) of environments."""
        own = u.gather(1, k[:, None])[:, 0]
        noise = own - (u * self.weights().T[k]).sum(1)
        odds: Tensor = (
            self.constant[k] + self.slope[k] * own - (self.inner[k] * own) ** 2 + (self.outer[k] * noise) ** 2
        )
        return odds

    def penalty(self, controls: Tensor) -> Tensor:
        """Of edges, of cycles (Zheng et al. 2018), and of latents (n, p) of control cells that are not centred."""
        a = self.weights()
        cycles = torch.trace(torch.matrix_exp(a * a)) - len(a)
        return L1 * a.abs().sum() + ACYCLIC * cycles + CENTRED * (controls.mean(0) ** 2).sum()


@dataclass(frozen=True)
class Encoder:
    """Latents of components, and the loss of held-out cells."""

    embedding: Embedding
    center: Floats  # (q,)
    scale: Floats  # (q,)
    loss: float

    def latents(self, y: Floats) -> Floats:
        """(n, p) of components (n, q)."""
        with torch.no_grad():
            found: Floats = self.embedding(self._inputs(y)).double().numpy()
        return found

    def squared_slopes(self, y: Floats) -> Floats:
        """(p,) mean over cells ``y`` (n, q) of |grad u_k|^2: what noise of variance 1 in the components makes of u_k."""
        inputs = self._inputs(y).requires_grad_()
        u = self.embedding(inputs)
        slopes = [torch.autograd.grad(part.sum(), inputs, retain_graph=True)[0].double().numpy() for part in u.T]
        return np.array([((slope / self.scale) ** 2).sum(1).mean() for slope in slopes])

    def _inputs(self, y: Floats) -> Tensor:
        return torch.from_numpy((y - self.center) / self.scale).float()


def train_encoder(
    y: Floats,
    environment: Ints,
    pairs: Ints,
    dependent: bool,
    seed: int,
    noise: float = 0.0,
    start: Floats | None = None,
) -> Encoder:
    """The encoder of components ``y`` (n, q) of environments (n,), 0 control, that is best on held-out cells.

    ``pairs`` (p, 2) are a_k and b_k; ``noise`` is the variance of measurement in each component; the encoder starts along
    directions ``start`` (p, q), at random without.
    """
    center, deviation = y[environment == 0].mean(0), y.std(0)
    scale = np.maximum(deviation, max(FLOOR * float(deviation.max()), math.sqrt(noise)))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding = Embedding(y.shape[1], len(pairs))
    if start is not None:
        embedding.start_linear(torch.from_numpy(start * scale).float())
    head = QuadraticHead(len(pairs), dependent)
    if start is not None:
        nn.init.zeros_(head.slope)
    x = torch.from_numpy((y - center) / scale).float()
    held = torch.randperm(len(y), generator=generator) % HELD_OUT == 0
    rows = [[torch.from_numpy(np.flatnonzero((environment == e) & (held.numpy() == side))) for e in range(int(environment.max()) + 1)] for side in (False, True)]  # fmt: skip
    drawn = [_placed([rows[0][e] for e in pairs[:, side]]) for side in (0, 1)]
    of_controls = _placed(rows[0][:1])
    modules = nn.ModuleList([embedding, head])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)

    @torch.no_grad()
    def on_held_out() -> float:
        return sum(
            float(_loss(embedding(x[rows[1][a]]), embedding(x[rows[1][b]]), head, k)) for k, (a, b) in enumerate(pairs)
        )

    best, kept = math.inf, modules.state_dict()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        embedding.requires_grad_(start is None or step >= STEPS // 10)
        k = torch.randint(len(pairs), (BATCH,), generator=generator)
        sides = [_drawn(*of_side, k, generator) for of_side in drawn]
        u = embedding(x[torch.cat(sides)])
        value = nn.functional.softplus(head(u[:BATCH], k)).mean() + nn.functional.softplus(-head(u[BATCH:], k)).mean()
        controls = embedding(x[_drawn(*of_controls, torch.zeros_like(k), generator)])
        optimizer.zero_grad()
        (value + head.penalty(controls)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % EVERY == 0 and (now := on_held_out()) < best:
            best, kept = now, {name: part.clone() for name, part in modules.state_dict().items()}
    modules.load_state_dict(kept)
    return Encoder(embedding, center, scale, best)


def _loss(lower: Tensor, upper: Tensor, head: QuadraticHead, k: int) -> Tensor:
    of = torch.full((max(len(lower), len(upper)),), k)
    soft = nn.functional.softplus
    return soft(head(lower, of[: len(lower)])).mean() + soft(-head(upper, of[: len(upper)])).mean()


def _placed(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """All rows, one list after the other, and how many each has."""
    return torch.cat(rows), torch.tensor([len(own) for own in rows])


def _drawn(rows: Tensor, sizes: Tensor, k: Tensor, generator: torch.Generator) -> Tensor:
    """A row of list k of `_placed`, for each k."""
    place = (torch.rand(len(k), generator=generator) * sizes[k]).long()
    return rows[place + (sizes.cumsum(0) - sizes)[k]]
