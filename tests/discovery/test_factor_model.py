"""The negative-binomial factor model: its number of components, dispersions and end, on counts of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from crlseq.discovery import factor_model
from crlseq.discovery.factor_model import FactorModel, chunks_of, fit_factors, noise_edge, score

Floats = NDArray[np.float64]
N, GENES, FACTORS = 1200, 120, 3
ALPHA = np.where(np.arange(GENES) % 2, 0.1, 0.6)


def counts_of(factors: int = FACTORS, seed: int = 0, n: int = N) -> tuple[Tensor, Floats]:
    """Counts (n, GENES) with dispersions `ALPHA`, and log means without the cells' sizes."""
    rng = np.random.default_rng(seed)
    eta = 0.5 * rng.standard_normal((n, factors)) @ rng.standard_normal((factors, GENES))
    eta += 1.5 + 0.7 * rng.standard_normal(GENES)
    mean = np.exp(eta + 0.3 * rng.standard_normal((n, 1)))
    return torch.from_numpy(rng.poisson(rng.gamma(1 / ALPHA, mean * ALPHA))).float(), eta


def axes_of(x: Tensor, q: int) -> Floats:
    logs = torch.log1p(x / x.sum(1, keepdim=True) * x.sum(1).median()).double()
    return np.asarray(torch.linalg.svd(logs - logs.mean(0), full_matrices=False)[2][:q].T)


def fitted(x: Tensor, most: int = 10, least: int = 1, threads: int = 1) -> tuple[FactorModel, Tensor]:
    return fit_factors(x, axes_of(x, most), 0.3, least, threads)


def test_edge_of_noise_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_model, "EDGE_MARGIN", 1.0)
    assert noise_edge(400, 100) == pytest.approx(1.5**2 - 1)


@pytest.mark.parametrize("factors", [0, 1, 3, 6])
def test_components_are_those_of_the_counts_and_none_of_noise(factors: int) -> None:
    x, _ = counts_of(factors, seed=factors)
    for least in (1, 5):
        beyond = len(fitted(x, 14, least)[0].loadings) - max(factors, least) - factor_model.SPARE
        assert 0 <= beyond <= 1  # one at the edge, where the spare ones take a part of the noise of so few genes
    assert len(fitted(x, 3)[0].loadings) == 3


def test_dispersions_are_those_of_the_genes_and_biology_is_none() -> None:
    x, _ = counts_of()
    alpha = fitted(x)[0].alpha.numpy()
    assert np.abs(np.log(alpha / ALPHA)).mean() < 0.15
    assert np.log(alpha / ALPHA).mean() == pytest.approx(0, abs=0.08)


def test_genes_of_few_counts_have_the_dispersions_of_the_others() -> None:
    x, _ = counts_of()
    rng = np.random.default_rng(1)
    x[:, :40] = torch.from_numpy(rng.poisson(rng.gamma(1 / 0.4, 0.05 * 0.4, (N, 40)))).float()  # on their own: 0.4 +- 1
    rare = fitted(x)[0].alpha[:40].numpy()
    assert np.abs(np.log(rare / 0.4)).max() < np.log(2)


def test_loadings_are_at_the_end_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_model, "SPARE", 0)  # what is noise takes longer
    x, eta = counts_of()
    log_means = []
    for settled in (factor_model.SETTLED, factor_model.SETTLED / 10):
        monkeypatch.setattr(factor_model, "SETTLED", settled)
        model, v = fitted(x)
        found = (v @ model.loadings).numpy()
        log_means.append(found - found.mean(0))
    left = eta - eta.mean(0) - log_means[0]
    left -= left.mean(1, keepdims=True)  # the size's
    assert (log_means[0] - log_means[1]).std() < 0.1 * left.std()
    assert left.std() < 0.25 * eta.std(0).mean()


def test_threads_and_chunks_have_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = counts_of()
    one, other = fitted(x), fitted(x, threads=3)
    assert torch.equal(one[0].loadings, other[0].loadings) and torch.equal(one[1], other[1])
    monkeypatch.setattr(factor_model, "CHUNK", 200)
    assert [part.stop for part in chunks_of(450)] == [200, 400, 450]
    pieces = fitted(x)[0]
    torch.testing.assert_close(pieces.alpha, one[0].alpha, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prior", [1.0, 0.1])
def test_scores_maximise_the_likelihood_with_its_prior(prior: float) -> None:
    x, _ = counts_of()
    model, _ = fitted(x)
    some = x[:50]
    v, s, factor = score(some, torch.zeros(50, len(model.loadings)), model.log_size(some), model, 30, prior)
    state = torch.cat([v, s], 1).double().requires_grad_()
    eta = state[:, -1:] + model.intercept.double() + state[:, :-1] @ model.loadings.double()
    alpha = model.alpha.double()
    likelihood = (some * eta - (some + 1 / alpha) * (1 + alpha * eta.exp()).log()).sum()
    gradient = torch.autograd.grad(likelihood - 0.5 * prior * (state[:, :-1] ** 2).sum(), state)[0]
    step = torch.cholesky_solve(gradient[..., None], factor.double())[..., 0]
    assert step.abs().max() < 2 * factor_model.TOLERANCE


def test_a_gene_that_is_hardly_there_breaks_no_trend() -> None:
    sums = torch.tensor([[3.0, 4.0, 5.0, 6.0], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    found = factor_model._shrunk(sums, torch.tensor([-800.0, 0.0, 0.5, 1.0], dtype=torch.float64))
    assert bool(torch.isfinite(found).all())
