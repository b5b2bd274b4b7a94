"""Which kind of intervention fits, and what that says about the graph.

Four models of the same environments: shifts (any graph has the same likelihood, so that none is fitted); shifts and
noise scales without edges, which is every model whose graph the decoder can absorb; hard interventions with the
selected graph; soft ones. The graph is identified only if held-out cells are better explained with it than
by the better one of the first two: interventions must be seen to cut or weaken what their targets receive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from crlseq.config import InterventionKind
from crlseq.discovery.edges import Edges, select_edges
from crlseq.discovery.likelihood import Solution, allowed_edges
from crlseq.discovery.misfit import Misfit, misfit
from crlseq.discovery.moments import DTYPE, Moments
from crlseq.model.interventions import INTERVENTIONS

Verdict = Literal["identified", "ancestry only", "not identified"]
DECISIVE = 2.0  # standard errors of a held-out gain
OTHER_KIND_STEPS, RACE_STEPS = 30, 5
FOLD_STEPS = 8  # from the fit to all cells


@dataclass(frozen=True)
class KindComparison:
    """The kind that fits, the graph selected under it, and why.

    ``held_out``: negative log-likelihood per held-out cell of each model; ``gain`` and ``error``: what the graph gains
    over no edges, summed over cells, each held out once, and its standard error over environments. ``misfit``: of the
    model that was judged, which is that of ``edges`` unless its graph was taken away because of it.
    """

    kind: InterventionKind
    verdict: Verdict
    reason: str
    edges: Edges
    held_out: dict[str, float]
    gain: float
    error: float
    misfit: Misfit


def compare_kinds(
    dense: Solution,
    folds: list[tuple[Moments, Moments]],
    kind: InterventionKind | None = None,
    each: Callable[..., Iterable[Any]] = map,
) -> KindComparison:
    """Choose between shift, hard and soft interventions, and whether there is a graph to tell.

    Soft over hard, which is nested in it, by the likelihood ratio over the dispersion on the cells of the fit:
    held-out cells are too few to see a retention of a half. Hard holds if the ratio stays within three standard
    deviations of what one parameter a perturbation gives by chance. A graph over none by cross-validated likelihood.

    Parameters
    ----------
    dense
        Hard interventions with a dense graph, fitted to all cells.
    folds
        Moments of the other cells and of the held-out ones, of the same environments.
    kind
        To take that kind; the verdict still comes from the data.
    each
        `map`, or what does the same in parallel.
    """
    edges = hard = select_edges(dense)
    chosen = dense.model.kind  # among the kinds that have a graph
    plain: InterventionKind = "shift"  # among those whose graph the data leave open
    if kind is None:
        chosen = "soft" if _weakened(hard.solution) else chosen
    elif INTERVENTIONS[kind].graph == "nothing":
        plain = kind
    else:
        chosen = kind
    if chosen != dense.model.kind:
        edges = select_edges(_under(dense, chosen, allowed_edges(dense.model.p, chosen)))
    models = {chosen: edges.solution, "no edges": _without_edges(hard.solution, dense.model.kind, OTHER_KIND_STEPS)}
    models[plain] = _without_edges(models["no edges"], plain, FOLD_STEPS)
    names = list(models)
    by_fold = each(lambda case: _held_out(*case), [(models[name], *fold) for name in names for fold in folds])
    values = torch.stack(list(by_fold)).view(len(names), len(folds), -1).sum(1)
    losses = dict(zip(names, values, strict=True))
    cells = sum(float(test.counts.sum()) for _, test in folds)
    # Scales are parameters too: where interventions leave them alone, mere shifts predict better than free scales do.
    rival = min(("no edges", plain), key=lambda name: float(losses[name].sum()))
    gained = losses[rival] - losses[chosen]
    gain, error = float(gained.sum()), float(gained.std() * math.sqrt(len(gained)))
    held_out = {name: float(values.sum()) / cells for name, values in losses.items()}
    decisive = gain > DECISIVE * error and bool(edges.adjacency.any())
    if decisive and plain != kind:
        verdict: Verdict = "identified" if INTERVENTIONS[chosen].graph == "edges" else "ancestry only"
        reason = INTERVENTIONS[chosen].reason.format(gain=f"{gain:.0f} ± {error:.0f}")
        return KindComparison(chosen, verdict, reason, edges, held_out, gain, error, misfit(edges.solution))
    if not bool(edges.adjacency.any()):
        reason = "No edge is worth its parameter, and mere shifts fit every graph as well as the empty one."
    elif decisive:
        reason = INTERVENTIONS[plain].reason
    else:
        reason = (
            f"Held-out cells are explained no better with edges than without ({gain:+.0f} ± {error:.0f} log-likelihood"
            " units), as with mere shifts, which every graph fits as well as the empty one."
        )
    empty = torch.zeros(dense.model.p, dense.model.p, dtype=DTYPE)
    left = misfit(models[plain])
    without = Edges(models[plain], empty, left.dispersion)
    return KindComparison(plain, "not identified", reason, without, held_out, gain, error, left)


def require_description(comparison: KindComparison) -> KindComparison:
    """The comparison, without its graph if the structural model does not describe the moments it was fitted to.

    Where it does not, what edges gain on held-out cells may come from what it misses.
    """
    if comparison.verdict == "not identified" or comparison.misfit.describes:
        return comparison
    reason = (
        f"The structural model does not describe the cells (misfit {comparison.misfit.value:.2f}, where 1 is none), so that what edges"
        f" gain on held-out cells ({comparison.gain:+.0f} ± {comparison.error:.0f} log-likelihood units) may come from"
        " what it misses."
    )
    scaled = _without_edges(comparison.edges.solution, "hard", OTHER_KIND_STEPS)
    shifts = _without_edges(scaled, "shift", FOLD_STEPS)
    empty = torch.zeros_like(comparison.edges.adjacency)
    edges = Edges(shifts, empty, misfit(shifts).dispersion)
    return replace(comparison, kind="shift", verdict="not identified", reason=reason, edges=edges)


def _weakened(hard: Solution) -> bool:
    """Whether retentions are seen, on the graph selected under hard interventions."""
    soft = _under(hard, "soft", hard.mask)
    k, cells = soft.model.k, float(soft.model.moments.counts.sum())
    ratio = 2 * cells * float(hard.nll[0] - soft.nll[0]) / misfit(soft).dispersion
    return ratio > k + 3 * math.sqrt(2 * k)


def _under(hard: Solution, kind: InterventionKind, mask: Tensor) -> Solution:
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


def _without_edges(solution: Solution, kind: InterventionKind, steps: int) -> Solution:
    return solution.refitted(kind=kind, mask=torch.zeros_like(solution.mask), steps=steps)


def _held_out(solution: Solution, train: Moments, test: Moments) -> Tensor:
    """Negative log-likelihood (C,) of each environment's cells of a fold, under a fit to the other folds."""
    fitted = solution.refitted(moments=train, steps=FOLD_STEPS)
    value = fitted.model.per_environment(fitted.theta, fitted.targets, test)[0] * test.counts
    return torch.where(test.counts > 0, value, 0.0)
