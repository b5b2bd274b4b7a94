"""What a program is known for, on real screens with real gene sets; skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import crlseq
from crlseq.run.run import Run
from tests.paths import shared
from tests.support import invoke

REACTOME, GO = "genesets/enrichr_Reactome_2022.gmt", "genesets/GO_BP_orgHsegdb3.16.symbols.gmt"
LINEAR = {"method": "linear", "bootstrap": 0}


@pytest.fixture(scope="module")
def papalexi() -> Run:
    pytest.importorskip("gseapy")
    return crlseq.fit(shared("data/papalexi2021_thp1_20729x299.h5ad"), batch_key="bio_rep", **LINEAR)


def interferon(table: pd.DataFrame) -> pd.DataFrame:
    named = table["gene_set"] + " " + table["description"]
    return table[named.str.contains("IFNG|interferon.gamma", case=False)]


def test_the_jak_stat_program_is_interferon_gamma_signalling(papalexi: Run) -> None:
    receptor = {"IFNGR1", "IFNGR2", "JAK2", "STAT1"}
    program = papalexi.interventions.set_index("perturbation").loc[sorted(receptor), "program"]
    assert program.nunique() == 1 and program.iloc[0] != ""
    found = crlseq.enrich(papalexi, shared(REACTOME))
    drivers = found[found["test"] == "drivers"]
    best = drivers.sort_values("fdr").iloc[0]
    assert len(interferon(drivers[drivers.index == best.name])) == 1
    assert best["program"] == program.iloc[0]
    assert best["fdr"] < 0.01
    assert set(best["genes"].split(", ")) <= receptor
    others = interferon(drivers[drivers["program"] != program.iloc[0]])
    assert len(others) and (others["fdr"] > 0.5).all()


def test_go_says_the_same_with_less_certainty(papalexi: Run) -> None:
    """More sets: one of interferon-gamma is still first, but no longer certain."""
    found = crlseq.enrich(papalexi, shared(GO))
    drivers = found[found["test"] == "drivers"]
    assert drivers.iloc[0]["program"] == interferon(drivers).iloc[0]["program"]
    assert interferon(drivers.iloc[:1])["p_value"].iloc[0] < 0.01 < drivers["fdr"].min()


def test_norman_and_names_of_another_kind(tmp_path: Path) -> None:
    pytest.importorskip("gseapy")
    path = shared("data/norman2019_k562_perturbench_3375x500.h5ad")
    answer = invoke("fit", path, "--output", tmp_path / "RUN", "--method", "linear", "--bootstrap", 0, "--n-latents", 4)
    assert answer.code == 0, answer.err
    answer = invoke("inspect", "programs", tmp_path / "RUN", "--gene-sets", shared(REACTOME), "--json")
    assert answer.code == 0, answer.err
    ensembl = tmp_path / "ensembl.gmt"
    ensembl.write_text("A\t\tENSG00000115415\tENSG00000096968\n")
    answer = invoke("inspect", "programs", tmp_path / "RUN", "--gene-sets", ensembl)
    assert answer.code == 3 and "Ensembl" in answer.err and "symbols" in answer.err
