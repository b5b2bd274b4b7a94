"""``crlseq simulate``: a screen with a known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from crlseq.cli.options import Force, setting
from crlseq.cli.output import refuse_output, say
from crlseq.errors import UsageError


def simulate(
    output: Annotated[Path, setting("The h5ad file to write.", "--output", "-o")],
    n_latents: Annotated[int, setting("Number of latents (programs).")] = 10,
    perturbations_per_latent: Annotated[int, setting("Single perturbations per latent.")] = 4,
    n_genes: Annotated[int, setting("Number of genes.")] = 500,
    cells_per_perturbation: Annotated[int, setting("Cells per perturbation.")] = 150,
    n_control: Annotated[int, setting("Number of control cells.")] = 2000,
    expected_parents: Annotated[float, setting("Mean number of parents per latent.")] = 1.0,
    equations: Annotated[str, setting("Structural equations: linear or relu.")] = "linear",
    intervention: Annotated[str, setting("Kind of intervention: hard, soft or shift.")] = "hard",
    mixing: Annotated[str, setting("From latents to genes: linear or network.")] = "linear",
    noise: Annotated[str, setting("Of the measurement: counts or gaussian.")] = "counts",
    depth: Annotated[float, setting("Mean counts per cell.")] = 5000.0,
    n_doubles: Annotated[int, setting("Number of pairs of perturbations.")] = 0,
    escapers: Annotated[float, setting("Share of perturbed cells that escape their perturbation.")] = 0.0,
    n_batches: Annotated[int, setting("Number of experimental batches.")] = 1,
    batch_scale: Annotated[float, setting("Size of batch effects.")] = 0.0,
    loading_density: Annotated[float, setting("Share of the genes that each latent affects.")] = 1.0,
    seed: Annotated[int, setting("Seed of all random numbers.")] = 0,
    force: Force = False,
) -> None:
    """Simulate a Perturb-seq screen; the true graph and targets are stored in uns["truth"]."""
    # Words among them are checked by the simulator itself.
    options = {name: value for name, value in locals().items() if name not in ("output", "force")}
    from crlseq.data.simulate import simulate as simulate_screen
    from crlseq.storage.files import written_whole

    refuse_output(output, force)
    try:
        adata = simulate_screen(**options)
    except ValueError as error:
        raise UsageError(str(error), "See `crlseq simulate --help`.") from None
    with written_whole(output) as beside:
        adata.write_h5ad(beside, compression="gzip")
    say(f"{adata.n_obs} cells x {adata.n_vars} genes: {output}")
