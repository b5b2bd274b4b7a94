"""Sparse decoder: each gene a sum of functions of few programs, by masks with a spike-and-slab-lasso prior.

    f_g(u) = b_g + sum_k w_gk s_gk(u_k),    s_gk = sum_j V_gkj LeakyReLU(a_kj u_k + c_kj),    Var s_gk = 1 over control cells

A hidden unit reads one program, so that a mask of 0 cuts a gene off from the program whatever the weights are. Moran et
al. 2022 (TMLR) mask what a network of all programs reads, gene by gene, at the cost of a network per gene; sums of
functions of single programs (with the same prior: Bai et al. 2022, JASA, "Spike-and-slab group lassos") keep the output
layer linear, thus the cost of the dense decoder, and lose effects that only two programs together have. Unit variance
of the shapes settles the scale between w and V: a mask is the standard deviation that its program gives the gene.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crlseq.model.networks import Decoder
from crlseq.model.spike_slab import SpikeSlab, fit_masks

FLAT = 1e-6  # standard deviation of a shape that counts as none


class MaskedLinear(nn.Module):
    """Output layer with weights (G, H) ``mask[g, h % p] * shape[g, h]``: unit h belongs to program h % p."""

    share: Tensor  # (p,) eta, of a program's masks that are of the slab

    def __init__(self, n_latents: int, n_units: int, n_genes: int) -> None:
        super().__init__()
        start = nn.Linear(n_units * n_latents, n_genes)
        self.shape, self.bias = start.weight, start.bias
        self.mask = nn.Parameter(torch.ones(n_genes, n_latents))
        self.register_buffer("share", torch.full((n_latents,), 0.5))

    @property
    def weight(self) -> Tensor:
        """(G, H) weights."""
        return self.mask.repeat(1, self.shape.shape[1] // self.mask.shape[1]) * self.shape

    def forward(self, h: Tensor) -> Tensor:
        """(..., H) to (..., G)."""
        return F.linear(h, self.weight, self.bias)


class ProgramUnits(nn.Module):
    """Hidden layer whose unit h reads program h % p: (..., p) to (..., H) ``u[h % p] * weight[h] + bias[h]``."""

    def __init__(self, n_latents: int, n_units: int) -> None:
        super().__init__()
        self.n_units = n_units
        # As a linear layer with one input starts.
        self.weight = nn.Parameter(torch.empty(n_units * n_latents).uniform_(-1, 1))
        self.bias = nn.Parameter(torch.empty(n_units * n_latents).uniform_(-1, 1))

    def forward(self, u: Tensor) -> Tensor:
        """See above."""
        return u.repeat(*(1,) * (u.dim() - 1), self.n_units) * self.weight + self.bias


class SparseDecoder(Decoder):
    """Latents to mean expression through masks; see above. The ``n_hidden`` units are shared out: as many whole ones
    per program, and at least two, which carry a linear map.
    """

    hidden: ProgramUnits  # type: ignore[assignment]
    output: MaskedLinear  # type: ignore[assignment]

    def __init__(self, n_latents: int, n_hidden: int, n_genes: int) -> None:
        nn.Module.__init__(self)
        self.n_units = max(2, n_hidden // n_latents)
        self.hidden = ProgramUnits(n_latents, self.n_units)
        self.output = MaskedLinear(n_latents, self.n_units, n_genes)
        self.output_activation = "identity"

    @torch.no_grad()
    def standardise(self, u: Tensor) -> None:
        """Unit variance to every shape over control latents (n, p), in place; the decoder stays the same function."""
        h = self.features(u).view(len(u), self.n_units, -1)
        h = h - h.mean(0)
        gram = torch.einsum("nik,njk->kij", h, h) / len(u)
        shape = self.output.shape.view(len(self.output.mask), self.n_units, -1)  # a view: written to below
        deviation = torch.einsum("gik,kij,gjk->gk", shape, gram, shape).clamp_min(0).sqrt()
        scale = torch.where(deviation > FLAT, deviation, torch.ones_like(deviation))
        shape.div_(scale[:, None])
        self.output.mask.mul_(scale)

    @torch.no_grad()
    def fit_masks(self, prior: SpikeSlab, noise: Tensor, h: Tensor, mean_x: Tensor, cross: Tensor) -> None:
        """Masks, their shares of the slab, and biases at the mode, given shapes and noise variances (G,); in place.

        ``h`` (n, H) features of cells, ``mean_x`` (G,) mean of their expression, and ``cross`` (G, H) sums over cells
        of expression times the features about their mean.
        """
        output, unit = self.output, noise.double().sqrt()[:, None]
        centred = (h - h.mean(0)).double()
        start, shape = output.mask.double() / unit, output.shape.double()
        gram = centred.T @ centred
        masks, share = fit_masks(prior, start, output.share.double(), shape, cross.double() / unit, gram)
        output.mask.copy_(masks * unit)
        output.share.copy_(share)
        output.bias.copy_(mean_x - output.weight @ h.mean(0))
