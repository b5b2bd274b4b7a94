"""Guides: whose gene they are of, which cells carry them, and fits of screens that have nothing else."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import crlseq
from crlseq.config import DataConfig, make_config
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.guide_names import genes_of_guides
from crlseq.data.guide_targets import targets_in_uns
from crlseq.data.guides import assign, labels_of
from crlseq.errors import InputError, UsageError
from tests.paths import shared
from tests.support import check_refusal, fit_file, invoke, labels, small_screen


@pytest.mark.parametrize(
    ("names", "rule", "genes"),
    [
        ("IFNGR1g1 IFNGR1g2 NTg3", "GENEg1", "IFNGR1 IFNGR1 control"),
        ("sgSTAT1_1 sgSTAT1_2 sgNT_1", "GENE_1", "STAT1 STAT1 control"),
        ("STAT1_g1 STAT1_sg2 NKX2-1_g1 non-targeting_g12", "GENE_g1", "STAT1 STAT1 NKX2-1 control"),
        ("Atg5g1 Rag1g2 Reg1g1 NTCg1", "GENEg1", "Atg5 Rag1 Reg1 control"),
        ("ENSG00000115415_1 ENSG00000115415_2 safe-targeting_7", "GENE_1", "ENSG00000115415 ENSG00000115415 control"),
        ("AHR_+_17421431.23-P1P2 AHR_-_17338341.23-P1 non-targeting_00012", "GENE_+_POSITION", "AHR AHR control"),
        ("TP53_ACGTACGTACGTACGTACGT MYC_TTTTACGTACGTACGTACGT NT3_g1", "GENE_SEQUENCE", "TP53 MYC NT3_g1"),
        ("sgSTAT1 sgIRF1 ctrl3", "sgGENE", "STAT1 IRF1 control"),
        ("JAK2_+_4985245-P1P2 JAK2_-_4985033.23 JAK2_4985245 NT-1", "GENE_+_POSITION", "JAK2 JAK2 JAK2 control"),
        ("HLA-A_P1P2 NKX2-1-P1 non-targeting", "GENE_+_POSITION", "HLA-A NKX2-1 control"),
        # Many control guides have no say.
        ("A_+_191878.23-P1 NT-1 NT-2 NT-3 NT-4 NT-5", "GENE_+_POSITION", "A" + 5 * " control"),
    ],
)
def test_genes_by_names(names: str, rule: str, genes: str) -> None:
    found, how = genes_of_guides(names.split())
    assert how == rule
    assert [found[name] for name in names.split()] == genes.split()


def test_names_that_say_no_gene_are_refused() -> None:
    with pytest.raises(InputError, match="do not contain their genes"):
        genes_of_guides(["STAT1", "IRF1", "Atg5", "control"])


def test_a_named_control() -> None:
    assert genes_of_guides(["AAVS1_1", "AAVS1_2", "NT_1"], "AAVS1")[0] == {
        "AAVS1_1": "AAVS1", "AAVS1_2": "AAVS1", "NT_1": "NT",
    }  # fmt: skip


def test_assignment_by_hand() -> None:
    # genes:        control, A, B, C; at least 5 UMIs and 0.8 of all
    rows = {
        (0, 10, 0, 0): (1, -1),
        (0, 4, 0, 0): (-1, -1),  # too few
        (0, 0, 0, 0): (-1, -1),
        (0, 8, 2, 0): (1, -1),  # 0.8 is enough
        (0, 12, 3, 0): (1, -1),
        (0, 79, 21, 0): (1, 2),
        (0, 7, 4, 0): (-2, -1),  # the second has too few to count, the first too small a share
        (0, 6, 6, 0): (1, 2),  # equal: in the order of the columns
        (9, 0, 0, 8): (0, 3),
        (0, 5, 5, 5): (-2, -1),
        (0, 8, 8, 4): (1, 2),
        (0, 8, 8, 5): (-2, -1),
    }
    first, second = assign(sp.csr_matrix(np.array(list(rows), dtype=float)), 5, 0.8)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == list(rows.values())


@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0.51, 1.0))
def test_assignment_follows_its_rule(seed: int, fewest: int, share: float) -> None:
    x = np.random.default_rng(seed).integers(0, [31, 12, 4], (8, 3)).astype(float)
    first, second = assign(sp.csr_matrix(x), fewest, share)
    for row, a, b in zip(x, first.tolist(), second.tolist(), strict=True):
        top = np.sort(row)[::-1]
        if a == -1:
            assert top[0] < fewest
        elif a == -2:
            assert top[0] >= fewest and top[0] < share * row.sum()
            assert top[1] < fewest or top[:2].sum() < share * row.sum()
        else:
            assert row[a] == top[0] >= fewest
            held = row[a] + (row[b] if b >= 0 else 0)
            assert held >= share * row.sum() * (1 - 1e-8)
            assert b < 0 or (row[b] == top[1] >= fewest and top[0] < share * row.sum())


def guided() -> ad.AnnData:
    """`small_screen` with two guides a perturbation in ``grna``; its own labels are gone."""
    adata = small_screen()
    names = adata.obs["perturbation"].astype(str).replace({"control": "NT"})
    adata.obs["grna"] = [
        f"GENE{name[1:]}g{1 + i % 2}" if name != "NT" else f"NTg{i % 3}" for i, name in enumerate(names)
    ]
    adata.obs["was"] = adata.obs.pop("perturbation").astype(str)
    return adata


def counted(adata: ad.AnnData) -> ad.AnnData:
    """The same guides as counts: 20 UMIs of a cell's own, 1 of another; the first two cells have none, or two guides."""
    guides = sorted(set(adata.obs["grna"]))
    counts = np.zeros((adata.n_obs, len(guides)), dtype=np.int64)
    own = np.array([guides.index(name) for name in adata.obs["grna"]])
    counts[np.arange(len(own)), own] = 20
    counts[np.arange(len(own)), (own + 5) % len(guides)] += 1
    counts[:2] = 0
    counts[1, [0, 2]] = 20
    adata.obsm["guides"] = pd.DataFrame(counts, index=adata.obs_names, columns=guides)
    return adata


def same_cells(data: PerturbSeqData, was: pd.Series, cells: slice) -> None:
    names = np.array([*data.condition_names, "-"], dtype=object)[data.condition]
    expected = was.str.replace("g", "GENE").to_numpy()
    assert names[cells].tolist() == expected[cells].tolist()


def test_a_column_of_guides() -> None:
    adata = guided()
    data = read_data(adata, make_config(guide_key="grna").data, 0)
    same_cells(data, adata.obs["was"], slice(None))
    assert data.guides is not None
    assert data.guides.record["rule"] == "GENEg1"
    assert data.guides.record["genes"]["NTg0"] == "control" and data.guides.record["genes"]["GENE3g2"] == "GENE3"
    assert data.notes[0] == (
        "Guides are named in column 'grna'. Genes are read from names like GENEg1 ('GENE0g1' is 'GENE0'): 12 guides "
        "target 6 genes and 3 are controls."
    )


def test_several_guides_in_a_label() -> None:
    adata = guided()
    grna = adata.obs["grna"].astype(str).to_numpy()
    grna[100:112] = "GENE0g1|GENE0g2"  # one gene
    grna[112:124] = "GENE1g1;NTg1"  # with a control guide: the gene
    grna[124:136] = "GENE2g1, GENE3g2"
    grna[136], grna[137] = "unassigned", "GENE2g1|multiple"
    adata.obs["grna"] = grna
    adata.obs.loc[adata.obs_names[138], "grna"] = None
    data = read_data(adata, make_config(guide_key="grna").data, 0)
    names = np.array([*data.condition_names, "-"], dtype=object)[data.condition]
    assert (
        set(names[100:112]) == {"GENE0"} and set(names[112:124]) == {"GENE1"} and set(names[124:136]) == {"GENE2+GENE3"}
    )
    assert set(names[136:139]) == {"-"}
    assert data.labels.dropped == {"unassigned": 1, "multiple": 1, "missing": 1}


def test_counts_in_obsm() -> None:
    adata = counted(guided())
    data = read_data(adata, make_config(guide_counts="guides").data, 0)
    same_cells(data, adata.obs["was"], slice(2, None))
    assert data.guides is not None and data.guides.record["cells"]["unassigned"] == 1
    assert data.guides.record["cells_with_two"] == 1
    assert data.labels.dropped == {"unassigned": 1}
    assert data.condition[:2].tolist() == [-1, -1]  # the pair is a combination of one cell, too few to fit
    assert "GENE0+GENE1" in data.labels.condition_names
    alone = read_data(adata, make_config(guide_counts="guides", combinations=False).data, 0)
    assert alone.labels.dropped == {"multiple": 1, "unassigned": 1}
    with pytest.raises(InputError, match="no control cells"):
        read_data(adata, make_config(guide_counts="guides", guide_min_share=0.96).data, 0)


def test_a_modality(tmp_path: Path) -> None:
    mudata = pytest.importorskip("mudata", reason="mudata is not installed")
    adata = counted(guided())
    guides = ad.AnnData(sp.csr_matrix(adata.obsm["guides"].to_numpy(dtype=np.float32)))
    guides.obs_names, guides.var_names = adata.obs_names, adata.obsm["guides"].columns
    del adata.obsm["guides"]
    # In another order, and without the last cell.
    order = np.random.default_rng(0).permutation(adata.n_obs - 1)
    mudata.MuData({"rna": adata, "guide": guides[order].copy()}).write_h5mu(tmp_path / "screen.h5mu")
    run = fit_file(tmp_path / "screen.h5mu", "--guide-counts", "guide")
    assert run.info["guides"]["modality"] == "guide" and run.info["guides"]["cells"]["unassigned"] == 2
    annotated = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad")
    assert (annotated.X != adata.X).nnz == 0
    assert (
        annotated.obs["crlseq_perturbation"][2:-1].tolist() == adata.obs["was"][2:-1].str.replace("g", "GENE").tolist()
    )
    assert annotated.obs["crlseq_perturbation"].iloc[-1] == "unassigned"
    refused = invoke("check", tmp_path / "screen.h5mu", "--guide-counts", "grna")
    assert refused.code == 3 and "'guide'" in refused.err


def test_a_mudata_file_without_expression(tmp_path: Path) -> None:
    mudata = pytest.importorskip("mudata", reason="mudata is not installed")
    mudata.MuData({"prot": small_screen()}).write_h5mu(tmp_path / "screen.h5mu")
    answer = invoke("check", tmp_path / "screen.h5mu")
    check_refusal(answer.code, answer.out, answer.err, 3, "no modality 'rna'", "'prot'")


@pytest.mark.parametrize(("expression", "guide"), [("gene", "guide"), ("rna", "gdo"), ("GEX", "crispr"), ("x", "y")])
def test_modalities_as_pipelines_name_them(tmp_path: Path, expression: str, guide: str) -> None:
    """And whose gene a guide is, where its table says so: their names tell nothing here."""
    adata = counted(guided())
    names = list(adata.obsm["guides"].columns)
    guides = ad.AnnData(sp.csr_matrix(adata.obsm.pop("guides").to_numpy(dtype=np.float32)))
    guides.obs_names, guides.var_names = adata.obs_names, [f"ID{i:03d}" for i in range(len(names))]
    guides.var["intended_target_name"] = [name.split("g")[0] if "NT" not in name else "chr1:100" for name in names]
    guides.var["targeting"] = [not name.startswith("NT") for name in names]
    adata.var["feature_types"], guides.var["feature_types"] = "Gene Expression", "CRISPR Guide Capture"
    path = tmp_path / "screen.h5mu"
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"], file.attrs["encoding-version"] = "MuData", "0.1.0"
        for name, part in ((expression, adata), (guide, guides)):
            ad.io.write_elem(file, f"mod/{name}", part)
        ad.io.write_elem(file, "obs", pd.DataFrame(index=adata.obs_names))
        ad.io.write_elem(file, "var", pd.DataFrame(index=[*adata.var_names, *guides.var_names]))
    data = read_data(path, make_config(guide_counts=guide).data, 0)
    same_cells(data, adata.obs["was"], slice(2, None))
    assert data.guides is not None
    assert "Genes are read from their table in the file ('ID000' is 'GENE0'): 12 guides target 6 genes" in data.notes[0]


def labelled(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({key: list(values) for key, values in columns.items()})


LIBRARIES = {
    "GENE_g1": "{}_g{}", "GENEg1": "{}g{}", "GENE_1": "sg{}-{}", "GENE_+_POSITION": "{}_+_1918789{}.23-P1P2",
    "GENE_SEQUENCE": "{}_ACGTACGTACGTACGTAC{}",
}  # fmt: skip


@pytest.mark.parametrize("style", LIBRARIES)
def test_labels_that_are_guides_are_read_as_genes(style: str) -> None:
    genes = ["STAT1", "NKX2-1", "HLA-A", "KLF1"]
    ends = ("GT", "TG") if style == "GENE_SEQUENCE" else (1, 2)
    names = [LIBRARIES[style].format(gene, end) for gene in genes for end in ends]
    cells = [
        *names,
        f"{names[0]}|{names[1]}",
        f"{names[0]}|{names[2]}",
        "NT-1",
        "NT-2",
        "NT-3",
        f"{names[7]}|NT-1",
        "*",
    ]
    expected = [*(gene for gene in genes for _ in ends), "STAT1", "NKX2-1+STAT1", "NT", "NT", "NT", "KLF1", "-"]
    found, guides = labels_of(labelled(guide=cells), DataConfig())
    assert labels(found) == expected and found.targets == found.names == tuple(sorted(genes))
    assert guides is not None and guides.record["rule"] == style
    assert guides.record["genes"][names[2]] == "NKX2-1" and guides.record["genes"]["NT-2"] == "NT"
    assert "8 guides target 4 genes and 3 are controls" in found.reason
    assert found.dropped == {"*": 1}
    # Where the column is named, labels are perturbations, and what they target is known.
    found, guides = labels_of(labelled(guide=[*cells[:8], "NT-1"]), DataConfig(perturbation_key="guide"))
    assert guides is None and labels(found) == [*cells[:8], "NT-1"]
    assert dict(zip(found.names, found.targets, strict=True))[names[2]] == "NKX2-1"
    assert f"names of guides like {style}" in found.reason and "--guide-key guide reads them as genes" in found.reason


@pytest.mark.parametrize(
    ("names", "measured"),
    [
        ("HLA-A HLA-B NKX2-1 MT-CO1 H2AC6", ""),
        ("NKX2-1 NKX2-2 NKX6-1 NKX6-2", "NKX2-1 NKX6-1"),
        ("Perturb_0 Perturb_1 Perturb_2 Perturb_3", ""),
        ("DrugA_1 DrugA_10 DrugA_100 DrugB_1 DrugB_10", ""),
        ("chr1_1000 chr1_2000 chr2_1000 chr2_2000", ""),
        ("chr1_1000000 chr2_2000000 chrX_3000000", ""),
        ("Atg5 Atg7 Atg12 Rag1 Rag2", ""),
        ("g0 g1 g2 g3", ""),
        ("ENSG00000115415.1 ENSG00000115416.2", ""),
        ("Mix_1 Mix_2 Mux_1 Mux_2", "STAT1"),
    ],
)
def test_labels_that_are_no_guides(names: str, measured: str) -> None:
    cells = ["control", *names.split()]
    found, guides = labels_of(labelled(perturbation=cells), DataConfig(), frozenset(measured.split()))
    assert guides is None
    assert labels(found) == cells and found.targets == found.names


def test_the_guides_of_cellxgene_and_their_table() -> None:
    ids = ["id1", "id2", "id3", "id1 || id3", "id1 || id9", "id9", "id8 || id9", "na"]
    screen = "CRISPR knockout screen"
    obs = labelled(
        genetic_perturbation_id=ids, genetic_perturbation_strategy=[*[screen] * 5, "control", "control", screen]
    )
    table = {
        "id1": {"role": "targeting", "target_features": {"ENSG1": "KARS1"}},
        "id2": {"role": "targeting", "target_features": {"ENSG1": "KARS1"}},
        "id3": {"role": "targeting", "target_features": {"ENSG2": "CERS6", "ENSG3": "CERS6-AS1"}},
        "id8": {"role": "control"}, "id9": {"role": "control"},
    }  # fmt: skip
    adata = ad.AnnData(np.ones((8, 2), dtype=np.float32), obs=obs.set_index(pd.Index([f"c{i}" for i in range(8)])))
    adata.uns["genetic_perturbations"] = table
    assert targets_in_uns(adata) == {"id1": "KARS1", "id2": "KARS1", "id3": "CERS6", "id8": "control", "id9": "control"}
    found, guides = labels_of(obs, DataConfig(), frozenset(), targets_in_uns(adata))
    assert labels(found) == ["KARS1", "KARS1", "CERS6", "CERS6+KARS1", "KARS1", "control", "control", "-"]
    assert guides is not None and found.key == "crlseq_perturbation"
    named, guides = labels_of(
        obs, DataConfig(perturbation_key="genetic_perturbation_id"), frozenset(), targets_in_uns(adata)
    )
    assert guides is None and named.names == ("id1", "id2", "id3") and named.targets == ("KARS1", "KARS1", "CERS6")


def test_a_fit_of_guides_that_nobody_named(tmp_path: Path) -> None:
    """As with --guide-key; the result is evaluated on another file with the same guides."""
    adata = guided()
    del adata.obs["was"]
    adata.write_h5ad(tmp_path / "screen.h5ad")
    run = fit_file(tmp_path / "screen.h5ad", "--hold-out-cells", "0.2")
    assert run.interventions["perturbation"].tolist() == [f"GENE{i}" for i in range(6)]
    assert run.info["perturbation_key"] == "crlseq_perturbation" and run.info["guides"]["column"] == "grna"
    other = guided()
    del other.obs["was"]
    other.obs_names = [f"other{i}" for i in range(other.n_obs)]
    other.X = sp.csr_matrix(other.X.toarray() + np.random.default_rng(1).poisson(0.2, other.shape))
    other.write_h5ad(tmp_path / "other.h5ad")
    scores = crlseq.evaluate(run, data=tmp_path / "other.h5ad")
    assert set(scores.conditions["condition"]) == {f"GENE{i}" for i in range(6)}
    prepared = invoke("prepare", tmp_path / "screen.h5ad", "--output", tmp_path / "store")
    assert prepared.code == 0, prepared.err
    store = read_data(tmp_path / "store", make_config().data, 0)
    assert store.perturbation_names == tuple(f"GENE{i}" for i in range(6)) and store.shuffled


def crowded(n_single: int) -> ad.AnnData:
    """Most cells carry three genes of six; some carry one beside a control guide."""
    adata = small_screen()
    names = [f"G{i}_g1" for i in range(6)]
    rng = np.random.default_rng(0)
    sets = ["|".join(rng.choice(names, 3, replace=False)) for _ in range(adata.n_obs)]
    sets[:20] = ["NT_g1"] * 20
    for i in range(2 * n_single):
        sets[20 + i] = f"G{i % 2}_g1|NT_g1"
    adata.obs["guides"] = sets
    del adata.obs["perturbation"]
    counts = pd.DataFrame({name: [20 * (name in own.split("|")) for own in sets] for name in [*names, "NT_g1"]})
    adata.obsm["counts"] = counts.set_index(adata.obs_names)
    return adata


@pytest.mark.parametrize("how", [{"guide_key": "guides"}, {"guide_counts": "counts"}, {}])
def test_high_multiplicity_is_said_and_single_cells_are_fitted(how: dict[str, str]) -> None:
    said = (
        "The multiplicity of infection is high: cells carry a median of 3 perturbations, and {} of 260 cells carry one"
    )
    data = read_data(crowded(20), make_config(**how, min_cells=20).data, 0)
    assert data.condition_names[1:] == ("G0", "G1")
    assert [int((data.condition == c).sum()) for c in range(3)] == [20, 20, 20]
    assert any(said.format(40) in note for note in data.notes)
    with pytest.raises(InputError) as refused:
        read_data(crowded(5), make_config(**how, min_cells=20).data, 0)
    assert said.format(10) in refused.value.message
    assert refused.value.hint.startswith("Two perturbations with 20 cells that carry nothing else are needed")


def test_a_map(tmp_path: Path) -> None:
    adata = guided()
    table = tmp_path / "map.csv"
    lines = [
        f"{guide},{'NT' if guide.startswith('NT') else 'ENSG' + guide[4]}" for guide in sorted(set(adata.obs["grna"]))
    ]
    table.write_text("\n".join(["guide,gene", *lines]))
    data = read_data(adata, make_config(guide_key="grna", guide_map=str(table)).data, 0)
    assert data.perturbation_names == tuple(f"ENSG{i}" for i in range(6))
    assert data.labels.is_control.sum() == 100


def test_the_whole_way_of_guides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """check, its command, inspect, predict, evaluate and a fit of the result again."""
    counted(guided()).write_h5ad(tmp_path / "screen.h5ad")
    monkeypatch.chdir(tmp_path)
    found = json.loads(invoke("check", "screen.h5ad", "--guide-counts", "guides", "--guide-min-umis", 4, "--json").out)
    assert found["guides"]["min_umis"] == 4 and found["dropped"] == {"unassigned": 1}
    shown = invoke("check", "screen.h5ad", "--guide-key", "grna").out
    assert "GENE3\tGENE3g1, GENE3g2" in shown
    words = shlex.split(found["command"])[1:]
    answer = invoke(*words, "--epochs", 1, "--method", "gradient", "--n-latents", 2, "--hold-out-cells", 0.2)
    assert answer.code == 0, answer.err
    run = crlseq.load("screen-run")
    assert run.info["config"]["data"]["guide_min_umis"] == 4
    assert run.interventions["perturbation"].tolist() == [f"GENE{i}" for i in range(6)]
    assert run.info["guides"]["genes"]["GENE5g1"] == "GENE5"
    predicted = invoke("predict", "screen-run", "--perturbation", "GENE1+GENE2", "--output", "virtual.h5ad")
    assert predicted.code == 0, predicted.err
    assert invoke("evaluate", "screen-run").code == 0
    assert invoke("plot", "screen-run", "embedding", "--output", "cells.png").code == 0
    again = invoke(
        "fit", "screen-run/crlseq.h5ad", "--output", "again", "--epochs", 1, "--method", "gradient",
        "--n-latents", 2, "--perturbation-key", "crlseq_perturbation",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert crlseq.load("again").interventions["perturbation"].tolist() == run.interventions["perturbation"].tolist()


def _bad_map(text: str) -> Any:
    def change(adata: ad.AnnData, folder: Path) -> dict[str, Any]:
        (folder / "map.tsv").write_text(text)
        return {"guide_key": "grna", "guide_map": str(folder / "map.tsv")}

    return change


def _matrix(values: Any) -> Any:
    def change(adata: ad.AnnData, folder: Path) -> dict[str, Any]:
        adata.obsm["guides"] = values(adata)
        return {"guide_counts": "guides"}

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda adata, folder: {"guide_key": "nothing"}, "no column 'nothing' for --guide-key"),
        (lambda adata, folder: {"guide_counts": "nothing"}, "no guide counts 'nothing'"),
        (lambda adata, folder: {"guide_key": "grna", "guide_map": "/nowhere/map.tsv"}, "cannot be read"),
        (_bad_map("GENE0g1\tA\nGENE0g2"), "Line 2 of guide map"),
        (_bad_map("GENE0g1\tA\nGENE0g1\tB"), "a second gene"),
        (_bad_map("GENE0g1\tA"), "14 of 15 guides are not in the guide map"),
        (_bad_map("\n"), "is empty"),
        (_bad_map("".join(f"{guide}\tA+B\n" for guide in sorted(set(guided().obs["grna"])))), "contains '\\+'"),
        (_matrix(lambda adata: np.ones((adata.n_obs, 3))), "do not name their guides"),
        (
            _matrix(lambda adata: pd.DataFrame(0.5, index=adata.obs_names, columns=["Ag1", "Bg1"])),
            "0.5, which is not a count",
        ),
        (
            _matrix(lambda adata: pd.DataFrame(-1, index=adata.obs_names, columns=["Ag1", "Bg1"])),
            "-1, which is not a count",
        ),
        (_matrix(lambda adata: pd.DataFrame("x", index=adata.obs_names, columns=["Ag1", "Bg1"])), "are not numbers"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, change: Any, says: str) -> None:
    adata = guided()
    options = change(adata, tmp_path)
    with pytest.raises(InputError, match=says):
        read_data(adata, make_config(**options).data, 0)


@pytest.mark.parametrize(
    "options",
    [{"guide_key": "grna", "guide_counts": "x"}, {"guide_key": "grna", "perturbation_key": "was"}, {"guide_map": "x"}],
)
def test_options_that_contradict(options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        read_data(guided(), make_config(**options).data, 0)


def test_papalexi() -> None:
    """The guides of a real screen: by name exactly its labels, by counts the same wherever a cell is assigned one gene."""
    path = shared("data/papalexi2021_thp1_20729x299.h5ad")
    was = ad.read_h5ad(path, backed="r").obs["perturbation"].astype(str).to_numpy()

    def names(**options: Any) -> np.ndarray:
        data = read_data(path, make_config(**options).data, 0)
        found: np.ndarray = np.array([*data.labels.condition_names, "-"], dtype=object)[data.labels.condition]
        return found

    assert (names(guide_key="grna") == was).all()
    single = names(guide_counts="grna_counts", combinations=False)
    told = (single != "-") & (single != "PDL1")
    assert (single[told] == was[told]).all()
    assert told.sum() > 0.75 * len(was)


def test_the_table_of_guides_in_a_file(tmp_path: Path) -> None:
    """CELLxGENE's column and table, on the whole way."""
    adata = small_screen()
    names = adata.obs.pop("perturbation").astype(str)
    adata.obs["genetic_perturbation_id"] = names.where(names == "control", "id-" + names).replace({"control": "na"})
    adata.obs["genetic_perturbation_strategy"] = names.map(
        lambda name: "no perturbations" if name == "control" else "CRISPR"
    )
    adata.uns["genetic_perturbations"] = {
        f"id-{name}": {"role": "targeting", "target_features": {"ENSG1": f"SYMBOL{int(name[1:]) // 2}"}}
        for name in sorted({*names} - {"control"})
    }
    adata.write_h5ad(tmp_path / "screen.h5ad")
    data = read_data(tmp_path / "screen.h5ad", make_config().data, 0)
    assert data.perturbation_names == ("SYMBOL0", "SYMBOL1", "SYMBOL2")
    assert data.labels.is_control.sum() == (names == "control").sum()
    assert "Genes are read from the table of guides in uns ('id-g0' is 'SYMBOL0')" in data.notes[0]
