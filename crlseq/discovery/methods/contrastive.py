"""Latents by contrast: a network whose latents tell each intervention's cells from controls as a linear model would.

    log-odds of environment k against controls = g_k(f(y)), quadratic in u = f(y)

`crlseq.discovery.contrastive` has g and the objective. The network is trained from two starts, at random and along the directions of
score differences, and the one that tells held-out cells better is taken: where interventions change variances alone, a latent's
square, from which no program follows, tells them nearly as well as the latent. Edges are those that score differences show in
the latents (`crlseq.discovery.methods.score_linear`).

Source: Buchholz, Rajendran, Rosenfeld, Aragam, Schoelkopf and Ravikumar 2023, "Learning linear causal representations from
interventions under general nonlinear mixing", NeurIPS 2023. There edges are the entries of A beyond a threshold.
Assumes: equations are linear with normal noise, components are any invertible function of the programs, and each program has
exactly one perturbation, which changes more than its mean.
Identified: programs and graph under hard interventions, which have to be asked for; otherwise ancestry alone is claimed.
"""

import numpy as np
import torch

from crlseq.discovery.contrastive import Floats, Ints, train_encoder
from crlseq.discovery.factor_result import REASON, latents_result, start_with
from crlseq.discovery.methods import Programs
from crlseq.discovery.methods.score_linear import judged, leading, weights, with_errors
from crlseq.discovery.score_differences import fit_log_odds, products
from crlseq.discovery.task import Start, Task
from crlseq.discovery.verdict import Answer

AT_MOST: Answer = "identified"
EXTRA = 10  # components beyond the programs, in which a curved mixing shows
FEWEST = 20
MOST_CONTROLS = 1000  # of which the slopes of latents are averaged


def find(task: Task) -> Programs:
    """Programs and graph of as many programs as there are perturbations with an effect."""
    start = start_with(task, "contrastive")
    p, environments = start.n_latents, np.arange(start.n_latents)
    y, environment = components_of(start)
    noise = start.cells.noise or 0.0
    task.stage("training the classifier")
    straight = score_directions(y, environment, p, task.seed, noise)
    pairs = np.column_stack([np.zeros(p, dtype=np.int64), environments + 1])
    encoder = min(
        (train_encoder(y, environment, pairs, True, task.seed, noise, start) for start in (None, straight)),
        key=lambda encoder: encoder.loss,
    )
    u = encoder.latents(y)
    of_groups = products(u, environment, task.seed)
    found, error = with_errors(u, environment, of_groups, True, mixed=False)
    edges, verdict = judged(found, error, of_groups, u[environment == 0], task.kind == "hard")
    graph = torch.from_numpy(weights(u[environment == 0], edges) * verdict.grants_graph)
    target = np.full(len(task.effect), -1)
    target[start.environments] = environments
    latents = torch.from_numpy(encoder.latents(start.cells.values[task.fitted_cells(), : y.shape[1]].double().numpy()))
    known = torch.from_numpy(noise * encoder.squared_slopes(y[environment == 0][:MOST_CONTROLS]))
    return Programs(p, REASON, latents_result(task, start, latents, known, verdict, graph, target))


def score_directions(y: Floats, environment: Ints, p: int, seed: int, noise: float) -> Floats:
    """Directions (p, q) in components ``y`` (n, q) along which each perturbation changes the density most."""
    controls = y[environment == 0, :p]
    scores = fit_log_odds(y[:, :p], environment, seed, noise).gradients(controls)
    directions = np.zeros((p, y.shape[1]))
    directions[:, :p] = leading(np.swapaxes(scores, 1, 2) @ scores / len(controls), np.cov(controls.T).reshape(p, p))
    return directions


def components_of(start: Start) -> tuple[np.ndarray, np.ndarray]:
    """Components (n, q) and environments (n,) of the training cells."""
    used = start.cells.train.numpy()
    q = max(start.n_latents + EXTRA, FEWEST)
    return start.cells.values[used, :q].double().numpy(), start.cells.environment[used].numpy()
