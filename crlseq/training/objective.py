"""Objective: the loss terms of one batch of cells."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crlseq.config import ModelConfig
from crlseq.data.batches import BatchIndex
from crlseq.data.dataset import PerturbSeqData
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import anchor_term, interventional_terms, loss_terms
from crlseq.training.warm_start import Anchor


class CellSource:
    """Rows of the screen as tensors on the device; the whole screen lies there when it fits."""

    def __init__(self, data: PerturbSeqData, device: torch.device, dtype: torch.dtype) -> None:
        self.data, self.device, self.dtype = data, device, dtype
        self.resident: Tensor | None = None
        if device.type == "cuda":
            size = data.x.shape[0] * data.n_genes * torch.finfo(dtype).bits // 8
            if size < 0.5 * torch.cuda.mem_get_info(device)[0]:
                self.resident = torch.from_numpy(data.dense(np.arange(data.x.shape[0]))).to(device, dtype)

    def __call__(self, index: np.ndarray) -> Tensor:
        """(...) cell indices to (..., G)."""
        if self.resident is not None:
            return self.resident[torch.from_numpy(index).to(self.device)]
        rows = torch.from_numpy(self.data.dense(index.ravel())).to(self.device, self.dtype)
        return rows.reshape(*index.shape, -1)


class Objective:
    """Loss terms of batches (`crlseq.model.losses`); with Gaussian noise the bound counts perturbed cells as well.

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
        self.anchored = anchor is not None
        if anchor is not None:
            self.anchors = torch.from_numpy(anchor.z).to(self.device, self.dtype)
            self.anchor_variance = torch.from_numpy(anchor.variance).to(self.device, self.dtype)

    def __call__(self, batch: BatchIndex, generator: torch.Generator) -> dict[str, Tensor]:
        """Unweighted terms, each a scalar."""
        control, perturbed = self.source(batch.control), self.source(batch.perturbed)
        mask = None if batch.mask.all() else torch.from_numpy(batch.mask).to(self.device)
        conditions = self.table[torch.from_numpy(batch.condition).to(self.device)]
        output = self.model(control, conditions, self._draws(control, generator))
        config, g = self.config, control.shape[-1]
        unbiased = config.mmd_estimator == "unbiased"
        terms = loss_terms(self.model, output, control, perturbed, self.bandwidth, config.mmd_kernels, unbiased, mask)
        if self.model.log_noise is None:
            return terms
        inference = self.model.infer(perturbed, conditions, self._draws(perturbed, generator))
        for name, value in interventional_terms(self.model, inference, perturbed, mask).items():
            terms[name] = (terms[name] + value) / 2
        if self.anchored:
            pairs = ((output.mean, batch.control), (inference.mean, batch.perturbed))
            sides = [anchor_term(mean, self._anchors(cells), self.anchor_variance, g, mask) for mean, cells in pairs]
            terms["anchor"] = torch.stack(sides).mean()
        return terms

    def _anchors(self, cells: np.ndarray) -> Tensor:
        return self.anchors[torch.from_numpy(cells).to(self.device)]

    def _draws(self, x: Tensor, generator: torch.Generator) -> Tensor:
        shape = (*x.shape[:2], self.model.scm.graph.shape[0])
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
