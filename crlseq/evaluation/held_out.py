"""Virtual cells under a fitted condition, and how they compare with cells held out of the fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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
from crlseq.threads import counted, in_parallel

SOURCE_CELLS = 500  # controls of a condition's batches that virtual cells are made of
COMPARED_CELLS = 250  # a side, in distances between cells; more sharpen a comparison less than they cost


@dataclass(frozen=True)
class Abducted:
    """Control cells, encoded once, as they would be under perturbations."""

    model: DiscrepancyVAE
    z: Tensor  # (1, n, p) noise, drawn from its posterior
    rest: Tensor  # (1, n, G) what the decoded cells leave over
    escaped: Tensor  # (n, G) cells that no perturbation hits
    uniform: Tensor  # (n,) draws that say which perturbations hit a cell
    dtype: np.dtype[Any]  # of the cells as they were given

    def some(self, rows: np.ndarray) -> Abducted:
        """These of the cells."""
        uniform = self.uniform[torch.from_numpy(rows)]
        return Abducted(self.model, self.z[:, rows], self.rest[:, rows], self.escaped[rows], uniform, self.dtype)

    @torch.no_grad()
    def __call__(self, perturbations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, G) cells under perturbations (M,), filled up with -1, of which some escaped, as many as the penetrance says,
        and their expectations over who did.
        """
        virtual, expected = torch.empty_like(self.escaped), torch.zeros_like(self.escaped)
        for chance, hit, own in self.model.mixture(self._rows(perturbations), self.uniform):
            made = self.escaped
            if bool((hit >= 0).any()):
                decoded = self.model.decoder(self.model.intervene(self.z, hit))
                made = self._carried(decoded, self.rest, hit)[0]
            virtual[own] = made[own]
            expected += chance * made
        return virtual.cpu().numpy().astype(self.dtype), expected.cpu().numpy().astype(self.dtype)

    @torch.no_grad()
    def mean(self, perturbations: np.ndarray) -> np.ndarray:
        """(G,) mean of the expectations, of a linear output without decoding every cell."""
        found = torch.zeros_like(self.escaped[0])
        rest = self.rest.mean(1, keepdim=True)
        for chance, hit, _ in self.model.mixture(self._rows(perturbations), self.uniform[:0]):
            decoded = self.model.decoder.mean(self.model.intervene(self.z, hit))[:, None]
            found += chance * self._carried(decoded, rest, hit)[0, 0]
        return np.asarray(found.cpu().double().numpy())

    def _rows(self, perturbations: np.ndarray) -> Tensor:
        return torch.from_numpy(perturbations).to(self.z.device)

    def _carried(self, decoded: Tensor, rest: Tensor, hit: Tensor) -> Tensor:
        made = self.model.carried(decoded, rest, hit)
        return made if self.model.law is None else made + self.model.interaction(self.z, hit)


@torch.no_grad()
def abducted(model: DiscrepancyVAE, control: np.ndarray, seed: int) -> Abducted:
    """Control cells (n, G), encoded."""
    weight = model.encoder.hidden.weight
    x = torch.from_numpy(control).to(weight.device, weight.dtype)[None]
    generator = torch.Generator(weight.device).manual_seed(seed)
    mean, variance = model.encoder(x)
    z = mean + variance.sqrt() * torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    uniform = torch.rand(len(control), generator=generator, device=mean.device)
    decoded, none = model.decoder(model.scm(z)), torch.full((1, 1), -1, device=weight.device)
    rest = x - decoded
    return Abducted(model, z, rest, model.carried(decoded, rest, none)[0], uniform, control.dtype)


class _Controls(NamedTuple):
    """Control cells of some batches that the cells of a condition are compared with."""

    mean: np.ndarray  # (G,) of all of them
    unperturbed: np.ndarray  # (G,) of those that virtual cells are made of, as the model decodes them
    cells: Tensor  # (n, G) those between which and others distances are taken, and
    within: Tensor  # (n, n) their squared distances
    act: Abducted
    virtual: Abducted  # of `cells`


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
    held_out = data.cells_by_condition(code)
    table = data.perturbation_table()
    train = _training_effects(data)
    average = np.mean(list(train.values()), axis=0) if train else np.zeros(data.n_genes)
    known: dict[tuple[int, ...], _Controls] = {}

    def controls(c: int) -> _Controls:
        batches = tuple(np.unique(data.batch[held_out[c]]).tolist())
        if batches not in known:
            known[batches] = _controls_of(model, data, batches, seed)
        return known[batches]

    def row(item: tuple[int, _Controls]) -> dict[str, Any]:
        c, them = item
        cells, parts = data.dense(held_out[c]), data.conditions[c]
        few = np.random.default_rng([seed, 6, c]).permutation(len(cells))[:COMPARED_CELLS]
        virtual = torch.from_numpy(them.virtual(table[c])[0])
        mmd2, mmd2_no_change = _discrepancies(virtual, torch.from_numpy(cells[few]), them)
        trained = train[parts] if parts in train else sum(train.get((part,), 0 * average) for part in parts)
        # Which controls were drawn, and how they are decoded, is no effect.
        changes = {"": them.act.mean(table[c]) - them.unperturbed, "_training": trained, "_mean": average}
        measured, means = cells.mean(0, dtype=float), {name: them.mean + change for name, change in changes.items()}
        return {
            "condition": data.condition_names[c],
            "split": splits.SPLITS[code],
            "n_cells": len(cells),
            "mmd2": mmd2,
            "mmd2_no_change": mmd2_no_change,
            "l2_no_change": l2_distance(them.mean, measured),
            **{f"pearson_delta{name}": pearson_delta(mean, measured, them.mean) for name, mean in means.items()},
            **{f"l2{name}": l2_distance(mean, measured) for name, mean in means.items()},
        }

    chosen = [c for c in range(1, len(data.conditions)) if len(held_out[c]) >= 2]
    rows = in_parallel(row, ((c, controls(c)) for c in chosen), torch.get_num_threads())
    return pd.DataFrame(counted(rows, len(chosen)), columns=list(COLUMNS["evaluation"]))


def _controls_of(model: DiscrepancyVAE, data: PerturbSeqData, batches: tuple[int, ...], seed: int) -> _Controls:
    """Controls of these batches; of all where they have none."""
    controls = data.control_pool(splits.TRAIN, splits.VALIDATION, splits.TEST)
    alike = controls[np.isin(data.batch[controls], batches)]
    source = alike if len(alike) >= 2 else controls
    drawn = np.random.default_rng([seed, 6]).choice(source, min(SOURCE_CELLS, len(source)), replace=False)
    cells = data.dense(np.sort(drawn))
    act, some = (
        abducted(model, cells, seed),
        np.linspace(0, len(cells) - 1, min(len(cells), COMPARED_CELLS)).astype(int),
    )
    compared = torch.from_numpy(cells[some])
    within = squared_distances(compared, compared).double()
    return _Controls(data.moments(source)[0], act.mean(np.array([-1])), compared, within, act, act.some(some))


def _training_effects(data: PerturbSeqData) -> dict[tuple[int, ...], np.ndarray]:
    """Mean change (G,) of the training cells of every fitted condition against controls of the same batches."""
    cells = data.cells_by_condition(splits.TRAIN)
    controls = controls_by_batch(data, cells[0])
    fitted = [c for c in range(1, len(cells)) if len(cells[c]) > 1]
    # In float32: with very many conditions they are a matrix of their own.
    return {data.conditions[c]: mean_effect(data, cells[c], controls)[0].astype(np.float32) for c in fitted}


def _discrepancies(virtual: Tensor, measured: Tensor, control: _Controls) -> tuple[float, float]:
    """Unbiased MMD^2 of virtual and of control cells to measured ones; distances of real cells are taken once.

    Distances in the cells' own float32, which keeps six digits of them, kernels in float64.
    """
    within, between = (squared_distances(x, measured).double() for x in (measured, control.cells))
    pairs = [x[tuple(torch.triu_indices(len(x), len(x), offset=1))] for x in (control.within, within)]
    bandwidth = max(float(torch.cat([*pairs, between.flatten()]).median()), 1e-12)
    kernel = Kernel(bandwidth, MMD_KERNELS)
    made = squared_distances(virtual, virtual).double(), within, squared_distances(virtual, measured).double()
    return float(mmd_of_distances(*made, kernel)), float(mmd_of_distances(control.within, within, between, kernel))
