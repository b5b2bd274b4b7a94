"""An encoder that starts from latents which are no linear function of expression, as a curved mixing has them.

    z = c + M LeakyReLU(b + V y)        y: standardised scores on principal components

It is trained towards the noise z that a discovery found, from the linear map, which 2 p hidden units hold; what the other units
read is random at first. Weights are kept where they describe validation cells better than the linear map does.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from crlseq.data.projection import Projection
from crlseq.discovery.causal_training import descend_in_cycles, loss_of
from crlseq.model.networks import Encoder
from crlseq.model.scm import NEGATIVE_SLOPE
from crlseq.threads import on_threads

RATE = 1e-2
LINEAR = 0.01  # of the variance of one latent, in all latents together: less than that need not be learned
MAX_CELLS = 100_000  # that are looked at


@torch.no_grad()
def curve(encoder: Encoder, projection: Projection, cells: np.ndarray, z: Tensor, validating: np.ndarray) -> None:
    """Write what ``encoder``, which is linear, misses of z (n, p) in ``cells`` (n,), of which some (n,) bool are ``validating``."""
    assert isinstance(encoder.hidden, nn.Linear)
    some = np.linspace(0, len(cells) - 1, min(MAX_CELLS, len(cells))).astype(int)
    scores, judging = torch.from_numpy(projection.scores[cells[some]]).double(), torch.from_numpy(validating[some])
    axes, center, scale = torch.from_numpy(projection.axes), scores.mean(0), scores.std(0)
    scale = torch.where(scale > 1e-12 * scale.max(), scale, 1.0)
    origin = torch.from_numpy(projection.center) + axes @ center
    y, z = ((scores - center) / scale).float(), z[some].float()
    first, last = _same(encoder, axes * scale, origin)
    network = nn.Sequential(first, nn.LeakyReLU(NEGATIVE_SLOPE), last)
    unit = z.var(0)
    unit = torch.where(unit > 0, unit, 1.0)

    def loss(cells: Tensor) -> Tensor:
        error: Tensor = (network(y[cells]) - z[cells]) ** 2 / unit
        return error.sum(1)

    if judging.sum() < 2 or loss_of(loss, judging).mean() <= LINEAR:
        return
    with torch.enable_grad(), on_threads(1):
        gained = descend_in_cycles(loss, [*network.parameters()], judging, RATE, seed=0)
    if gained:
        weight = (first.weight.double() / scale) @ axes.T
        encoder.hidden.weight.copy_(weight)
        encoder.hidden.bias.copy_(first.bias - weight @ origin)
        encoder.mean.weight.copy_(last.weight)
        encoder.mean.bias.copy_(last.bias)


def _same(encoder: Encoder, axes: Tensor, origin: Tensor) -> tuple[nn.Linear, nn.Linear]:
    """The two layers of a linear ``encoder``'s mean on y (q,), where expression is ``origin + axes @ y``; idle units read at random."""
    hidden, mean, q = encoder.hidden, encoder.mean, axes.shape[1]
    first = nn.Linear(q, mean.in_features, device="meta").to_empty(device="cpu")
    last = nn.Linear(mean.in_features, mean.out_features, device="meta").to_empty(device="cpu")
    weight, bias = hidden.weight.to(axes), hidden.bias.to(axes)
    idle = (mean.weight == 0).all(0)
    random = torch.randn(len(idle), q + 1, generator=torch.Generator().manual_seed(0), dtype=axes.dtype)
    first.weight.copy_(torch.where(idle[:, None], random[:, :q] / math.sqrt(q), weight @ axes))
    first.bias.copy_(torch.where(idle, random[:, q], bias + weight @ origin))
    last.weight.copy_(mean.weight)
    last.bias.copy_(mean.bias)
    return first, last
