"""``crlseq prepare``, ``fit`` and ``rerun``: from screens to a store, to a run folder, and once more from its ``run.json``."""

from __future__ import annotations

import gc
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from crlseq.cli.options import AsJson, Cluster, Force, Quiet, RunFolder, read_config, setting, switch, takes_config
from crlseq.cli.output import say, say_paragraph, say_verdict, show_json
from crlseq.config import PRESETS
from crlseq.pipeline.progress import shown
from crlseq.storage.runfolder import default_output

SCREEN = (
    "The screen: an .h5ad or .h5mu file, a zarr store, a store made by `crlseq prepare`, or what Cell Ranger wrote."
)


@takes_config("perturbation_key", "control_label", "separator", "context_key", "layer", "values", "seed")
def prepare(
    files: Annotated[
        list[Path], typer.Argument(help="Screens with the same genes: .h5ad files or zarr stores.", show_default=False)
    ],
    output: Annotated[Path, setting("Store to write (a folder).", "--output", "-o")],
    resume: Annotated[bool, switch("--resume", "Continue an unfinished store.")] = False,
    force: Force = False,
    cluster: Cluster = None,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Write one or more screens to a store sorted by perturbation, which `fit` reads without loading all of it."""
    from crlseq.data.prepare import prepare as write

    config = read_config(given)
    tell = (lambda text: None) if quiet else say
    done = write(
        files, output, config.data, config.training.seed, resume=resume, force=force, cluster=cluster,
        stage=lambda text: tell(f"• {text}"), note=lambda text: tell(f"  {text}"),
    )  # fmt: skip
    if not quiet:
        say(f"{done.n_cells} cells x {done.n_genes} genes, {done.n_nonzero} non-zero values ({done.values}).")
        say(f"Written to {output}. Next: crlseq fit {output}")


@takes_config()
def fit(
    file: Annotated[Path, typer.Argument(help=SCREEN, show_default=False)],
    output: Annotated[
        Path | None, setting("Run folder to write.", "--output", "-o", default="NAME-run, after the screen's NAME")
    ] = None,
    preset: Annotated[
        str | None, setting("paper: the model exactly as published.", choices=PRESETS, default="default")
    ] = None,
    config: Annotated[
        Path | None, setting("TOML file with tables data, model and training; options win over it.", default="none")
    ] = None,
    resume: Annotated[bool, switch("--resume", "Continue an unfinished fit of the same input and options.")] = False,
    force: Force = False,
    cluster: Cluster = None,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Fit a screen: gene programs, the program that each perturbation targets, and the graph of the programs."""
    from crlseq.training.distributed import joined

    output = output or default_output(file)
    with joined() as ranks:  # what is wrong with the options is then reported by one process
        settings = read_config(given, preset, config)
        with shown(settings, quiet or ranks.rank > 0) as progress:  # before the imports, which take seconds
            first = "crlseq.pipeline.fit" not in sys.modules
            gc.disable()  # imports leave no garbage, and to look for it takes a quarter of their time
            from crlseq.pipeline.fit import fit as fit_screen
            from crlseq.pipeline.fit import take_part
            from crlseq.run.findings import doubts, told

            if first:
                gc.freeze()  # nor is what they made looked through later
            gc.enable()
            if ranks.rank > 0:
                take_part(file, settings, ranks)
                return
            run = fit_screen(
                file, output, config=settings, resume=resume, force=force, progress=progress, ranks=ranks,
                cluster=cluster,
            )  # fmt: skip
    if not quiet:
        for line in told(run):
            say_paragraph(f"• {line}")
        if not run.facts.without_effect:
            say_verdict(run)
        for doubt in doubts(run):
            say_paragraph(f"warning: {doubt}")
        say(f"Written to {output} in {run.facts.seconds:.0f} s. Next: crlseq inspect {output}")


def rerun(
    run: RunFolder,
    data: Annotated[Path | None, setting("The run's input.", default="its path in run.json")] = None,
    output: Annotated[
        Path | None, setting("Keep the second run in this folder.", "--output", "-o", default="not kept")
    ] = None,
    json: AsJson = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Repeat a fit from its run.json and report the first difference: exit code 0 if there is none, else 4."""
    from crlseq.experiments.rerun import rerun as repeat

    with tempfile.TemporaryDirectory(prefix="crlseq-") as folder:
        differences, causes = repeat(run, output or Path(folder) / "RUN", data, not quiet, force)
    if json:
        show_json({
            "identical": not differences, "differences": [asdict(one) for one in differences], "causes": causes,
        })  # fmt: skip
    if not differences:
        say("Identical: losses, weights, tables, graph and latents.")
        return
    first, *others = differences
    say(f"Different. First in {first}.")
    if others:
        say(f"Then in {', '.join(one.file for one in others)}.")
    known = f"Probable causes: {'; '.join(causes)}."
    say(known if causes else "The recorded versions, threads and machine are the same.")
    raise typer.Exit(4)
