"""Programs as combinations of gene sets, for encoders that read them; and how much of the programs these see."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.genesets import GeneSets
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.networks import GeneSetLayer
from crlseq.model.scm import NEGATIVE_SLOPE
from crlseq.readout.programs import Programs, encode, mean_jacobian
from crlseq.run.tables import program_names
from crlseq.training.warm_start import WarmStart, regress

ROWS = 4096  # cells read at once, and controls whose latents show what acts on what


@torch.no_grad()
def pathway_table(model: DiscrepancyVAE, data: PerturbSeqData, programs: Programs, sets: GeneSets) -> pd.DataFrame:
    """``program, gene_set, description, weight, rank, n_genes, same_genes``; every program and set, by \\|weight\\|.

    With activities h_s of sets, z = h B + b and latents u = SCM(z), the weight of set s in program k is

        E[d u_k / d h_s] sd(h_s) / sd(u_k)       over control cells:

    standard deviations of the program by one of the activity, all other activities as they are. The sign of an activity
    is that of the greater part of its squared gene weights, so that it rises with most of its genes.
    """
    layer = model.encoder.hidden
    assert isinstance(layer, GeneSetLayer)
    controls = data.cells(0, splits.TRAIN, splits.VALIDATION)
    weight, device = layer.weight, layer.free.device
    sums, squares, n = np.zeros(len(sets.names)), np.zeros(len(sets.names)), len(controls)
    for i in range(0, n, ROWS):
        x = torch.from_numpy(data.dense(controls[i : i + ROWS])).to(device, weight.dtype)
        h = F.leaky_relu(F.linear(x, weight, layer.bias), NEGATIVE_SLOPE).double()
        sums, squares = sums + h.sum(0).cpu().numpy(), squares + h.square().sum(0).cpu().numpy()
    deviation = np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 0.0))
    u = torch.from_numpy(encode(model, data, controls[:ROWS])).to(device, weight.dtype)
    through = mean_jacobian(lambda noise: model.scm(noise).mean(0), model.scm.abduct(u).detach())  # (p, p), z -> u
    signed = (weight * weight.abs()).sum(1)
    sign = torch.where(signed < 0, -1.0, 1.0).cpu().double().numpy()
    read = model.encoder.mean.weight.detach().cpu().double().numpy()  # (p, S)
    found = through.T @ read * (deviation * sign) / programs.scale[:, None]
    about = {name: description for name, description, _ in sets.lines}
    order = np.argsort(-np.abs(found), axis=1, kind="stable")
    columns, (p, n_sets) = order.ravel(), found.shape
    names = np.array(sets.names, dtype=object)[columns]
    return pd.DataFrame({
        "program": np.repeat(program_names(p), n_sets), "gene_set": names, "description": [about[name] for name in names],
        "weight": np.take_along_axis(found, order, axis=1).ravel(), "rank": np.tile(np.arange(1, n_sets + 1), p),
        "n_genes": sets.members.sum(1)[columns], "same_genes": np.array(sets.same, dtype=object)[columns],
    })  # fmt: skip


def explained_by_sets(model: DiscrepancyVAE, data: PerturbSeqData, start: WarmStart) -> tuple[np.ndarray, np.ndarray]:
    """(p,) shares of the variance of the latents that were found, over validation cells: by the encoder, and linearly by all genes.

    1 - E (u - u')^2 / var u with u' what the encoder reads; below 0 where that is farther off than the mean. "All genes"
    is the regression on principal components, from which an encoder without sets starts.
    """
    discovery, projection = start.discovery, start.projection
    split = data.split[discovery.index]
    validation, train = split == splits.VALIDATION, split == splits.TRAIN
    slope, offset = regress(projection.scores, discovery.latents[train], discovery.index[train])
    truth = discovery.latents[validation]
    if not validation.any():
        return (np.full(truth.shape[1], np.nan),) * 2
    variance = np.maximum(truth.var(0), 1e-12)
    by_all = projection.scores[discovery.index[validation]] @ slope + offset
    by_sets = encode(model, data, discovery.index[validation])
    first, second = (1 - ((truth - read) ** 2).mean(0) / variance for read in (by_sets, by_all))
    return first, second
