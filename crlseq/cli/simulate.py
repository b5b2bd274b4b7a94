"""``crlseq simulate``: a screen with a known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crlseq.cli.options import Force
from crlseq.cli.output import refuse_output, say


def simulate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The h5ad file to write.", show_default=False)],
    n_latents: Annotated[int, typer.Option(help="Latents.")] = 10,
    perturbations_per_latent: Annotated[int, typer.Option(help="Single perturbations of each latent.")] = 4,
    n_genes: Annotated[int, typer.Option(help="Genes.")] = 500,
    cells_per_perturbation: Annotated[int, typer.Option(help="Cells of each perturbation.")] = 150,
    n_control: Annotated[int, typer.Option(help="Control cells.")] = 2000,
    expected_parents: Annotated[float, typer.Option(help="Mean number of parents of a latent.")] = 1.0,
    equations: Annotated[str, typer.Option(help="linear or relu.")] = "linear",
    intervention: Annotated[str, typer.Option(help="hard, soft or shift.")] = "hard",
    mixing: Annotated[str, typer.Option(help="linear or network.")] = "linear",
    noise: Annotated[str, typer.Option(help="counts or gaussian.")] = "counts",
    depth: Annotated[float, typer.Option(help="Mean counts a cell.")] = 5000.0,
    n_doubles: Annotated[int, typer.Option(help="Pairs of perturbations.")] = 0,
    escapers: Annotated[float, typer.Option(help="Share of perturbed cells without the perturbation's effect.")] = 0.0,
    n_batches: Annotated[int, typer.Option(help="Experimental batches.")] = 1,
    batch_scale: Annotated[float, typer.Option(help="Size of batch effects.")] = 0.0,
    loading_density: Annotated[float, typer.Option(help="Share of the genes that a latent moves.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    force: Force = False,
) -> None:
    """Simulate a Perturb-seq screen; the true graph and targets are in uns["truth"]."""
    # Words among them are checked by the simulator itself.
    options = {name: value for name, value in locals().items() if name not in ("output", "force")}
    from crlseq.data.simulate import simulate as simulate_screen
    from crlseq.errors import UsageError
    from crlseq.storage.files import written_whole

    refuse_output(output, force)
    try:
        adata = simulate_screen(**options)
    except ValueError as error:
        raise UsageError(str(error), "See `crlseq simulate --help`.") from None
    with written_whole(output) as beside:
        adata.write_h5ad(beside, compression="gzip")
    say(f"{adata.n_obs} cells x {adata.n_vars} genes: {output}")
