"""Objective: the loss terms of one batch of cells."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from crlseq.config import ModelConfig
from crlseq.data.batches import BatchIndex
from crlseq.data.dataset import PerturbSeqData
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.expression_rows import DenseRows
from crlseq.model.losses import Kernel, anchor_term, interventional_terms, loss_terms
from crlseq.model.sparse_losses import Pairs, StepCells, sparse_loss_terms, step_cells
from crlseq.training.cell_source import CellSource, sent
from crlseq.training.warm_start import Anchor

SETS, CONTROLS = 8, 64  # padded sets have a multiple of so many cells, padded steps of so many controls

Draws = tuple[list[Tensor], Tensor | None]  # standard normal (C, B, p) of one or both sides; uniform (C, B, M)


@dataclass(frozen=True)
class StepShare:
    """Which conditions of a batch a step computes, and their shares of its conditions and of its cells."""

    own: Tensor
    of_conditions: float
    of_cells: float


@dataclass(frozen=True)
class Step:
    """A batch as tensors."""

    conditions: Tensor  # (C, M)
    mask: Tensor | None  # (C, B)
    cells: StepCells | tuple[Tensor, Tensor]  # or dense rows (C, B, G) of controls and of perturbed cells
    anchors: Tensor | None  # (2, C, B, p) what their latents are held to
    hit: Tensor | None  # (C, B) probabilities of perturbed cells to have been hit, NaN unknown
    whole: tuple[int, int]  # (C, B) of the batch
    share: StepShare | None  # what of it is computed; None for all


class Objective:
    """Loss terms of batches (`crlseq.model.losses`); with Gaussian noise the bound counts perturbed cells as well.

    A linear output layer with Gaussian noise is computed from the non-zeros (`crlseq.model.sparse_losses`); the published
    output, which is not linear, from dense rows. The encoder is held to the latents of the ``anchor``, if there is one.
    """

    def __init__(
        self, model: DiscrepancyVAE, data: PerturbSeqData, config: ModelConfig, bandwidth: float, anchor: Anchor | None
    ) -> None:
        weight = model.encoder.hidden.weight
        self.model = model
        self.kernel = Kernel(bandwidth, config.mmd_kernels, config.mmd_estimator == "unbiased")
        self.device, self.dtype = weight.device, weight.dtype
        self.source = CellSource(data, self.device, self.dtype)
        self.table = torch.from_numpy(data.perturbation_table()).to(self.device)
        self.linear_output = model.log_noise is not None and model.decoder.output_activation == "identity"
        self.anchored = anchor is not None
        # Some cells escaped, which a discovery has found.
        self.mixed = self.anchored and bool((model.penetrance < 1).any())
        if anchor is not None:
            self.anchors = torch.from_numpy(anchor.z).to(self.device, self.dtype)
            self.hit = torch.from_numpy(anchor.hit).to(self.device, self.dtype)
            self.anchor_variance = torch.from_numpy(anchor.variance).to(self.device, self.dtype)

    def of(self, model: DiscrepancyVAE) -> Objective:
        """The same of another model, which shares the screen."""
        other = copy.copy(self)
        other.model = model
        return other

    def prepare(self, batch: BatchIndex, own: np.ndarray | None = None, padded: bool = False) -> Step:
        """What a batch asks of the screen and not of the model: it can be done ahead, in another thread.

        Where it is `padded`, steps of nearly one size have one shape, with the same terms to rounding. With ``own`` conditions of the batch the terms are this part's share: those of parts that make up the batch add up
        to its terms.
        """
        share, whole, arrays = None, batch.mask.shape, dict[str, np.ndarray]()
        if own is not None:
            of_conditions, of_cells = len(own) / len(batch.mask), float(batch.mask[own].sum() / batch.mask.sum())
            # A part without conditions computes one for a share of 0: its gradients are there, as those of the others.
            own = arrays["own"] = own if len(own) else np.array([0])
            batch = BatchIndex(*(field[own] for field in (batch.condition, batch.perturbed, batch.control, batch.mask)))
        if padded:
            width = (0, -batch.mask.shape[1] % SETS)
            filled = (np.pad(x, ((0, 0), width)) for x in (batch.perturbed, batch.control, batch.mask))
            batch = BatchIndex(batch.condition, *filled)
        arrays |= {"condition": batch.condition, "cells": np.stack([batch.control, batch.perturbed])}
        if padded or not batch.mask.all():
            arrays["mask"] = batch.mask
        if self.linear_output:
            arrays |= _padded_rows(batch) if padded else _rows_of(batch)
        there = sent(self.device, **arrays)
        if own is not None:
            share = StepShare(there["own"], of_conditions, of_cells)
        mask = there["mask"].bool() if "mask" in there else None
        cells: StepCells | tuple[Tensor, Tensor]
        if self.linear_output:
            cells = self._cells(batch, arrays["index"], there, mask)
        else:
            control, perturbed = map(self.source.dense, arrays["cells"], there["cells"])
            cells = control, perturbed
        anchors = self.anchors[there["cells"]] if self.anchored else None
        hit = self.hit[there["cells"][1]] if self.anchored else None
        return Step(self.table[there["condition"]], mask, cells, anchors, hit, whole, share)

    def _cells(self, batch: BatchIndex, index: np.ndarray, there: dict[str, Tensor], mask: Tensor | None) -> StepCells:
        """Of a linear output; ``there`` are the rows of `_rows_of` or `_padded_rows`."""
        pairs, rows = Pairs(there["row"], there["order"], there["start"]), self.source.rows(index, there["index"])
        counts = tuple(batch.mask.sum(1).tolist())
        if "kept" not in there:
            return step_cells(rows, len(index) - sum(counts), pairs, counts, mask, self.kernel)
        # What fills up is 0: it adds nothing to a sum over rows, and every place of a set has a row.
        assert isinstance(rows, DenseRows)
        rows = DenseRows(rows.x.mul_(there["kept"].to(self.dtype)[:, None]))
        places = (batch.mask.shape[1],) * len(batch.mask)
        found = step_cells(rows, len(index) - sum(places), pairs, places, mask, self.kernel)
        return replace(found, n_pairs=there["mask"].sum())

    def draws(self, step: Step, generator: torch.Generator) -> Draws:
        """The noise of a step; of the whole batch, whoever computes it, and 0 where cells only fill up."""
        n_draws = 1 if self.model.log_noise is None else 2
        eps = [self._draws((*step.whole, self.model.scm.graph.shape[0]), generator) for _ in range(n_draws)]
        uniform = None
        if self.mixed:
            shape = (*step.whole, step.conditions.shape[1])
            uniform = torch.rand(shape, generator=generator, dtype=self.dtype, device=self.device)
        width = 0 if step.mask is None else step.mask.shape[1] - step.whole[1]
        if width <= 0:
            return eps, uniform
        return [pad(x, (0, 0, 0, width)) for x in eps], None if uniform is None else pad(uniform, (0, 0, 0, width))

    def __call__(self, step: Step, generator: torch.Generator) -> dict[str, Tensor]:
        """Unweighted terms, each a scalar; of a part, its share."""
        return self.terms(step, self.draws(step, generator))

    def terms(self, step: Step, draws: Draws) -> dict[str, Tensor]:
        """The terms for given noise."""
        eps, uniform = draws
        if step.share is None:
            return self._terms(step, eps, uniform)
        own = step.share.own
        terms = self._terms(step, [each[own] for each in eps], None if uniform is None else uniform[own])
        shares = {"mmd": step.share.of_conditions, "graph": step.share.of_conditions}
        return {name: shares.get(name, step.share.of_cells) * term for name, term in terms.items()}

    def _terms(self, step: Step, eps: list[Tensor], uniform: Tensor | None) -> dict[str, Tensor]:
        means: tuple[Tensor, Tensor] | None
        conditions, both, hit = step.conditions, (eps[0], eps[-1]), None
        if uniform is not None and step.hit is not None:
            hit = uniform < self.model.chance(conditions)[:, None], step.hit
        if isinstance(step.cells, StepCells):
            terms, means = sparse_loss_terms(self.model, step.cells, conditions, both, self.kernel, hit)
        else:
            terms, means = self._dense(conditions, *step.cells, step.mask, both, hit)
        if step.anchors is not None and means is not None:
            pairs, n_genes = zip(means, step.anchors, strict=True), self.source.data.n_genes
            sides = [anchor_term(m, a, self.anchor_variance, n_genes, step.mask) for m, a in pairs]
            terms["anchor"] = torch.stack(sides).mean()
        return terms

    def _dense(
        self,
        conditions: Tensor,
        control: Tensor,
        perturbed: Tensor,
        mask: Tensor | None,
        eps: tuple[Tensor, Tensor],
        hit: tuple[Tensor, Tensor] | None,
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """Terms, and with Gaussian noise the posterior means of both sides."""
        virtual_hit, perturbed_hit = (None, None) if hit is None else hit
        output = self.model(control, conditions, eps[0], virtual_hit)
        terms = loss_terms(self.model, output, control, perturbed, self.kernel, mask)
        if self.model.log_noise is None:
            return terms, None
        inference = self.model.infer(perturbed, conditions, eps[1], perturbed_hit)
        for name, value in interventional_terms(self.model, inference, perturbed, mask).items():
            terms[name] = (terms[name] + value) / 2
        return terms, (output.mean, inference.mean)

    def _draws(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)


def _padded_rows(batch: BatchIndex) -> dict[str, np.ndarray]:
    """`_rows_of` with a row for every place of a set, and as many controls as round up, of which the last is none.

    Rows that only fill up are the screen's first cell, and not `kept`.
    """
    controls, place = np.unique(batch.control[batch.mask], return_inverse=True)
    n, size = -(-(len(controls) + 1) // CONTROLS) * CONTROLS, batch.mask.size
    row = np.stack([np.full(batch.mask.shape, n - 1), n + np.arange(size).reshape(batch.mask.shape)])
    row[0][batch.mask] = place
    index, kept = np.zeros((2, n + size), dtype=np.int64)
    index[: len(controls)], kept[: len(controls)] = controls, 1
    index[n:], kept[n:] = np.where(batch.mask, batch.perturbed, 0).ravel(), batch.mask.ravel()
    start = np.concatenate([[0], np.bincount(row.ravel(), minlength=len(index)).cumsum()])
    return {"index": index, "kept": kept, "row": row, "order": np.argsort(row.ravel(), kind="stable"), "start": start}


def _rows_of(batch: BatchIndex) -> dict[str, np.ndarray]:
    """The cells of a batch as rows, each control once and then the perturbed cells: their ``index`` in the screen, and the
    fields of `Pairs`.
    """
    controls, place = np.unique(batch.control[batch.mask], return_inverse=True)
    own = np.concatenate([place, len(controls) + np.arange(len(place))])
    there = np.flatnonzero(np.stack([batch.mask, batch.mask]))
    row = np.zeros((2, *batch.mask.shape), dtype=np.int64)
    row.flat[there] = own
    index = np.concatenate([controls, batch.perturbed[batch.mask]])
    start = np.concatenate([[0], np.bincount(own, minlength=len(index)).cumsum()])
    return {"index": index, "row": row, "order": there[np.argsort(own, kind="stable")], "start": start}
