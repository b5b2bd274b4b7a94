"""Lost chromosome arms: stretches and windows by hand, planted losses found, and none where there are none."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, t

import crlseq
from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import read_data
from crlseq.data.names import GeneNames
from crlseq.data.positions import Positions
from crlseq.errors import InputError
from crlseq.readout.arms import Genome, arm_rows, arm_table, beside_windows
from crlseq.readout.effects import control_sums, measured_effect
from crlseq.run.arms import losses_in_words, programs_in_words
from crlseq.run.columns import ARM_COLUMNS
from tests.support import check_refusal, files_of, invoke

GENES_EACH, APART = 20, 6_000_000  # of 22 chromosomes, so far apart
TARGETS = [f"gene{GENES_EACH * (chromosome - 1) + 8}" for chromosome in (13, 14, 15, 17, 18, 19, 20, 21, 22)]


def screen(seed: int, lost: dict[str, float], n_genes: int = 22 * GENES_EACH) -> ad.AnnData:
    """Nine perturbations of genes in the middle of long arms; genes beyond are halved in a share of cells."""
    adata = crlseq.simulate(
        n_latents=3, perturbations_per_latent=3, n_genes=n_genes, cells_per_perturbation=150, n_control=600, seed=seed
    )
    labels = adata.obs["perturbation"].astype(str).replace({f"g{i}": name for i, name in enumerate(TARGETS)})
    counts, rng = adata.X.toarray().astype(int), np.random.default_rng(seed)
    for name, share in lost.items():
        first = int(name.removeprefix("gene"))
        beyond = np.arange(first + 1, first - 8 + GENES_EACH)
        cells = np.flatnonzero((labels == name).to_numpy() & (rng.random(len(labels)) < share))
        counts[np.ix_(cells, beyond)] = rng.binomial(counts[np.ix_(cells, beyond)], 0.5)
    adata.X, adata.obs["perturbation"] = counts.astype(np.float32), pd.Categorical(labels)
    adata.var["chromosome"] = [f"chr{i // GENES_EACH + 1}" for i in range(n_genes)]
    adata.var["start"] = [(i % GENES_EACH + 1) * APART for i in range(n_genes)]
    return adata


def table_of(adata: ad.AnnData) -> pd.DataFrame:
    data = read_data(adata, make_config(n_top_genes="all").data, 0)
    genome, cells = Genome.of(data), data.cells_by_condition(splits.TRAIN, splits.VALIDATION)
    assert genome is not None
    controls, rows = control_sums(data, cells[0]), []
    for parts, own in zip(data.conditions[1:], cells[1:], strict=True):
        found = measured_effect(data, own, controls)
        rows += arm_rows(data, genome, parts[0], found.change, found.se, np.full(data.n_genes, np.nan))
    return arm_table(rows)


def genome_of(chromosome: list[str], start: list[float]) -> Genome:
    n = len(chromosome)
    # Positions know genes on 21 and 22, and so arms of man.
    names = GeneNames([f"gene{i}" for i in range(n + 2)], {})
    positions = Positions(names, np.array([*chromosome, "21", "22"], dtype=object), np.array([*start, 1.0, 1.0]), "")
    arms = np.array([positions.arm(c, s) for c, s in zip(chromosome, start, strict=True)], dtype=object)
    return Genome(positions, np.arange(n), np.array(chromosome, dtype=object), np.array(start), arms, ())


def test_stretches_by_hand() -> None:
    """Chromosome 2 has its centromere at 93.9 million bases."""
    genome = genome_of(["1"] + ["2"] * 6, [5e6, 1e6, 5e7, 9e7, 1e8, 1.5e8, 2e8])
    found = {key: np.flatnonzero(stretch).tolist() for key, stretch in genome.stretches("2", 1.5e8).items()}
    assert found == {("q", "distal"): [6], ("q", "proximal"): [4], ("p", "other arm"): [1, 2, 3]}
    found = {key: np.flatnonzero(stretch).tolist() for key, stretch in genome.stretches("2", 6e7).items()}
    assert found == {("p", "distal"): [1, 2], ("p", "proximal"): [3], ("q", "other arm"): [4, 5, 6]}
    found = {key: np.flatnonzero(stretch).tolist() for key, stretch in genome.stretches("KI1", 6.0).items()}
    assert found == {("", "before"): [], ("", "after"): []}


def test_windows_by_hand() -> None:
    """Two genes against six others, whose neighbours sum to 1, 3, 1, -1, -1 and 3, around 1 on average."""
    values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0, -1.0, 0.0, -1.0])
    others = values[2:]
    windows = np.array([1, 3, 1, -1, -1, -1]) / 2 - others.mean()
    spread = max(np.mean(windows**2), np.mean(windows[windows < 0] ** 2)) / (1 - 1 / 3) * (1 + 1 / 3)
    size, error, p = beside_windows(values, 2)
    assert size == pytest.approx(-1.5 - others.mean())
    assert error == pytest.approx(np.sqrt(spread))
    assert p == pytest.approx(t.cdf(size / np.sqrt(spread), 2))
    values[:2] = -0.5  # as low as three of the windows
    assert beside_windows(values, 2)[2] == pytest.approx(max(t.cdf((-0.5 - others.mean()) / np.sqrt(spread), 2), 3 / 6))
    assert np.isnan(beside_windows(np.ones(8), 2)[2])


@pytest.mark.parametrize("block", [1, 8])
def test_neighbours_that_go_together_are_not_taken_for_a_loss(block: int) -> None:
    rng = np.random.default_rng(block)
    p = []
    for _ in range(2000):
        values = np.repeat(rng.normal(size=600 // block), block) * 1.5 + rng.normal(size=600)
        p.append(beside_windows(rankdata(np.roll(values, rng.integers(block))), 12)[2])
    assert np.mean(np.array(p) < 0.05) < 0.065
    assert np.mean(np.array(p) < 0.01) < 0.015
    assert np.mean(np.array(p) < 0.05) > 0.025  # and p-values are not larger than they have to be


def test_planted_losses_are_found_and_no_others() -> None:
    """In all cells and in a third of them, over eight screens: a planted loss is the stretch beyond the target alone."""
    found = {1.0: 0, 0.3: 0}
    false = tested = 0
    for seed in range(8):
        rng = np.random.default_rng(seed + 100)
        lost = dict(zip(rng.choice(TARGETS, 4, replace=False), (1.0, 1.0, 0.3, 0.3), strict=True))
        table = table_of(screen(seed + 50, lost))
        planted = (table["part"] == "distal") & table["perturbation"].isin(lost)
        assert planted.sum() == 4
        for row in table[planted & table["lost"]].to_dict("records"):
            found[lost[row["perturbation"]]] += 1
            assert row["change"] < 0 and row["n_genes"] == 11
        false += int((table["lost"] & ~planted).sum())
        tested += int((~planted).sum())
    assert found[1.0] >= 15  # of 16
    assert found[0.3] >= 8
    assert false / tested <= 0.05
    assert false / (false + sum(found.values())) <= 0.1


def test_a_screen_without_losses_has_none() -> None:
    tables = [table_of(screen(seed, {})) for seed in (71, 72, 73, 74)]
    assert sum(int(table["lost"].any()) for table in tables) <= 1
    assert all(list(table) == list(ARM_COLUMNS) for table in tables)


def test_a_run_tells_of_lost_arms(tmp_path: Path) -> None:
    path, lost = tmp_path / "screen.h5ad", TARGETS[3]
    screen(3, {lost: 1.0}).write_h5ad(path)
    answer = invoke("fit", path, "--output", tmp_path / "RUN", "--method", "linear", "--bootstrap", 0)
    assert answer.code == 0, answer.err
    sentence = f"{lost}: the 11 fitted genes beyond it on 17q fall by "
    assert sentence in " ".join(answer.err.split())
    assert {file.name for file in (tmp_path / "RUN").iterdir()} == files_of(tmp_path / "RUN") - {"resume.pt"}
    run = crlseq.load(tmp_path / "RUN")
    assert run.arms is not None and list(run.arms) == list(ARM_COLUMNS)
    assert run.arms.loc[run.arms["lost"], "perturbation"].tolist() == [lost]
    assert run.info["positions"] == {"source": "columns chromosome and start of var", "n_tested": 9}
    driven = [program for program in run.described.values() if lost in [*program.drivers["perturbation"]]]
    assert [program.lost_arms for program in driven] == [(lost,)]
    assert sentence in (tmp_path / "RUN" / "report.html").read_text()
    written = tmp_path / "RUN" / "arms.csv"
    whole = written.read_text()
    written.write_text(whole.replace(lost, "gene1"))
    with pytest.raises(InputError, match=r"arms\.csv names 'gene1', which is not in the run"):
        crlseq.load(tmp_path / "RUN")
    written.write_text(whole)
    table = invoke("inspect", "arms", tmp_path / "RUN")
    assert table.code == 0 and len(table.out.splitlines()) == len(run.arms) + 1
    assert sentence in " ".join(invoke("inspect", "perturbation", tmp_path / "RUN", lost, "--json").out.split())


def test_a_run_without_positions(linear_folder: Path) -> None:
    run = crlseq.load(linear_folder)
    assert run.arms is None and run.info["positions"] is None
    assert losses_in_words(run.arms) == programs_in_words(run.arms, run.interventions) == []
    answer = invoke("inspect", "arms", linear_folder)
    check_refusal(answer.code, answer.out, answer.err, 3, "Positions of genes are not known")


def test_sentences() -> None:
    row = {"n_genes": 40, "change": -0.3, "se": 0.04, "lost": True, "program_fdr": 0.01, "chromosome": "2"}
    arms = pd.DataFrame([
        row | {"perturbation": "STAT1", "arm": "q", "part": "distal"},
        row | {"perturbation": "STAT1", "arm": "q", "part": "proximal", "n_genes": 7, "program_fdr": 0.5},
        row | {"perturbation": "JAK2", "arm": "p", "part": "other arm", "program_fdr": np.nan},
        row | {"perturbation": "MYC", "arm": "", "part": "before", "lost": False},
    ])  # fmt: skip
    assert losses_in_words(arms) == [
        "STAT1: the 40 fitted genes beyond it on 2q fall by 0.30 ± 0.04 and the 7 fitted genes between it and the centromere "
        "on 2q fall by 0.30 ± 0.04 (log expression): its cells may have lost that part of the chromosome.",
        "JAK2: the 40 fitted genes on 2p fall by 0.30 ± 0.04 (log expression): its cells may have lost that part of the "
        "chromosome.",
    ]
    interventions = pd.DataFrame({"perturbation": ["STAT1", "JAK2", "MYC"], "program": ["P0", "P0", "P1"], "fdr": 0.01})
    assert programs_in_words(arms, interventions) == [
        "P0 may in part be a lost piece of a chromosome: its genes there fall, as in the cells of STAT1 (1 of its 2 drivers)."
    ]
    many = pd.concat([arms[:1].assign(perturbation=f"gene{i}") for i in range(10)])
    assert losses_in_words(many)[-1].startswith("Cells of 2 more perturbations")
