"""Location-scale mechanisms: how the parents of a latent move its mean and the size of its noise.

    u_k = sum_j A[j, k] u_j + w_k h_k + exp(s_k) z_k,        h_k = silu(V_k (A[:, k] * u) + b_k) - silu(b_k)
    s_k = S tanh(v_k h_k / S)

V_k (H, p), b_k, w_k, v_k (H,) are a network of each latent; S bounds the log scale. Without parents h_k is 0, so that the noise
of a latent without parents is standard normal; with w and v at 0, where they start, the equations are linear. Beyond the cells seen a mean goes on as a line.

Source: affine autoregressive mechanisms of Komanduri et al. 2024, "Learning causally disentangled representations via the
principle of independent causal mechanisms" (ICM-VAE), IJCAI, arXiv 2306.01213.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

SCALE_BOUND = 2.0  # S: an unbounded one lets one outlying cell explode its children
HIDDEN = 16  # H


class LocationScale(nn.Module):
    """The mechanisms of p latents."""

    def __init__(self, p: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(p, p, HIDDEN))  # V, (parent, child, unit)
        self.bias = nn.Parameter(torch.randn(p, HIDDEN))
        self.location = nn.Parameter(torch.zeros(p, HIDDEN))  # w
        self.scale = nn.Parameter(torch.zeros(p, HIDDEN))  # v

    def forward(self, u: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor]:
        """Latents u (..., B, p) and weights (p, p), row -> column, to the mean and the log scale (..., B, p) of each latent."""
        gated = adjacency[..., None] * self.inner
        h = silu(torch.einsum("...j,jkh->...kh", u, gated) + self.bias) - silu(self.bias)
        log_scale = SCALE_BOUND * torch.tanh((h * self.scale).sum(-1) / SCALE_BOUND)
        return u @ adjacency + (h * self.location).sum(-1), log_scale
