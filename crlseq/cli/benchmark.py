"""``crlseq benchmark``: what fits recover of screens with a known truth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from crlseq.cli.options import AsJson, Quiet, setting, switch
from crlseq.cli.output import say, show_table
from crlseq.errors import UsageError, suggestion
from crlseq.experiments.scenarios import EXTERNAL, METHODS, SCENARIOS, SUITES

SHOWN = ["scenario", "method", "runs", "failed", "ancestor_f1", "upstream_precision", "upstream_recall", "target_accuracy", "ari", "shd", "mcc", "n_latents", "verdict", "seconds"]  # fmt: skip
SEEDS = "0-7"


def benchmark(
    output: Annotated[Path, setting("Folder for the results; finished fits there are kept.", "--output", "-o")],
    scenario: Annotated[
        list[str] | None, setting("A scenario; may be repeated.", default="all", metavar="<str>", choices=SCENARIOS)
    ] = None,
    seeds: Annotated[str, setting("Seeds, such as 0-7 or 0,2,5-6.")] = SEEDS,
    method: Annotated[
        list[str] | None,
        setting(
            "How to fit; may be repeated.", choices=(*METHODS, *EXTERNAL), default="all of crlseq", metavar="<str>"
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
        str | None, setting("Many methods on many scenarios, as one page.", default="none", choices=SUITES)
    ] = None,
    quick: Annotated[bool, switch("--quick", "The suite on few and small screens, in two minutes.")] = False,
    jobs: Annotated[int, setting("Fits at a time, each on one thread unless --threads says more.", min=1)] = 1,
    threads: Annotated[int | None, setting("CPU threads.", default="all", min=1)] = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Simulate screens, fit them and score targets, programs and graph against the truth.

    The same command continues an interrupted benchmark.
    """
    chosen = _seeds(seeds)
    others = {"--scenario": scenario, "--method": method, "--epochs": epochs, "--seeds": seeds != SEEDS}
    others["--n-latents"] = n_latents != "known"
    _refuse(suite, quick, [name for name, given in others.items() if given])
    note = (lambda text: None) if quiet else say
    from crlseq.experiments.benchmark import benchmark as run_benchmark
    from crlseq.experiments.suite import run_suite

    try:
        if suite is None:
            options = None if epochs is None else {"epochs": epochs}
            table = run_benchmark(
                output, scenarios=scenario or tuple(SCENARIOS), seeds=chosen, methods=method or tuple(METHODS),
                n_latents=n_latents, threads=threads, options=options, jobs=jobs, note=note,
            )  # fmt: skip
        else:
            table = run_suite(output, suite, quick, threads, jobs, note)
    except KeyboardInterrupt:
        say(f"Interrupted. Finished fits are kept in {output}; the same command continues.")
        raise SystemExit(130) from None  # past the entry point, whose advice is for `crlseq fit`
    shown = table[SHOWN] if suite is None else table.drop(columns=["group", "reason"])
    show_table(table if json else shown, "Medians over seeds", json)
    if not quiet:
        files = "suite.html, suite.csv, " if suite else ""
        say(f"Written to {output}: {files}benchmark.csv, summary.csv, calibration.csv, benchmark.png, benchmark.svg.")


def _refuse(suite: str | None, quick: bool, others: list[str]) -> None:
    """Refuse, by `UsageError`, a suite that there is none, and options that contradict one."""
    if suite is None and quick:
        raise UsageError("--quick makes a suite small, and none was given.", "Give --suite field as well.")
    if suite is not None and suite not in SUITES:
        raise UsageError(f"There is no suite {suite!r}.", suggestion(suite, SUITES, "There are"))
    if suite is not None and others:
        raise UsageError(f"--suite chooses for itself, and {others[0]} was given.", "Omit one of them.")


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
