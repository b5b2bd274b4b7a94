"""Gene sets from gmt files: which genes a unit reads, and files that are none."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.data.genesets import fitted_sets, read_gmt
from crlseq.data.names import GeneNames
from crlseq.errors import InputError

GENES = tuple(f"G{i}" for i in range(12))


def gmt(path: Path, **sets: str) -> Path:
    path.write_text("".join("\t".join([name, "about it", *own.split()]) + "\n" for name, own in sets.items()))
    return path


def test_units_by_hand(tmp_path: Path) -> None:
    path = gmt(
        tmp_path / "sets.gmt",
        first="G3 G0 G1 G2 G4 elsewhere",
        small="G0 G1 G2 G3",
        again="G4 G3 G2 G1 G0 G0 nowhere",
        last="G5 G6 G7 G8 G9 G10",
    )
    found = fitted_sets(path, GeneNames(GENES, {}))
    assert found.names == ("first", "last")
    assert found.same == ("again", "")
    assert found.n_small == 1
    assert [np.flatnonzero(row).tolist() for row in found.members] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]
    assert found.lines[0] == ("first", "about it", ("G3", "G0", "G1", "G2", "G4", "elsewhere"))
    assert found.in_words() == (
        "The encoder reads 2 gene sets, which contain 11 of 12 fitted genes. Left out: 1 with fewer than 5 fitted genes and "
        "1 with the same fitted genes as another."
    )


NAMES = st.text(st.characters(exclude_characters="\t\n\r\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name == name.strip() and not name.startswith("\ufeff")
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(NAMES, st.sets(st.sampled_from([*GENES, "other", "Δ"]), min_size=5), min_size=1, max_size=8))
def test_what_is_written_makes_the_same_units(
    tmp_path_factory: pytest.TempPathFactory, sets: dict[str, set[str]]
) -> None:
    folder = tmp_path_factory.mktemp("sets")
    text = "".join("\t".join([name, "", *sorted(own)]) + "\n" for name, own in sets.items())
    (folder / "a.gmt").write_text(text, encoding="utf-8", newline="\n")
    if not any(len(own & set(GENES)) >= 5 for own in sets.values()):
        with pytest.raises(InputError, match="contains 5 or more"):
            fitted_sets(folder / "a.gmt", GeneNames(GENES, {}))
        return
    found = fitted_sets(folder / "a.gmt", GeneNames(GENES, {}))
    for name, row in zip(found.names, found.members, strict=True):
        assert {GENES[j] for j in np.flatnonzero(row)} == sets[name] & set(GENES)
    found.write(folder / "b.gmt")
    again = fitted_sets(folder / "b.gmt", GeneNames(GENES, {}))
    assert (again.names, again.same, again.lines) == (found.names, found.same, found.lines)
    assert again.digest() == found.digest()


def test_the_digest_is_of_what_is_read(tmp_path: Path) -> None:
    one = fitted_sets(gmt(tmp_path / "a.gmt", s="G0 G1 G2 G3 G4"), GeneNames(GENES, {})).digest()
    assert fitted_sets(gmt(tmp_path / "b.gmt", s="G4 G3 G2 G1 G0 unknown"), GeneNames(GENES, {})).digest() == one
    assert fitted_sets(gmt(tmp_path / "c.gmt", s="G0 G1 G2 G3 G5"), GeneNames(GENES, {})).digest() != one
    assert fitted_sets(gmt(tmp_path / "d.gmt", t="G0 G1 G2 G3 G4"), GeneNames(GENES, {})).digest() != one


LINE = b"A\tabout\tG0\tG1\tG2\tG3\tG4\n"
BAD = {
    "empty": (b"", "There is no gene set"),
    "blank lines": (b"\n \n\t\n", "There is no gene set"),
    "sets without genes": (b"A\tabout\t\n", "There is no gene set"),
    "packed": (gzip.compress(LINE), "compressed with gzip"),
    "binary": (b"\x89HDF\r\n\x1a\n" + bytes(range(256)), "not UTF-8|no text"),
    "zeros": (b"A\tabout\tG0\0G1\n", "Line 1 .* is not text"),
    "another encoding": ("A\tä\tG0\n".encode("latin-1"), "Line 1 .* not UTF-8"),
    "wide characters": (LINE.decode().encode("utf-16"), "Line 1 .* is not text"),
    "commas": (LINE + b"B,about,G0,G1\n", "Line 2 .* is not a gene set"),
    "a name alone": (LINE + b"B\n", "Line 2 .* is not a gene set"),
    "no name": (b"\tabout\tG0\n", "Line 1 .* is not a gene set"),
    "old line ends": (LINE.replace(b"\n", b"\r") + LINE.replace(b"A", b"B"), "Line 1 .* is not a gene set"),
    "a name twice": (LINE + b"\n" + LINE, "Line 3 .* repeats the name of the gene set in line 1"),
    "Ensembl identifiers": (
        b"A\tabout\tENSG00000115415\tENSG00000096968\n",
        "its genes are Ensembl identifiers .such as ENSG00000096968., those of the run symbols in capitals .such as G0.",
    ),
    "Entrez identifiers": (b"A\tabout\t6772\t3717\n", "Entrez identifiers"),
    "small sets": (b"A\tabout\tG0\tG1\n", "contains 5 or more of the 12 fitted genes"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(tmp_path: Path, kind: str) -> None:
    content, said = BAD[kind]
    (tmp_path / "sets.gmt").write_bytes(content)
    with pytest.raises(InputError, match=said) as refused:
        fitted_sets(tmp_path / "sets.gmt", GeneNames(GENES, {}))
    assert refused.value.hint and refused.value.exit_code == 3


def test_places_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        fitted_sets(tmp_path / "absent.gmt", GeneNames(GENES, {}))
    with pytest.raises(InputError, match="Is a directory"):
        fitted_sets(tmp_path, GeneNames(GENES, {}))


def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gmt(tmp_path / "sets.gmt", a="G0 G1 G2 G3 G4", b="G1 G2 G3 G4 G5")
    monkeypatch.setattr("crlseq.data.genesets.MAX_ENTRIES", 12)
    with pytest.raises(InputError, match="more than 1 gene sets of 12 genes"):
        fitted_sets(path, GeneNames(GENES, {}))
    monkeypatch.setattr("crlseq.data.genesets.MAX_LINE", 20)
    with pytest.raises(InputError, match=r"Line 1 .* too large"):
        list(read_gmt(path))


def test_what_else_a_file_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "sets.gmt"
    path.write_bytes("\ufeffA\thttps://example.org\tG0\tG1\t\t\r\n\r\n<b>\x1b[31m\tna\tG2".encode())
    assert list(read_gmt(path)) == [("A", "", ["G0", "G1"]), ("<b>\x1b[31m", "na", ["G2"])]
