"""Networks trained together with a structural model of the latents, where perturbations' targets are given.

Adam with a rate that rises over the first steps and falls to nothing by a cosine, on batches drawn with replacement.
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
FIT_STEPS = 100  # of the likelihood


def descend(
    loss: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter], n: int, steps: int, rate: float, seed: int
) -> None:
    """Minimise the mean of ``loss`` of cells, given as indices (BATCH,) below ``n``."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    for step in counted(range(steps), steps):
        now = rate * min(1.0, (step + 1) / RISE) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = now
        value = loss(torch.randint(n, (BATCH,), generator=generator)).mean()
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        optimizer.step()


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
