"""``crlseq cite``: the method and this software, as text or BibTeX."""

from __future__ import annotations

from typing import Annotated

from crlseq._version import __version__, package_versions
from crlseq.cli.options import switch
from crlseq.cli.output import show_text
from crlseq.run.citation import bibtex as entries
from crlseq.run.citation import references


def cite(bibtex: Annotated[bool, switch("--bibtex", "Print BibTeX entries.")] = False) -> None:
    """Print how to cite crlseq, with the versions installed here."""
    show_text(entries() if bibtex else _text())


def _text() -> str:
    paper, software = references()
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    return f"""Please cite the method and the software:

{paper}

{software}

Versions here: crlseq {__version__}, {versions}."""
