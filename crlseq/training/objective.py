"""Objective: the loss terms of one batch of cells."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crlseq.config import ModelConfig
from crlseq.data.batches import BatchIndex
from crlseq.data.dataset import PerturbSeqData, StreamedExpression
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.expression_rows import DenseRows, Rows, SparseRows
from crlseq.model.losses import Kernel, anchor_term, interventional_terms, loss_terms
from crlseq.model.sparse_losses import StepCells, sparse_loss_terms, step_cells
from crlseq.training.warm_start import Anchor


class CellSource:
    """Cells of the screen as tensors on the device: sparse or dense as they are stored.

    On CUDA all lie there for good when they take at most half of the free memory; else they are sliced and sent.
    """

    def __init__(self, data: PerturbSeqData, device: torch.device, dtype: torch.dtype) -> None:
        self.data, self.device, self.dtype = data, device, dtype
        self.resident: tuple[Tensor, ...] | None = None
        x = data.x
        if device.type == "cuda" and not isinstance(x, StreamedExpression):
            size = x.size * torch.finfo(dtype).bits // 8 if isinstance(x, np.ndarray) else 12 * x.nnz
            if size < 0.5 * torch.cuda.mem_get_info(device)[0]:
                self.resident = self._sent(x)

    def dense(self, index: np.ndarray) -> Tensor:
        """(...) cell indices to (..., G)."""
        return torch.from_numpy(self.data.dense(index.ravel())).to(self.device, self.dtype).reshape(*index.shape, -1)

    def rows(self, index: np.ndarray) -> Rows:
        """(N,) cell indices to their rows as they are stored."""
        if self.resident is None:
            chosen = self.data.x[index]
            if isinstance(chosen, np.ndarray):
                return DenseRows(*self._sent(chosen))
            start, gene, value = self._sent(chosen)
            if self.device.type != "cpu":
                return SparseRows.from_csr(start, gene, value, self.data.n_genes)
            row = np.repeat(np.arange(len(index), dtype=chosen.indices.dtype), np.diff(chosen.indptr))
            return SparseRows(start, torch.from_numpy(row), gene, value, *self._sent(chosen.tocsc()))
        at = torch.from_numpy(index).to(self.device)
        if len(self.resident) == 1:
            return DenseRows(self.resident[0][at])
        start, gene, value = self.resident
        first, counts = start[at].long(), (start[at + 1] - start[at]).long()
        own = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        entry = torch.arange(int(own[-1]), device=self.device) + torch.repeat_interleave(first - own[:-1], counts)
        return SparseRows.from_csr(own.to(gene.dtype), gene[entry], value[entry], self.data.n_genes)

    def _sent(self, x: Any) -> tuple[Tensor, ...]:
        if isinstance(x, np.ndarray):
            return (torch.from_numpy(x).to(self.device, self.dtype),)
        start, gene, value = map(torch.from_numpy, (x.indptr, x.indices, x.data))
        return start.to(self.device, gene.dtype), gene.to(self.device), value.to(self.device, self.dtype)


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

    def prepare(self, batch: BatchIndex, own: np.ndarray | None = None) -> Step:
        """What a batch asks of the screen and not of the model: it can be done ahead, in another thread.

        With ``own`` conditions of the batch the terms are this part's share: those of parts that make up the batch add up
        to its terms.
        """
        share, hit, whole = None, None, batch.mask.shape
        if own is not None:
            of_conditions, of_cells = len(own) / len(batch.mask), float(batch.mask[own].sum() / batch.mask.sum())
            # A part without conditions computes one for a share of 0: its gradients are there, as those of the others.
            own = own if len(own) else np.array([0])
            batch = BatchIndex(*(field[own] for field in (batch.condition, batch.perturbed, batch.control, batch.mask)))
            share = StepShare(torch.from_numpy(own).to(self.device), of_conditions, of_cells)
        mask = None if batch.mask.all() else torch.from_numpy(batch.mask).to(self.device)
        conditions = self.table[torch.from_numpy(batch.condition).to(self.device)]
        dense, anchors = self.source.dense, None
        cells = self._cells(batch) if self.linear_output else (dense(batch.control), dense(batch.perturbed))
        if self.anchored:
            pairs = torch.from_numpy(np.stack([batch.control, batch.perturbed])).to(self.device)
            anchors, hit = self.anchors[pairs], self.hit[pairs[1]]
        return Step(conditions, mask, cells, anchors, hit, whole, share)

    def __call__(self, step: Step, generator: torch.Generator) -> dict[str, Tensor]:
        """Unweighted terms, each a scalar; of a part, its share. Noise is drawn for the whole batch, whoever computes it."""
        n_draws = 1 if self.model.log_noise is None else 2
        eps = [self._draws((*step.whole, self.model.scm.graph.shape[0]), generator) for _ in range(n_draws)]
        uniform = None
        if self.mixed:
            shape = (*step.whole, step.conditions.shape[1])
            uniform = torch.rand(shape, generator=generator, dtype=self.dtype, device=self.device)
        if step.share is None:
            return self._terms(step, eps, uniform)
        own = step.share.own
        terms = self._terms(step, [draws[own] for draws in eps], None if uniform is None else uniform[own])
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

    def _cells(self, batch: BatchIndex) -> StepCells:
        """Each control of the batch once, then its perturbed cells."""
        controls, place = np.unique(batch.control[batch.mask], return_inverse=True)
        control, perturbed = np.zeros((2, *batch.mask.shape), dtype=np.int64)
        control[batch.mask] = place
        perturbed[batch.mask] = len(controls) + np.arange(batch.mask.sum())
        rows = self.source.rows(np.concatenate([controls, batch.perturbed[batch.mask]]))
        left, right = (torch.from_numpy(place).to(self.device) for place in (control, perturbed))
        return step_cells(rows, len(controls), left, right, tuple(batch.mask.sum(1).tolist()), self.kernel)

    def _draws(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
