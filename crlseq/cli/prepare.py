"""``crlseq prepare``: screens of any size to a store that training reads in contiguous runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from crlseq.cli.options import Force, Quiet, read_config, setting, switch, takes_config
from crlseq.cli.output import say


@takes_config("perturbation_key", "control_label", "separator", "layer", "values", "seed")
def prepare(
    files: Annotated[
        list[Path], typer.Argument(help="Screens with the same genes: .h5ad files or zarr stores.", show_default=False)
    ],
    output: Annotated[Path, setting("Store to write (a folder).", "--output", "-o")],
    resume: Annotated[bool, switch("--resume", "Continue an unfinished store.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Write one or more screens to a store sorted by perturbation, which `fit` reads without loading all of it."""
    from crlseq.data.prepare import prepare as write

    config = read_config(given)
    tell = (lambda text: None) if quiet else say
    done = write(
        files, output, config.data, config.training.seed, resume=resume, force=force,
        stage=lambda text: tell(f"• {text}"), note=lambda text: tell(f"  {text}"),
    )  # fmt: skip
    if not quiet:
        say(f"{done.n_cells} cells x {done.n_genes} genes, {done.n_nonzero} non-zero values ({done.values}).")
        say(f"Written to {output}. Next: crlseq fit {output} --output RUN")
