"""``crlseq report``: the HTML page of a run, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crlseq.cli.output import say


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file. [RUN/report.html]")] = None,
    gene_sets: Annotated[
        Path | None, typer.Option(help="A gmt file: the gene sets in which each program is enriched are in its card.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an --output that exists.")] = False,
) -> None:
    """Write the report of a run as one HTML page.

    Tables that `crlseq evaluate RUN --output RUN/NAME.csv` left in the run's folder are in it.
    """
    from crlseq.data.genesets import check_gmt
    from crlseq.errors import InputError
    from crlseq.pipeline.fitted import load
    from crlseq.readout.enrichment import enrich
    from crlseq.report import write_report
    from crlseq.storage.runfolder import refuse_part_of_run

    if gene_sets is not None:
        check_gmt(gene_sets)
    found = load(run)
    if output is not None and output.is_dir():
        raise InputError(f"{output} is a folder.", "Name a file to write.")
    if output is not None and output.name != "report.html":
        refuse_part_of_run(output)
    if output is not None and output.exists() and not force:
        raise InputError(f"The output {output} exists.", "Choose another --output, or replace it with --force.")
    enriched = enrich(found, gene_sets) if gene_sets is not None else None
    target = output or run / "report.html"
    write_report(found, target, enriched)
    say(f"report: {target}")
