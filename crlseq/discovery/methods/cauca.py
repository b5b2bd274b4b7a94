"""Causal component analysis: a normalizing flow where targets and a causal order of the programs are known.

    maximise over flow h, graph G, interventions c    sum_cells [ log p_c(h(y); G) + log|det h'(y)| ]

h is a flow (`crlseq.model.unmixing_flow`) of as many whitened components as there are programs; p_c is the density of a linear
structural model (`crlseq.model.scm`) in which each program may depend on all before it. The flow is tried from two starts,
the linear model of highest likelihood and the standardised components, and is trained on from the one of higher likelihood, until
validation cells gain no more. An edge is a slope, of programs of unit noise, above `MIN_EFFECT` and three standard errors, in
cells in which nobody perturbs its end.

Source: Liang et al. 2023, "Causal component analysis", NeurIPS, arXiv 2305.17225.
Assumes: as many components as programs hold the programs; every perturbation is a hard intervention on the program that the
table of targets (``--targets``) gives, every program has one; programs in the table come in causal order.
Identified: each program up to a function of its own, under hard interventions; under others programs stay mixed with those
upstream. The order is not found but given; edges along it are identified with the programs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from crlseq.config import InterventionKind
from crlseq.data import splits
from crlseq.discovery.causal_training import (
    descend,
    descend_in_cycles,
    linear_start,
    loss_of,
    of_cells,
    of_environments,
    structural_model,
)
from crlseq.discovery.discover import find_components
from crlseq.discovery.edges import MIN_EFFECT
from crlseq.discovery.methods import Programs
from crlseq.discovery.network_result import network_result
from crlseq.discovery.task import Start, Task
from crlseq.discovery.verdict import Answer, judge_cauca
from crlseq.errors import InputError
from crlseq.model.scm import LatentSCM
from crlseq.model.unmixing_flow import UnmixingFlow

AT_MOST: Answer = "identified"
REASON = "those of the table of targets"
TRIAL, RATE = 200, 1e-2  # steps from each start, and of Adam
SURE = 3.0  # standard errors of an edge


@dataclass(frozen=True)
class Fitted:
    """A flow and the structural model of its latents."""

    flow: UnmixingFlow
    scm: LatentSCM


def find(task: Task) -> Programs:
    """The programs of the table, and the edges between them."""
    assert task.targets is not None
    programs = list(dict.fromkeys(task.targets.values()))
    p, asked, acting = len(programs), task.config.n_latents, int((task.effect > 0).sum())
    if asked not in ("auto", p):
        what = f"{asked} programs were asked for, but only {acting} perturbations have a detectable effect."
        if asked <= acting:  # type: ignore[operator]
            what = f"{asked} programs were asked for, and the table of targets has {p}."
        raise InputError(what, "Leave out --n-latents.")
    start = find_components(replace(task, config=task.config.model_copy(update={"n_latents": p})), REASON)
    chosen, targets = known_targets(task, start, programs)
    environment = task.environments(chosen)
    fitted = task.cells_of(splits.TRAIN, environment) | task.cells_of(splits.VALIDATION, environment)
    judging = task.cells_of(splits.VALIDATION, environment)[fitted]
    y, own = start.cells.values[fitted, :p].float(), environment[fitted]
    kind: InterventionKind = task.kind or "hard"
    task.stage("training the flow")
    found = fit_flow(y, own, targets, judging, kind, task.seed)
    with torch.no_grad():
        u = found.flow(y)[0].double()
    graph, left = edges_of(u, own, targets, p), untouched(found.scm, u, own, targets)
    verdict = judge_cauca(left, int((graph != 0).sum()), kind, task.kind == "hard")
    with torch.no_grad():
        found.scm.graph.copy_(graph * verdict.grants_graph)
        latents = found.flow(start.cells.values[task.fitted_cells(), :p].float())[0]
    return Programs(p, REASON, network_result(task, start, latents, found.scm, chosen, targets, verdict))


def known_targets(task: Task, start: Start, programs: list[str]) -> tuple[np.ndarray, Tensor]:
    """The perturbations (m,) that are fitted, those of the table with an effect, and their programs (m,)."""
    assert task.targets is not None
    names, place = task.data.perturbation_names, {name: i for i, name in enumerate(programs)}
    chosen = np.array([k for k in start.environments if names[k] in task.targets], dtype=np.int64)
    targets = torch.tensor([place[task.targets[names[k]]] for k in chosen], dtype=torch.int64)
    for i, name in enumerate(programs):
        if i not in targets.tolist():
            what = f"No perturbation of the program {name!r} has a detectable effect."
            hint = f"Names of perturbations are those of the screen, such as {names[0]!r}; leave out programs without an effect."
            raise InputError(what, hint)
    return chosen, targets


def fit_flow(
    y: Tensor, environment: Tensor, targets: Tensor, judging: Tensor, kind: InterventionKind, seed: int
) -> Fitted:
    """Of components ``y`` (n, p) in environments (n,), 0 control and c of the perturbation with target ``targets[c - 1]``; cells
    that are ``judging`` (n,) bool choose the start and end the training.
    """
    learning = (~judging).nonzero()[:, 0]
    known, own = y[learning], environment[learning]
    linear = linear_start(known.double(), own, targets, y.shape[1], kind)
    offset = linear.model.unpack(linear.theta)["offset"][0]
    tried = []
    for i, (center, directions) in enumerate(
        [(offset, linear.directions()), (known.mean(0), torch.diag(1 / known.std(0)))]
    ):
        torch.manual_seed(seed)
        flow, scm = UnmixingFlow(center, directions), structural_model(linear, "linear")
        if i:  # nothing is known of these coordinates but means
            u = (known - center) @ directions.float()
            with torch.no_grad():
                scm.graph.zero_()
                scm.shift.copy_(torch.stack([u[own == c, k].mean() for c, k in enumerate(targets.tolist(), 1)]))
                scm.log_scale.zero_()
        loss, parameters = _training(flow, scm, y, environment, targets)
        descend(loss, parameters, learning, TRIAL, RATE, seed)
        tried.append((float(loss_of(loss, judging).mean()), Fitted(flow, scm), loss, parameters))
    _, best, loss, parameters = min(tried, key=lambda one: (math.isnan(one[0]), one[0]))
    descend_in_cycles(loss, parameters, judging, RATE, seed)
    return best


def _training(
    flow: UnmixingFlow, scm: LatentSCM, y: Tensor, environment: Tensor, targets: Tensor
) -> tuple[Callable[[Tensor], Tensor], list[Parameter]]:
    """The negative log-likelihood of cells, given as indices, and the parameters that it depends on."""

    def loss(cells: Tensor) -> Tensor:
        u, log_det = flow(y[cells])
        mechanism = of_cells(of_environments(scm, targets), environment[cells])
        density: Tensor = scm.log_density(u[:, None], mechanism)[:, 0] + log_det
        return -density

    return loss, [weight for weight in (*flow.parameters(), *scm.parameters()) if weight.requires_grad]


def edges_of(u: Tensor, environment: Tensor, targets: Tensor, p: int) -> Tensor:
    """Slopes (p, p) of each latent on those before it, by least squares in cells (n, p) in which it is no target."""
    graph = torch.zeros(p, p, dtype=torch.float64)
    of_cell = torch.cat([torch.tensor([-1]), targets])[environment]
    for k in range(1, p):
        free = u[of_cell != k]
        x = torch.cat([free[:, :k], torch.ones(len(free), 1)], 1)
        gram = torch.linalg.inv(x.T @ x)
        slope = gram @ (x.T @ free[:, k])
        variance = ((free[:, k] - x @ slope) ** 2).mean()
        error = (variance * gram.diagonal()).sqrt()
        sure = (slope.abs() > SURE * error) & (slope.abs() > MIN_EFFECT)
        graph[:k, k] = (slope * sure)[:k]
    return graph


@torch.no_grad()
def untouched(scm: LatentSCM, u: Tensor, environment: Tensor, targets: Tensor) -> float:
    """Root mean square of the mean noise of latents in environments that do not target them, less what sampling gives."""
    noise = scm.abduct(u[:, None].float(), of_cells(of_environments(scm, targets), environment))[:, 0]
    square, expected = [], []
    for c, target in enumerate(targets.tolist(), 1):
        own = noise[environment == c]
        others = torch.arange(u.shape[1]) != target
        square.append(own.mean(0)[others] ** 2)
        expected.append((own.var(0) / len(own))[others])
    excess = float((torch.cat(square) - torch.cat(expected)).mean()) if u.shape[1] > 1 else 0.0
    return math.sqrt(max(excess, 0.0))
