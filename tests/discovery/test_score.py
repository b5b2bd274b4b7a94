"""Score differences of two hard interventions a program: the paper's setting, and screens that cannot be paired."""

from __future__ import annotations

import numpy as np
import pytest

from crlseq.config import ModelConfig
from crlseq.discovery.contrastive import train_encoder
from crlseq.discovery.methods import method_of
from crlseq.discovery.methods.score import by_pairs, paired
from crlseq.discovery.methods.score_linear import declared, with_errors
from crlseq.discovery.score_differences import products
from crlseq.errors import InputError
from tests.discovery.test_discover import Screen
from tests.discovery.varici import Latents, distance, mcc


@pytest.mark.slow
def test_quadratic_equations_through_tanh_at_the_papers_size() -> None:
    """x = tanh(u M), 100 features, 10,000 cells an environment; interventions with 1/4 of the variance and with 4 times it."""
    model = Latents(5, 24, linear=False)
    hits = model.one_each()
    u = np.concatenate([model.draw(10_000), *(model.draw(10_000, hit, scale) for scale in (0.25, 4.0) for hit in hits)])
    x = np.tanh(u @ model.mixing(100))
    centred, environment = x - x.mean(0), np.repeat(np.arange(11), 10_000)
    y = centred @ np.linalg.eigh(centred.T @ centred)[1][:, :-21:-1]
    pairs, first = paired(y, environment, 5, 0)
    assert np.array_equal(pairs, np.column_stack([np.arange(1, 6), np.arange(6, 11)]))
    latents = train_encoder(y, environment, pairs, False, 0, 0.0, first).latents(y)
    controls = environment == 0
    assert mcc(latents[controls], u[controls]) >= 0.95
    of_pairs = by_pairs(products(latents, environment, 0), pairs)
    found = with_errors(latents, environment, of_pairs, True, mixed=False)
    assert distance(declared(*found)[0], model.edges()) <= 2


def test_it_asks_for_two_perturbations_for_each_program() -> None:
    screen = Screen()
    with pytest.raises(
        InputError, match="needs two perturbations for each program: 12 have a detectable effect, and 4"
    ):
        method_of("score").find(screen.task(ModelConfig(n_latents=4)))
    odd = (np.arange(12) < 5).astype(float)
    with pytest.raises(InputError, match="needs two perturbations for each program: 5 have a detectable effect\\."):
        method_of("score").find(screen.task(ModelConfig(), effect=odd))
