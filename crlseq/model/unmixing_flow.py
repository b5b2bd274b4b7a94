"""A normalizing flow from components to latents: rotations between autoregressive rational-quadratic splines.

    h_0 = (y - c) W_0 + b_0,    h_i = s_i(h_{i-1}) W_i + b_i,    u = h_L,    log|det du/dy| = sum_i log|det W_i| + log|det ds_i|

Source: neural spline flows (Durkan et al. 2019, arXiv 1906.04032); transforms of the package zuko, imported when a flow is made.
"""

from functools import partial

import torch
from torch import Tensor, nn

from crlseq.errors import needs_extra

LAYERS, BINS, WIDTH = 3, 8, 64
BOUND = 8.0  # standard deviations, beyond which a spline is the identity


class UnmixingFlow(nn.Module):
    """Of p components; it starts as the affine map ``(y - center) @ directions``.

    ``center`` (p,), ``directions`` (p, p). A `UsageError` where zuko is not installed.
    """

    center: Tensor

    def __init__(self, center: Tensor, directions: Tensor) -> None:
        super().__init__()
        try:
            from zuko.flows.autoregressive import MaskedAutoregressiveTransform
            from zuko.transforms import MonotonicRQSTransform
        except ImportError:
            raise needs_extra("The method cauca", "zuko", "methods") from None
        p = len(directions)
        spline = partial(MonotonicRQSTransform, bound=BOUND)
        shapes = [(BINS,), (BINS,), (BINS - 1,)]
        self.register_buffer("center", center.float())
        self.rotations = nn.ParameterList([directions.float(), *(torch.eye(p) for _ in range(LAYERS))])
        self.offsets = nn.ParameterList([torch.zeros(p) for _ in range(LAYERS + 1)])
        self.splines = nn.ModuleList()
        for i in range(LAYERS):
            order = torch.arange(p) if i % 2 == 0 else torch.arange(p).flip(0)
            hidden = (WIDTH, WIDTH)
            self.splines.append(
                MaskedAutoregressiveTransform(p, order=order, univariate=spline, shapes=shapes, hidden_features=hidden)
            )
        for each in self.splines:
            for last in [*each.parameters()][-2:]:  # of the layer that gives the splines' shapes: the identity
                nn.init.zeros_(last)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Components (n, p) to latents (n, p) and log|det du/dy| (n,)."""
        h, log_det = (y - self.center) @ self.rotations[0] + self.offsets[0], torch.linalg.slogdet(self.rotations[0])[1]
        for spline, rotation, offset in zip(self.splines, self.rotations[1:], self.offsets[1:], strict=True):
            h, own = spline().call_and_ladj(h)
            h, log_det = h @ rotation + offset, log_det + own + torch.linalg.slogdet(rotation)[1]
        return h, log_det
