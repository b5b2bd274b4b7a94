"""Virtual cells under a fitted condition, and how they compare with cells held out of the fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.mean_effects import controls_by_batch, mean_effect
from crlseq.evaluation.metrics import MMD_KERNELS, l2_distance, pearson_delta
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import Kernel, mmd_of_distances, squared_distances
from crlseq.run.columns import COLUMNS
from crlseq.threads import counted

SOURCE_CELLS = 500  # controls of a condition's batches that virtual cells are made of
COMPARED_CELLS = 250  # a side, in distances between cells; more sharpen a comparison less than they cost


@torch.no_grad()
def abducted(
    model: DiscrepancyVAE, control: np.ndarray, seed: int
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Control cells (n, G), encoded once, as they would be under perturbations (M,), filled up with -1.

    Gives (n, G) cells of which some escaped, as many as the penetrance says, and their expectations over who did.
    """
    weight = model.encoder.hidden.weight
    x = torch.from_numpy(control).to(weight.device, weight.dtype)[None]
    generator = torch.Generator(weight.device).manual_seed(seed)
    mean, variance = model.encoder(x)
    z = mean + variance.sqrt() * torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    uniform = torch.rand(len(control), generator=generator, device=mean.device)
    decoded, none = model.decoder(model.scm(z)), torch.full((1, 1), -1, device=weight.device)
    rest = x - decoded
    escaped = model.carried(decoded, rest, none)[0]  # the same whatever the perturbation

    @torch.no_grad()
    def under(perturbations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        virtual, expected = torch.empty_like(x[0]), torch.zeros_like(x[0])
        for chance, hit, own in model.mixture(torch.from_numpy(perturbations).to(weight.device), uniform):
            made = escaped
            if bool((hit >= 0).any()):
                made = model.carried(model.decoder(model.intervene(z, hit)), rest, hit)[0]
                if model.law is not None:
                    made = made + model.interaction(z, hit)[0]
            virtual[own] = made[own]
            expected += chance * made
        return virtual.cpu().numpy().astype(control.dtype), expected.cpu().numpy().astype(control.dtype)

    return under


def evaluate_held_out(model: DiscrepancyVAE, data: PerturbSeqData, seed: int) -> pd.DataFrame:
    """One row per condition: virtual cells against held-out cells (test cells; validation cells without those).

    Virtual cells are a mixture of hit and escaped ones; their mean is that of the mixture, not of a draw.

    Columns ``condition``, ``split``, ``n_cells``, ``mmd2`` (unbiased, bandwidth = median squared distance of
    the condition's cells to real controls, the same for every model), ``mmd2_no_change`` (real control cells in
    place of virtual ones), ``pearson_delta``, ``l2``, ``l2_no_change``; the last two also with the ending
    ``_training`` (the training effect of the condition itself, or the sum of its parts' where it was not fitted) and
    ``_mean`` (the mean training effect of all conditions) in place of the model. Every change is taken against the mean
    of all real control cells of the condition's batches; that of the model is what it makes of control cells less what it
    makes of the same cells without a perturbation.
    """
    tested = bool((data.split == splits.TEST).any())
    code = splits.TEST if tested else splits.VALIDATION
    controls = data.control_pool(splits.TRAIN, splits.VALIDATION, splits.TEST)
    held_out = data.cells_by_condition(code)
    table = data.perturbation_table()
    train = _training_effects(data)
    average = np.mean(list(train.values()), axis=0) if train else np.zeros(data.n_genes)
    known: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, np.ndarray, Tensor, Any]] = {}
    rows = []
    for c in counted(range(1, len(data.conditions)), len(data.conditions) - 1):
        cells = held_out[c]
        if len(cells) < 2:
            continue
        batches = tuple(np.unique(data.batch[cells]).tolist())
        if batches not in known:
            alike = controls[np.isin(data.batch[controls], batches)]
            source = alike if len(alike) >= 2 else controls  # of all batches where these have none
            mean = data.moments(source)[0]
            drawn = np.random.default_rng([seed, 6]).choice(source, min(SOURCE_CELLS, len(source)), replace=False)
            control = data.dense(np.sort(drawn))
            x = torch.from_numpy(control[_compared(len(control))])
            act = abducted(model, control, seed)
            unperturbed = act(np.array([-1]))[1].mean(0, dtype=float)
            known[batches] = control, mean, unperturbed, squared_distances(x, x).double(), act
        control, mean, unperturbed, within_control, act = known[batches]
        few = np.random.default_rng([seed, 6, c]).permutation(len(cells))[:COMPARED_CELLS]
        measured = data.dense(cells)
        virtual, expected = act(table[c])
        virtual_mean, measured_mean = (x.mean(0, dtype=float) for x in (expected, measured))
        virtual_mean += mean - unperturbed  # which controls were drawn, and how they are decoded, is no effect
        some = _compared(len(control))
        mmd2, mmd2_no_change = _discrepancies(virtual[some], control[some], within_control, measured[few])
        parts = data.conditions[c]
        trained = train[parts] if parts in train else sum(train.get((part,), 0 * average) for part in parts)
        simple = {name: mean + change for name, change in (("training", trained), ("mean", average))}
        rows.append({
            "condition": data.condition_names[c],
            "split": splits.SPLITS[code],
            "n_cells": len(cells),
            "mmd2": mmd2,
            "mmd2_no_change": mmd2_no_change,
            "pearson_delta": pearson_delta(virtual_mean, measured_mean, mean),
            "l2": l2_distance(virtual_mean, measured_mean),
            "l2_no_change": l2_distance(mean, measured_mean),
            **{f"pearson_delta_{name}": pearson_delta(x, measured_mean, mean) for name, x in simple.items()},
            **{f"l2_{name}": l2_distance(x, measured_mean) for name, x in simple.items()},
        })  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS["evaluation"]))


def _training_effects(data: PerturbSeqData) -> dict[tuple[int, ...], np.ndarray]:
    """Mean change (G,) of the training cells of every fitted condition against controls of the same batches."""
    cells = data.cells_by_condition(splits.TRAIN)
    controls = controls_by_batch(data, cells[0])
    fitted = [c for c in range(1, len(cells)) if len(cells[c]) > 1]
    # In float32: with very many conditions they are a matrix of their own.
    return {data.conditions[c]: mean_effect(data, cells[c], controls)[0].astype(np.float32) for c in fitted}


def _compared(n: int) -> np.ndarray:
    """Which of n cells are compared."""
    return np.linspace(0, n - 1, min(n, COMPARED_CELLS)).astype(int)


def _discrepancies(
    virtual: np.ndarray, control: np.ndarray, within_control: Tensor, measured: np.ndarray
) -> tuple[float, float]:
    """Unbiased MMD^2 of virtual and of control cells to measured ones; distances of real cells are taken once.

    Distances in the cells' own float32, which keeps six digits of them, kernels in float64.
    """
    v, c, m = map(torch.from_numpy, (virtual, control, measured))
    within, between = squared_distances(m, m).double(), squared_distances(c, m).double()
    pairs = [x[tuple(torch.triu_indices(len(x), len(x), offset=1))] for x in (within_control, within)]
    bandwidth = max(float(torch.cat([*pairs, between.flatten()]).median()), 1e-12)
    kernel = Kernel(bandwidth, MMD_KERNELS)
    made = squared_distances(v, v).double(), within, squared_distances(v, m).double()
    return float(mmd_of_distances(*made, kernel)), float(mmd_of_distances(within_control, within, between, kernel))
