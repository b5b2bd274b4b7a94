"""Principal components, rotated until few cells have large scores.

    maximise over rotations R    sum_j [ mean_i z_ij^4 - (mean_i z_ij^2)^2 ],    z = U R,

U (n, p) being whitened principal components of the training cells. Each perturbation acts on the factor that it shifts most,
in standard errors.

Source: Rohe and Zeng 2023, "Vintage factor analysis with varimax performs statistical inference", JRSS B 85:1037; the rotation
is that of Kaiser 1958, Psychometrika 23:187.
Assumes: components are linear in the programs, which are independent and heavy-tailed: active in few cells.
Identified: the programs, up to order and sign. It has no graph.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from crlseq.discovery.discover import find_components
from crlseq.discovery.factor_result import factor_result
from crlseq.discovery.methods import Programs
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer, judge_factors

AT_MOST: Answer = "not identified"
STEPS, TOLERANCE = 1000, 1e-8  # of the criterion, relative

Floats = NDArray[np.float64]


def find(task: Task) -> Programs:
    """Rotated components, and the perturbations that shift them."""
    start = find_components(task)
    p = start.n_latents
    values = start.cells.values[:, :p].double().numpy()
    fitted = values[start.cells.train.numpy()]
    center = fitted.mean(0)
    variance, axes = np.linalg.eigh(np.cov(fitted.T).reshape(p, p))
    whitening = axes / np.sqrt(variance)
    directions = whitening @ rotation((fitted - center) @ whitening)
    verdict = judge_factors("varimax")
    return Programs.of(factor_result(task, start, torch.from_numpy(directions), verdict))


def rotation(u: Floats) -> Floats:
    """The varimax rotation (p, p) of scores ``u`` (n, p), by fixed-point steps: R is the polar factor of the gradient."""
    n, p = u.shape
    found, before = np.eye(p), 0.0
    for _ in range(STEPS):
        z = u @ found
        gradient = u.T @ (z**3 - z * (z**2).mean(0)) / n
        left, sizes, right = np.linalg.svd(gradient)
        found, now = left @ right, float(sizes.sum())
        if now - before < TOLERANCE * now:
            break
        before = now
    return found
