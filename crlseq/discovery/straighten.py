"""Straighten and refit: coordinates in which a network mixing is nearly linear, and the graph read off there.

    maximise  sum_cells E_q(v|y) [ log N(y; f(v), diag(noise)) ] - beta KL( q(v | y) || N(mu_c, S_c) )

A variational autoencoder on the whitened components ``y`` whose prior of every environment ``c`` is a Gaussian.
The prior step is exact and never a gradient step: the prior that maximises the bound is the Gaussian that fits the
aggregated posterior (means plus posterior variances) of the environment's cells. Three phases:

1. *free*: ``mu_c, S_c`` are the environment's own moments. A map that makes all environments Gaussian at once is
   fixed up to an affine map, so this straightens without believing any graph or target. ``beta`` > 1 presses.
2. *free* with ``beta = 1`` and a rate that falls to nothing: a constant rate leaves the latents noisy.
3. *causal*: ``mu_c, S_c`` are those of the linear structural model (W square, which carries the basis; no noise),
   refitted by scoring every few hundred steps from where it was; now and then from fresh targets too.
"""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crlseq.config import InterventionKind
from crlseq.discovery.device import CPU
from crlseq.discovery.likelihood import LinearModel, Solution, allowed_edges
from crlseq.discovery.moments import DTYPE, Crossed, Moments, environment_moments
from crlseq.discovery.propose import propose_targets
from crlseq.threads import counted

SHIFTED = 2.0  # mean square of shifts along a direction, in standard errors, from which perturbations shift it
BACKGROUND = 4.0  # variance over that of noise; curvature that no mean shows reaches 3, the weakest of four factors 6
WIDTH = 128
BATCH = 256
CHUNK = 100_000  # cells encoded at a time
LEARNING_RATE = 3e-3
AT_THE_END = 100  # steps whose mean loss is that of a phase
REFIT_EVERY = 200  # steps between prior steps; every FRESH-th tries new targets
FRESH = 5
SHRINK = 2  # pseudo-cells per latent that pull a free covariance to the pooled one


@dataclass(frozen=True)
class Phase:
    """Steps of training, weight of the KL term, and whether the rate falls to nothing on the way (by a cosine)."""

    steps: int
    beta: float = 1.0
    settle: bool = False


FREE = (Phase(3000, 4.0), Phase(3000, settle=True))
CAUSAL = Phase(5000, settle=True)
STEPS = sum(phase.steps for phase in (*FREE, CAUSAL))
OPERATIONS = 6 * BATCH * STEPS * 2 * WIDTH**2  # of one training, in the square layers of both networks


def without_background(y: Tensor, moments: Moments, p: int, noise: float) -> Tensor:
    """Cells (N, r) in the span of mean shifts, p <= r <= q, without background that nobody perturbs, which the programs would
    have to describe otherwise.

    ``y`` (N, q) components, ``moments`` of the training cells in them, ``noise`` their variance by measurement. Means shift
    where the ``p`` programs vary, along their bends too. Other directions in which control cells vary beyond `BACKGROUND`
    times the noise are background, and what they predict within environments is taken off. Principal axes.
    """
    pooled = moments.pooled()
    root = torch.linalg.cholesky(pooled)
    n = moments.n_controls
    shift = moments.shifts() * moments.counts[n:, None].sqrt()
    directions, size, _ = torch.linalg.svd(torch.linalg.solve_triangular(root, shift.T, upper=False))
    r = max(int((size**2 / len(shift) > SHIFTED).sum()), p)
    axes = torch.linalg.qr(root @ directions[:, :r], mode="complete")[0]
    span, rest = axes[:, :r], axes[:, r:]
    variance, turn = torch.linalg.eigh(rest.T @ moments.covariances[:n].mean(0) @ rest)
    background = rest @ turn[:, variance > BACKGROUND * noise]
    slopes = torch.linalg.solve(background.T @ pooled @ background, background.T @ pooled @ span)
    taken = span - background @ slopes
    principal: Tensor = taken @ torch.linalg.eigh(taken.T @ pooled @ taken)[1].flip(1)
    return y @ principal.to(y.dtype)


def _network(n_in: int, n_out: int, bias: Tensor) -> nn.Sequential:
    last = nn.Linear(WIDTH, n_out)
    nn.init.zeros_(last.weight)
    last.bias.data[:] = bias
    return nn.Sequential(
        nn.Linear(n_in, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2), last
    ).to(torch.float32)


class StraighteningVAE(nn.Module):
    """``v = (y - c) E + f(y)``, ``y = v W + c + g(v)``; f, g start at zero, so that training starts linear."""

    center: Tensor

    def __init__(self, y: Tensor, control: Tensor, directions: Tensor) -> None:
        super().__init__()
        p = directions.shape[1]
        center = y[control].mean(0)
        root = torch.linalg.cholesky(torch.cov(((y[control] - center) @ directions).T).reshape(p, p))
        encoder = directions @ torch.linalg.inv(root).T  # controls whitened
        v = (y - center) @ encoder
        decoder = torch.linalg.lstsq(v, y - center).solution
        noise = (y - center - v @ decoder).var(0).clamp_min(1e-3)
        self.p = p
        self.register_buffer("center", center.float())
        self.encoder, self.decoder = nn.Parameter(encoder.float()), nn.Parameter(decoder.float())
        self.f = _network(y.shape[1], 2 * p, torch.cat([torch.zeros(p), torch.full((p,), -2.0)]))
        self.g = _network(p, y.shape[1], torch.zeros(y.shape[1]))
        self.log_noise = nn.Parameter(noise.log().float())

    def encode(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance, (B, p) each."""
        h = self.f(y)
        return (y - self.center) @ self.encoder + h[:, : self.p], h[:, self.p :].clamp(-12, 3)

    def decode(self, v: Tensor) -> Tensor:
        """Components (B, q) of latents."""
        value: Tensor = v @ self.decoder + self.center + self.g(v)
        return value


class Straightener:
    """Trains one network on whitened components ``y`` (N, q), from encoder ``directions`` (q, p).

    Steps are of the `device`, and wait for nothing there; the network starts from the same weights on every device. Priors
    are fitted on the CPU.
    """

    def __init__(
        self,
        y: Tensor,
        environment: Tensor,
        directions: Tensor,
        seed: int = 0,
        device: torch.device = CPU,
        crossed: Crossed | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.p, self.environment, self.device, self.crossed = directions.shape[1], environment, device, crossed
        on_cpu = device.type == "cpu"
        self.draws = self.generator if on_cpu else torch.Generator(device).manual_seed(seed)
        control = environment < (1 if crossed is None else crossed.n_contexts)
        self.vae = StraighteningVAE(y, control, directions).to(device)
        self.y, self.of_cell = y.float().to(device), environment.to(device)
        self.optimizer = torch.optim.Adam(self.vae.parameters(), lr=LEARNING_RATE, fused=not on_cpu)
        self.solution: Solution | None = None
        self.steps = 0  # taken
        self.order, self.position = self._shuffled(), 0

    def _shuffled(self) -> Tensor:
        return torch.randperm(len(self.y), generator=self.draws, device=self.device)

    @torch.no_grad()
    def encode(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and variances (N, p), float64, on the CPU, of components (N, q)."""
        means, variances = zip(*map(self._encode, torch.split(y, CHUNK)), strict=True)
        return torch.cat(means), torch.cat(variances)

    def _encode(self, y: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.vae.encode(y.to(self.device, torch.float32))
        return mean.cpu().to(DTYPE), log_variance.cpu().to(DTYPE).exp()

    def moments(self) -> Moments:
        """Of the aggregated posterior of the training cells."""
        mean, variance = self.encode(self.y)
        return environment_moments(mean, self.environment, variance, crossed=self.crossed)

    def fit_prior(self, kind: InterventionKind, fresh: bool) -> Solution:
        """The structural model on the present latents: from where it was, and from fresh targets if that is better."""
        moments = self.moments()
        model = LinearModel(moments, self.p, kind, fit_noise=False)
        mask = allowed_edges(self.p, kind)
        found = []
        if self.solution is not None:
            found.append(self.solution.refitted(moments=moments, kind=kind, mask=mask, steps=40))
        if fresh or not found:
            targets = propose_targets(moments, self.p, 3, self.generator)
            found.append(model.solve(model.start(targets), targets, mask.expand(3, -1, -1), steps=60).best())
        self.solution = min(found, key=lambda s: float(s.nll[0]))
        return self.solution

    def train(self, phase: Phase, kind: InterventionKind | None = None) -> float:
        """Steps of a phase, with a free prior or that of a `kind` of intervention; the mean loss at its end."""
        losses: deque[Tensor] = deque(maxlen=AT_THE_END)  # read once: a number of the device is waited for
        n = len(self.y)
        for step in counted(range(phase.steps), STEPS, self.steps):
            if step % REFIT_EVERY == 0:
                prior = self._whitened(kind, fresh=step % (FRESH * REFIT_EVERY) == 0)
                mean, whiten, diagonal, offset = (part.float().to(self.device) for part in prior)
            rate = LEARNING_RATE * min(1.0, (step + 1) / 100)
            if phase.settle:
                rate *= 0.5 * (1 + math.cos(math.pi * (step + 1) / phase.steps)) + 0.01
            self.optimizer.param_groups[0]["lr"] = rate
            if self.position + BATCH > n:
                self.order, self.position = self._shuffled(), 0
            i = self.order[self.position : self.position + BATCH]
            self.position += BATCH
            y, c = self.y[i], self.of_cell[i]
            m, log_variance = self.vae.encode(y)
            eps = torch.randn(m.shape, generator=self.draws, dtype=m.dtype, device=self.device)
            v = m + eps * (0.5 * log_variance).exp()
            noise = self.vae.log_noise
            reconstruction = 0.5 * ((y - self.vae.decode(v)) ** 2 * torch.exp(-noise) + noise).sum(1)
            z = (whiten[c] @ (m - mean[c])[..., None])[..., 0]
            kl = 0.5 * (z**2 + diagonal[c] * log_variance.exp() - log_variance).sum(1) + offset[c]
            loss = (reconstruction + phase.beta * kl).mean()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.vae.parameters(), 100.0)
            self.optimizer.step()
            losses.append(loss.detach())
        self.steps += phase.steps
        return sum(torch.stack([*losses]).cpu().tolist()) / len(losses) if losses else 0.0

    def _whitened(self, kind: InterventionKind | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each environment the mean (C, p), what whitens (C, p, p), the diagonal of the precision (C, p), and half the
        logarithm of the covariance's determinant (C,).
        """
        mean, covariance = self._prior(kind, fresh)
        root = torch.linalg.cholesky(covariance)
        whiten = torch.linalg.inv(root)
        return mean, whiten, (whiten**2).sum(1), root.diagonal(dim1=1, dim2=2).log().sum(1)

    def _prior(self, kind: InterventionKind | None, fresh: bool) -> tuple[Tensor, Tensor]:
        if kind is not None:
            solution = self.fit_prior(kind, fresh)
            mean, covariance = solution.model.environments(solution.theta, solution.targets)
            return mean[0], covariance[0]
        moments = self.moments()
        n, pull = moments.counts[:, None, None], SHRINK * self.p
        return moments.means, (n * moments.covariances + pull * moments.pooled()) / (n + pull)
