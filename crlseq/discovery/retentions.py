"""Hard or soft: what interventions leave of their target's input, and which edges could stand for it.

Where all interventions on k keep a share r_k of its input, all moments are those of hard interventions on other programs,

    u' = u (I - G R),    I - G' = (I - G R)^-1 (I - G),    G' = (I - G R)^-1 G (I - R),    R = diag(r),

so that a chain j -> k -> i has an edge j -> i beside it, r_k / (1 - r_k) times the product of its own two edges, with its sign.
Such edges are taken out, and retentions are free. Then cells tell soft from hard by interventions on one program that
keep different shares. Multiplying all 1 - r_c of a program changes nothing but edges, so that this is about log(1 - r_c).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from crlseq.config import InterventionKind
from crlseq.discovery.edges import NEAR_STEPS, Edges, score_absent
from crlseq.discovery.likelihood import Solution
from crlseq.discovery.misfit import misfit
from crlseq.discovery.moments import DTYPE

OTHER_KIND_STEPS, RACE_STEPS = 30, 5
SPREAD = 0.15  # standard deviation of log(1 - r) among soft interventions on a program: they take away 15% more or less
FLAT = 1e-6  # information about what the cells do not tell
SURE = 2 * math.log(20)  # twice the logarithm of odds


@dataclass(frozen=True)
class Kept:
    """Whether interventions are ``seen`` to leave a part of their target's input; else how many edges of the graph of hard
    ones could stand for such a part (``n_around``).
    """

    seen: bool
    n_around: int = 0


def kept(edges: Edges) -> Kept:
    """Soft or hard, from the graph that was selected under hard interventions.

    Soft if free retentions gain more than three standard deviations of what one parameter for each intervention on a program
    with parents gains by chance, or if one retention of all is worth more than the edges that it stands for (quasi-BIC, by the
    normal approximation about free ones). Hard edges that retentions can stand for are in doubt unless both are sure: that
    one retention of all is worse, as where other programs keep nothing, and that those of a program agree.
    """
    hard, graph, targets = edges.solution, edges.adjacency, edges.solution.targets[0]
    if not bool(graph.any()):
        return Kept(False)
    soft = _without_shortcuts(hard, shortcuts(graph))
    dispersion, cells = misfit(soft).dispersion, float(soft.model.moments.counts.sum())
    ratio = 2 * cells * float(hard.nll[0] - soft.nll[0]) / dispersion
    fed = (graph != 0).any(0)[targets]
    m, n_around = int(fed.sum()), int((hard.mask - soft.mask).sum())
    if ratio > m + 3 * math.sqrt(2 * m):
        return Kept(True)
    if not n_around:
        return Kept(False)
    x, covariance = _lost(soft, cells / dispersion, fed)
    whole = _between(torch.ones(m, 1, dtype=DTYPE))
    of_one = ratio - _square(whole @ x, whole @ covariance @ whole.T) + (n_around - 1) * math.log(cells)
    if of_one > 0:
        return Kept(True)
    crossed = soft.model.moments.crossed
    gene = torch.arange(len(targets)) if crossed is None else crossed.gene
    sure = of_one < -SURE and agreement(x, covariance, targets[fed], gene[fed]) > SURE
    return Kept(False, 0 if sure else n_around)


def shortcuts(graph: Tensor) -> Tensor:
    """Edges j -> i (p, p), bool, beside a chain j -> k -> i of the same sign, in a graph (p, p) of weights."""
    return (torch.einsum("jk,ki,ji->jki", graph, graph, graph) > 0).any(1)


def agreement(x: Tensor, covariance: Tensor, targets: Tensor, gene: Tensor) -> float:
    """Twice the log of how many times more likely m retentions are if those of one program agree than if they differ.

    ``x`` (m,) are estimates of log(1 - r) with a ``covariance`` (m, m), of interventions on ``targets`` (m,). Soft ones differ by
    normal deviations of `SPREAD` between the genes ``gene`` (m,); means of programs, which edges may take, tell nothing.
    """
    within, same = _between(one_hot(targets).to(DTYPE)), (gene[:, None] == gene).to(DTYPE)
    x, covariance = within @ x, within @ covariance @ within.T
    wider = covariance + SPREAD**2 * within @ same @ within.T
    volume = float(torch.logdet(wider) - torch.logdet(covariance))
    return volume + _square(x, wider) - _square(x, covariance)


def under(hard: Solution, kind: InterventionKind, mask: Tensor) -> Solution:
    """Another kind from a hard solution; three starts, since a learned retention and its edges can be traded."""
    model = hard.model.like(kind=kind)
    if not model.learns_retention:
        return hard.refitted(kind=kind, mask=mask, steps=OTHER_KIND_STEPS)
    named = model.unpack(model.adopt(hard))
    starts = [
        model.pack({**named, "G": named["G"] * shrink, "retention": torch.full((1, model.k), level, dtype=DTYPE)})
        for level, shrink in ((-1.5, 1.0), (0.0, 1.0), (1.5, 0.5))
    ]
    raced = model.solve(torch.cat(starts), hard.targets.expand(3, -1), mask.expand(3, -1, -1), RACE_STEPS).best()
    return raced.refitted(steps=OTHER_KIND_STEPS)


def _without_shortcuts(hard: Solution, around: Tensor) -> Solution:
    """Free retentions in place of the edges ``around`` (p, p) programs; those come back that are worth their price beside them."""
    soft = under(hard, "soft", hard.mask * ~around)
    price = math.log(float(soft.model.moments.counts.sum())) * misfit(soft).dispersion
    while True:
        absent, worth = score_absent(soft)
        worth = worth * around.flatten()[absent]
        if not len(worth) or float(worth.max()) <= price:
            return soft
        mask = soft.mask.clone()
        mask.view(-1)[absent[worth.argmax()]] = 1
        soft = soft.refitted(mask=mask, steps=NEAR_STEPS)


def _lost(soft: Solution, cells: float, some: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 - r) (m,) of ``some`` (K,) perturbations, and its covariance (m, m) by the information of so many cells.

    Information about a retention near 0 is small in its parameter, the logit, and not in log(1 - r), whose slope is -r.
    """
    model = soft.model
    r = model.retention(model.unpack(soft.theta)["retention"])[0]
    ridge = model.ridge()
    _, gradient, information = model.information(soft.theta, soft.targets, soft.mask)
    slope = torch.ones(model.size, dtype=DTYPE)
    place = torch.arange(model.size)[model.at["retention"]]
    slope[place] = -1 / r
    gradient = (gradient[0] - ridge * soft.theta[0] * model.free(soft.mask)[0]) * slope * cells
    information = (information[0] - torch.diag(ridge)) * slope * slope[:, None] * cells
    information.diagonal().add_(FLAT)
    wanted = torch.zeros(model.size, int(some.sum()), dtype=DTYPE)
    wanted[place[some], torch.arange(wanted.shape[1])] = 1
    inverse = torch.linalg.solve(information, wanted)
    covariance = wanted.T @ inverse
    return torch.log1p(-r[some]) - gradient @ inverse, (covariance + covariance.T) / 2


def _between(groups: Tensor) -> Tensor:
    """Orthonormal contrasts (d, m) within groups (m, g) of ones and zeros."""
    values, vectors = torch.linalg.eigh(groups @ torch.linalg.pinv(groups))
    contrasts: Tensor = vectors[:, values < 0.5].T
    return contrasts


def _square(x: Tensor, covariance: Tensor) -> float:
    """Chi-square of ``x`` (d,)."""
    return float(x @ torch.linalg.solve(covariance, x))
