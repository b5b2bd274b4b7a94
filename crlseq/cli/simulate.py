"""``crlseq simulate`` and ``benchmark``: screens with a known truth, and what fits recover of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, NoReturn

from crlseq.cli.options import AsJson, Force, Quiet, setting, switch
from crlseq.cli.output import refuse_output, say, show_table
from crlseq.errors import UsageError, suggestion
from crlseq.experiments.scenarios import EXTERNAL, METHODS, SCENARIOS, SUITES

SHOWN = ["scenario", "method", "runs", "failed", "ancestor_f1", "upstream_precision", "upstream_recall", "target_accuracy", "ari", "shd", "mcc", "n_latents", "verdict", "seconds"]  # fmt: skip
SEEDS = "0-7"
RANGES = ("edge_size", "shift_size", "retention", "penetrance")


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


def benchmark(
    output: Annotated[Path, setting("Folder for the results; finished fits there are kept.", "--output", "-o")],
    scenario: Annotated[
        list[str] | None, setting("A scenario; may be repeated.", default="all", metavar="<str>", choices=SCENARIOS)
    ] = None,
    seeds: Annotated[str, setting("Seeds, such as 0-7 or 0,2,5-6.")] = SEEDS,
    method: Annotated[
        list[str] | None,
        setting(
            "How to fit; may be repeated. Those of other packages are not among all.",
            choices=(*METHODS, *EXTERNAL),
            default="all",
            metavar="<str>",
        ),
    ] = None,
    n_latents: Annotated[
        str, setting("known: the fits are given the true number; auto: they choose it.", choices=("known", "auto"))
    ] = "known",
    epochs: Annotated[
        int | None,
        setting(
            "Epochs per fit; targets and graphs of the default method do not depend on it.",
            default="as in a fit",
            min=1,
        ),
    ] = None,
    suite: Annotated[
        str | None,
        setting(
            "Many methods on many scenarios, as a page: their scenarios, seeds and methods.",
            default="none",
            choices=SUITES,
        ),
    ] = None,
    quick: Annotated[bool, switch("--quick", "The suite on small screens, in two minutes.")] = False,
    jobs: Annotated[int, setting("Fits at a time, each with one thread unless --threads says more.", min=1)] = 1,
    threads: Annotated[int | None, setting("CPU threads.", default="all", min=1)] = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Simulate screens, fit them and score targets, programs and graph against the truth.

    The same command continues an interrupted benchmark.
    """
    chosen = _seeds(seeds)
    if suite is None and quick:
        raise UsageError("--quick makes a suite small, and none was given.", "Give --suite field as well.")
    if suite is not None:
        others = {"--scenario": scenario, "--method": method, "--epochs": epochs, "--seeds": seeds != SEEDS or None}
        _run_suite(output, suite, quick, threads, jobs, [name for name, given in others.items() if given], json, quiet)
        return
    from crlseq.experiments.benchmark import benchmark as run_benchmark

    try:
        summary = run_benchmark(
            output,
            scenarios=scenario or tuple(SCENARIOS),
            seeds=chosen,
            methods=method or tuple(METHODS),
            n_latents=n_latents,
            threads=threads,
            options=None if epochs is None else {"epochs": epochs},
            jobs=jobs,
            note=(lambda text: None) if quiet else say,
        )
    except KeyboardInterrupt:
        _interrupted(output)
    show_table(summary if json else summary[SHOWN], "Medians over seeds", json)
    if not quiet:
        say(f"Written to {output}: benchmark.csv, summary.csv, calibration.csv, benchmark.png, benchmark.svg.")


def _run_suite(
    output: Path, name: str, quick: bool, threads: int | None, jobs: int, others: list[str], json: bool, quiet: bool
) -> None:
    """``crlseq benchmark --suite``."""
    if name not in SUITES:
        raise UsageError(f"There is no suite {name!r}.", suggestion(name, SUITES, "There are"))
    if others:
        raise UsageError(f"--suite chooses for itself, and {others[0]} was given.", f"Omit --suite or {others[0]}.")
    from crlseq.experiments.suite import run_suite

    try:
        table = run_suite(output, name, quick, threads, jobs, note=(lambda text: None) if quiet else say)
    except KeyboardInterrupt:
        _interrupted(output)
    show_table(table if json else table.drop(columns=["group", "reason"]), "Medians over seeds", json)
    if not quiet:
        say(f"Written to {output}: suite.html, suite.csv, benchmark.csv.")


def _interrupted(output: Path) -> NoReturn:
    say(f"Interrupted. Finished fits are kept in {output}; the same command continues.")
    raise SystemExit(130) from None  # past the entry point, whose advice is for `crlseq fit`


def _seeds(text: str) -> list[int]:
    """``0-2,5`` -> 0, 1, 2, 5."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, flags=re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UsageError(f"Seeds are {text!r}.", "Give numbers and ranges, such as 0-7 or 0,2,5-6.")
        found += range(first, last + 1)
    return found
