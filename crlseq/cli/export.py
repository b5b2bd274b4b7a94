"""``crlseq export``: a run in the formats of other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from crlseq.cli.output import say


class FormatName(StrEnum):
    """The formats of `crlseq.export.interchange.FORMATS`."""

    h5ad = "h5ad"
    csv = "csv"
    graphml = "graphml"
    json = "json"
    cyjs = "cyjs"
    dot = "dot"
    network = "network"
    gmt = "gmt"
    rnk = "rnk"
    h5mu = "h5mu"
    pertpy = "pertpy"
    gears = "gears"
    multiqc = "multiqc"


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    name: Annotated[
        FormatName | None,
        typer.Option(
            "--format",
            "-f",
            help="h5ad (the annotated input); csv (a folder of tables); graphml, json, cyjs or dot (the DAG); network "
            "(decoupler); gmt, rnk (gene sets, a folder of rankings); h5mu (MuData); pertpy, gears (h5ad with their "
            "labels); multiqc (a folder).",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File or folder to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    h5ad: Annotated[Path | None, typer.Option(hidden=True)] = None,
    graphml: Annotated[Path | None, typer.Option(hidden=True)] = None,
    dag_json: Annotated[Path | None, typer.Option("--json", hidden=True)] = None,
    csv: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write a run in the format of another tool."""
    from crlseq.errors import InputError, UsageError
    from crlseq.export.interchange import FORMATS, write
    from crlseq.pipeline.fitted import load
    from crlseq.storage.runfolder import refuse_part_of_run

    if (name is None) != (output is None):
        raise UsageError("--format and --output belong together.", f"Formats are {', '.join(FORMATS)}.")
    # --h5ad PATH was the way to say --format h5ad --output PATH; so were --graphml, --json and --csv.
    asked = {"h5ad": h5ad, "graphml": graphml, "json": dag_json, "csv": csv} | ({} if name is None else {name: output})
    wanted = {what: path for what, path in asked.items() if path is not None}
    if not wanted:
        raise UsageError("Nothing to export was named.", "Give --format and --output.")
    found = load(run)
    for what, path in wanted.items():
        if path.is_dir() and not FORMATS[what].is_folder:
            raise InputError(f"{path} is a folder.", "Name a file to write.")
        refuse_part_of_run(path)
        if path.exists() and not force:
            raise InputError(f"{path} exists.", "Choose another path, or replace it with --force.")
    for what, path in wanted.items():
        notes = write(found, what, path)
        say(f"{what}: {path}")
        for note in notes:
            say(note)
