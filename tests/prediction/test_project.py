"""Programs of other cells: the same cells, cells without some genes, shallower cells, and cells of another kind."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import crlseq
from crlseq.data.matrix import open_screen
from crlseq.data.preprocess import align
from crlseq.errors import InputError
from crlseq.prediction.project import project
from crlseq.run.run import Run
from tests.support import check_refusal, invoke, succeeds


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, ad.AnnData]:
    """A run of one half of a screen of counts, and the other half."""
    screen = crlseq.simulate(n_latents=4, perturbations_per_latent=2, n_genes=300, n_control=800, seed=11)
    first = np.random.default_rng(0).random(screen.n_obs) < 0.5
    folder = tmp_path_factory.mktemp("project") / "RUN"
    return crlseq.fit(screen[first].copy(), folder, method="linear", bootstrap=0), screen[~first].copy()


def test_cells_of_the_same_screen_lie_inside(halves: tuple[Run, ad.AnnData]) -> None:
    run, cells = halves
    found = project(run, cells)
    # By definition 1 % of the run's own cells, and a cell, beyond each of the two limits; others within three binomial errors.
    n_own = run.facts.cells.train + run.facts.cells.validation
    assert 0.01 <= found.own_share <= 0.02 + 2 / n_own
    assert abs(found.share - found.own_share) < 3 * np.sqrt(0.02 / cells.n_obs)
    assert np.median(found.distance) == pytest.approx(1, abs=0.02)
    assert found.notes == ()
    np.testing.assert_allclose(found.activities, run.latents(cells), rtol=0, atol=1e-6)


def test_cells_of_another_kind_lie_outside(halves: tuple[Run, ad.AnnData]) -> None:
    """A fifth of the genes four times as high or low, counts drawn anew."""
    run, cells = halves
    rng = np.random.default_rng(1)
    factor = np.ones(cells.n_vars)
    factor[rng.choice(cells.n_vars, cells.n_vars // 5, replace=False)] = 4.0 ** rng.choice([-1, 1], cells.n_vars // 5)
    other = cells.copy()
    other.X = sp.csr_matrix(rng.poisson(cells.to_df().to_numpy() * factor).astype(np.float32))
    found = project(run, other)
    assert found.share > 0.5
    assert np.median(found.distance) > 1.05
    assert "lie outside what the run's cells cover" in found.notes[0]


def test_half_the_depth_is_not_another_kind(halves: tuple[Run, ad.AnnData]) -> None:
    run, cells = halves
    thinned = cells.copy()
    counts = cells.to_df().to_numpy().astype(int)
    thinned.X = sp.csr_matrix(np.random.default_rng(2).binomial(counts, 0.5).astype(np.float32))
    found = project(run, thinned)
    assert found.share < found.own_share + 0.05
    assert not any("outside" in note for note in found.notes)


def test_missing_genes_leave_the_scale(halves: tuple[Run, ad.AnnData]) -> None:
    """A third of the genes is gone; the others have the values that they had, and few cells are outside."""
    run, cells = halves
    kept = np.sort(np.random.default_rng(3).choice(cells.n_vars, 200, replace=False))
    fewer = cells[:, kept].copy()
    record = run.preprocessing
    with run.screen() as fitted, open_screen(cells) as whole, open_screen(fewer) as part:
        all_genes, _ = align(record, whole, fitted)
        some_genes, notes = align(record, part, fitted)
        (block,), (less,) = ([own for _, own in screen.blocks()] for screen in (whole, part))
        before = all_genes.expression(record, block)[:, some_genes.present].mean(0)
        after = some_genes.expression(record, less).mean(0)
    assert all_genes.shared is None
    assert "200 of the 300 genes of the fitted file" in notes[-1]
    # Without the genes' share of the counts the values would be about log(3/2) = 0.4 higher.
    assert abs(np.asarray(after - before)).mean() < 0.02
    found = project(run, fewer)
    assert found.share < found.own_share + 0.05
    for ours, theirs in zip(project(run, cells).activities.T, found.activities.T, strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] > 0.85


def test_genes_that_only_the_other_file_has_change_nothing(halves: tuple[Run, ad.AnnData]) -> None:
    """Cells with 100 more genes, which hold as many counts again."""
    run, cells = halves
    more = ad.AnnData(
        sp.hstack([cells.X, sp.csr_matrix(np.full((cells.n_obs, 100), 50, np.float32))], format="csr"), obs=cells.obs
    )
    more.var_names = [*cells.var_names, *(f"more{i}" for i in range(100))]
    np.testing.assert_allclose(project(run, more).activities, project(run, cells).activities, rtol=0, atol=1e-5)


def test_command(halves: tuple[Run, ad.AnnData], tmp_path: Path) -> None:
    run, cells = halves
    source, output = tmp_path / "cells.h5ad", tmp_path / "with.h5ad"
    cells.write_h5ad(source)
    answer = succeeds("project", run.folder, source, "--output", output, "--json")
    told, written = json.loads(answer.out), ad.read_h5ad(output)
    assert told["outside"] == written.obs["crlseq_outside"].mean() == project(run, source).share
    assert written.obsm["X_crlseq"].shape == (cells.n_obs, len(told["programs"]))
    assert written.uns["crlseq_projection"]["program_names"].tolist() == told["programs"]
    assert (written.X != cells.X).nnz == 0

    check_refusal(*invoke("project", run.folder, source, "--output", output), 3, "exists", "--force")
    check_refusal(*invoke("project", run.folder, source, "--output", source, "--force"), 3, "the file to read")
    few = tmp_path / "few.h5ad"
    cells[:, :100].copy().write_h5ad(few)
    check_refusal(
        *invoke("project", run.folder, few, "--output", tmp_path / "o.h5ad"), 3, "200 of the 300 fitted genes"
    )
    assert not (tmp_path / "o.h5ad").exists()


def test_no_programs(tmp_path: Path) -> None:
    screen = crlseq.simulate(n_latents=3, perturbations_per_latent=2, n_genes=60, penetrance=(0.0, 0.0), seed=1)
    run = crlseq.fit(screen, tmp_path / "RUN", method="linear", bootstrap=0)
    assert run.facts.without_effect
    with pytest.raises(InputError, match="no programs"):
        project(run, screen)
