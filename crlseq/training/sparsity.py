"""Masks of a sparse decoder in training: a generalised EM.

Encoder, structural model, shapes, and the masks that are not 0 learn by gradient. Now and then the masks are set to
their mode under the spike-and-slab lasso, given the posterior of some cells: exactly, by coordinate ascent, so that
masks become 0 and come back by the same rule, and no step of an optimiser decides which genes a program has.
"""

from __future__ import annotations

import numpy as np
import torch

from crlseq.data import splits
from crlseq.model.sparse_decoder import SparseDecoder
from crlseq.model.spike_slab import SpikeSlab
from crlseq.training.objective import Objective

MAX_CELLS = 10_000  # that masks are fitted to
TIMES = 20  # in a fit
DRAWS = 2000  # of control latents, whose variance is the unit of a program


class Sparsity:
    """The prior of a model's masks, and the cells that they are fitted to."""

    def __init__(self, objective: Objective) -> None:
        model = objective.model
        assert isinstance(model.decoder, SparseDecoder) and model.log_noise is not None
        self.model, self.decoder, self.log_noise = model, model.decoder, model.log_noise
        self.source = objective.source
        cells = np.flatnonzero(self.source.data.split == splits.TRAIN)
        self.cells = cells[np.linspace(0, len(cells) - 1, min(MAX_CELLS, len(cells))).astype(int)]
        self.full = SpikeSlab.of(len(self.cells))
        z = torch.randn(DRAWS, len(model.scm.graph), generator=torch.Generator().manual_seed(0))
        self.z = z.to(model.scm.graph)  # the same at all times: masks move with the model alone
        self.support = torch.empty(0)

    @torch.no_grad()
    def begin(self, epoch: int, n_epochs: int, sparsity: float) -> None:
        """Start an epoch: shapes of unit variance; in some epochs the masks' mode, of a spike annealed to `sparsity`."""
        self.decoder.standardise(self.model.scm(self.z))
        if epoch % max(1, n_epochs // TIMES) == 0:
            self._fit_masks(self.full.annealed(sparsity))

    @torch.no_grad()
    def mark(self) -> None:
        """Remember which masks are 0."""
        self.support = (self.decoder.output.mask != 0).to(self.decoder.output.mask)

    @torch.no_grad()
    def hold(self) -> None:
        """After a step of gradient descent: masks that were 0 stay so."""
        self.decoder.output.mask.mul_(self.support)

    def _fit_masks(self, prior: SpikeSlab) -> None:
        """M-step, for latents drawn from the posterior of the cells."""
        rows, encoder = self.source.rows(self.cells), self.model.encoder
        mean, variance = encoder.posterior(rows.times(encoder.hidden.weight.T) + encoder.hidden.bias)
        eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)).to(mean)
        h = self.decoder.features(self.model.scm(mean + variance.sqrt() * eps))
        mean_x = rows.moments(torch.ones(len(self.cells), device=mean.device))[0].to(mean) / len(self.cells)
        cross = rows.transposed_times(h - h.mean(0))  # features that sum to 0: expression need not
        self.decoder.fit_masks(prior, self.log_noise.exp(), h, mean_x, cross)
