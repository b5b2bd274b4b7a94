"""Where an encoder starts that reads gene sets: activities of the sets, and latents read out of them by ridge regression.

The activity of a set is the combination of its genes that goes along most with the latents that the likelihood found:
with standardised genes x_s of the set and latents z, the direction w of unit length that maximises |Cov(w x_s, z)| over
all latents together, the first step of partial least squares (Wold 1975). Latents are then regressed on the activities of
all sets at once,

    z_k = sum_s B_sk h_s + b_k,     |B_k|^2 penalised, the penalty chosen by generalised cross-validation,

for sets overlap, and there may be more of them than a screen can tell apart.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import RidgeCV

from crlseq.data.dataset import PerturbSeqData
from crlseq.model.networks import Encoder, GeneSetLayer
from crlseq.model.scm import NEGATIVE_SLOPE

MAX_READ = 5_000  # cells of which the read-out is estimated
CENTER = 4.0  # standard deviations above the kink of the leaky ReLU: activities start linear in the genes
PENALTIES = np.logspace(-4, 2, 13)  # by cell


@torch.no_grad()
def start_from_sets(encoder: Encoder, data: PerturbSeqData, cells: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Write activities and read-out into `encoder`, from training cells (n,) and their exogenous noise z (n, p).

    Returns the variance (p,) of z that they leave unexplained.
    """
    layer = encoder.hidden
    assert isinstance(layer, GeneSetLayer)
    members = layer.members.cpu().numpy()
    some = np.linspace(0, len(cells) - 1, min(MAX_READ, len(cells))).astype(int)
    cells, z = cells[some], z[some]
    weight = _directions(members, data, cells, z)
    raw = np.empty((len(cells), len(members)))
    for rows, x in data.blocks(cells):
        raw[rows] = x @ weight.T
    mean, deviation = raw.mean(0), raw.std(0)
    scale = 1 / np.where(deviation > 1e-12, deviation, 1.0)
    raw = (raw - mean) * scale + CENTER
    h = np.where(raw > 0, raw, NEGATIVE_SLOPE * raw)
    ridge = RidgeCV(PENALTIES * len(h), alpha_per_target=True).fit(h - CENTER, z)
    slope = ridge.coef_.reshape(z.shape[1], -1)
    layer.free.copy_(torch.from_numpy(weight * scale[:, None]))
    layer.bias.copy_(torch.from_numpy(CENTER - mean * scale))
    encoder.mean.weight.copy_(torch.from_numpy(slope))
    encoder.mean.bias.copy_(torch.from_numpy(np.atleast_1d(ridge.intercept_) - CENTER * slope.sum(1)))
    unexplained: np.ndarray = (z - ridge.predict(h - CENTER).reshape(z.shape)).var(0)
    return unexplained


def _directions(members: np.ndarray, data: PerturbSeqData, cells: np.ndarray, z: np.ndarray) -> np.ndarray:
    """(S, G) weights of genes in the activity of each set, 0 outside of it."""
    mean, square = data.moments(cells)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    inverse = np.where(deviation > 1e-6, 1 / np.where(deviation > 1e-6, deviation, 1.0), 0.0)
    cross, centred = np.zeros((data.n_genes, z.shape[1])), z - z.mean(0)
    for rows, x in data.blocks(cells):
        cross += x.T @ centred[rows]  # centred latents sum to 0, so x need not be centred
    cross *= inverse[:, None] / len(cells)
    weight = np.zeros(members.shape)
    for own, row in zip(members, weight, strict=True):
        left = np.linalg.svd(cross[own], full_matrices=False)[0][:, 0]
        row[own] = left * inverse[own] * (1.0 if (left * np.abs(left)).sum() >= 0 else -1.0)
    return weight
