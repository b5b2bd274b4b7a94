"""How fast `crlseq fit` trains, against the plain published step run between its epochs, and where the time goes.

    ./scripts/benchmark_speed --yardstick plain_training_step.py
    ./scripts/benchmark_speed --yardstick plain_training_step.py --preset paper --dtype float32
    ./scripts/benchmark_speed --genes 20000 --density 0.025        # the same non-zeros a cell

A screen of Norman's size is made (or read, --screen), and fitted through `crlseq.fit`. After every epoch but the last
the yardstick runs once: both numbers of a ratio are of the same minute. One more epoch is timed by stage. A cell is one
perturbed cell with its control partner; an epoch's time includes its validation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from screens import make_screen

import crlseq
from crlseq.model import losses
from crlseq.model.expression_rows import DenseRows, SparseRows
from crlseq.pipeline.fit import fit
from crlseq.pipeline.progress import EFFECTS, TRAINING, Progress
from crlseq.training.cell_source import CellSource
from crlseq.training.objective import Objective

STAGES = ("waiting for cells", "products", "MMD", "other forward", "backward", "optimiser", "rest")
AHEAD = ("loading", "distances and moments")  # of the next step, in another thread where there is one


class Stopwatch:
    """Seconds by stage, by wrapping the functions that do the work; a stage inside another counts for the inner one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.running = False
        self.local = threading.local()  # what is open, and since when, in each thread

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Count calls of ``owner.name`` under `stage`."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch(stage)
            try:
                return inner(*args, **kwargs)
            finally:
                self._switch(None)

        setattr(owner, name, timed)

    def _switch(self, stage: str | None) -> None:
        now, of_thread = time.perf_counter(), self.local.__dict__
        stack: list[str] = of_thread.setdefault("open", [])
        if self.running and stack:
            self.seconds[stack[-1]] += now - of_thread["last"]
        of_thread["last"] = now
        if stage is None:
            stack.pop()
        else:
            stack.append(stage)


def watch() -> Stopwatch:
    """A stopwatch on everything that a training step does."""
    watch = Stopwatch()
    watch.wrap(Objective, "__call__", "other forward")
    watch.wrap(Objective, "prepare", "distances and moments")
    watch.wrap(CellSource, "rows", "loading")
    watch.wrap(CellSource, "dense", "loading")
    watch.wrap(Future, "result", "waiting for cells")
    for rows in (SparseRows, DenseRows):
        watch.wrap(rows, "times", "products")
        watch.wrap(rows, "transposed_times", "products")
    watch.wrap(losses.Kernel, "mean", "MMD")
    watch.wrap(losses, "mmd_squared", "MMD")
    watch.wrap(torch.Tensor, "backward", "backward")
    watch.wrap(torch.optim.Adam, "step", "optimiser")
    return watch


def plain_step(yardstick: Path, threads: int) -> float:
    """Microseconds per cell of the plain step."""
    words = [sys.executable, str(yardstick), "--threads", str(threads)]
    answer = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(json.loads(answer.stdout)["microseconds_per_cell"])


def main() -> None:
    """Make the screen, fit it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yardstick", type=Path, help="plain_training_step.py; left out: no ratio")
    parser.add_argument("--screen", type=Path, help="an .h5ad to fit, made there if it is missing")
    parser.add_argument("--perturbed", type=int, default=57_831)
    parser.add_argument("--control", type=int, default=8_907)
    parser.add_argument("--genes", type=int, default=5_000)
    parser.add_argument("--perturbations", type=int, default=105)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--method", help="of the fit; gradient: one latent a perturbation, as the yardstick has")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--epochs", type=int, default=4, help="the first warms up, the last is timed by stage")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        screen = args.screen or Path(folder) / "screen.h5ad"
        if not screen.exists():
            made = make_screen(args.perturbed, args.control, args.genes, args.perturbations, args.density)
            made.write_h5ad(screen)
        found = measure(args, screen, Path(folder) / "run")
    print_table(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def measure(args: argparse.Namespace, screen: Path, run_folder: Path) -> dict[str, Any]:
    """Fit the screen; times of epochs, of the yardstick between them, of stages."""
    clock, plain, epochs = watch(), [], []
    stages: list[tuple[str, float]] = []
    since = time.perf_counter()

    def on_epoch(record: dict[str, float], n_epochs: int) -> None:
        nonlocal since
        epochs.append(time.perf_counter() - since)
        if args.yardstick and len(epochs) < n_epochs:
            plain.append(plain_step(args.yardstick, args.threads))
        clock.running = len(epochs) == n_epochs - 1
        since = time.perf_counter()

    def on_stage(text: str) -> None:
        nonlocal since
        stages.append((text, time.perf_counter()))
        since = time.perf_counter()

    options: dict[str, Any] = {"n_top_genes": "all", "patience": None, "threads": args.threads, "device": args.device}
    run = fit(
        screen, run_folder, preset=args.preset, method=args.method, epochs=args.epochs, dtype=args.dtype,
        progress=Progress(stage=on_stage, epoch=on_epoch), **options,
    )  # fmt: skip
    stages.append(("end", time.perf_counter()))
    cells = sum(row.cells.get("train", 0) for row in run.facts.conditions if row.perturbations)
    timed = epochs[1:-1] or epochs
    each = statistics.median(timed) / cells * 1e6
    by_stage = {name: clock.seconds[name] / cells * 1e6 for name in STAGES[:-1]}
    ahead = {name: clock.seconds[name] / cells * 1e6 for name in AHEAD}
    one_thread = args.threads == 1  # then nothing is ahead
    by_stage["rest"] = epochs[-1] / cells * 1e6 - sum(by_stage.values()) - one_thread * sum(ahead.values())
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, {args.device}",
        "load": os.getloadavg()[0],
        "threads": args.threads,
        "versions": f"crlseq {crlseq.__version__}, torch {torch.__version__}",
        "screen": f"{run.facts.input.n_cells} cells x {run.facts.input.n_genes} genes, {cells} perturbed to train on",
        "fit": f"preset {args.preset}, {run.info['config']['model']['method']}, {args.dtype}, {run.facts.n_latents} latents",
        "microseconds_per_cell": each,
        "microseconds_per_cell_plain": statistics.median(plain) if plain else None,
        "ratio": statistics.median(plain) / each if plain else None,
        "plain_runs": plain,
        "epoch_seconds": epochs,
        "hundred_epochs_seconds": 100 * statistics.median(timed),
        "microseconds_per_cell_by_stage": by_stage,
        "microseconds_per_cell_ahead": ahead,
        "seconds_by_part": {
            name: end - start
            for (name, start), (_, end) in itertools.pairwise(stages)
            if name not in (EFFECTS, TRAINING)
        },
    }


def print_table(found: dict[str, Any]) -> None:
    """The numbers, a line each."""
    for name in ("machine", "load", "versions", "screen", "fit"):
        print(f"{name:<28}{found[name]}")
    print(f"{'microseconds per cell':<28}{found['microseconds_per_cell']:.1f}")
    if found["ratio"]:
        print(f"{'  of the plain step':<28}{found['microseconds_per_cell_plain']:.0f}")
        print(f"{'ratio':<28}{found['ratio']:.0f}")
    print(f"{'100 epochs':<28}{found['hundred_epochs_seconds']:.0f} s")
    print("by stage, last epoch, microseconds per cell")
    for name, value in found["microseconds_per_cell_by_stage"].items():
        print(f"  {name:<26}{value:.1f}")
    print("for the next step, " + ("in the same thread" if found["threads"] == 1 else "in another thread"))
    for name, value in found["microseconds_per_cell_ahead"].items():
        print(f"  {name:<26}{value:.1f}")
    print("other parts of the fit, seconds")
    for name, value in found["seconds_by_part"].items():
        print(f"  {name:<60}{value:.1f}")


if __name__ == "__main__":
    main()
