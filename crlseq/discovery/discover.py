"""From cells to targets, interventions and a graph, by likelihood: the steps, in order.

1. Cells become whitened components (`crlseq.discovery.components`); the number of programs is chosen
   (`crlseq.discovery.n_latents`).
2. The Gaussian interventional likelihood (`crlseq.discovery.likelihood`) gives targets and a dense graph.
3. Edges are selected, and kinds of intervention compared on held-out cells (`crlseq.discovery.kind_comparison`).
4. Where linear equations do not describe the cells, a method may refine them (`crlseq.discovery.methods.straighten`).
5. A bootstrap measures how certain edges, ancestry, targets and programs are (`crlseq.discovery.bootstrap`); the
   evidence is judged (`crlseq.discovery.verdict`), and what is left is put in the terms of the screen
   (`crlseq.discovery.result`).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from crlseq.data import splits
from crlseq.discovery.axes import SIMILAR, alike
from crlseq.discovery.bootstrap import Stability, bootstrap
from crlseq.discovery.components import whitened_components
from crlseq.discovery.direct_edges import unconfirmed
from crlseq.discovery.edges import Edges
from crlseq.discovery.kind_comparison import KindComparison, compare_kinds, without_graph
from crlseq.discovery.likelihood import Solution, fit_linear
from crlseq.discovery.misfit import misfit
from crlseq.discovery.moments import environment_moments, fold_moments, noise_level
from crlseq.discovery.n_latents import LatentChoice, choose_n_latents
from crlseq.discovery.negative_controls import Found, ordered_shifts
from crlseq.discovery.ordering import Ordering, order_programs, with_support
from crlseq.discovery.orientation import undirected
from crlseq.discovery.propose import most_telling
from crlseq.discovery.reassign import settle_targets
from crlseq.discovery.result import Discovery, Judged, claims_of, linear_result
from crlseq.discovery.robustness import robust_pairs
from crlseq.discovery.second_targets import SecondTargets, second_targets
from crlseq.discovery.task import Cells, Start, Task
from crlseq.discovery.thresholds import DECLARED_SUPPORT
from crlseq.discovery.verdict import PairCounts, judge
from crlseq.errors import InputError
from crlseq.threads import in_parallel, on_threads

COMPONENTS = 40
FEWEST = 16  # where programs are to be counted: a mean shift of few cells shows in components that look like noise
MAX_ENVIRONMENTS = 300  # perturbations that shape the graph: those that tell most of all programs
MIN_NOISE = 0.1  # share of the measurement noise that every component has at least; more makes targets hard to reassign
RESTARTS, FOLDS, REPLICATES = 6, 5, 20
MANY_LATENTS = 20  # from here on each of those is dear, and there are fewer:
FEW_RESTARTS, FEW_FOLDS, FEW_REPLICATES = 1, 2, 0

Refined = tuple[Cells, KindComparison] | Discovery | None
Refine = Callable[[Task, Start, Cells, Solution, KindComparison], Refined]


def discover(task: Task, refine: Refine | None = None, by_changes: bool = False) -> Discovery:
    """Targets, interventions and graph of a screen, from its single perturbations with an effect.

    Where linear equations do not describe the cells, ``refine`` gives other coordinates with a comparison of models on
    them, a finished discovery, or None if it does no better. ``by_changes``: the graph is what interventions change alone.
    """
    start = find_components(task)
    p, cache = start.n_latents, task.cache
    with on_threads(1 if p < MANY_LATENTS else task.threads):
        task.stage("fitting the likelihood")
        cells = start.cells.first(p + 10 if p > 10 else 20)
        dense = cache.get("likelihood", lambda: fit_likelihood(task, cells, p))
        comparison = cache.get("kinds", lambda: compare_on(task, cells, dense, task.seed))
        if refine is not None and not misfit(dense).describes:
            refined = refine(task, start, cells, dense, comparison)
            if isinstance(refined, Discovery):
                return refined
            cells, comparison = refined or (cells, comparison)
        task.stage("ordering the programs")
        ordering, second, of_shifts = cache.get(
            "ordering", lambda: ordered(task, start, cells, comparison.edges.solution)
        )
        found = linear_result(
            task, start, cells, comparison, judged(task, cells, comparison, ordering, by_changes), ordering, second
        )
        return replace(found, of_shifts=of_shifts)


def find_components(task: Task, reason: str = "as asked") -> Start:
    """Whitened components of the cells, environments, and the number of programs."""
    asked = task.config.n_latents
    task.stage("finding the programs")
    n = COMPONENTS if asked == "auto" else max(COMPONENTS, asked + 10)
    least = FEWEST if asked == "auto" else asked
    components = partial(whitened_components, task.data, seed=task.seed, device=task.device)
    y, noise = task.cache.get("components", lambda: components(most=n, least=least))
    chosen = np.flatnonzero(task.effect > 0)
    cells = _cells_under(task, y, noise, chosen)
    if len(chosen) > MAX_ENVIRONMENTS:
        values, _, environment = cells.training_by_context()
        n_controls = 1 if cells.crossed is None else cells.crossed.n_contexts
        moments = environment_moments(values, environment, None, n_controls + len(chosen), cells.crossed)
        chosen = chosen[most_telling(moments, MAX_ENVIRONMENTS).numpy()]
        cells = _cells_under(task, y, noise, chosen)
    p, choice = task.cache.get("number", lambda: number_of_programs(task, cells, len(chosen)))
    task.note(f"{p} programs: {f'{reason}.' if choice is None else choice.reason}")
    if p + 10 > n == y.shape[1]:
        y, noise = task.cache.get("more components", lambda: components(most=p + 10, least=p))
        cells = replace(cells, values=torch.from_numpy(y), noise=noise)
    return Start(cells, chosen, p, choice)


def _cells_under(task: Task, y: np.ndarray, noise: float | None, perturbations: np.ndarray) -> Cells:
    """Cells in components (N, q), environments being controls and the perturbations."""
    environment = task.environments(perturbations)
    context = torch.from_numpy(task.data.context) if task.data.context_names else None
    train, crossed = task.cells_of(splits.TRAIN, environment), task.crossed(perturbations)
    return Cells(torch.from_numpy(y), None, environment, train, noise, crossed, context)


def number_of_programs(task: Task, cells: Cells, n_environments: int) -> tuple[int, LatentChoice | None]:
    """The number that was asked for, or one chosen; an `InputError` if perturbations are fewer."""
    asked = task.config.n_latents
    if asked == "auto":
        context = None if cells.context is None else cells.context[cells.train]
        choice = choose_n_latents(cells.values[cells.train], cells.environment[cells.train], task.seed, context)
        return min(choice.n_latents, n_environments), choice
    if asked > n_environments:
        raise InputError(
            f"{asked} programs were asked for, but only {n_environments} single perturbations have a detectable effect.",
            "Each program needs a perturbation with an effect of its own: ask for fewer programs.",
        )
    return asked, None


def fit_likelihood(task: Task, cells: Cells, p: int) -> Solution:
    """Hard interventions with a dense graph."""
    values, _, environment = cells.training_by_context()
    moments = environment_moments(values, environment, crossed=cells.crossed)
    restarts = RESTARTS if p < MANY_LATENTS else FEW_RESTARTS
    noise = noise_level(moments) if cells.noise is None else cells.noise
    floor, each = MIN_NOISE * noise, partial(in_parallel, threads=task.threads)
    return settle_targets(fit_linear(moments, p, "hard", restarts, task.seed, floor, each=each))


def compare_on(task: Task, cells: Cells, dense: Solution, seed: int) -> KindComparison:
    """Kinds of intervention compared on folds of the training cells."""
    values, variances, environment = cells.training_by_context()
    n_folds = FOLDS if dense.model.p < MANY_LATENTS else FEW_FOLDS
    generator = torch.Generator().manual_seed(seed)
    folds = fold_moments(values, environment, variances, n_folds, generator, cells.crossed)
    return compare_kinds(dense, folds, task.kind, task.threads)


def ordered(task: Task, start: Start, cells: Cells, solution: Solution) -> tuple[Ordering, SecondTargets, Found]:
    """What interventions change, by all perturbations with an effect; their second targets; and what mere shifts of
    controls would change.
    """
    targets = claims_of(task, start, cells, solution).target
    acting = np.flatnonzero(targets >= 0)
    environment = task.environments(acting)
    known = np.flatnonzero(task.cells_of(splits.TRAIN, environment) | task.cells_of(splits.VALIDATION, environment))
    known = known[np.argsort(environment[known], kind="stable")]  # in order, so that nothing is sorted again
    y, own, targets = cells.values[known].double().numpy(), environment[known].numpy(), targets[acting]
    p, guides = solution.model.p, task.data.guides
    context = task.data.context[known] if task.data.context_names else None
    directions = solution.directions().numpy()
    found = order_programs(y, own, targets, p, cells.variances is not None, directions, context)
    if p < MANY_LATENTS:  # as with the bootstrap: of 50 programs and 10,000 perturbations it takes minutes
        more = y if cells.variances is not None else start.cells.values[known].double().numpy()
        guide = None if guides is None else guides.number[known]
        found = replace(found, robust=robust_pairs(found, more, own, targets, guide, task.threads, context))
        del more
    of_shifts, x = ordered_shifts(y, own, targets, p, found, task.seed), found.exogenous(y)
    del y
    second, n = second_targets(x, own, targets), replicates(task, p)
    return with_support(found, x, own, targets, n, task.seed, task.threads, context), second, of_shifts


def judged(
    task: Task, cells: Cells, comparison: KindComparison, ordering: Ordering, by_changes: bool = False
) -> Judged:
    """The verdict on all evidence, and the edges of the likelihood that it leaves: none unless it grants them."""
    edges, gone = confirmed(comparison.edges, ordering, cells.variances is not None)
    of_graph = misfit(edges.solution)
    known = ordering.pairs.have("upstream", "likely")
    # Of more programs it takes minutes an edge.
    turned = undirected(edges, known) if len(known) <= MANY_LATENTS else np.zeros_like(known)
    left = comparison.evidence.n_edges - gone - int(turned.sum())
    n_open = 0 if task.kind == "hard" else passed_alone(edges)
    evidence = replace(
        comparison.evidence, n_edges=left, n_gone=gone, n_turned=int(turned.sum()), misfit=of_graph,
        pairs=counted(ordering), n_open=n_open, by_changes=by_changes,
    )  # fmt: skip
    verdict = judge(evidence)
    if verdict.by_likelihood:
        edges = _without(edges, torch.from_numpy(turned))
    if not verdict.by_likelihood and edges.solution.model.intervention.graph != "nothing":
        edges = without_graph(edges)
    stability = measure_support(task, cells, edges)
    if verdict.by_likelihood and stability is not None and stability.n:
        evidence = replace(evidence, support=float(stability.edge[edges.adjacency != 0].max()))
        verdict = judge(evidence)
        edges = supported(edges, stability) if verdict.by_likelihood else without_graph(edges)
    of_verdict = misfit(edges.solution) if verdict.by_likelihood else of_graph
    return edges, verdict, of_verdict.dispersion, stability


def confirmed(edges: Edges, ordering: Ordering, straightened: bool) -> tuple[Edges, int]:
    """The graph without the edges that what interventions change speaks against, and how many those are.

    Edges stay where the model describes the cells with them and does not without: many programs with one perturbation each
    show too little of single edges. Not between programs that are alike or straightened, where false edges describe cells too.
    """
    # Of programs whose mean no perturbation shifts the axes are arbitrary.
    shifted = np.asarray(np.isfinite(ordering.pairs.error).any(0))
    similar = alike(ordering.axes, SIMILAR) & np.outer(shifted, shifted)
    gone = unconfirmed(ordering.pairs, (edges.adjacency != 0).numpy(), similar, straightened)
    left = _without(edges, torch.from_numpy(gone))
    if not straightened and misfit(edges.solution).describes and not misfit(left.solution).describes:
        double = np.flatnonzero(similar.any(0))
        kept = gone.copy()
        kept[double] = kept[:, double] = False
        gone = gone & ~kept
        left = _without(edges, torch.from_numpy(gone))
    return left, int(gone.sum())


def passed_alone(edges: Edges) -> int:
    """Number of programs between others, by edges j -> k -> i, that have one perturbation alone.

    A soft intervention on k that keeps a share r of its input is a hard one on u_k - r sum_j G[j, k] u_j, with
    r G[j, k] G[k, i] more from j to i: only a second perturbation of k, which keeps another share, tells the two apart.
    One gene's in several contexts may all keep the same, and count as one.
    """
    solution, graph = edges.solution, edges.adjacency != 0
    targets, crossed = solution.targets[0], solution.model.moments.crossed
    if crossed is not None:
        targets = torch.unique(torch.stack([targets, crossed.gene]), dim=1)[0]
    count = torch.bincount(targets, minlength=len(graph))
    return int((graph.any(0) & graph.any(1) & (count == 1)).sum())


def counted(ordering: Ordering) -> PairCounts:
    """How many pairs have each status."""
    pairs = ordering.pairs
    excluded, both = pairs.have("excluded"), pairs.have("both ways")
    return PairCounts(
        upstream=int(pairs.have("upstream").sum()),
        likely=int(pairs.have("likely").sum()),
        both_ways=int((both | both.T).sum()) // 2,
        excluded=int(excluded.sum()),
        undecided=int(pairs.have("undecided").sum()),
        detectable=float(np.median(pairs.detectable[excluded])) if excluded.any() else float("inf"),
        modulated=int(pairs.modulated.any(1).sum()),
    )


def replicates(task: Task, p: int) -> int:
    """How many times the bootstrap draws the cells again."""
    n = task.config.bootstrap
    if n == "auto":
        return REPLICATES if p < MANY_LATENTS else FEW_REPLICATES
    return n


def measure_support(task: Task, cells: Cells, edges: Edges) -> Stability | None:
    """Support of the edges over bootstrap replicates."""
    n = replicates(task, edges.solution.model.p)
    if not n:
        return None
    task.stage(f"bootstrapping {n} times")
    return task.cache.get(
        "bootstrap", lambda: bootstrap(*cells.training_by_context(), edges, n, task.seed, task.threads)
    )


def supported(edges: Edges, stability: Stability) -> Edges:
    """The graph refitted without edges of little support."""
    return _without(edges, (edges.adjacency != 0) & (stability.edge < DECLARED_SUPPORT))


def _without(edges: Edges, gone: Tensor) -> Edges:
    """The graph refitted without some edges (p, p)."""
    if not bool(gone.any()):
        return edges
    solution = edges.solution.refitted(mask=edges.solution.mask * ~gone)
    return replace(edges, solution=solution, adjacency=solution.adjacency())
