"""``crlseq report``: the HTML page of a run, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crlseq.cli.output import say


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file. [RUN/report.html]")] = None,
) -> None:
    """Write the report of a run as one HTML page."""
    from crlseq.files import written_whole
    from crlseq.report import write_report
    from crlseq.run import load

    target = output or run / "report.html"
    found = load(run)
    with written_whole(target) as beside:
        write_report(found, beside)
    say(f"report: {target}")
