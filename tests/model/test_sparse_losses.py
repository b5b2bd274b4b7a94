"""The objective from non-zeros is the objective from dense rows: value and gradient, on screens of random shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.config import ModelConfig
from crlseq.data import splits
from crlseq.data.batches import BatchIndex
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import weighted_total
from crlseq.model.networks import GeneSetLayer
from crlseq.model.sparse_decoder import SparseDecoder
from crlseq.model.sparse_losses import Pairs
from crlseq.training.cell_source import CellSource
from crlseq.training.objective import Objective
from crlseq.training.warm_start import Anchor

WEIGHTS = {"mmd": 10.0, "reconstruction": 1.0, "kl": 1.0, "graph": 1e-3, "anchor": 1.0}


class Screen:
    """What the objective asks of a screen: log-normalised counts, stored sparsely or densely."""

    def __init__(self, x: np.ndarray, n_controls: int, table: np.ndarray, sparse: bool) -> None:
        self.x: Any = sp.csr_matrix(x) if sparse else x
        self.n_controls, self.table, self.n_genes = n_controls, table, x.shape[1]

    def dense(self, index: np.ndarray) -> np.ndarray:
        rows = self.x[index]
        return np.asarray(rows.toarray() if sp.issparse(rows) else rows)

    def cells(self, condition: int, code: int) -> np.ndarray:
        assert (condition, code) == (0, splits.TRAIN)
        return np.arange(self.n_controls)

    def perturbation_table(self) -> np.ndarray:
        return self.table


def screen(rng: np.random.Generator, n_genes: int, n_perturbations: int, sparse: bool) -> Screen:
    """80 controls, 120 perturbed cells; a few genes in every cell, most in few; doubles among the conditions."""
    rate = rng.gamma(0.4, 0.8, n_genes) + np.where(rng.random(n_genes) < 0.05, 30.0, 0.0)
    x = np.log1p(rng.poisson(np.exp(rng.normal(0, 0.5, (200, 1))) * rate)).astype(np.float32)
    x[0] = 0  # a cell without a value among the fitted genes
    singles = [[k, -1] for k in range(n_perturbations)]
    doubles = [[k, k + 1] for k in range(n_perturbations - 1)]
    return Screen(x, 80, np.array([[-1, -1], *singles, *doubles]), sparse)


def batch(rng: np.random.Generator, n_conditions: int, width: int, of: Screen) -> BatchIndex:
    """Conditions of up to `width` pairs that share a few controls; one condition may be shorter."""
    few = rng.choice(80, width + 2, replace=False)
    control = np.stack([rng.permutation(few)[:width] for _ in range(n_conditions)])
    perturbed = rng.permutation(np.arange(80, 200))[: n_conditions * width].reshape(n_conditions, width)
    mask = np.ones(control.shape, dtype=bool)
    mask[-1, int(rng.integers(2, width + 1)) :] = False
    return BatchIndex(rng.integers(1, len(of.table), n_conditions), np.where(mask, perturbed, 0), control * mask, mask)


def model(
    seed: int,
    n_genes: int,
    p: int,
    k: int,
    intervention: str,
    equations: str,
    n_gene_sets: int = 0,
    decoder: str = "dense",
) -> DiscrepancyVAE:
    torch.manual_seed(seed)
    made = DiscrepancyVAE(n_genes, p, k, 8, intervention, equations, n_gene_sets=n_gene_sets, leak=0.1, decoder=decoder)
    with torch.no_grad():
        if isinstance(made.encoder.hidden, GeneSetLayer):
            made.encoder.hidden.assign(torch.rand(n_gene_sets, n_genes) < 0.3)
        assert made.log_noise is not None
        made.log_noise.normal_(-1, 1)
        made.scm.shift.normal_(0, 2)
        if isinstance(made.decoder, SparseDecoder):
            made.decoder.output.mask.copy_(torch.randn(n_genes, p) * (torch.rand(n_genes, p) < 0.5))
        else:
            made.decoder.output.weight.normal_(0, 0.2)
    return made


def objective(made: DiscrepancyVAE, data: Screen, config: ModelConfig, sparse: bool, draws: torch.dtype) -> Objective:
    """The objective in either form; draws are made in `draws`, so that dtypes compare."""
    hit = np.where(np.arange(200) % 3, np.linspace(0, 1, 200), np.nan)
    anchor = Anchor(np.zeros((200, made.scm.graph.shape[0])), np.full(made.scm.graph.shape[0], 0.5), hit)
    found = Objective(made, data, config, 30.0, anchor)  # type: ignore[arg-type]
    assert found.linear_output
    found.linear_output = sparse
    dtype = found.dtype
    found._draws = lambda shape, g: torch.randn(shape, generator=g, dtype=draws).to(dtype)  # type: ignore[method-assign]
    return found


def value_and_gradient(
    made: DiscrepancyVAE, data: Screen, config: ModelConfig, sparse: bool, cells: BatchIndex, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    made = made.to(dtype)
    made.zero_grad()
    found = objective(made, data, config, sparse, torch.float64)
    terms = found(found.prepare(cells), torch.Generator().manual_seed(3))
    weighted_total(terms, WEIGHTS).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.double().clone() for name, p in made.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in terms.items()}, gradients


def difference(found: Any, expected: Any) -> float:
    """Largest relative difference among terms and among gradients (by their norms)."""
    terms = [abs(found[0][name] - value) / max(abs(value), 1e-6) for name, value in expected[0].items()]
    norms = [(found[1][name] - g).norm() / g.norm() for name, g in expected[1].items() if g.norm() > 1e-9]
    assert found[0].keys() == expected[0].keys() and found[1].keys() == expected[1].keys()
    return float(max(*terms, *norms))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16), n_genes=st.integers(3, 90), p=st.integers(1, 5), n_conditions=st.integers(1, 5),
    width=st.integers(2, 20), intervention=st.sampled_from(["soft", "hard", "shift"]),
    equations=st.sampled_from(["linear", "nonlinear"]), sparse=st.booleans(),
    estimator=st.sampled_from(["unbiased", "biased"]), n_gene_sets=st.sampled_from([0, 7]),
    decoder=st.sampled_from(["dense", "sparse"]), penetrance=st.sampled_from([1.0, 0.5]),
)  # fmt: skip
def test_both_forms_agree(
    seed: int, n_genes: int, p: int, n_conditions: int, width: int,
    intervention: str, equations: str, sparse: bool, estimator: Any, n_gene_sets: int, decoder: str, penetrance: float,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    data = screen(rng, n_genes, p + 1, sparse)
    cells, config = batch(rng, n_conditions, width, data), ModelConfig(mmd_estimator=estimator)
    made = model(seed, n_genes, p, p + 1, intervention, equations, n_gene_sets, decoder)
    made.penetrance[::2] = penetrance
    dense = value_and_gradient(made, data, config, False, cells, torch.float64)
    assert difference(value_and_gradient(made, data, config, True, cells, torch.float64), dense) < 1e-9


@pytest.mark.parametrize("sparse", [True, False])
def test_float32_is_within_1e_5_of_float64(sparse: bool) -> None:
    rng = np.random.default_rng(0)
    data = screen(rng, 2000, 6, sparse)
    cells, made = batch(rng, 4, 25, data), model(0, 2000, 5, 6, "soft", "linear")
    single = value_and_gradient(made, data, ModelConfig(), True, cells, torch.float32)
    exact = value_and_gradient(made, data, ModelConfig(), True, cells, torch.float64)
    assert difference(single, exact) < 1e-5


def test_squares_about_a_far_bias_keep_float32s_digits() -> None:
    # 30 counts in every cell, hardly any variance: squares about 0 would lose four digits.
    rng = np.random.default_rng(1)
    data = screen(rng, 50, 3, True)
    data.x = sp.csr_matrix((100 + 0.01 * rng.normal(size=(200, 50))).astype(np.float32))
    cells, made = batch(rng, 2, 10, data), model(0, 50, 2, 3, "soft", "linear")
    with torch.no_grad():
        made.decoder.output.bias.fill_(100)
        made.decoder.output.weight.mul_(1e-2)
        made.encoder.hidden.weight.zero_()
    found = [
        value_and_gradient(made, data, ModelConfig(mmd_weight=0), True, cells, dtype)[0]["reconstruction"]
        for dtype in (torch.float32, torch.float64)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_values_of_pairs_are_added_up_by_row() -> None:
    # Two conditions of two and one pairs: row 0 is the control of both, rows 2 to 4 are perturbed; a place fills up.
    pairs = Pairs(
        torch.tensor([[[0, 1], [0, 0]], [[2, 3], [4, 0]]]),
        torch.tensor([0, 2, 1, 4, 5, 6]),
        torch.tensor([0, 2, 3, 4, 5, 6]),
    )
    values = torch.tensor([[[1.0, 2.0], [4.0, 99.0]], [[8.0, 16.0], [32.0, 99.0]]])[..., None]
    assert pairs.gather(values)[:, 0].tolist() == [5.0, 2.0, 8.0, 16.0, 32.0]
    rows = torch.arange(5.0, requires_grad=True)
    assert pairs.spread(rows[:, None])[..., 0].tolist() == [[[0, 1], [0, 0]], [[2, 3], [4, 0]]]
    (pairs.spread(rows[:, None]) * values).sum().backward()
    assert rows.grad is not None and rows.grad.tolist() == [5.0, 2.0, 8.0, 16.0, 32.0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_slices_the_same_rows() -> None:
    data = screen(np.random.default_rng(0), 40, 3, True)
    index, table = np.array([3, 0, 150, 3]), torch.randn(40, 5)
    source = CellSource(data, torch.device("cuda", 0), torch.float32)  # type: ignore[arg-type]
    found = source.rows(index).times(table.cuda()).cpu()
    torch.testing.assert_close(found, torch.from_numpy(data.dense(index)) @ table)
