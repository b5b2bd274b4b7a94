"""The constants of docs/scaling.md: what a training step costs on one process or several, in time, memory and traffic.

    python scripts/benchmark_ranks.py --screen screen.h5ad [--density 0.4 --perturbed 15000]
    torchrun --standalone --nproc-per-node 2 scripts/benchmark_ranks.py --screen screen.h5ad

A screen of Norman's size is made where --screen has none. Every process computes on one thread, or as many as asked. A cell is one perturbed
cell with its control partner; an epoch's time includes its validation.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from screens import make_screen

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.batches import ControlPartners, epoch_batches
from crlseq.data.dataset import read_data
from crlseq.training.distributed import joined
from crlseq.training.schedules import resolve_step
from crlseq.training.trainer import fit_model

REPEATS = 20


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Of one call, the median."""
    times = []
    for _ in range(repeats):
        since = time.perf_counter()
        work()
        times.append(time.perf_counter() - since)
    return statistics.median(times)


def main() -> None:
    """Measure, and print on the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screen", type=Path, required=True)
    parser.add_argument("--perturbed", type=int, default=57_831, help="perturbed cells, where the screen is made")
    parser.add_argument("--density", type=float, default=0.1, help="share of non-zeros, where the screen is made")
    parser.add_argument("--n-latents", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=4, help="the first warms up")
    parser.add_argument("--perturbations-per-step", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ensemble", type=int, default=1, help="seeds trained at once")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with joined() as ranks:
        if ranks.rank == 0 and not args.screen.exists():
            make_screen(args.perturbed, 8_907, 5_000, 105, args.density).write_h5ad(args.screen)
        ranks.from_first(None)
        config = make_config(
            method="gradient", n_top_genes="all", epochs=args.epochs, patience=1.0,
            perturbations_per_step=args.perturbations_per_step, ensemble=args.ensemble,
        )  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        data = read_data(args.screen, config.data, 0)
        cells = data.cells_by_condition(splits.TRAIN)
        n_cells, in_step = sum(map(len, cells[1:])), resolve_step(config.training, cells)
        ends = [time.perf_counter()]
        fitted = fit_model(
            data, config, args.n_latents, on_epoch=lambda *_: ends.append(time.perf_counter()), ranks=ranks
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parameters = [parameter for parameter in fitted.model.parameters() if parameter.requires_grad]
        n_parameters = sum(parameter.numel() for parameter in parameters)
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        added = seconds(lambda: ranks.add_up(gradients), REPEATS)
        rng, partners = np.random.default_rng(0), ControlPartners(cells[0], data.batch)
        drawn = seconds(lambda: epoch_batches(cells, partners, config.training.batch_size, in_step, rng), 3)
        noise = seconds(lambda: torch.randn(1_000_000), REPEATS)
    if ranks.rank:
        return
    nnz = data.x.size if isinstance(data.x, np.ndarray) else data.x.nnz
    stored = sum(file.stat().st_size for file in [args.screen] if file.is_file())
    for name, value in {
        "processes": ranks.size,
        "load": f"{os.getloadavg()[0]:.1f}",
        "cells x genes": f"{data.x.shape[0]:,} x {data.n_genes:,}, {nnz / data.x.shape[0]:.0f} non-zeros a cell",
        "perturbed cells to train on": f"{n_cells:,}, {in_step} perturbations of up to {config.training.batch_size} a step",
        "microseconds a cell": f"{1e6 * statistics.median(np.diff(ends)[1:]) / n_cells:.1f}",
        "parameters": f"{n_parameters:,}: {4 * n_parameters / 1e6:.1f} MB of gradients a step",
        "adding up gradients": f"{1e3 * added:.1f} ms a step",
        "drawing an epoch's cells": f"{1e6 * drawn / n_cells:.2f} microseconds a cell, on every process",
        "drawing noise": f"{1e9 * noise / 1e6:.1f} ns a number, on every process",
        "peak memory": f"{peak / 1e6:.2f} GB, {before / 1e6:.2f} GB before reading; the non-zeros are {8 * nnz / 1e9:.2f} GB",
        "on disk": f"{stored / 1e9:.2f} GB, {stored / nnz:.1f} bytes a non-zero",
    }.items():
        print(f"{name:30}{value}")


if __name__ == "__main__":
    main()
