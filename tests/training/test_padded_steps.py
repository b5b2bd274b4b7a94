"""Steps whose sets are filled up have the terms, and the gradients, of those that are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.batches import ControlPartners, epoch_batches
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.expression_rows import DenseRows
from crlseq.model.losses import weighted_total
from crlseq.model.sparse_losses import StepCells
from crlseq.training.objective import CONTROLS, SETS, Objective
from crlseq.training.trainer import architecture_of
from crlseq.training.warm_start import Anchor
from tests.support import small_screen


@pytest.fixture(scope="module")
def data() -> PerturbSeqData:
    """Dense, with doubles and two batches."""
    made = small_screen(
        depth=2000.0, cells_per_perturbation=50, n_control=200, n_doubles=2, n_batches=2, n_genes=40, seed=1
    )
    few = (made.obs["perturbation"] == "g0") & (np.arange(made.n_obs) % 3 == 0)
    return read_data(made[~few.to_numpy()].copy(), make_config().data, 0)


@pytest.mark.parametrize("decoder", ["dense", "sparse"])
@pytest.mark.parametrize("anchored", [False, True])
def test_terms_and_gradients_are_the_same(data: PerturbSeqData, decoder: str, anchored: bool) -> None:
    config = make_config(decoder=decoder).model
    torch.manual_seed(0)
    model = DiscrepancyVAE(**architecture_of(config, data.n_genes, 3, len(data.perturbation_names))).double()
    n, rng = len(data.split), np.random.default_rng(0)
    if anchored:
        model.penetrance[::2] = 0.6
    hit = np.where(rng.random(n) < 0.2, np.nan, rng.random(n))
    anchor = Anchor(rng.standard_normal((n, 3)), np.full(3, 0.5), hit) if anchored else None
    objective = Objective(model, data, config, 30.0, anchor)
    cells = data.cells_by_condition(splits.TRAIN)
    batches = epoch_batches(cells, ControlPartners(cells[0], data.batch), 13, 5, rng)
    assert any(not batch.mask.all() for batch in batches) and any(len(batch.mask) < 5 for batch in batches)
    for batch in batches:
        found = []
        for padded in (False, True):
            step = objective.prepare(batch, padded=padded)
            terms = objective(step, torch.Generator().manual_seed(3))
            model.zero_grad()
            weighted_total(terms, dict.fromkeys(terms, 1.0)).backward()  # type: ignore[no-untyped-call]
            found.append((terms, [p.grad for p in model.parameters() if p.grad is not None]))
        assert isinstance(step.cells, StepCells) and isinstance(step.cells.rows, DenseRows)
        assert step.mask is not None and step.mask.shape[1] % SETS == 0 and step.cells.n_controls % CONTROLS == 0
        assert found[0][0].keys() == found[1][0].keys() and ("anchor" in found[0][0]) == anchored
        for name, value in found[0][0].items():
            torch.testing.assert_close(found[1][0][name], value, rtol=1e-12, atol=1e-12, msg=name)
        for ours, theirs in zip(found[1][1], found[0][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
