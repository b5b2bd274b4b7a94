"""Schedules against the published ones, written out."""

from itertools import pairwise

import numpy as np
import pytest

from crlseq.config import make_config
from crlseq.training.schedules import schedule, settled


def test_published_schedules():
    config = make_config("paper")
    n = config.training.epochs
    assert n == 100
    mmd = np.r_[np.zeros(5), np.linspace(0, 10, 45), np.full(50, 10)]
    kl = np.r_[np.zeros(10), np.linspace(0, 2, 90)]
    temperature = np.r_[np.ones(5), np.linspace(1, 5, 95)]
    for epoch in range(n):
        weights = schedule(epoch, n, config.model, config.training)
        assert weights.terms["mmd"] == pytest.approx(mmd[epoch])
        assert weights.terms["kl"] == pytest.approx(kl[epoch])
        assert weights.temperature == pytest.approx(temperature[epoch])
        assert (weights.terms["graph"], weights.terms["reconstruction"], weights.learning_rate) == (1e-3, 1.0, 1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_any_number_of_epochs_ends_at_the_full_weights(n, preset):
    config = make_config(preset)
    all_weights = [schedule(epoch, n, config.model, config.training) for epoch in range(n)]
    assert all(np.isfinite(list(w.terms.values())).all() and w.learning_rate > 0 for w in all_weights)
    assert all(b.terms["mmd"] >= a.terms["mmd"] and b.temperature >= a.temperature for a, b in pairwise(all_weights))
    if n == 100:
        assert all_weights[-1].terms["mmd"] == pytest.approx(config.model.mmd_weight)
        assert all_weights[-1].temperature == pytest.approx(config.model.max_temperature)


def test_the_objective_is_constant_once_settled():
    config = make_config()
    later = [
        schedule(epoch, 50, config.model, config.training) for epoch in range(50) if settled(epoch, 50, config.training)
    ]
    assert len({(w.terms["mmd"], w.terms["kl"], w.terms["graph"], w.temperature) for w in later}) == 1
    assert len(later) == 40
