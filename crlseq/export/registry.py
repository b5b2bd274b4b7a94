"""The formats of other tools that a run can be written in, and the one function that writes them.

A new format is an entry in `FORMATS` and a function beside its kin: ``f(run, path)`` writes the format and returns what a
user should know, if there is anything. Functions are named as text, since the command line reads this table before
anything heavy is imported.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from crlseq.errors import InputError, UsageError, needs_extra, suggestion
from crlseq.storage.files import written_whole

if TYPE_CHECKING:
    from crlseq.run.run import Run


class Format(NamedTuple):
    """One format."""

    what: str  # is written and for which tool, for the help
    function: str  # that writes it, after its module of `crlseq.export`
    suffix: str = ""  # usual end of the file's name; empty for a folder of files
    extra: str = ""  # package that is needed, and the name of crlseq's extra


FORMATS: dict[str, Format] = {
    "h5ad": Format("the annotated input, for scanpy", "cells.h5ad", ".h5ad"),
    "csv": Format("a folder of all tables", "genes.csv"),
    "graphml": Format("the DAG, for Cytoscape and others", "graph.graphml", ".graphml"),
    "json": Format("the DAG, for networkx", "graph.json", ".json"),
    "cyjs": Format("the DAG, for Cytoscape", "graph.cyjs", ".cyjs"),
    "dot": Format("the DAG, for Graphviz", "graph.dot", ".dot"),
    "cytoscape": Format(
        "perturbations, programs and their genes as one network, for Cytoscape", "graph.network", ".cyjs"
    ),
    "network": Format("loadings as a network, for decoupler", "genes.network", ".csv"),
    "gmt": Format("strongest genes of each program as gene sets", "genes.gmt", ".gmt"),
    "rnk": Format("a folder with a ranking of genes per program, for GSEA", "genes.rnk"),
    "h5mu": Format("the annotated input and guide counts, for muon", "cells.h5mu", ".h5mu", extra="mudata"),
    "pertpy": Format("log-normalised cells with pertpy's labels", "cells.pertpy", ".h5ad"),
    "gears": Format("log-normalised cells with GEARS' labels", "cells.gears", ".h5ad"),
    "multiqc": Format("a folder with crlseq_mqc.json, for MultiQC", "multiqc.multiqc"),
}


def write(run: Run, name: str, path: Path) -> list[str]:
    """Write a format of `FORMATS`, whole or not at all; returned is what a user should know about it.

    Refused are, by `InputError`, a run without a folder and a place that cannot be written, and what `check_format` refuses.
    """
    check_format(name)
    _ = run.folder  # refuses a run without one
    module, function = FORMATS[name].function.split(".")
    writer = getattr(import_module(f"crlseq.export.{module}"), function)
    with written_whole(path) if FORMATS[name].suffix else nullcontext(path) as place:
        return list(writer(run, place) or [])


def check_format(name: str) -> None:
    """Refuse, by `UsageError`, a format that does not exist or whose library is not installed."""
    if name not in FORMATS:
        raise UsageError(f"There is no format {name!r}.", suggestion(name, FORMATS, "Formats are"))
    extra = FORMATS[name].extra
    if extra and find_spec(extra) is None:
        raise needs_extra(f"The format {name}", extra, extra)


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """All files of a folder, or none of them."""
    there = path.exists()
    try:
        with ExitStack() as written:
            for name, content in files.items():
                written.enter_context(written_whole(path / name)).write_bytes(content)
    except InputError:
        if not there:
            with suppress(OSError):
                path.rmdir()
        raise
