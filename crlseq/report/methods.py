"""The methods paragraph of a report, with versions and thresholds, for a paper."""

from __future__ import annotations

from crlseq.discovery.thresholds import DECISIVE, DECLARED_SUPPORT, DESCRIBED
from crlseq.run.findings import GUESS
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR


def methods(run: Run) -> str:
    """How the run was made, in sentences."""
    facts, discovery, n = run.facts, run.facts.discovery, len(run.interventions)
    found = f"{facts.metrics.n_detected} of {n} perturbations have"
    detected = "none of the perturbations has" if facts.without_effect else found
    batch = facts.config.data.batch_key
    controls = "control cells" + (f" of the same batch ({batch})" if batch else "")
    words = [
        f"The screen ({facts.input.n_cells} cells, {facts.input.n_genes} genes) was fitted with crlseq {facts.version} "
        f"(preset {facts.config.preset}, seed {facts.seed}). Values were read as {facts.preprocessing.values}; "
        f"the fit has {facts.preprocessing.gene_choice} and {facts.cells.train} cells for training, "
        f"{facts.cells.validation} for validation and {facts.cells.test} held out.",
        f"Cells of each perturbation were compared with {controls} by a permutation test of the energy distance (Székely and "
        f"Rizzo 2013): {detected} a detectable effect at a false discovery rate of {DETECTABLE_FDR} (Benjamini and Hochberg 1995).",
    ]
    if facts.without_effect:
        return " ".join([*words, "So there are no programs, and no model was trained."])
    if discovery is not None:
        words.append(
            f"{facts.n_latents} programs, their targets and their graph were found by the Gaussian likelihood of all conditions, "
            f"with {discovery.intervention} interventions and {discovery.equations} equations"
            f"{', in coordinates that a network straightened' if discovery.straightened else ''}. "
            f"A graph is believed if its gain in held-out likelihood exceeds {DECISIVE:.0f} standard errors and the model "
            f"describes the cells (misfit at most {DESCRIBED}, here {discovery.dispersion:.2f}); edges need a support of "
            f"{DECLARED_SUPPORT}."
        )
    if facts.bootstrap is not None:
        words.append(
            f"Support is the share of {facts.bootstrap.replicates} bootstrap replicates, in which cells were drawn again within "
            f"each condition; findings with a support below {GUESS} are called guesses."
        )
    if facts.training.epochs_run:
        start = "from that solution" if discovery is not None else "from random weights"
        words.append(
            f"A Discrepancy-VAE (Zhang et al. 2023) was trained {start} for {facts.training.epochs_run} epochs; the weights of "
            f"epoch {facts.training.best_epoch + 1} were kept."
        )
    versions = ", ".join(f"{name} {number}" for name, number in facts.packages.items())
    return " ".join([*words, f"Software: {versions}."])
