"""What a method found that has no likelihood of its own: latents, and what perturbations do to them on average."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from crlseq.data import splits
from crlseq.discovery.discover import find_components
from crlseq.discovery.numbering import explained_by, numbered
from crlseq.discovery.result import Discovery
from crlseq.discovery.task import Start, Task
from crlseq.discovery.verdict import Verdict
from crlseq.errors import InputError

REASON = "one for each perturbation with an effect"
REASON_OF_PAIRS = "one for every two perturbations with an effect"


def start_with(task: Task, method: str, each: int = 1) -> Start:
    """Components and environments for a method that needs exactly ``each`` perturbations for a program, 1 or 2; an
    `InputError` if the screen has others.
    """
    k, asked = int((task.effect > 0).sum()), task.config.n_latents
    if asked not in ("auto", k // each) or k % each:
        needs = "one perturbation" if each == 1 else "two perturbations"
        wanted = "" if asked == "auto" else f", and {asked} programs were asked for"
        raise InputError(
            f"{asked} programs were asked for, but only {k} perturbations have a detectable effect."
            if isinstance(asked, int) and asked > k
            else f"The method {method} needs {needs} for each program: {k} have a detectable effect{wanted}.",
            "Leave out --n-latents, or take another method." if asked != "auto" else "Take another method.",
        )
    if task.data.totals is not None:
        task.note(f"The method {method} is for values, not for counts: it gets whitened components of the counts.")
    config = task.config.model_copy(update={"n_latents": k // each})
    return find_components(replace(task, config=config), REASON if each == 1 else REASON_OF_PAIRS)


def factor_result(
    task: Task,
    start: Start,
    directions: Tensor,
    verdict: Verdict,
    adjacency: Tensor | None = None,
    target: np.ndarray | None = None,
) -> Discovery:
    """Latents along ``directions`` (q, p) of the first q components; see `latents_result`."""
    u = start.cells.values[task.fitted_cells(), : len(directions)].double() @ directions
    measured = 0.0 if start.cells.noise is None else start.cells.noise
    return latents_result(task, start, u, measured * (directions**2).sum(0), verdict, adjacency, target)


def latents_result(
    task: Task,
    start: Start,
    u: Tensor,
    noise: Tensor,
    verdict: Verdict,
    adjacency: Tensor | None = None,
    target: np.ndarray | None = None,
) -> Discovery:
    """Latents ``u`` (fitted cells, p), known with variance ``noise`` (p,), in units in which the noise of their equations has
    variance 1 over control cells.

    ``adjacency`` (p, p) of the latents in their own scale, row -> column; none by default. Perturbations with an effect act on
    ``target`` (K,), -1 without a claim; by default on the latent whose noise u - u G they shift most, in standard errors.
    """
    index, p = task.fitted_cells(), u.shape[1]
    graph = torch.zeros(p, p, dtype=torch.float64) if adjacency is None else adjacency
    with_effect = np.flatnonzero(task.effect > 0)
    environment = task.environments(with_effect).numpy()
    environment[task.data.split != splits.TRAIN] = -1
    own = environment[index]
    noises = u - u @ graph
    u, noises = u - u[own == 0].mean(0), noises - noises[own == 0].mean(0)
    scale = noises[own == 0].std(0)
    u, noises, graph = u / scale, noises / scale, graph * scale[:, None] / scale
    shifts, errors = mean_shifts(noises.numpy(), own, len(with_effect))
    given = np.full(len(task.effect), -1) if target is None else target.copy()
    if target is None:
        given[with_effect] = (np.abs(shifts) / errors).argmax(1)
    acting = given[with_effect] >= 0
    shift = np.zeros(len(given))
    shift[with_effect[acting]] = shifts[acting, given[with_effect[acting]]]
    order = numbered(graph, explained_by(task, given, shift, p))
    place = np.append(torch.argsort(order).numpy(), -1)
    return Discovery(
        index=index,
        latents=u[:, order].numpy(),
        noise=(noise / scale**2)[order].numpy(),
        adjacency=graph[order][:, order].numpy(),
        intercept=np.zeros(p),
        target=place[given],
        shift=shift,
        log_scale=np.zeros(len(given)),
        retention=np.ones(len(given)),
        kind="shift",
        equations="linear",
        verdict=verdict,
        held_out={},
        gain=float("nan"),
        gain_error=float("nan"),
        misfit=float("nan"),
        environments=start.environments,
        choice=start.choice,
    )


def mean_shifts(noises: np.ndarray, environment: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean noise of each environment 1 to k less that of environment 0, and its standard error: (k, p) each."""
    sums = [noises[environment == c] for c in range(k + 1)]
    mean = np.array([own.mean(0) if len(own) else np.zeros(noises.shape[1]) for own in sums])
    square = np.array([own.var(0) / max(len(own) - 1, 1) for own in sums])
    return mean[1:] - mean[0], np.sqrt(np.maximum(square[1:] + square[0], 1e-300))
