"""Names of genes: one gene under several names, wherever a name is asked for."""

from __future__ import annotations

import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import crlseq
from crlseq.data.names import GeneNames, targets_in_words
from crlseq.run.run import Run
from tests.support import dense, small_screen

IDS = ["ENSG00000115415", "ENSG00000136997.21", "ENSG00000141510", "ENSG00000102145"]
SYMBOLS = ["STAT1", "MYC", "TP53", "GATA1"]


def names(**columns: object) -> GeneNames:
    return GeneNames.of(pd.DataFrame(columns, index=IDS))


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ("ENSG00000115415", (0,)), ("ENSG00000115415.4", (0,)), ("ENSG00000136997", (1,)), ("ensg00000136997.3", (1,)),
        ("MYC", (1,)), ("Myc", (1,)), ("P53", (2,)), ("Trp53", (2,)), ("LFS1", (2,)), ("NF-E1", (3,)), ("GATA2", ()), ("", ()),
        ("nan", ()), ("ENSG00000999999", ()),
    ],
)  # fmt: skip
def test_a_gene_is_found_under_each_of_its_names(asked: str, place: tuple[int, ...]) -> None:
    known = names(name=SYMBOLS, also=["", None, "P53|LFS1, trp53", "NF-E1; ERYF1"], chromosome=["2", "8", "17", "X"])
    assert known.find(asked) == place


def test_the_index_decides_before_columns_and_spelling_before_case() -> None:
    table = pd.DataFrame({"symbol": ["B", "C", "a", "D"]}, index=["A", "B", "x", "y"])
    known = GeneNames.of(table)
    assert known.find("B") == (1,)  # not the first, whose symbol is B
    assert known.find("a") == (2,)  # not the first, which is A in the index
    assert known.find("c") == (1,)


def test_a_name_of_several_genes() -> None:
    known = GeneNames(["E1", "E2", "E3"], {"symbol": ["TBCE", "TBCE", "tbce2"], "other": ["x|y", "y|z", ""]})
    assert known.find("TBCE") == (0, 1)  # all that are called so
    assert known.find("tbce") == known.find("y") == ()  # which of them is meant?
    assert known.find("Z") == (1,)


def test_columns_of_few_values_or_numbers_are_no_names() -> None:
    table = pd.DataFrame(
        {"biotype": ["coding"] * 4, "start": [1, 2, 3, 4], "gene_name": SYMBOLS, "feature": SYMBOLS},
        index=IDS,
    )
    assert list(GeneNames.of(table).columns) == ["gene_name", "feature"]


def test_symbols_stand_for_identifiers_and_not_for_symbols() -> None:
    known = names(description=["a b", "c d", "e f", "g h"], whatever=["STAT1", None, "TP53", "GATA1"])
    assert known.symbol_column == "whatever"
    assert known.symbols.tolist() == ["STAT1", IDS[1], "TP53", "GATA1"]
    turned = GeneNames.of(pd.DataFrame({"gene_ids": IDS}, index=SYMBOLS))
    assert turned.symbol_column is None and turned.symbols.tolist() == SYMBOLS
    numbered = GeneNames.of(pd.DataFrame({"gene_symbols": ["A", "A", "B"]}, index=["A", "A-1", "B"]))
    assert numbered.symbol_column is None


def test_where_targets_were_found_is_said() -> None:
    known = names(symbol=SYMBOLS)
    assert targets_in_words(known, ["MYC", IDS[0], "KLF1"]) == (
        "2 of 3 perturbed genes are measured (1 in column 'symbol' and 1 in the index of var)."
    )
    assert targets_in_words(known, ["KLF1"]).startswith(
        "None of the 1 perturbed genes ('KLF1') is measured: genes of this"
    )


def screens() -> tuple[ad.AnnData, ad.AnnData]:
    """The same cells with genes by symbol, and by identifier with symbols beside; six targets lose their transcripts."""
    symbol = small_screen(cells_per_perturbation=60, n_control=200, n_genes=60, depth=3000.0, seed=2)
    x, labels = dense(symbol), symbol.obs["perturbation"].astype(str).to_numpy()
    for k in range(6):
        x[:, k] += np.random.default_rng(k).poisson(np.where(labels == f"g{k}", 3, 60))
    symbol.X = x
    symbol.var_names = [f"g{k}" if k < 6 else f"GENE{k}" for k in range(60)]
    symbol.var = symbol.var[[]]
    identifier = symbol.copy()
    identifier.var_names = [f"ENSG{k:011d}.1" for k in range(60)]
    identifier.var["Gene"] = symbol.var_names.to_numpy()
    return symbol, identifier


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder, found = tmp_path_factory.mktemp("names"), {}
    for name, adata in zip(("symbol", "identifier"), screens(), strict=True):
        adata.write_h5ad(folder / f"{name}.h5ad")
        run = crlseq.fit(folder / f"{name}.h5ad", folder / name, method="linear", n_latents=3, bootstrap=0, threads=1)
        found[name] = run
    return found


def test_a_fit_does_not_depend_on_how_genes_are_named(runs: dict[str, Run]) -> None:
    symbol, identifier = runs["symbol"], runs["identifier"]
    pd.testing.assert_frame_equal(symbol.interventions, identifier.interventions)
    pd.testing.assert_frame_equal(symbol.evaluation, identifier.evaluation)
    np.testing.assert_array_equal(symbol.programs["loading"], identifier.programs["loading"])
    assert identifier.programs["symbol"].tolist() == symbol.programs["gene"].tolist()
    assert "symbol" not in symbol.programs and identifier.programs["gene"].str.startswith("ENSG").all()
    assert [p.title for p in symbol.described.values()] == [p.title for p in identifier.described.values()]
    assert [row["genes"] for row in symbol.info["programs"]] == [row["genes"] for row in identifier.info["programs"]]


def test_own_transcripts_are_no_program(runs: dict[str, Run]) -> None:
    for run in runs.values():
        assert run.interventions["shift"].abs().max() < 10
        top = [gene for row in run.info["programs"] for gene in row["genes"].split(", ")]
        assert sum(gene in {f"g{k}" for k in range(6)} for gene in top) <= 3


def test_sets_lists_and_cells_under_other_names(runs: dict[str, Run], tmp_path: Path) -> None:
    symbol, identifier = runs["symbol"], runs["identifier"]
    genes = [f"GENE{k}" for k in range(6, 60)]
    sets = {f"S{i}": genes[i::4] for i in range(4)} | {"D": [f"g{k}" for k in range(6)]}
    pd.testing.assert_frame_equal(crlseq.enrich(symbol, sets), crlseq.enrich(identifier, sets))
    by_identifier = {
        name: [f"ENSG{int(re.sub('[A-Za-z]', '', gene)):011d}" for gene in own] for name, own in sets.items()
    }
    pd.testing.assert_frame_equal(crlseq.enrich(identifier, by_identifier), crlseq.enrich(identifier, sets))
    listed = crlseq.fit(screens()[1], genes=tuple(genes[:30]), method="linear", n_latents=2, bootstrap=0)
    assert listed.preprocessing.genes == tuple(f"ENSG{k:011d}.1" for k in range(6, 36))
    other = screens()[0]
    np.testing.assert_array_equal(identifier.latents(other), symbol.latents(other))
    annotated = identifier.annotate(other.copy())
    np.testing.assert_array_equal(annotated.varm["crlseq_programs"], symbol.annotate(other).varm["crlseq_programs"])
    first, second = (run.predict(["g0"], source=other, seed=1) for run in (symbol, identifier))
    np.testing.assert_array_equal(first.X, second.X)
    assert second.var["symbol"].tolist() == first.var_names.tolist()


def test_vectors_under_other_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(20, 3)), index=[f"ENSG{k:011d}" for k in range(20)])
    table.to_csv(tmp_path / "vectors.csv")
    run = crlseq.fit(
        screens()[1], embeddings=str(tmp_path / "vectors.csv"), method="linear", n_latents=3, bootstrap=0, threads=1
    )
    assert run.extrapolation is not None
    assert {f"g{k}" for k in range(6)} <= {*run.extrapolation.table.names}
