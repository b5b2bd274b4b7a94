"""``crlseq report``: the HTML page of a run, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from crlseq.cli.options import Force, RunFolder, setting
from crlseq.cli.output import refuse_output, say


def report(
    run: RunFolder,
    output: Annotated[Path | None, setting("HTML file.", "--output", "-o", default="RUN/report.html")] = None,
    gene_sets: Annotated[Path | None, setting("A gmt file: each program's card lists the enriched gene sets.")] = None,
    force: Force = False,
) -> None:
    """Write the report of a run as one HTML page.

    Tables that `crlseq evaluate RUN --output RUN/NAME.csv` wrote into the run's folder are included.
    """
    from crlseq.data.genesets import check_gmt
    from crlseq.pipeline.fitted import load
    from crlseq.readout.enrichment import enrich
    from crlseq.report import write_report

    if gene_sets is not None:
        check_gmt(gene_sets)
    found = load(run)
    if output is not None:
        refuse_output(output, force, replaceable="report.html")
    enriched = enrich(found, gene_sets) if gene_sets is not None else None
    target = output or run / "report.html"
    write_report(found, target, enriched)
    say(f"report: {target}")
