"""Screens and fits that the tests of the fake device share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crlseq
from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.batches import BatchIndex, ControlPartners, epoch_batches
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.run.run import Run
from crlseq.training.objective import Objective
from crlseq.training.trainer import architecture_of
from crlseq.training.warm_start import Anchor
from tests.support import small_screen

# Perturbations of several sizes, so that some pieces have rows that only fill up; doubles; two batches.
SHAPE: dict[str, Any] = {
    "cells_per_perturbation": 60, "n_control": 260, "n_doubles": 2, "n_batches": 2, "n_genes": 60, "seed": 1,
}  # fmt: skip
FIT: dict[str, Any] = {
    "n_latents": 3,
    "epochs": 3,
    "bootstrap": 0,
    "dtype": "float64",
    "method": "gradient",
    "threads": 1,
}


@pytest.fixture(scope="session")
def screens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Expression that is stored sparsely, densely, and in a prepared store; and gene sets."""
    found: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("screens")
    for name, depth in (("sparse", 30.0), ("dense", 2000.0)):
        made = small_screen(depth=depth, **SHAPE)
        few = (made.obs["perturbation"] == "g0") & (np.arange(made.n_obs) % 3 == 0)
        found[name] = made[~few.to_numpy()].copy()
    found["sparse"].write_h5ad(folder / "sparse.h5ad")
    found["file"], found["store"] = folder / "sparse.h5ad", folder / "store"
    crlseq.prepare([folder / "sparse.h5ad"], folder / "store")
    rng, genes = np.random.default_rng(0), found["sparse"].var_names
    lines = ["\t".join([f"SET{i}", "", *rng.choice(genes, 12, replace=False)]) for i in range(8)]
    found["sets"] = folder / "sets.gmt"
    found["sets"].write_text("\n".join(lines) + "\n")
    return found


@pytest.fixture(scope="session")
def read(screens: dict[str, Any]) -> dict[str, PerturbSeqData]:
    """The screens in memory, read."""
    return {name: read_data(screens[name].copy(), make_config().data, 0) for name in ("sparse", "dense")}


def with_escaped_cells(data: PerturbSeqData, device: torch.device) -> tuple[Objective, BatchIndex]:
    """An objective with an anchor and perturbations that miss some of their cells, and a batch with doubles."""
    config = make_config().model
    model = DiscrepancyVAE(**architecture_of(config, data.n_genes, 3, len(data.perturbation_names)))
    model.penetrance[::2] = 0.6
    n = len(data.split)
    anchor = Anchor(np.zeros((n, 3)), np.full(3, 0.5), np.linspace(0, 1, n))
    cells = data.cells_by_condition(splits.TRAIN)
    batch = epoch_batches(cells, ControlPartners(cells[0], data.batch), 20, 8, np.random.default_rng(0))[0]
    return Objective(model.to(device), data, config, 30.0, anchor), batch


def fit(screen: Any, device: str, output: Path | None = None, **options: Any) -> Run:
    """A small fit in float64; None takes an option's default."""
    words = {name: value for name, value in {**FIT, **options}.items() if value is not None}
    return crlseq.fit(screen if isinstance(screen, Path) else screen.copy(), output, device=device, **words)
