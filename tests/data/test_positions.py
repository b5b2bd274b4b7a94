"""Positions of genes: from every kind of file and from ``var``, by hand; arms; and files that are none."""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas as pd
import pytest

from crlseq.data.names import GeneNames
from crlseq.data.positions import read_positions
from crlseq.errors import InputError
from tests.support import check_refusal, invoke, small_screen

# Three genes of man, with identifiers and symbols, of which the screen has the symbols.
STAT1, IFNG, JAK2 = ("2", 190_969_149), ("12", 68_154_768), ("9", 4_984_390)
SYMBOLS = ["STAT1", "IFNG", "JAK2"]
GTF = (
    "#!genome-build GRCh38\n"
    'chr2\tHAVANA\tgene\t190969149\t191178435\t.\t-\t.\tgene_id "ENSG00000115415.20"; gene_name "STAT1";\n'
    'chr2\tHAVANA\ttranscript\t1\t191178435\t.\t-\t.\tgene_id "ENSG00000115415.20"; gene_name "STAT1";\n'
    'chr12\tHAVANA\tgene\t68154768\t68159740\t.\t-\t.\tgene_id "ENSG00000111537"; gene_name "IFNG";\n'
    'chr9\tHAVANA\tgene\t4984390\t5129948\t.\t+\t.\tgene_id "ENSG00000096968"; gene_name "JAK2";\n'
)
BED = "track name=genes\nchr2\t190969148\t191178435\tSTAT1\t0\t-\nchr12\t68154767\t68159740\tIFNG\nchr9\t4984389\t5129948\tJAK2\n"
CSV = 'gene,biotype,Chromosome,Start\nSTAT1,x,2,190969149\n"IFNG",x,12,68154768\nJAK2,y,9,4984390\n'
TSV = "Gene stable ID\tgene name\tchromosome\tGene start (bp)\nENSG00000115415\tSTAT1\t2\t190969149\nENSG00000111537\tIFNG\t12\t68154768\nENSG00000096968\tJAK2\t9\t4984390\n"


@pytest.mark.parametrize(("name", "text"), [("a.gtf", GTF), ("a.bed", BED), ("a.csv", CSV), ("a.tsv", TSV)])
@pytest.mark.parametrize("packed", [False, True])
def test_files_by_hand(tmp_path: Path, name: str, text: str, packed: bool) -> None:
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = read_positions(pd.DataFrame(index=SYMBOLS), str(path))
    assert found is not None
    assert [found.find([symbol]) for symbol in SYMBOLS] == [STAT1, IFNG, JAK2]
    assert found.find(["TP53"]) is None
    if name in ("a.gtf", "a.tsv"):
        assert found.find(["unknown", "ENSG00000115415.3"]) == STAT1


def test_columns_of_var() -> None:
    var = pd.DataFrame(
        {"Chromosome": ["chr2", "12", None, "MT", "6_GL000250v2_alt"], "Start": [5, 6.0, 7, 8, 9]}, index=[*"ABCDE"]
    )
    found = read_positions(var, None)
    assert found is not None
    assert [found.find([name]) for name in "ABCDE"] == [("2", 5.0), ("12", 6.0), None, None, None]
    assert found.source == "columns Chromosome and Start of var"
    assert found.in_words(GeneNames.of(var), ["A", "C"]) == (
        "2 of 5 genes and 1 of 2 perturbed genes (columns Chromosome and Start of var)"
    )
    assert read_positions(var[["Chromosome"]], None) is None
    assert read_positions(var.assign(Start=None), None) is None


def test_a_gene_on_two_chromosomes_has_no_position(tmp_path: Path) -> None:
    path = tmp_path / "a.bed"
    path.write_text("X\t99\t200\tCD99\nY\t99\t200\tCD99\n1\t99\t200\tA\n1\t9\t200\tA\n")
    found = read_positions(pd.DataFrame(index=["A", "CD99"]), str(path))
    assert found is not None
    assert found.find(["CD99"]) is None and found.find(["A"]) == ("1", 10.0)


@pytest.mark.parametrize(
    ("there", "arms"), [([*range(1, 23), "X"], True), ([*range(1, 20), "X"], False), ([*range(1, 30)], False)]
)
def test_arms_are_those_of_man_alone(there: list[int | str], arms: bool) -> None:
    var = pd.DataFrame({"chrom": map(str, there), "start": 1}, index=[f"gene{i}" for i in range(len(there))])
    found = read_positions(var, None)
    assert found is not None
    assert found.with_arms == arms
    assert [found.arm(*STAT1), found.arm(*JAK2), found.arm("KI270728.1", 1)] == (["q", "p", ""] if arms else [""] * 3)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.gtf", GTF.replace("\t", " "), "Line 2 of the gene positions"),
        ("a.gtf", GTF.replace("gene_id", "id"), "has no gene_id"),
        ("a.gtf", GTF.replace("\tgene\t", "\texon\t"), "have no gene"),
        ("a.bed", "chr2\t1\t2\n", "a BED needs names"),
        ("a.bed", "chr2\tone\t2\tSTAT1\n", "'one' for a start"),
        ("a.csv", "gene,start\nSTAT1,1\n", "have no columns gene, chromosome and start"),
        ("a.csv", "gene,chromosome,start\nSTAT1,2\n", "Line 2 of the gene positions .* has 2 fields, the header 3"),
        ("a.csv", "gene,chromosome,start\nSTAT1,2,-4\n", "'-4' for a start"),
        ("a.csv", "gene,chromosome,start\n", "have no gene"),
        ("a.csv", "", "have no columns"),
        ("a.csv", "gene,chromosome,start\nStat2,2,4\n", "none of the screen's genes"),
        ("a.gtf.gz", "\x1f\x8b not", "cannot be read"),
        ("a.gtf.gz", "\x1f\x8b\x08\0\0\0\0\0\0\xff no deflated stream", "cannot be read: Error"),
        ("a.gtf.gz", "\x1f\x8b\x08\0\0\0\0\0\0\xff", "cannot be read: Compressed"),
        ("a.csv", "\xff\xfe", "it is no text"),
    ],
)
def test_what_is_no_table_of_positions(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=says):
        read_positions(pd.DataFrame(index=SYMBOLS), str(path))


def test_check_says_where_positions_are_from(tmp_path: Path) -> None:
    adata = small_screen()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    path = tmp_path / "genes.csv"
    path.write_text("gene,chromosome,start\ngene0,2,5\ng1,3,7\n")
    answer = invoke("check", tmp_path / "screen.h5ad")
    assert answer.code == 0 and "--gene-positions FILE" in answer.out
    answer = invoke("check", tmp_path / "screen.h5ad", "--gene-positions", path)
    assert "1 of 40 genes and 1 of 6 perturbed genes" in answer.out and f"--gene-positions {path}" in answer.out
    missing = invoke("fit", tmp_path / "screen.h5ad", "--output", tmp_path / "RUN", "--gene-positions", "nowhere.gtf")
    check_refusal(missing.code, missing.out, missing.err, 3, "nowhere.gtf cannot be read")
