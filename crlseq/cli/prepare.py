"""``crlseq prepare``: screens of any size to a store that training reads in contiguous runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crlseq.cli.output import say


def prepare(
    files: Annotated[
        list[Path], typer.Argument(help="Screens with the same genes: .h5ad files or zarr stores.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Store to write, a folder.", show_default=False)],
    perturbation_key: Annotated[
        str | None, typer.Option(help="Column of obs with the perturbations. [detected]")
    ] = None,
    control_label: Annotated[str | None, typer.Option(help="Label of control cells. [detected]")] = None,
    separator: Annotated[
        str | None, typer.Option(help="Between the parts of a combination; '' for none. [detected]")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer to use instead of X.")] = None,
    values: Annotated[str | None, typer.Option(help="auto, counts, log or continuous.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the shuffle. [0]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished store.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a store that lies at --output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors alone.")] = False,
) -> None:
    """Write one or several screens as a store sorted by perturbation, which `fit` reads without holding it in memory."""
    from crlseq.config import make_config
    from crlseq.data.prepare import prepare as write

    config = make_config(
        perturbation_key=perturbation_key, control_label=control_label, separator=separator, layer=layer, values=values,
        seed=seed,
    )  # fmt: skip
    tell = (lambda text: None) if quiet else say
    done = write(
        files, output, config.data, config.training.seed, resume=resume, force=force,
        stage=lambda text: tell(f"• {text}"), note=lambda text: tell(f"  {text}"),
    )  # fmt: skip
    if not quiet:
        say(f"{done.n_cells} cells x {done.n_genes} genes, {done.n_nonzero} values that are not 0 ({done.values}).")
        say(f"Written to {output}. Next: crlseq fit {output} --output RUN")
