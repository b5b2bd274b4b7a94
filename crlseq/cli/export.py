"""``crlseq export``, ``report`` and ``plot``: a run as files for other tools, as a page, and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from crlseq.cli.options import Force, RunFolder, completing, load, setting
from crlseq.cli.output import refuse_no_figure, refuse_output, say, say_verdict
from crlseq.errors import UsageError, suggestion
from crlseq.export.registry import FORMATS, check_format, write

CHOICES = "\n\n".join(["What to write:", *(f"{name}: {about.what}." for name, about in FORMATS.items())])
# What can be plotted: each is a function of `crlseq.pl`, whose arguments some options are.
KINDS: dict[str, dict[str, str]] = {
    "dag": {},
    "pairs": {},
    "programs": {"top": "n_genes"},
    "interventions": {"top": "top"},
    "history": {},
    "effects": {"top": "top"},
    "effects-map": {"top": "top"},
    "volcano": {"perturbation": "perturbation"},
    "activity": {"top": "top"},
    "violin": {"program": "program", "perturbation": "perturbations"},
    "embedding": {"program": "programs", "perturbation": "perturbations"},
}
ONE = {"volcano": ("perturbation",), "violin": ("program",)}  # options that are given once


def export(
    run: RunFolder,
    name: Annotated[str, setting(CHOICES, "--format", "-f", autocompletion=completing(FORMATS))],
    output: Annotated[Path, setting("File or folder to write.", "--output", "-o")],
    force: Force = False,
) -> None:
    """Write a run in the format of another tool."""
    check_format(name)
    found = load(run)
    refuse_output(output, force, folder=not FORMATS[name].suffix)
    for line in (f"{name}: {output}", *write(found, name, output)):
        say(line)


def report(
    run: RunFolder,
    output: Annotated[Path | None, setting("HTML file.", "--output", "-o", default="RUN/report.html")] = None,
    gene_sets: Annotated[
        Path | None, setting("A gmt file: each program's card lists the enriched gene sets.", default="none")
    ] = None,
    force: Force = False,
) -> None:
    """Write the report of a run as one HTML page.

    Tables that `crlseq evaluate RUN --output RUN/NAME.csv` wrote into the run's folder are included.
    """
    from crlseq.data.genesets import check_gmt
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


def plot(
    run: RunFolder,
    kind: Annotated[
        str, typer.Argument(help=f"One of {', '.join(KINDS)}.", show_default=False, autocompletion=completing(KINDS))
    ],
    output: Annotated[Path, setting("Figure to write: .png, .svg or .pdf.", "--output", "-o")],
    top: Annotated[
        int | None,
        setting("Largest number of genes per program, or of perturbations.", default="what fits 60 rows", min=1),
    ] = None,
    program: Annotated[
        list[str] | None,
        setting(
            "The program of a violin, or an axis of the embedding, which has two.",
            default="those that explain most",
            metavar="<str>",
        ),
    ] = None,
    perturbation: Annotated[
        list[str] | None,
        setting(
            "Drawn in a volcano, a violin or the embedding; may be repeated in the latter two.",
            default="the strongest",
            metavar="<str>",
        ),
    ] = None,
    dpi: Annotated[int, setting("Resolution of a .png in dots per inch.", min=20, max=1200)] = 150,
    force: Force = False,
) -> None:
    """Draw a picture of a run: its graph, programs and interventions, effects on genes, cells, or losses."""
    refuse_no_figure(output)
    kind = kind.replace("_", "-")  # as in Python
    if kind not in KINDS:
        raise UsageError(f"There is no plot {kind!r}.", suggestion(kind, KINDS, "Plots are"))
    options = _options(kind, {"top": top, "program": program, "perturbation": perturbation})
    refuse_output(output, force)
    found = load(run)
    import matplotlib as mpl

    mpl.use("Agg")
    from crlseq import plotting
    from crlseq.plotting.style import write_figure

    axes = getattr(plotting, kind.replace("-", "_"))(found, **options)
    write_figure(axes.figure, output, dpi)
    say(f"{kind}: {output}")
    if kind in ("dag", "pairs"):
        say_verdict(found)


def _options(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the function that draws, from options that were given; UsageError where they do not go with the kind."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        if value in (None, []):
            continue
        if name not in KINDS[kind]:
            raise UsageError(f"A plot of {kind} has no option --{name}.", "Omit it.")
        options[KINDS[kind][name]] = value
    for name in ONE.get(kind, ()):
        if len(options.get(name, ())) != 1:
            raise UsageError(f"A plot of {kind} shows one {name}.", f"Name it with --{name}.")
        options[name] = options[name][0]
    return options
