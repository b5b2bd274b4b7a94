"""What share of the cells' variance, and of the perturbations' effects, each program explains."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crlseq.analysis.programs import ROWS, encode
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.model.discrepancy_vae import DiscrepancyVAE

CONTROL_CELLS = 5000  # whose variance is explained
SOURCE_CELLS = 100  # controls whose latents carry an effect; its mean hardly depends on them
AT_ONCE = 16  # perturbations


@torch.no_grad()
def variance_explained(model: DiscrepancyVAE, data: PerturbSeqData) -> np.ndarray:
    """(p,) share of the variance of control cells that goes along with each program alone.

    With expression x and latent v_k of control cells, both minus their means in the cell's batch,

        V_k = sum_g (sum_i v_ik x_ig)^2 / (sum_i v_ik^2 * sum_g sum_i x_ig^2),

    the R^2 of regressing all genes on v_k. Programs that are correlated share variance, so that the V_k need not add up.
    NaN for a program that no control cell moves.
    """
    controls = data.cells(0, splits.TRAIN, splits.VALIDATION)
    some = controls[np.linspace(0, len(controls) - 1, min(CONTROL_CELLS, len(controls))).astype(int)]
    v, batch = encode(model, data, some), data.batch[some]
    for b in np.unique(batch):
        v[batch == b] -= v[batch == b].mean(0)
    product, total = np.zeros((v.shape[1], data.n_genes)), 0.0
    for b in np.unique(batch):
        own = np.flatnonzero(batch == b)
        mean = _mean(data, some[own])
        for i in range(0, len(own), ROWS):
            x = data.dense(some[own[i : i + ROWS]]) - mean
            product += v[own[i : i + ROWS]].T @ x
            total += float((x**2).sum())
    square = (v**2).sum(0) * total
    known = square > 1e-12
    explained: np.ndarray = np.where(known, (product**2).sum(1) / np.where(known, square, 1.0), np.nan)
    return explained


@torch.no_grad()
def effect_explained(model: DiscrepancyVAE, data: PerturbSeqData, target: np.ndarray) -> np.ndarray:
    """(p,) share of the effects of single perturbations that each program carries, through the DAG and the decoder.

    With m_c the mean change of the training cells of perturbation c against controls of the same batches, e_c the sum of
    its squared standard errors, d_c its change by the model through the latents alone, and D_k the perturbations whose
    target is k,

        E_k = sum_{c in D_k} (|m_c|^2 - |m_c - d_c|^2) / sum_c (|m_c|^2 - e_c),

    the denominator over all perturbations that have a target. The E_k add up to what all programs explain of the effects,
    sampling noise taken off. Negative where the model's effects are farther from the measured ones than none at all.

    Parameters
    ----------
    target
        (K,) program of each perturbation, -1 for none.

    Returns
    -------
    NaN for all where the effects do not stand out of their sampling noise.
    """
    cells = data.cells_by_condition(splits.TRAIN)
    there = {parts[0]: c for c, parts in enumerate(data.conditions) if len(parts) == 1 and len(cells[c]) > 1}
    chosen = [k for k in there if target[k] >= 0]
    batches = {int(b): _moments(data, cells[0][data.batch[cells[0]] == b]) for b in np.unique(data.batch[cells[0]])}
    batches = {b: moments for b, moments in batches.items() if moments[2] > 1} | {-1: _moments(data, cells[0])}
    explained, total = np.zeros(model.scm.graph.shape[0]), 0.0
    for i in range(0, len(chosen), AT_ONCE):
        part = chosen[i : i + AT_ONCE]
        for k, through in zip(part, _through(model, data, cells[0], part), strict=True):
            own = cells[there[k]]
            mean, variance, n = _moments(data, own)
            error = float(variance.sum()) / n
            names, counts = np.unique(data.batch[own], return_counts=True)
            for b, count in zip(names, counts, strict=True):  # batches without controls share those of all
                center, spread, size = batches.get(int(b), batches[-1])
                mean = mean - count / n * center
                error += float(spread.sum()) / size * (count / n) ** 2
            explained[target[k]] += float(mean @ mean) - float(((mean - through) ** 2).sum())
            total += float(mean @ mean) - error
    return explained / total if total > 0 else np.full_like(explained, np.nan)


def _through(model: DiscrepancyVAE, data: PerturbSeqData, controls: np.ndarray, chosen: list[int]) -> np.ndarray:
    """(len(chosen), G) mean change of control cells under each perturbation, through the latents."""
    some = controls[np.linspace(0, len(controls) - 1, min(SOURCE_CELLS, len(controls))).astype(int)]
    weight = model.encoder.hidden.weight
    z: Tensor = model.encoder(torch.from_numpy(data.dense(some)).to(weight.device, weight.dtype))[0]
    index = torch.tensor(chosen, device=weight.device)[:, None]
    moved = model.scm(z.expand(len(chosen), -1, -1), model.scm.mechanism(index, model.target_weights(index)))
    change = model.decoder(moved).mean(1) - model.decoder(model.scm(z)).mean(0)
    return np.asarray(change.cpu().double().numpy())


def _mean(data: PerturbSeqData, cells: np.ndarray) -> np.ndarray:
    parts = [data.dense(cells[i : i + ROWS]).sum(0, dtype=float) for i in range(0, len(cells), ROWS)]
    return np.asarray(np.sum(parts, axis=0) / len(cells))


def _moments(data: PerturbSeqData, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and unbiased variance (G,) of cells, and their number."""
    mean, n = _mean(data, cells), len(cells)
    parts = [((data.dense(cells[i : i + ROWS]) - mean) ** 2).sum(0) for i in range(0, n, ROWS)]
    return mean, np.asarray(np.sum(parts, axis=0) / max(n - 1, 1)), n
