"""``crlseq cite``: the method and this software, as text or BibTeX."""

from __future__ import annotations

from typing import Annotated

from crlseq._version import __version__, package_versions
from crlseq.cli.options import switch
from crlseq.cli.output import show_text

# CITATION.cff says the same; tests/cli/test_cite.py compares the two.
TITLE, YEAR = "Identifiability Guarantees for Causal Disentanglement from Soft Interventions", 2023
AUTHORS = (
    ("Zhang", "Jiaqi"),
    ("Greenewald", "Kristjan"),
    ("Squires", "Chandler"),
    ("Srivastava", "Akash"),
    ("Shanmugam", "Karthikeyan"),
    ("Uhler", "Caroline"),
)
PROCEEDINGS, ARXIV = "Advances in Neural Information Processing Systems", "2307.06250"
SOFTWARE_AUTHORS, SOFTWARE_YEAR = "The crlseq authors", 2026


def cite(bibtex: Annotated[bool, switch("--bibtex", "Print BibTeX entries.")] = False) -> None:
    """Print how to cite crlseq, with the versions installed here."""
    show_text(_bibtex() if bibtex else _text())


def _text() -> str:
    authors = ", ".join(f"{family} {given[0]}" for family, given in AUTHORS)
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    return f"""Please cite the method and the software:

{authors}. {TITLE}. {PROCEEDINGS}, {YEAR}. arXiv:{ARXIV}.

{SOFTWARE_AUTHORS}. crlseq, version {__version__}. {SOFTWARE_YEAR}.

Versions here: crlseq {__version__}, {versions}."""


def _bibtex() -> str:
    authors = " and ".join(f"{family}, {given}" for family, given in AUTHORS)
    return f"""@inproceedings{{zhang{YEAR}identifiability,
  title = {{{TITLE}}},
  author = {{{authors}}},
  booktitle = {{{PROCEEDINGS}}},
  year = {{{YEAR}}},
  eprint = {{{ARXIV}}},
  archivePrefix = {{arXiv}}
}}

@software{{crlseq,
  title = {{crlseq}},
  author = {{{{{SOFTWARE_AUTHORS}}}}},
  version = {{{__version__}}},
  year = {{{SOFTWARE_YEAR}}}
}}"""
