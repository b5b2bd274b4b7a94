"""The linear method in coordinates that a network straightens, where cells are not described without.

    maximise over networks f, g    sum_cells E_q(v|y) [ log N(y; g(v), noise) ] - beta KL( q(v|y) || N(mean_c, covariance_c) )
    and over W, G, c of the linear method on the latents v

Tried only where mean shifts of one program leave a line, on components without background. The network is that of
`crlseq.discovery.straighten`. Where mere shifts fit best, nonlinear equations (`crlseq.discovery.nonlinear_test`) are
tried first.

Source: this project; ReLU equations after Zhang et al. 2023, arXiv 2307.06250.
Assumes: as the linear method, except that components are a network of the programs, one that makes the environments'
latents Gaussian at once.
Identified: as by the linear method on the straightened latents; under shifts with nonlinear equations who is upstream
of whom, if expression is linear in the programs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from crlseq.data import splits
from crlseq.discovery.axes import exogenous_axes, shifts_outside
from crlseq.discovery.device import device_for
from crlseq.discovery.discover import Refined, compare_on, discover
from crlseq.discovery.edges import select_edges
from crlseq.discovery.kind_comparison import KindComparison
from crlseq.discovery.likelihood import Solution
from crlseq.discovery.methods import Programs
from crlseq.discovery.misfit import misfit
from crlseq.discovery.moments import environment_moments, noise_level
from crlseq.discovery.nonlinear_test import Preference, prefers_nonlinear
from crlseq.discovery.reassign import settle_targets
from crlseq.discovery.result import nonlinear_result
from crlseq.discovery.straighten import CAUSAL, FREE, OPERATIONS, Straightener, without_background
from crlseq.discovery.task import Cells, Start, Task
from crlseq.discovery.verdict import Answer

AT_MOST: Answer = "identified"
CURVED = 1.5  # chi-square a degree of freedom of mean shifts off the programs' lines; .6 to 1.2 on straight ones
ATTEMPTS = 3  # trainings of the network where the first ones do not describe the cells


def find(task: Task) -> Programs:
    """Targets and graph, straightened where that describes the cells better."""
    return Programs.of(discover(task, refine))


def refine(task: Task, start: Start, cells: Cells, dense: Solution, linear: KindComparison) -> Refined:
    """Nonlinear equations under shifts, or straightened latents."""
    model = linear.edges.solution.model
    open_graph = model.intervention.graph == "nothing"
    possible = task.config.equations != "linear" and task.kind in (None, "shift")
    if possible and (open_graph or not misfit(linear.edges.solution).describes):
        task.stage("trying nonlinear equations")
        values, environment = start.cells.values[:, : start.n_latents].double(), cells.environment
        sides = [task.cells_of(split, environment) for split in (splits.TRAIN, splits.VALIDATION)]
        train, test = [(values[side], environment[side]) for side in sides]
        preference = task.cache.get("equations", lambda: prefers_nonlinear(train, test, seed=task.seed))
        if preference.chosen and (open_graph or _beats(preference, linear)):
            return nonlinear_result(task, start, preference)
    if not curved(cells, dense):
        return None
    task.stage("straightening the latents")
    return task.cache.get("straightened", lambda: straightened(task, start.cells, dense, linear))


def _beats(preference: Preference, linear: KindComparison) -> bool:
    """Whether nonlinear equations under shifts are better than linear ones under another kind: by more than two standard errors
    on held-out cells, and with less than half of the misfit beyond chance.
    """
    gained = linear.held_out["shift"] - min(linear.held_out.values())  # per cell, of that kind over linear shifts
    if preference.misfit is None or preference.gain - 2 * preference.error <= gained:
        return False
    return preference.misfit.value - 1 < (misfit(linear.edges.solution).value - 1) / 2


def curved(cells: Cells, solution: Solution) -> bool:
    """Whether mean shifts of one program leave a line: escaped cells and background bend none, a curved mixing does."""
    values, _, environment = cells.training()
    y, own, targets = values.numpy(), environment.numpy(), solution.targets[0].numpy()
    center, axes = exogenous_axes(y, own, targets, solution.model.p)
    return shifts_outside(y, (y - center) @ axes, own) > CURVED


def straightened(
    task: Task, components: Cells, dense: Solution, linear: KindComparison
) -> tuple[Cells, KindComparison] | None:
    """Straightened latents and the models on them; None if the structural model describes them no better. A training
    can end in a wrong partition: it is done again, from that of the lowest misfit, until the latents are described.
    """
    p, (values, _, environment) = dense.model.p, components.training_by_context()
    moments = environment_moments(values, environment, crossed=components.crossed)
    noise = noise_level(moments) if components.noise is None else components.noise
    cells = replace(components, values=without_background(components.values, moments, p, noise))
    best: tuple[Cells, KindComparison] | None = None
    targets = dense.targets[0]
    for attempt in range(ATTEMPTS):
        found = train_once(task, cells, targets, p, misfit(dense).dispersion, task.seed + attempt)
        if found is None:  # what is wrong is not the mixing
            break
        reference = linear if best is None else best[1]
        if misfit(found[1].edges.solution).dispersion < misfit(reference.edges.solution).dispersion:
            best = found
        if best is None or misfit(best[1].edges.solution).describes:
            break
        targets = best[1].edges.solution.targets[0]
    return best


def train_once(
    task: Task, components: Cells, targets: Tensor, p: int, worst: float, seed: int
) -> tuple[Cells, KindComparison] | None:
    """One training from the axes of ``targets`` (K,); None if free latents have a misfit of `worst` or more."""
    values, _, own = components.training()
    axes = exogenous_axes(values.numpy(), own.numpy(), targets.numpy(), p)[1]
    by_context, device = components.training_by_context()[2], device_for(OPERATIONS, task.device)
    network = Straightener(values, by_context, torch.from_numpy(axes), seed, device, components.crossed)

    def latents() -> Cells:
        values, variances = network.encode(components.values)
        return replace(components, values=values, variances=variances, noise=None)

    for free in FREE:
        network.train(free)
    free_fit = network.fit_prior("hard", fresh=True)
    if misfit(free_fit).dispersion >= worst:
        return None
    comparison = compare_on(task, latents(), free_fit, seed)
    kind = comparison.edges.solution.model.kind
    network.train(CAUSAL, kind)
    final = settle_targets(network.fit_prior(kind, fresh=True))
    if final.model.intervention.graph == "nothing":
        edges = replace(comparison.edges, solution=final, dispersion=misfit(final).dispersion)
        return latents(), replace(comparison, edges=edges)
    edges = select_edges(final)
    evidence = replace(comparison.evidence, n_edges=int((edges.adjacency != 0).sum()))
    return latents(), replace(comparison, edges=edges, evidence=evidence)
