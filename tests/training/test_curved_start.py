"""An encoder that starts curved where the latents are, and linear where they are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crlseq.data.projection import Projection
from crlseq.model.networks import Encoder
from crlseq.training.curved_start import curve
from crlseq.training.warm_start import _linear_output

N, GENES, Q, H = 4000, 6, 3, 24
P = 2
VALIDATING = np.arange(N) % 10 == 0


@pytest.fixture(scope="module")
def projection() -> Projection:
    """Scores of very different size, and cells that they describe but for one direction."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(GENES, Q)))[0]
    scores = (rng.normal(size=(N, Q)) * [5.0, 1.0, 0.01]).astype(np.float32)
    return Projection(scores, rng.normal(size=GENES), axes, scores)


def started(projection: Projection, z: Tensor) -> tuple[Encoder, dict[str, Tensor]]:
    """An encoder with the linear map of least squares, and what it was before `curve`."""
    encoder = Encoder(GENES, H, P).double()
    scores = np.hstack([projection.scores, np.ones((N, 1))])
    slope = torch.from_numpy(np.linalg.lstsq(scores, z.numpy(), rcond=None)[0])
    weight = slope[:-1].T @ torch.from_numpy(projection.axes.T)
    constant = slope[-1] - weight @ torch.from_numpy(projection.center)
    with torch.no_grad():
        encoder.hidden.weight[: 2 * P] = torch.cat([weight, -weight])
        encoder.hidden.bias[: 2 * P] = torch.cat([constant, -constant])
        _linear_output(encoder.mean, np.eye(P), np.zeros(P))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    curve(encoder, projection, np.arange(N), z, VALIDATING)
    return encoder, before


def of_scores(f: Callable[[Tensor], Tensor], projection: Projection) -> Tensor:
    return f(torch.from_numpy(projection.scores).double() / torch.tensor([5.0, 1.0, 0.01]))


def is_as_before(encoder: Encoder, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_fold_is_learned_also_along_a_component_of_little_variance(projection: Projection) -> None:
    """|y_3| is uncorrelated with every component; two units hold it, and |y_1| y_2 needs some more."""
    z = of_scores(lambda y: torch.stack([y[:, 2].abs() + y[:, 0], y[:, 0].abs() * y[:, 1]], 1), projection)
    encoder, before = started(projection, z)
    assert not is_as_before(encoder, before)
    x = torch.from_numpy(projection.center + projection.scores @ projection.axes.T)
    with torch.no_grad():
        left = ((encoder(x)[0] - z)[VALIDATING] ** 2).mean(0) / z.var(0)
        beside = encoder(x + torch.from_numpy(10 * outside(projection)))[0]
    assert left[0] < 0.01 and left[1] < 0.05  # without the bends 0.27 and 1
    torch.testing.assert_close(beside, encoder(x)[0], atol=1e-3, rtol=0)


def outside(projection: Projection) -> np.ndarray:
    """(GENES,) a direction of unit length outside of the components."""
    direction = np.ones(GENES) - projection.axes @ (projection.axes.T @ np.ones(GENES))
    found: np.ndarray = direction / np.linalg.norm(direction)
    return found


def test_what_is_linear_stays_as_it_is(projection: Projection) -> None:
    z = of_scores(lambda y: torch.stack([y[:, 0] - y[:, 2], 2 * y[:, 1] + 3], 1), projection)
    assert is_as_before(*started(projection, z))


def test_noise_is_not_learned(projection: Projection) -> None:
    """Half of the variance is no function of expression: a network that learns some of it is worse for other cells."""
    noise = torch.randn(N, P, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = of_scores(lambda y: y[:, :P], projection) + noise
    assert is_as_before(*started(projection, z))


def test_a_latent_that_does_not_vary_is_no_hindrance(projection: Projection) -> None:
    z = of_scores(lambda y: torch.stack([y[:, 2].abs(), torch.ones(N)], 1), projection)
    encoder, before = started(projection, z)
    assert not is_as_before(encoder, before)
    with torch.no_grad():
        found = encoder(torch.from_numpy(projection.center + projection.scores @ projection.axes.T))[0]
    assert ((found - z) ** 2).mean(0).max() < 0.01


def test_without_validation_cells_nothing_bends(projection: Projection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.training.test_curved_start.VALIDATING", np.zeros(N, dtype=bool))
    assert is_as_before(*started(projection, of_scores(lambda y: y[:, :P].abs(), projection)))


def test_random_numbers_of_training_are_not_used_up(projection: Projection) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    encoder, z = Encoder(GENES, H, P).double(), of_scores(lambda y: y[:, :P].abs(), projection)
    with torch.no_grad():
        _linear_output(encoder.mean, np.eye(P), np.zeros(P))
    torch.manual_seed(3)
    curve(encoder, projection, np.arange(N), z, VALIDATING)
    assert isinstance(encoder.hidden, nn.Linear)
    assert torch.equal(torch.rand(4), expected)
