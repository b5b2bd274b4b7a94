"""What a cell costs in a training step as the screen grows, one axis at a time: a picture and its numbers.

    python scripts/benchmark_curves.py --output docs/scaling.png

Each point is a fit by gradient (`--method gradient`) of a screen made for it, 500 non-zeros per cell whatever the genes; the
median of the epochs but the first, validation included. The other axes stay at 20,000 cells, 5,000 genes, 105
perturbations and 15 latents.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from screens import make_screen

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import read_data
from crlseq.training.trainer import fit_model

NON_ZEROS = 500
BASE = {"cells": 20_000, "genes": 5_000, "perturbations": 105, "latents": 15}
AXES = {
    "cells": (5_000, 10_000, 20_000, 40_000, 80_000),
    "genes": (2_500, 5_000, 10_000, 20_000),
    "perturbations": (25, 105, 400, 1_600),
    "latents": (5, 15, 50, 100),
}


def microseconds(cells: int, genes: int, perturbations: int, latents: int, epochs: int) -> float:
    """Microseconds per perturbed cell with its control partner."""
    config = make_config(method="gradient", n_top_genes="all", epochs=epochs, patience=1.0)
    made = make_screen(cells - cells // 8, cells // 8, genes, perturbations, NON_ZEROS / genes)
    data = read_data(made, config.data, 0)
    ends = [time.perf_counter()]
    fit_model(data, config, latents, on_epoch=lambda *_: ends.append(time.perf_counter()))
    n_cells = sum(map(len, data.cells_by_condition(splits.TRAIN)[1:]))
    return 1e6 * statistics.median(np.diff(ends)[1:]) / n_cells


def main() -> None:
    """Measure every point, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(11, 2.8), sharey=True, layout="constrained")
    for panel, (axis, values) in zip(panels, AXES.items(), strict=True):
        costs = [microseconds(**{**BASE, axis: value}, epochs=args.epochs) for value in values]
        print(
            f"{axis:<15}" + "  ".join(f"{n:,}: {cost:.1f}" for n, cost in zip(values, costs, strict=True)), flush=True
        )
        panel.plot(values, costs, "o-", color="#0072b2", clip_on=False)
        panel.set(xscale="log", xlabel=axis, xticks=values, xticklabels=[f"{n:,}" for n in values], ylim=(0, None))
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd")
        panel.set_axisbelow(True)
    panels[0].set_ylabel("µs per cell and step")
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
