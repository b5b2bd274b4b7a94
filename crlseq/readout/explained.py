"""What share of the cells' variance, and of the perturbations' effects, each program explains."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.mean_effects import cells_alone, controls_by_batch, mean_effect
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.readout.programs import encode

CONTROL_CELLS = 2000  # whose variance is explained
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
    product, total = np.zeros((v.shape[1], data.n_genes)), 0.0
    for b in np.unique(batch):
        own = np.flatnonzero(batch == b)
        v[own] -= v[own].mean(0)  # that sum to 0: expression need not be centred
        for rows, x in data.blocks(some[own]):
            product += (x.T @ v[own[rows]]).T
        mean, square = data.moments(some[own])
        total += len(own) * float((square - mean**2).sum())
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
    sampling noise taken off. Cells that escaped, by the model's penetrance, are counted in d_c. Negative where the model's
    effects are farther from the measured ones than none at all; NaN for all where the effects do not stand out of their
    sampling noise. ``target`` (K,): -1 for none.
    """
    cells = data.cells_by_condition(splits.TRAIN)
    there = cells_alone(data, cells)
    chosen = [k for k in there if target[k] >= 0]
    controls = controls_by_batch(data, cells[0])
    explained, total = np.zeros(model.scm.graph.shape[0]), 0.0
    some = cells[0][np.linspace(0, len(cells[0]) - 1, min(SOURCE_CELLS, len(cells[0]))).astype(int)]
    weight = model.encoder.hidden.weight
    z: Tensor = model.encoder(torch.from_numpy(data.dense(some)).to(weight.device, weight.dtype))[0]
    before = model.decoder(model.scm(z)).mean(0)
    for i in range(0, len(chosen), AT_ONCE):
        part = chosen[i : i + AT_ONCE]
        index = torch.tensor(part, device=weight.device)[:, None]
        moved = model.scm(z.expand(len(part), -1, -1), model.scm.mechanism(index, model.target_weights(index)))
        changes = model.decoder(moved).mean(1) - before
        changes = (changes * model.penetrance[part][:, None]).cpu().double().numpy()
        for k, through in zip(part, changes, strict=True):
            change, own, shared = mean_effect(data, there[k], controls)
            explained[target[k]] += float(change @ change) - float(((change - through) ** 2).sum())
            total += float(change @ change) - float((own + shared).sum())
    return explained / total if total > 0 else np.full_like(explained, np.nan)
