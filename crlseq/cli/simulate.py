"""``crlseq simulate``: screens with a known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from crlseq.cli.options import Force, setting, switch
from crlseq.cli.output import refuse_output, say
from crlseq.errors import UsageError

RANGES = ("edge_size", "shift_size", "retention", "penetrance", "context_noise")


def simulate(
    output: Annotated[Path, setting("The h5ad file to write.", "--output", "-o")],
    n_latents: Annotated[int, setting("Number of latents (programs).")] = 10,
    perturbations_per_latent: Annotated[int, setting("Single perturbations per latent.")] = 4,
    n_genes: Annotated[int, setting("Number of genes.")] = 500,
    cells_per_perturbation: Annotated[int, setting("Cells per perturbation.")] = 150,
    n_control: Annotated[int, setting("Number of control cells.")] = 2000,
    expected_parents: Annotated[float, setting("Mean number of parents per latent.")] = 1.0,
    edge_size: Annotated[str, setting("LOW,HIGH: sizes of edges.")] = "0.6,1.4",
    equations: Annotated[str, setting("Structural equations.", choices=("linear", "relu"))] = "linear",
    intervention: Annotated[str, setting("Kind of intervention.", choices=("hard", "soft", "shift"))] = "hard",
    shift_size: Annotated[str, setting("LOW,HIGH: sizes of shifts, in SDs of the target's own noise.")] = "1,3",
    retention: Annotated[str, setting("LOW,HIGH: retentions of soft interventions.")] = "0.2,0.6",
    penetrance: Annotated[
        str, setting("LOW,HIGH: shares of cells that perturbations hit. The other cells are as controls.")
    ] = "1,1",
    guides: Annotated[int, setting("Guides per perturbation. Their penetrances differ.")] = 1,
    second_targets: Annotated[float, setting("Share of perturbations that also shift a second latent.")] = 0.0,
    hidden: Annotated[int, setting("Number of hidden causes, each of three latents.")] = 0,
    cycle: Annotated[bool, switch("--cycle", "Add one feedback edge.")] = False,
    mixing: Annotated[str, setting("From latents to genes.", choices=("linear", "network"))] = "linear",
    background: Annotated[int, setting("Number of factors that nobody perturbs.")] = 0,
    cell_cycle: Annotated[bool, switch("--cell-cycle", "Add two more such factors, on a circle.")] = False,
    noise: Annotated[str, setting("Of the measurement.", choices=("counts", "gaussian"))] = "counts",
    depth: Annotated[float, setting("Median of the expected counts per cell.")] = 5000.0,
    depth_by_condition: Annotated[float, setting("SD of log depth between conditions.")] = 0.0,
    log_rate_scale: Annotated[float, setting("SD of the log rates that latents explain.")] = 0.35,
    genewise_dispersion: Annotated[
        bool, switch("--genewise-dispersion", "Draw a dispersion for each gene. Without it all have 0.2.")
    ] = False,
    n_doubles: Annotated[int, setting("Number of pairs of perturbations.")] = 0,
    n_batches: Annotated[int, setting("Number of experimental batches.")] = 1,
    batch_scale: Annotated[float, setting("Size of batch effects.")] = 0.0,
    contexts: Annotated[int, setting("Number of contexts, such as rest and stimulation.")] = 1,
    own_shifts: Annotated[float, setting("Share of shifts that differ in each further context.")] = 0.0,
    own_edges: Annotated[int, setting("Number of edges of its own in each further context.")] = 0,
    context_noise: Annotated[str, setting("LOW,HIGH: SDs of the latents' own noise there.")] = "1,1",
    context_scale: Annotated[float, setting("Size of what contexts themselves do to genes.")] = 0.0,
    loading_density: Annotated[float, setting("Share of the genes that each latent affects.")] = 1.0,
    seed: Annotated[int, setting("Seed of all random numbers.")] = 0,
    force: Force = False,
) -> None:
    """Simulate a Perturb-seq screen; the true graph and targets are stored in uns["truth"]."""
    # Words and bounds are checked by the simulator itself.
    options = {name: value for name, value in locals().items() if name not in ("output", "force")}
    options |= {name: _bounds(options[name], name) for name in RANGES}
    from crlseq.data.simulate import simulate as simulate_screen
    from crlseq.storage.files import written_whole
    from crlseq.storage.hdf5 import write_h5ad

    refuse_output(output, force)
    try:
        adata = simulate_screen(**options)
    except ValueError as error:
        raise UsageError(str(error), "See `crlseq simulate --help`.") from None
    with written_whole(output) as beside:
        write_h5ad(adata, beside, "gzip")
    say(f"{adata.n_obs} cells x {adata.n_vars} genes: {output}")


def _bounds(text: str, name: str) -> tuple[float, ...]:
    """``0.3,0.95`` -> 0.3, 0.95."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        option = name.replace("_", "-")
        raise UsageError(f"--{option} is {text!r}.", f"Give two numbers, such as --{option} 0.3,0.9.") from None
    return low, high
