"""Networks trained together with a structural model of the latents, where perturbations' targets are given.

Adam with a rate that rises over the first steps and falls to nothing by a cosine, on batches drawn with replacement; one such cycle
of a known length, or several until cells that are not learned gain no more.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from crlseq.config import InterventionKind
from crlseq.discovery.likelihood import LinearModel, Solution, allowed_edges
from crlseq.discovery.moments import environment_moments
from crlseq.model.scm import LatentSCM, Mechanism
from crlseq.threads import counted

BATCH, RISE, GRADIENT_NORM = 512, 100, 10.0
CYCLES = (500, 1000, 2000, 4000)  # steps
GAIN = 0.01  # of a judging cell's loss, and more than `SURE` standard errors, for which a cycle is kept and a longer one follows
SURE = 2.0
CHUNK = 100_000  # cells whose loss is computed at a time
FIT_STEPS = 100  # of the likelihood


def descend(
    loss: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    cells: Tensor,
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Minimise the mean of ``loss`` of cells, which takes some of the indices ``cells`` (n,)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    for step in counted(range(steps), steps):
        now = rate * min(1.0, (step + 1) / RISE) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = now
        value = loss(cells[torch.randint(len(cells), (BATCH,), generator=generator)]).mean()
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        optimizer.step()


def descend_in_cycles(
    loss: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter], judging: Tensor, rate: float, seed: int
) -> int:
    """Minimise ``loss`` in cycles, each twice as long as the one before, while ``judging`` (n,) bool cells gain; returns how many did.

    The rate rises again at the beginning of each (Loshchilov and Hutter 2017, arXiv 1608.03983). Cells that judge are not learned.
    """
    learning = (~judging).nonzero()[:, 0]
    best = loss_of(loss, judging)
    for i, steps in enumerate(CYCLES):
        kept = [weight.detach().clone() for weight in parameters]
        descend(loss, parameters, learning, steps, rate, seed + i)
        now = loss_of(loss, judging)
        gain, best = best - now, now
        if not gain.mean() >= max(GAIN, SURE * float(gain.std()) / math.sqrt(len(gain))):  # nor where it is no number
            with torch.no_grad():
                for weight, value in zip(parameters, kept, strict=True):
                    weight.copy_(value)
            return i
    return len(CYCLES)


@torch.no_grad()
def loss_of(loss: Callable[[Tensor], Tensor], cells: Tensor) -> Tensor:
    """The loss of ``cells`` (n,) bool, in float64."""
    return torch.cat([loss(part).double() for part in torch.split(cells.nonzero()[:, 0], CHUNK)])


def linear_start(values: Tensor, environment: Tensor, targets: Tensor, p: int, kind: InterventionKind) -> Solution:
    """The linear model by maximum likelihood, with targets (K,) of environments 1 to K and programs in causal order."""
    model = LinearModel(environment_moments(values, environment), p, kind)
    allowed = allowed_edges(p, kind) * torch.ones(p, p).triu(1)
    return model.solve(model.start(targets[None]), targets[None], allowed, steps=FIT_STEPS).best()


@torch.no_grad()
def structural_model(solution: Solution, equations: str) -> LatentSCM:
    """A structural model that starts as a linear solution, whose latents are in causal order."""
    named, model = solution.model.unpack(solution.theta), solution.model
    scm = LatentSCM(model.p, model.k, model.kind, equations)
    scm.graph.copy_(solution.adjacency())
    scm.shift.copy_(named["shift"][0])
    scm.log_scale.copy_(model.log_scale(named["scale"])[0])
    if scm.kind.retention is None:
        scm.retention_logit.copy_(model.retention(named["retention"])[0].clamp(0.01, 0.99).logit())
    return scm


def of_environments(scm: LatentSCM, targets: Tensor) -> Mechanism:
    """Mechanisms, of fields (K + 1, p), of control cells and of perturbations with ``targets`` (K,)."""
    conditions = torch.arange(-1, len(targets))[:, None]
    weights = one_hot(targets[conditions.clamp_min(0)], len(scm.graph)).to(scm.graph.dtype)
    return scm.mechanism(conditions, weights)


def of_cells(mechanism: Mechanism, environment: Tensor) -> Mechanism:
    """Those of each of n cells, fields (n, p), as a batch of one cell."""
    return Mechanism(mechanism.retention[environment], mechanism.log_scale[environment], mechanism.shift[environment])
