"""How to cite the method and this software."""

from __future__ import annotations

from crlseq._version import __version__

# CITATION.cff says the same; tests/cli/test_cite.py compares the two.
TITLE, YEAR = "Identifiability Guarantees for Causal Disentanglement from Soft Interventions", 2023
AUTHORS = (
    ("Zhang", "Jiaqi"), ("Greenewald", "Kristjan"), ("Squires", "Chandler"), ("Srivastava", "Akash"),
    ("Shanmugam", "Karthikeyan"), ("Uhler", "Caroline"),
)  # fmt: skip
PROCEEDINGS, ARXIV = "Advances in Neural Information Processing Systems", "2307.06250"
SOFTWARE_AUTHORS, SOFTWARE_YEAR = "The crlseq authors", 2026


def references(version: str = __version__) -> tuple[str, str]:
    """The paper, and the software in a ``version``, one line each."""
    authors = ", ".join(f"{family} {given[0]}" for family, given in AUTHORS)
    paper = f"{authors}. {TITLE}. {PROCEEDINGS}, {YEAR}. arXiv:{ARXIV}."
    return paper, f"{SOFTWARE_AUTHORS}. crlseq, version {version}. {SOFTWARE_YEAR}."


def bibtex() -> str:
    """Both as BibTeX entries."""
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
