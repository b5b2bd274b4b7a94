"""Objective: the loss terms of one batch of cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from crlseq.config import ModelConfig
from crlseq.data import splits
from crlseq.data.batches import BatchIndex
from crlseq.data.dataset import PerturbSeqData
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.factored import StepCells, factored_terms
from crlseq.model.losses import anchor_term, interventional_terms, loss_terms
from crlseq.model.rows import DenseRows, Rows, SparseRows
from crlseq.training.warm_start import Anchor

NORM_ROWS = 8192  # cells whose squared norms are taken at once


class CellSource:
    """Cells of the screen as tensors on the device: sparse or dense as they are stored; there for good if they fit.

    On CUDA the whole screen lies on the device when it takes at most half of the free memory; else cells are sliced
    on the CPU and sent.
    """

    def __init__(self, data: PerturbSeqData, device: torch.device, dtype: torch.dtype) -> None:
        self.data, self.device, self.dtype = data, device, dtype
        self.resident: tuple[Tensor, ...] | None = None
        x = data.x
        if device.type == "cuda":
            size = x.size * torch.finfo(dtype).bits // 8 if isinstance(x, np.ndarray) else 12 * x.nnz
            if size < 0.5 * torch.cuda.mem_get_info(device)[0]:
                self.resident = self._sent(x)

    def dense(self, index: np.ndarray) -> Tensor:
        """(...) cell indices to (..., G)."""
        rows = torch.from_numpy(self.data.dense(index.ravel())).to(self.device, self.dtype)
        return rows.reshape(*index.shape, -1)

    def rows(self, index: np.ndarray) -> Rows:
        """(N,) cell indices to their rows as they are stored."""
        if self.resident is None:
            chosen = self.data.x[index]
            if self.device.type == "cpu" and not isinstance(chosen, np.ndarray):
                by_gene = chosen.tocsc()
                return SparseRows(*self._sent(chosen), *self._sent(by_gene))
            return self._rows(*self._sent(chosen))
        at = torch.from_numpy(index).to(self.device)
        if len(self.resident) == 1:
            return DenseRows(self.resident[0][at])
        start, gene, value = self.resident
        first, counts = start[at].long(), (start[at + 1] - start[at]).long()
        own = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        entry = torch.arange(int(own[-1]), device=self.device) + torch.repeat_interleave(first - own[:-1], counts)
        return self._rows(own.to(gene.dtype), gene[entry], value[entry])

    def _sent(self, x: Any) -> tuple[Tensor, ...]:
        if isinstance(x, np.ndarray):
            return (torch.from_numpy(x).to(self.device, self.dtype),)
        start, gene, value = map(torch.from_numpy, (x.indptr, x.indices, x.data))
        return start.to(self.device, gene.dtype), gene.to(self.device), value.to(self.device, self.dtype)

    def _rows(self, *parts: Tensor) -> Rows:
        if len(parts) == 1:
            return DenseRows(parts[0])
        start, gene, value = parts
        return SparseRows.from_csr(start, gene, value, self.data.n_genes)


class Objective:
    """Loss terms of batches (`crlseq.model.losses`); with Gaussian noise the bound counts perturbed cells as well.

    A linear output layer with Gaussian noise is computed from the non-zeros (`crlseq.model.factored`); the published
    output, which is not linear, from dense rows.

    Parameters
    ----------
    anchor
        Latents that the encoder is held to; None for none.
    """

    def __init__(
        self, model: DiscrepancyVAE, data: PerturbSeqData, config: ModelConfig, bandwidth: float, anchor: Anchor | None
    ) -> None:
        weight = model.encoder.hidden.weight
        self.model, self.config, self.bandwidth = model, config, bandwidth
        self.device, self.dtype = weight.device, weight.dtype
        self.source = CellSource(data, self.device, self.dtype)
        self.table = torch.from_numpy(data.perturbation_table()).to(self.device)
        self.factored = model.log_noise is not None and model.decoder.output_activation == "identity"
        if self.factored:
            norms, center = map(torch.from_numpy, _norms_and_center(data))
            self.norms, self.center = norms.to(self.device), center.to(self.device, self.dtype)
        self.anchored = anchor is not None
        if anchor is not None:
            self.anchors = torch.from_numpy(anchor.z).to(self.device, self.dtype)
            self.anchor_variance = torch.from_numpy(anchor.variance).to(self.device, self.dtype)

    def __call__(
        self, batch: BatchIndex, generator: torch.Generator, own: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """Unweighted terms, each a scalar.

        Parameters
        ----------
        own
            Conditions of the batch to compute; None for all. The terms are then this part's share of the batch's:
            those of parts that make up the batch add up to its terms. Noise is drawn for the whole batch, so that it
            does not depend on the division.
        """
        n_draws, shape = 1 if self.model.log_noise is None else 2, (*batch.mask.shape, self.model.scm.graph.shape[0])
        eps = [self._draws(shape, generator) for _ in range(n_draws)]
        of_conditions = of_cells = 1.0
        if own is not None:
            of_conditions, of_cells = len(own) / len(batch.mask), float(batch.mask[own].sum() / batch.mask.sum())
            # A part without conditions computes one for a share of 0: its gradients are there, as those of the others.
            own = own if len(own) else np.array([0])
            batch = BatchIndex(*(field[own] for field in (batch.condition, batch.perturbed, batch.control, batch.mask)))
            eps = [draws[torch.from_numpy(own).to(self.device)] for draws in eps]
        terms = self._terms(batch, eps)
        shares = {"mmd": of_conditions, "graph": of_conditions}
        return terms if own is None else {name: shares.get(name, of_cells) * term for name, term in terms.items()}

    def _terms(self, batch: BatchIndex, eps: list[Tensor]) -> dict[str, Tensor]:
        mask = None if batch.mask.all() else torch.from_numpy(batch.mask).to(self.device)
        conditions = self.table[torch.from_numpy(batch.condition).to(self.device)]
        means: tuple[Tensor, Tensor] | None
        if self.factored:
            estimator = self.bandwidth, self.config.mmd_kernels, self.config.mmd_estimator == "unbiased"
            cells = self._cells(batch)
            terms, means = factored_terms(self.model, cells, conditions, (eps[0], eps[1]), *estimator, mask)
        else:
            terms, means = self._dense(batch, conditions, mask, eps)
        if self.anchored and means is not None:
            pairs = zip(means, (batch.control, batch.perturbed), strict=True)
            n_genes = self.source.data.n_genes
            sides = [anchor_term(m, self._anchors(cells), self.anchor_variance, n_genes, mask) for m, cells in pairs]
            terms["anchor"] = torch.stack(sides).mean()
        return terms

    def _dense(
        self, batch: BatchIndex, conditions: Tensor, mask: Tensor | None, eps: list[Tensor]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """Terms, and with Gaussian noise the posterior means of both sides."""
        control, perturbed = self.source.dense(batch.control), self.source.dense(batch.perturbed)
        output = self.model(control, conditions, eps[0])
        estimator = self.bandwidth, self.config.mmd_kernels, self.config.mmd_estimator == "unbiased"
        terms = loss_terms(self.model, output, control, perturbed, *estimator, mask)
        if self.model.log_noise is None:
            return terms, None
        inference = self.model.infer(perturbed, conditions, eps[1])
        for name, value in interventional_terms(self.model, inference, perturbed, mask).items():
            terms[name] = (terms[name] + value) / 2
        return terms, (output.mean, inference.mean)

    def _cells(self, batch: BatchIndex) -> StepCells:
        """Each control of the batch once, then its perturbed cells."""
        controls, place = np.unique(batch.control[batch.mask], return_inverse=True)
        control, perturbed = np.zeros((2, *batch.mask.shape), dtype=np.int64)
        control[batch.mask] = place
        perturbed[batch.mask] = len(controls) + np.arange(batch.mask.sum())
        index = np.concatenate([controls, batch.perturbed[batch.mask]])
        at = torch.from_numpy(index).to(self.device)
        return StepCells(
            rows=self.source.rows(index),
            n_controls=len(controls),
            control=torch.from_numpy(control).to(self.device),
            perturbed=torch.from_numpy(perturbed).to(self.device),
            counts=tuple(batch.mask.sum(1).tolist()),
            norms=self.norms[at],
            center=self.center,
        )

    def _anchors(self, cells: np.ndarray) -> Tensor:
        return self.anchors[torch.from_numpy(cells).to(self.device)]

    def _draws(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)


def _norms_and_center(data: PerturbSeqData) -> tuple[np.ndarray, np.ndarray]:
    """Squared norms (cells,) and the mean of training controls (genes,), in float64."""
    x = data.x
    norms = np.empty(x.shape[0])
    for start in range(0, x.shape[0], NORM_ROWS):
        part = x[start : start + NORM_ROWS].astype(np.float64)
        squares = part**2 if isinstance(part, np.ndarray) else part.multiply(part)
        norms[start : start + NORM_ROWS] = np.asarray(squares.sum(1)).ravel()
    return norms, np.asarray(x[data.cells(0, splits.TRAIN)].mean(0, dtype=np.float64)).ravel()
