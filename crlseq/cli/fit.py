"""``crlseq fit``: a screen to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from crlseq.cli.options import Force, Quiet, read_config, setting, switch, takes_config
from crlseq.cli.output import FitProgress, say, say_verdict


@takes_config()
def fit(
    file: Annotated[
        Path,
        typer.Argument(
            help="The screen: an .h5ad or .h5mu file, a zarr store, or a store made by `crlseq prepare`.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, setting("Run folder to write.", "--output", "-o")],
    preset: Annotated[str | None, setting("default, or paper (the model exactly as published).")] = None,
    config: Annotated[
        Path | None, setting("TOML file with tables data, model and training; options win over it.")
    ] = None,
    resume: Annotated[bool, switch("--resume", "Continue an unfinished fit.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Fit a screen: gene programs, the program that each perturbation targets, and the graph of the programs."""
    from crlseq.training.distributed import joined

    with joined() as ranks:  # what is wrong with the options is then reported by one process
        settings = read_config(given, preset, config)
        from crlseq.pipeline.fit import fit as fit_screen
        from crlseq.pipeline.fit import take_part

        if ranks.rank > 0:
            take_part(file, settings, ranks)
            return
        with FitProgress(quiet) as progress:
            run = fit_screen(file, output, config=settings, resume=resume, force=force, progress=progress, ranks=ranks)
    if not quiet:
        detected, total = run.facts.metrics.n_detected, len(run.interventions)
        say(f"{run.facts.n_latents} programs; {detected} of {total} perturbations have a detectable effect.")
        say_verdict(run)
        say(f"Written to {output} in {run.facts.seconds:.0f} s. Next: crlseq inspect {output}")
