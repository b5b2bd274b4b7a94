"""``crlseq rerun``: a run once more from its ``run.json``, and what differs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from crlseq.cli.options import AsJson, Force, Quiet, RunFolder, setting
from crlseq.cli.output import FitProgress, say, show_json


def rerun(
    run: RunFolder,
    data: Annotated[Path | None, setting("The run's input.", default="its path in run.json")] = None,
    output: Annotated[Path | None, setting("Keep the second run in this folder.", "--output", "-o")] = None,
    json: AsJson = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Repeat a fit from its run.json and report the first difference: exit code 0 if there is none, else 4."""
    from dataclasses import asdict

    from crlseq.experiments.rerun import rerun as repeat

    with tempfile.TemporaryDirectory(prefix="crlseq-") as folder, FitProgress(quiet) as progress:
        found = repeat(run, output or Path(folder) / "RUN", data, progress, force)
    if json:
        show_json({
            "identical": not found.differences, "differences": [asdict(one) for one in found.differences],
            "causes": list(found.causes),
        })  # fmt: skip
    if not found.differences:
        say("Identical: losses, weights, tables, graph and latents.")
        return
    first, *others = found.differences
    say(f"Different. First in {first}.")
    if others:
        say(f"Then in {', '.join(one.file for one in others)}.")
    if found.causes:
        say(f"Probable causes: {'; '.join(found.causes)}.")
    else:
        say("The recorded versions, threads and machine are the same.")
    raise typer.Exit(4)
