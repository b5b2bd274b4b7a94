"""``crlseq benchmark``: what fits recover of simulations with a known truth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from crlseq.cli.options import AsJson, Quiet, setting
from crlseq.cli.output import say, show_table
from crlseq.errors import UsageError

SHOWN = ["scenario", "method", "runs", "failed", "ancestor_f1", "target_accuracy", "ari", "shd", "mcc", "n_latents", "verdict", "seconds"]  # fmt: skip


def benchmark(
    output: Annotated[
        Path,
        setting("Folder for the results; finished fits there are kept.", "--output", "-o"),
    ],
    scenario: Annotated[list[str] | None, setting("A scenario; may be repeated.", default="all")] = None,
    seeds: Annotated[str, setting("Seeds, such as 0-7 or 0,2,5-6.")] = "0-7",
    method: Annotated[
        list[str] | None,
        setting("default, sparse, linear, paper or sparse-vae; may be repeated.", default="all"),
    ] = None,
    n_latents: Annotated[str, setting("known: the fits are given the true number; auto: they choose it.")] = "known",
    epochs: Annotated[
        int | None,
        setting("Epochs per fit; targets and graphs of the default method do not depend on it.", min=1),
    ] = None,
    threads: Annotated[int | None, setting("CPU threads.", default="all", min=1)] = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Simulate screens, fit them and score targets, programs and graph against the truth.

    The same command continues an interrupted benchmark.
    """
    chosen = _seeds(seeds)
    from crlseq.experiments.benchmark import METHODS, SCENARIOS
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
            note=(lambda text: None) if quiet else say,
        )
    except KeyboardInterrupt:
        say(f"Interrupted. Finished fits are kept in {output}; the same command continues.")
        raise SystemExit(130) from None  # past the entry point, whose advice is for `crlseq fit`
    show_table(summary if json else summary[SHOWN], "Medians over seeds", json)
    if not quiet:
        say(f"Written to {output}: benchmark.csv, summary.csv, calibration.csv, benchmark.png, benchmark.svg.")


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
