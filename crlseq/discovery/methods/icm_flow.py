"""A variational autoencoder of components whose prior is a structural model with location-scale mechanisms.

    maximise    sum_cells E_q(u|y) [ log N(y; f(u), noise) + log p_c(u) - log q(u | y) ],    log p_c(u) = sum_k log p_c(u_k | u_pa)

p_c is the density of `crlseq.model.scm`, by equations of the kind flow (`crlseq.model.mechanisms`) or, with ``--equations``,
linear or ReLU ones: a perturbation changes the factor of its target alone. Encoder and decoder f start as the linear model of
highest likelihood, which also gives targets, kind of intervention and order; each program may depend on all before it.

Source: Komanduri et al. 2022, "SCM-VAE", IEEE Big Data; Komanduri et al. 2024, "Learning causally disentangled representations
via the principle of independent causal mechanisms" (ICM-VAE), IJCAI, arXiv 2306.01213. Their labels are measured values of the
causal variables; ours are perturbations.
Assumes: noise is Gaussian, and targets and order of the linear likelihood hold where equations bend.
Identified: nothing that is declared: the theory asks for labels of the causal variables.
"""

import torch
from torch import Tensor

from crlseq.config import InterventionKind
from crlseq.discovery.causal_training import descend, linear_start, of_cells, of_environments, structural_model
from crlseq.discovery.discover import compare_on, find_components, fit_likelihood
from crlseq.discovery.likelihood import Solution
from crlseq.discovery.methods import Programs
from crlseq.discovery.network_result import network_result
from crlseq.discovery.numbering import numbered
from crlseq.discovery.straighten import StraighteningVAE
from crlseq.discovery.task import Cells, Start, Task
from crlseq.discovery.verdict import Answer, judge_icm_flow
from crlseq.model.scm import LatentSCM

AT_MOST: Answer = "not identified"
STEPS, RATE = 2000, 3e-3
MORE = 10  # components beside one for each program
LEAST_WEIGHT = 0.1  # of an edge at the start: what multiplies a mechanism's input must not be 0


def find(task: Task) -> Programs:
    """Programs of the autoencoder, in the order of the linear likelihood."""
    return programs_of(task, *fit(task))


def fit(task: Task) -> tuple[Start, Cells, Tensor, StraighteningVAE, LatentSCM]:
    """Cells in the components that are read, targets (m,) of perturbations, autoencoder and structural model."""
    start = find_components(task)
    cells = start.cells.first(start.n_latents + MORE)
    targets, kind = order_by_likelihood(task, start, cells)
    values, _, environment = cells.training()
    equations = "flow" if task.config.equations == "auto" else task.config.equations
    task.stage("training the autoencoder")
    linear = linear_start(values, environment, targets, start.n_latents, kind)
    network, scm = fit_autoencoder(values.float(), environment, targets, linear, equations, task.seed, STEPS)
    return start, cells, targets, network, scm


def programs_of(
    task: Task, start: Start, cells: Cells, targets: Tensor, network: StraighteningVAE, scm: LatentSCM
) -> Programs:
    """What was fitted, in the terms of a screen."""
    with torch.no_grad():
        latents = network.encode(cells.values[task.fitted_cells()].float())[0]
    found = network_result(task, start, latents, scm, start.environments, targets, judge_icm_flow())
    return Programs.of(found)


def order_by_likelihood(task: Task, start: Start, cells: Cells) -> tuple[Tensor, InterventionKind]:
    """Targets (m,) by the linear likelihood, of programs numbered in the order of its graph, and the kind that it prefers."""
    p = start.n_latents
    dense = fit_likelihood(task, cells, p)
    edges = compare_on(task, cells, dense, task.seed).edges
    solution = edges.solution
    reach = torch.linalg.inv(torch.eye(p).double() - edges.adjacency.double()).abs().sum(1)
    order = numbered(edges.adjacency, reach.numpy())
    return torch.argsort(order)[solution.targets[0]], solution.model.kind


def fit_autoencoder(
    y: Tensor, environment: Tensor, targets: Tensor, linear: Solution, equations: str, seed: int, steps: int
) -> tuple[StraighteningVAE, LatentSCM]:
    """Of components ``y`` (n, q) in environments (n,), 0 control and c of the perturbation with target ``targets[c - 1]``, from
    a ``linear`` solution whose latents are in causal order.
    """
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    network = linear_autoencoder(y, environment, linear)
    scm = structural_model(linear, equations)
    if equations == "flow":
        with torch.no_grad():
            scm.graph.add_(LEAST_WEIGHT * (scm.graph.abs() < LEAST_WEIGHT))

    def loss(cells: Tensor) -> Tensor:
        mean, log_variance = network.encode(y[cells])
        u = mean + torch.randn(mean.shape, generator=draws) * (0.5 * log_variance).exp()
        error, noise = y[cells] - network.decode(u), network.log_noise
        likelihood = -0.5 * (error**2 * torch.exp(-noise) + noise).sum(1)
        mechanism = of_cells(of_environments(scm, targets), environment[cells])
        prior: Tensor = scm.log_density(u[:, None], mechanism)[:, 0]
        return -(likelihood + prior + 0.5 * log_variance.sum(1))

    parameters = [weight for weight in (*network.parameters(), *scm.parameters()) if weight.requires_grad]
    descend(loss, parameters, torch.arange(len(y)), steps, RATE, seed)
    return network, scm


@torch.no_grad()
def linear_autoencoder(y: Tensor, environment: Tensor, linear: Solution) -> StraighteningVAE:
    """An autoencoder that starts as the linear solution."""
    named, directions = linear.model.unpack(linear.theta), linear.directions()
    network = StraighteningVAE(y.double(), environment == 0, directions)
    network.center.copy_(named["offset"][0])
    network.encoder.copy_(directions)
    network.decoder.copy_(named["W"][0])
    network.log_noise.copy_((linear.model.floor + named["psi"][0].exp()).log())
    return network
