"""``crlseq plot``: a picture of a run."""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from crlseq.cli.options import Force, RunFolder
from crlseq.cli.output import refuse_output, say, say_verdict

SUFFIXES = (".png", ".svg", ".pdf")


class Kind(StrEnum):
    """What can be plotted; each is a function of `crlseq.pl`."""

    dag = "dag"
    programs = "programs"
    interventions = "interventions"
    history = "history"
    effects = "effects"
    embedding = "embedding"


def plot(
    run: RunFolder,
    kind: Annotated[Kind, typer.Argument(help="What to plot.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture: .png, .svg or .pdf.", show_default=False)],
    top: Annotated[
        int | None, typer.Option(help="Genes a program, or perturbations at most. [what 60 rows hold]", min=1)
    ] = None,
    program: Annotated[
        list[str] | None, typer.Option(help="An axis of the embedding; give two. [those that explain most]")
    ] = None,
    perturbation: Annotated[
        list[str] | None, typer.Option(help="To colour in the embedding; may be repeated. [the strongest]")
    ] = None,
    dpi: Annotated[int, typer.Option(help="Dots per inch of a .png.", min=20, max=1200)] = 150,
    force: Force = False,
) -> None:
    """Draw the DAG, the programs, the intervention map, the losses, the tests of effects or the cells."""
    from crlseq.errors import UsageError
    from crlseq.pipeline.fitted import load

    if output.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{output} is no picture that can be written.", "End its name in .png, .svg or .pdf.")
    options = _options(kind, top, program, perturbation)
    refuse_output(output, force)
    found = load(run)
    import matplotlib as mpl

    mpl.use("Agg")
    from crlseq import plotting
    from crlseq.storage.files import written_whole

    axes = getattr(plotting, kind.value)(found, **options)
    # Text stays text, and equal runs give equal files.
    suffix = output.suffix.lower()
    stamp: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})
    with (
        written_whole(output) as file,
        mpl.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "crlseq"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # shown as a box
        axes.figure.savefig(file, format=suffix[1:], dpi=dpi, metadata=stamp)
    say(f"{kind.value}: {output}")
    if kind is Kind.dag:
        say_verdict(found)


def _options(kind: Kind, top: int | None, program: list[str] | None, perturbation: list[str] | None) -> dict[str, Any]:
    """What was asked for, by the names that the plot's function has; what it cannot take is refused."""
    from crlseq.errors import UsageError

    known = {
        Kind.programs: {"top": "n_genes"}, Kind.interventions: {"top": "top"}, Kind.effects: {"top": "top"},
        Kind.embedding: {"program": "programs", "perturbation": "perturbations"},
    }.get(kind, {})  # fmt: skip
    given = {"top": top, "program": program, "perturbation": perturbation}
    options = {}
    for name, value in given.items():
        if value is None or value == []:
            continue
        if name not in known:
            raise UsageError(f"A plot of {kind.value} takes no --{name}.", "Leave it out.")
        options[known[name]] = value
    return options
