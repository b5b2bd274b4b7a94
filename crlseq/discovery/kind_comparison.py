"""Which kind of intervention fits, and what its graph gains on held-out cells.

Four models of the same environments: shifts (any graph has the same likelihood, so that none is fitted); shifts and
noise scales without edges, which is every model whose graph the decoder can absorb; hard interventions with the
selected graph; soft ones. A graph is compared with the better one of the first two: interventions must be seen to cut
or weaken what their targets receive. What that says about the graph is for `crlseq.discovery.verdict`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.config import InterventionKind
from crlseq.discovery.edges import Edges, select_edges
from crlseq.discovery.likelihood import Solution, allowed_edges
from crlseq.discovery.misfit import misfit
from crlseq.discovery.moments import DTYPE, Moments
from crlseq.discovery.retentions import OTHER_KIND_STEPS, Kept, kept, under
from crlseq.discovery.verdict import Evidence, judge
from crlseq.model.interventions import INTERVENTIONS
from crlseq.storage.stage_cache import cached_on_disk
from crlseq.threads import counted, in_parallel

FOLD_STEPS = 8  # from the fit to all cells


@cached_on_disk()
@dataclass(frozen=True)
class KindComparison:
    """The kind that fits, and the evidence for its graph."""

    edges: Edges  # the selected graph, or mere shifts without one where the evidence does not bear it out
    held_out: dict[str, float]  # negative log-likelihood per held-out cell of each model, each cell held out once
    evidence: Evidence


def compare_kinds(
    dense: Solution, folds: list[tuple[Moments, Moments]], kind: InterventionKind | None = None, threads: int = 1
) -> KindComparison:
    """Choose between shift, hard and soft interventions, and measure what the graph gains.

    Soft or hard by the cells of the fit (`crlseq.discovery.retentions`): held-out cells are too few to see a retention of a
    half. The gain of a graph over none is summed over held-out cells, with its standard error
    over cells (`paired_error`). ``dense`` has hard interventions with a dense graph, fitted to all cells; ``folds`` are moments
    of the other cells and of the held-out ones. A given ``kind`` is taken; the evidence still comes from the data.
    """
    edges = hard = select_edges(dense)
    chosen = dense.model.kind  # among the kinds that have a graph
    plain: InterventionKind = "shift"  # among those whose graph the data leave open
    left = Kept(False)  # nothing, unless the kind is to be found
    if kind is None:
        left = kept(hard)
        chosen = "soft" if left.seen else chosen
    elif INTERVENTIONS[kind].graph == "nothing":
        plain = kind
    else:
        chosen = kind
    if chosen != dense.model.kind:
        edges = select_edges(under(dense, chosen, allowed_edges(dense.model.p, chosen)))
    models = {chosen: edges.solution, "no edges": _without_edges(hard.solution, dense.model.kind, OTHER_KIND_STEPS)}
    models[plain] = _without_edges(models["no edges"], plain, FOLD_STEPS)
    cases = [(model, *fold) for model in models.values() for fold in folds]
    values = torch.stack(list(counted(in_parallel(lambda case: _held_out(*case), cases, threads), len(cases))))
    losses = dict(zip(models, values.view(len(models), len(folds), -1).sum(2), strict=True))  # by fold
    cells = sum(float(test.counts.sum()) for _, test in folds)
    # Parameters that are worth nothing cost half a unit each on new cells; a fold that loses twice as much ran away where
    # an environment has few cells, and says no more than that: of a graph, and of the free scales that it is compared with.
    losses["no edges"] = torch.minimum(losses["no edges"], losses[plain] + dense.model.k)
    # Scales are parameters too: where interventions leave them alone, mere shifts predict better than free scales do.
    rival = min(("no edges", plain), key=lambda name: float(losses[name].sum()))
    n_edges, error = int((edges.adjacency != 0).sum()), paired_error(models[chosen], models[rival])
    own = n_edges + dense.model.k * (int(edges.solution.model.learns_retention) + int(rival == plain))
    losses[chosen] = torch.minimum(losses[chosen], losses[rival] + own)
    gained = losses[rival] - losses[chosen]
    asked = plain if plain == kind else None
    evidence = Evidence(chosen, asked, n_edges, float(gained.sum()), error, n_around=left.n_around)
    if not judge(evidence).grants_graph:
        edges = _no_edges(models[plain])
    return KindComparison(edges, {name: float(loss.sum()) / cells for name, loss in losses.items()}, evidence)


def paired_error(one: Solution, other: Solution) -> float:
    """Standard error of the difference of two models' log-likelihoods, summed over the cells that both were fitted to.

    Of a cell x it is (x - m_1)'P_1(x - m_1) / 2 - (x - m_2)'P_2(x - m_2) / 2 and constants. With A = P_1 - P_2 and
    b = P_1 (y - m_1) - P_2 (y - m_2) its variance over Gaussian cells of mean y and covariance C is
    tr(A C A C) / 2 + b'C b. Cells, not environments: what a graph gains comes from the few targets that have parents.
    """
    moments, sides = one.model.moments, []
    for solution in (one, other):
        mean, covariance = solution.model.environments(solution.theta, solution.targets)
        precision = torch.linalg.inv(covariance[0])
        sides.append((precision, (precision @ (moments.means - mean[0])[..., None])[..., 0]))
    (p_1, b_1), (p_2, b_2) = sides
    turned, b = (p_1 - p_2) @ moments.covariances, b_1 - b_2
    square = (turned @ turned).diagonal(dim1=1, dim2=2).sum(1)
    variance = 0.5 * square + torch.einsum("ca,cab,cb->c", b, moments.covariances, b)
    return math.sqrt(float((moments.counts * variance).sum()))


def without_graph(edges: Edges) -> Edges:
    """Mere shifts in place of a selected graph."""
    scaled = _without_edges(edges.solution, "hard", OTHER_KIND_STEPS)
    return _no_edges(_without_edges(scaled, "shift", FOLD_STEPS))


def _no_edges(solution: Solution) -> Edges:
    return Edges(solution, torch.zeros(solution.model.p, solution.model.p, dtype=DTYPE), misfit(solution).dispersion)


def _without_edges(solution: Solution, kind: InterventionKind, steps: int) -> Solution:
    return solution.refitted(kind=kind, mask=torch.zeros_like(solution.mask), steps=steps)


def _held_out(solution: Solution, train: Moments, test: Moments) -> Tensor:
    """Negative log-likelihood (C,) of each environment's cells of a fold, under a fit to the other folds."""
    fitted = solution.refitted(moments=train, steps=FOLD_STEPS)
    value = fitted.model.per_environment(fitted.theta, fitted.targets, test)[0] * test.counts
    return torch.where(test.counts > 0, value, 0.0)
