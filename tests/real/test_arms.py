"""Lost chromosome arms in a real screen whose genes are given places at random: planted losses are found, and no others."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import read_data
from crlseq.readout.arms import Genome, arm_rows, arm_table
from crlseq.readout.effects import control_sums, measured_effect
from tests.paths import shared

# Lengths of the chromosomes of GRCh38, in millions of bases: genes are as dense on each.
LENGTHS = {
    **dict(zip(map(str, range(1, 23)), (248, 242, 198, 190, 181, 171, 159, 145, 138, 133, 135, 133, 114, 107, 102, 90, 83, 80, 58, 64, 46, 50), strict=True)),
    "X": 156,
}  # fmt: skip


def losses(adata: ad.AnnData, share: float, seed: int, folder: Path) -> tuple[int, int, int]:
    """Planted losses, those found, and others: of six perturbations, genes beyond the target are halved in a share of cells."""
    rng = np.random.default_rng(seed)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    genes = sorted({*adata.var_names} | {*labels} - {"control"})
    chromosome = rng.choice([*LENGTHS], len(genes), p=np.array([*LENGTHS.values()]) / sum(LENGTHS.values()))
    start = [int(rng.integers(1_000_000, 1_000_000 * LENGTHS[name])) for name in chromosome]
    path = folder / f"{seed}.csv"
    pd.DataFrame({"gene": genes, "chromosome": chromosome, "start": start}).to_csv(path, index=False)
    config = make_config(n_top_genes="all", gene_positions=str(path)).data
    data = read_data(adata, config, 0)
    genome, counts, planted = Genome.of(data), sp.csr_matrix(adata.X).toarray().astype(int), set[str]()
    assert genome is not None
    for name in rng.permutation(data.perturbation_names):
        at = genome.positions.find([name])
        assert at is not None
        beyond = next(stretch for (_, part), stretch in genome.stretches(*at).items() if part == "distal")
        if beyond.sum() >= 5 and len(planted) < 6:
            columns = adata.var_names.get_indexer([data.genes[j] for j in genome.gene[beyond]])
            cells = np.flatnonzero((labels == name) & (rng.random(len(labels)) < share))
            counts[np.ix_(cells, columns)] = rng.binomial(counts[np.ix_(cells, columns)], 0.5)
            planted.add(name)
    changed = adata.copy()
    changed.X = sp.csr_matrix(counts.astype(np.float32))
    data = read_data(changed, config, 0)
    genome, cells_of = Genome.of(data), data.cells_by_condition(splits.TRAIN, splits.VALIDATION)
    assert genome is not None
    controls, rows = control_sums(data, cells_of[0]), []
    for parts, own in zip(data.conditions[1:], cells_of[1:], strict=True):
        found = measured_effect(data, own, controls)
        rows += arm_rows(data, genome, parts[0], found.change, found.se, np.full(data.n_genes, np.nan))
    table = arm_table(rows)
    true = (table["part"] == "distal") & table["perturbation"].isin(planted)
    return int(true.sum()), int((true & table["lost"]).sum()), int((~true & table["lost"]).sum())


@pytest.mark.parametrize(("share", "least"), [(1.0, 0.9), (0.5, 0.5), (0.0, 0.0)])
def test_losses_in_papalexi(tmp_path: Path, share: float, least: float) -> None:
    adata = ad.read_h5ad(shared("data/papalexi2021_thp1_20729x299.h5ad"))
    planted, found, false = np.sum([losses(adata, share, seed, tmp_path) for seed in range(20, 26)], axis=0)
    print(f"{found} of {planted} planted losses found, and {false} others")
    assert planted == 36
    if share:
        assert found / planted >= least
        assert false / (found + false) <= 0.1
    else:
        assert found + false <= 1  # of six screens
