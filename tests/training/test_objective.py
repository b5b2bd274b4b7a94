"""Loss terms of a batch, worked out by hand on a model of two programs and two genes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from crlseq.config import ModelConfig
from crlseq.data.batches import BatchIndex
from crlseq.data.dataset import PerturbSeqData
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import Kernel, loss_terms, mmd_squared
from crlseq.training.cell_source import CellSource
from crlseq.training.objective import Objective
from crlseq.training.warm_start import Anchor

VARIANCE = 0.25  # of the posterior, in both programs
NOISE = 0.5  # variance of both genes
EDGE, SHIFT, LOG_SCALE = 2.0, 1.5, math.log(0.5)
# Controls are cells 0 and 1, perturbed cells 2, 3 and 4.
X = np.array([[1.0, -1.0], [0.5, 2.0], [2.0, 0.0], [-1.0, 3.0], [4.0, 1.0]])
HIT = np.array([0.0, 0, np.nan, 0.75, 1])  # probability of each cell to have been hit
BATCH = BatchIndex(np.array([1]), np.array([[2, 3]]), np.array([[0, 1]]), np.ones((1, 2), dtype=bool))


def screen() -> Any:
    """What the objective asks of a screen: rows, and the perturbations of each condition."""
    asked: Any = SimpleNamespace(
        x=X,
        n_genes=2,
        dense=lambda index: X[index],
        perturbation_table=lambda: np.array([[-1], [0]]),
        cells=lambda condition, code: np.arange(2),
        blocks=lambda index: PerturbSeqData.blocks(asked, index),
        moments=lambda index: PerturbSeqData.moments(asked, index),
    )
    return asked


@torch.no_grad()
def model(intervention: str = "hard", noise: str = "gaussian") -> DiscrepancyVAE:
    """z = x (posterior mean), P0 -2-> P1, perturbation 0 on P1, decoder x = u."""
    made = DiscrepancyVAE(2, 2, 1, 4, intervention, noise=noise).double()
    eye, share = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64) / 1.2
    both, shared = torch.cat([eye, -eye]), torch.cat([share, -share], 1)  # relu(v) - relu(-v) = 1.2 v
    for hidden in (made.encoder.hidden, made.decoder.hidden):
        hidden.weight.copy_(both)
        hidden.bias.zero_()
    for output in (made.encoder.mean, made.decoder.output):
        output.weight.copy_(shared)
        output.bias.zero_()
    made.encoder.variance.weight.zero_()
    made.encoder.variance.bias.fill_(math.log(math.expm1(VARIANCE)))
    if made.log_noise is not None:
        made.log_noise.fill_(math.log(NOISE))
    made.scm.graph.copy_(torch.tensor([[0.0, EDGE], [0.0, 0.0]]))
    made.scm.shift.fill_(SHIFT)
    made.scm.log_scale.fill_(3 * math.atanh(LOG_SCALE / 3))
    made.intervention_encoder.given.copy_(torch.tensor([[0.0, 1.0]]))
    made.intervention_encoder.is_given.fill_(True)
    return made


def objective(made: DiscrepancyVAE, anchor: Anchor | None = None) -> Objective:
    return Objective(made, screen(), ModelConfig(), 1.0, anchor)


def terms_of(made: Objective, batch: BatchIndex = BATCH) -> dict[str, torch.Tensor]:
    return made(made.prepare(batch), seeded())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def draws() -> tuple[np.ndarray, np.ndarray]:
    """The normal draws of control and of perturbed cells, in that order."""
    generator = seeded()
    one, two = (torch.randn(1, 2, 2, generator=generator, dtype=torch.float64)[0].numpy() for _ in range(2))
    return one, two


def gaussian(x: np.ndarray, mean: np.ndarray) -> float:
    """Mean negative log-likelihood over cells and genes."""
    return float((0.5 * ((x - mean) ** 2 / NOISE + math.log(2 * math.pi * NOISE))).mean())


def control_terms() -> tuple[float, float]:
    """Reconstruction and KL of the control cells 0 and 1."""
    z = X[:2] + math.sqrt(VARIANCE) * draws()[0]
    u = np.column_stack([z[:, 0], z[:, 1] + EDGE * z[:, 0]])
    kl = (0.5 * (X[:2] ** 2 + VARIANCE - math.log(VARIANCE) - 1)).sum(1).mean() / 2
    return gaussian(X[:2], u), float(kl)


@pytest.mark.parametrize(("intervention", "kept"), [("hard", 0.0), ("shift", 1.0)])
def test_perturbed_cells_count_under_their_own_condition(intervention: str, kept: float) -> None:
    terms = terms_of(objective(model(intervention)))
    log_scale = LOG_SCALE if intervention == "hard" else 0.0
    eps = draws()[1]
    z = X[2:4] + math.sqrt(VARIANCE) * eps
    u = np.column_stack([z[:, 0], z[:, 1] + EDGE * z[:, 0]])
    # the noise that gives u under the intervention: P1 keeps what it keeps of P0, is moved and scaled
    own = np.column_stack([u[:, 0], (u[:, 1] - kept * EDGE * u[:, 0] - SHIFT) * math.exp(-log_scale)])
    divergence = 0.5 * (own**2 - eps**2 - math.log(VARIANCE)).sum(1) + log_scale
    reconstruction, kl = control_terms()
    assert terms["reconstruction"].item() == pytest.approx((reconstruction + gaussian(X[2:4], u)) / 2)
    assert terms["kl"].item() == pytest.approx((kl + divergence.mean() / 2) / 2)
    assert terms["graph"].item() == pytest.approx(EDGE)
    assert set(terms) == {"mmd", "reconstruction", "kl", "graph"}


def test_the_divergence_is_on_average_the_kl_between_gaussians() -> None:
    made = model("hard")
    eps = torch.randn(1, 40_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.from_numpy(X[2]).expand(1, 40_000, 2)
    with torch.no_grad():
        drawn = made.infer(x, torch.tensor([[0]]), eps).divergence
    system = torch.linalg.inv(torch.tensor([[1.0, -EDGE], [0.0, 1.0]], dtype=torch.float64))  # u = z T
    q = torch.distributions.MultivariateNormal(torch.from_numpy(X[2]) @ system, VARIANCE * system.T @ system)
    prior = torch.distributions.MultivariateNormal(
        torch.tensor([0.0, SHIFT], dtype=torch.float64),
        torch.diag(torch.tensor([1.0, math.exp(2 * LOG_SCALE)], dtype=torch.float64)),
    )
    expected = torch.distributions.kl_divergence(q, prior).item()
    error = float(drawn.std()) / math.sqrt(40_000)
    assert abs(drawn.mean().item() - expected) < 4 * error < 0.02 * expected


def test_the_anchor_is_a_measurement_of_the_posterior_mean() -> None:
    z = np.zeros((5, 2))
    z[0] = [1.5, -1.0]  # half a unit off in P0
    z[1:] = X[1:]
    z[3] += [0.0, 3.0]
    made = objective(model(), Anchor(z, np.array([0.1, 2.0]), HIT))
    terms = terms_of(made)
    control, perturbed = 0.5 * 0.25 / 0.1, 0.5 * 9 / 2.0  # one cell each of two
    assert terms["anchor"].item() == pytest.approx((control / 2 + perturbed / 2) / 2 / 2)  # a side, and a gene
    assert made.anchored
    without = terms_of(objective(model()))
    for name, value in without.items():
        assert terms[name].item() == value.item()  # and the draws are the same


def test_the_anchor_pulls_on_the_encoder_alone() -> None:
    made = model()
    terms = terms_of(objective(made, Anchor(X + 1, np.ones(2), HIT)))
    named = {name: p for name, p in made.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(terms["anchor"], list(named.values()), allow_unused=True)
    moved = {name for name, g in zip(named, gradients, strict=True) if g is not None and bool(g.abs().sum() > 0)}
    assert moved == {"encoder.hidden.weight", "encoder.hidden.bias", "encoder.mean.weight", "encoder.mean.bias"}


def test_rows_that_only_fill_up_do_not_count() -> None:
    anchor = Anchor(np.zeros((5, 2)), np.ones(2), HIT)
    filled = BatchIndex(
        np.array([1]), np.array([[2, 3, 0]]), np.array([[0, 1, 0]]), np.array([[True, True, False]])
    )  # fmt: skip
    other = BatchIndex(filled.condition, np.array([[2, 3, 4]]), np.array([[0, 1, 4]]), filled.mask)
    made = objective(model(), anchor)
    a, b = terms_of(made, filled), terms_of(made, other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].item() == pytest.approx(b[name].item()), name
    assert a["anchor"].item() == pytest.approx(terms_of(made)["anchor"].item())


def test_the_published_objective_leaves_perturbed_cells_to_the_mmd() -> None:
    made = model("shift", noise="none")
    terms = terms_of(objective(made, Anchor(X, np.ones(2), HIT)))
    assert set(terms) == {"mmd", "reconstruction", "kl", "graph"}
    eps = torch.from_numpy(draws()[0])[None]
    control, perturbed = torch.from_numpy(X[None, :2]), torch.from_numpy(X[None, 2:4])
    output = made(control, torch.tensor([[0]]), eps)
    expected = loss_terms(made, output, control, perturbed, Kernel(1.0, ModelConfig().mmd_kernels), None)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item())
    u = X[:2] + math.sqrt(VARIANCE) * draws()[0]
    u[:, 1] += EDGE * u[:, 0]
    assert terms["reconstruction"].item() == pytest.approx(((u - X[:2]) ** 2).mean())


def test_rows_of_the_screen_come_in_the_shape_of_their_indices() -> None:
    source = CellSource(screen(), torch.device("cpu"), torch.float32)
    rows = source.dense(np.array([[0, 4], [1, 1]]))
    assert rows.dtype == torch.float32 and rows.shape == (2, 2, 2)
    assert rows[0, 1].tolist() == [4, 1] and torch.equal(rows[1, 0], rows[1, 1])


@pytest.mark.parametrize("penetrance", [1.0, 0.4])
def test_who_is_hit_is_drawn_after_the_noise_where_cells_escape(penetrance: float) -> None:
    made = model()
    made.penetrance.fill_(penetrance)
    generator, expected = seeded(), seeded()
    found = objective(made, Anchor(X, np.ones(2), HIT))
    terms = found(found.prepare(BATCH), generator)
    for _ in range(2):
        torch.randn(1, 2, 2, generator=expected, dtype=torch.float64)
    if penetrance < 1:
        hit = torch.rand(1, 2, 1, generator=expected, dtype=torch.float64) < penetrance
        control, perturbed = torch.from_numpy(X[None, :2]), torch.from_numpy(X[None, 2:4])
        virtual = made(control, torch.tensor([[0]]), torch.from_numpy(draws()[0])[None], hit).virtual
        kernel = Kernel(1.0, ModelConfig().mmd_kernels)
        assert terms["mmd"].item() == pytest.approx(mmd_squared(virtual, perturbed, kernel).item())
    assert torch.equal(generator.get_state(), expected.get_state())


def test_cells_that_may_have_escaped_count_in_part_as_control_cells() -> None:
    """Cell 2, of which nothing is known, by the penetrance of .4, cell 3 by its probability of .75."""
    made = model()
    made.penetrance.fill_(0.4)
    terms = terms_of(objective(made, Anchor(X, np.ones(2), HIT)))
    eps = draws()[1]
    z = X[2:4] + math.sqrt(VARIANCE) * eps
    of_hit = 0.5 * ((z[:, 1] + EDGE * z[:, 0] - SHIFT) / 0.5) ** 2 + math.log(0.5)
    share = np.array([0.4, 0.75])
    prior = 0.5 * z[:, 0] ** 2 + share * of_hit + (1 - share) * 0.5 * z[:, 1] ** 2
    own = prior - 0.5 * (eps**2 + math.log(VARIANCE)).sum(1)
    assert terms["kl"].item() == pytest.approx((control_terms()[1] + own.mean() / 2) / 2)
