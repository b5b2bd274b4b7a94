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

from crlseq.discovery.edges import Edges, dispersion, misfit, select_edges
from crlseq.discovery.likelihood import Kind, LinearModel, Solution, allowed_edges
from crlseq.discovery.moments import DTYPE, Moments

Verdict = Literal["identified", "ancestry only", "not identified"]
DECISIVE = 2.0  # standard errors of a held-out gain
DESCRIBED, CHANCE = 1.1, 3.0  # misfit up to which the model holds, and standard deviations of chance on top
REFIT_STEPS, RACE_STEPS = 30, 5
FOLD_STEPS = 8  # from the fit to all cells


@dataclass(frozen=True)
class KindComparison:
    """The kind that fits, the graph selected under it, and why.

    ``held_out``: negative log-likelihood per held-out cell of each model; ``gain`` and ``error``: what the graph gains
    over no edges, summed over cells, each held out once, and its standard error over environments.
    """

    kind: Kind
    verdict: Verdict
    reason: str
    edges: Edges
    held_out: dict[str, float]
    gain: float
    error: float


def compare_kinds(
    dense: Solution,
    folds: list[tuple[Moments, Moments]],
    kind: Kind | None = None,
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
        ``shift``, ``hard`` or ``soft`` to take that kind; the verdict still comes from the data.
    each
        `map`, or what does the same in parallel.
    """
    hard = select_edges(dense)
    chosen: Kind = "hard"
    edges = hard
    models = {"hard": hard.solution}
    if kind == "soft" or (kind is None and _weakened(hard.solution)):
        chosen = "soft"
        edges = select_edges(_soften(dense, allowed_edges(dense.model.p, "soft")))
        models["soft"] = edges.solution
    models["no edges"] = _without_edges(hard.solution, "hard", REFIT_STEPS)
    models["shift"] = _without_edges(models["no edges"], "shift", FOLD_STEPS)
    names = list(dict.fromkeys((chosen, "no edges", "shift")))
    by_fold = each(lambda case: _held_out(*case), [(models[name], *fold) for name in names for fold in folds])
    values = torch.stack(list(by_fold)).view(len(names), len(folds), -1).sum(1)
    losses = dict(zip(names, values, strict=True))
    cells = sum(float(test.counts.sum()) for _, test in folds)
    # Scales are parameters too: where interventions leave them alone, mere shifts predict better than free scales do.
    rival = min(("no edges", "shift"), key=lambda name: float(losses[name].sum()))
    gained = losses[rival] - losses[chosen]
    gain, error = float(gained.sum()), float(gained.std() * math.sqrt(len(gained)))
    held_out = {name: float(values.sum()) / cells for name, values in losses.items()}
    decisive = gain > DECISIVE * error and bool(edges.adjacency.any())
    if decisive and kind != "shift":
        verdict: Verdict = "identified" if chosen == "hard" else "ancestry only"
        cut = "cut their targets off from" if chosen == "hard" else "weaken what their targets receive from"
        told = (
            "single edges can be told" if chosen == "hard" else "who is upstream can be told, single edges less surely"
        )
        reason = (
            f"Interventions that {cut} upstream programs explain held-out cells better than any model without edges"
            f" (by {gain:.0f} ± {error:.0f} log-likelihood units), so that {told}."
        )
        return KindComparison(chosen, verdict, reason, edges, held_out, gain, error)
    if not bool(edges.adjacency.any()):
        reason = "No edge is worth its parameter, and mere shifts fit every graph as well as the empty one."
    elif decisive:
        reason = "Shifts were asked for, and with linear equations every graph, the empty one too, fits shifts as well."
    else:
        reason = (
            f"Held-out cells are explained no better with edges than without ({gain:+.0f} ± {error:.0f} log-likelihood"
            " units), as with mere shifts, which every graph fits as well as the empty one."
        )
    empty = torch.zeros(dense.model.p, dense.model.p, dtype=DTYPE)
    shifts = Edges(models["shift"], empty, empty, dispersion(models["shift"]), hard.threshold)
    return KindComparison("shift", "not identified", reason, shifts, held_out, gain, error)


def describes(solution: Solution) -> bool:
    """Whether the structural model describes the moments that it was fitted to, but for chance."""
    excess, chance = misfit(solution)
    return excess <= DESCRIBED + CHANCE * chance


def require_description(comparison: KindComparison) -> KindComparison:
    """The comparison, without its graph if the structural model does not describe the moments it was fitted to.

    Where it does not, what edges gain on held-out cells may come from what it misses.
    """
    if comparison.verdict == "not identified" or describes(comparison.edges.solution):
        return comparison
    excess, _ = misfit(comparison.edges.solution)
    reason = (
        f"The structural model does not describe the cells (misfit {excess:.2f}, where 1 is none), so that what edges"
        f" gain on held-out cells ({comparison.gain:+.0f} ± {comparison.error:.0f} log-likelihood units) may come from"
        " what it misses."
    )
    shifts = _without_edges(_without_edges(comparison.edges.solution, "hard", REFIT_STEPS), "shift", FOLD_STEPS)
    empty = torch.zeros_like(comparison.edges.adjacency)
    edges = Edges(shifts, empty, empty, dispersion(shifts), comparison.edges.threshold)
    return replace(comparison, kind="shift", verdict="not identified", reason=reason, edges=edges)


def _weakened(hard: Solution) -> bool:
    """Whether retentions are seen, on the graph selected under hard interventions."""
    soft = _soften(hard, hard.mask)
    k, cells = soft.model.k, float(soft.model.moments.counts.sum())
    ratio = 2 * cells * float(hard.nll[0] - soft.nll[0]) / dispersion(soft)
    return ratio > k + 3 * math.sqrt(2 * k)


def _soften(hard: Solution, mask: Tensor) -> Solution:
    """Soft interventions from a hard solution; three starts, since a retention and its edges can be traded."""
    model = LinearModel(hard.model.moments, hard.model.p, "soft", hard.model.floor, hard.model.fit_noise)
    named = model.unpack(model.adopt(hard))
    starts = [
        model.pack({**named, "G": named["G"] * shrink, "retention": torch.full((1, model.k), level, dtype=DTYPE)})
        for level, shrink in ((-1.5, 1.0), (0.0, 1.0), (1.5, 0.5))
    ]
    raced = model.solve(torch.cat(starts), hard.targets.expand(3, -1), mask.expand(3, -1, -1), RACE_STEPS).best()
    return model.solve(raced.theta, raced.targets, raced.mask, REFIT_STEPS)


def _without_edges(solution: Solution, kind: Kind, steps: int) -> Solution:
    old = solution.model
    model = LinearModel(old.moments, old.p, kind, old.floor, old.fit_noise)
    start = model.adopt(solution)
    start[:, model.at["G"]] = 0
    return model.solve(start, solution.targets, allowed_edges(old.p, "shift"), steps)


def _held_out(solution: Solution, train: Moments, test: Moments) -> Tensor:
    """Negative log-likelihood (C,) of each environment's cells of a fold, under a fit to the other folds."""
    old = solution.model
    model = LinearModel(train, old.p, old.kind, old.floor, old.fit_noise)
    fitted = model.solve(solution.theta, solution.targets, solution.mask, steps=FOLD_STEPS)
    value = model.per_environment(fitted.theta, fitted.targets, test)[0] * test.counts
    return torch.where(test.counts > 0, value, 0.0)
