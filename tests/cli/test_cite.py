"""crlseq cite: the paper and the software as CITATION.cff and LICENSE name them, with the versions installed here."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from typing import Any

import pytest

from crlseq._version import __version__
from tests.support import ROOT, invoke

yaml = pytest.importorskip("yaml")


@pytest.fixture
def citation() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    return found


def test_the_file_has_the_version(citation: dict[str, Any]) -> None:
    assert citation["version"] == __version__


def test_text(citation: dict[str, Any]) -> None:
    answer = invoke("cite")
    assert (answer.code, answer.err) == (0, "")
    (paper,) = citation["references"]
    authors = ", ".join(f"{person['family-names']} {person['given-names'][0]}" for person in paper["authors"])
    source = f"{paper['collection-title']}, {paper['year']}. {paper['identifiers'][0]['value']}."
    assert f"{authors}. {paper['title']}. {source}\n" in answer.out
    (year,) = re.findall(r"\(c\) (\d+)", (ROOT / "LICENSE").read_text(encoding="utf-8"))
    assert f"{citation['authors'][0]['name']}. {citation['title']}, version {__version__}. {year}.\n" in answer.out
    assert f"crlseq {__version__}, python {sys.version.split()[0]}, torch {version('torch')}," in answer.out


def test_bibtex(citation: dict[str, Any]) -> None:
    answer = invoke("cite", "--bibtex")
    assert (answer.code, answer.err) == (0, "")
    paper, software = answer.out.split("\n\n")
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", paper, flags=re.MULTILINE))
    (cited,) = citation["references"]
    assert fields == {
        "title": cited["title"],
        "author": " and ".join(f"{person['family-names']}, {person['given-names']}" for person in cited["authors"]),
        "booktitle": cited["collection-title"],
        "year": str(cited["year"]),
        "eprint": cited["identifiers"][0]["value"].removeprefix("arXiv:"),
        "archivePrefix": "arXiv",
    }
    assert software.startswith("@software{crlseq,\n  title = {crlseq},\n  author = {{The crlseq authors}},\n")
    assert f"  version = {{{__version__}}},\n" in software
    for entry in (paper, software):
        assert entry.count("{") == entry.count("}") and entry.rstrip().endswith("\n}")
