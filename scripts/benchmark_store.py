"""A screen of any size made, prepared as a store, and trained on as it is streamed; and a part of it in memory.

    ./scripts/benchmark_store FOLDER                        # 1,000,000 cells, 8,000 genes, 2,000 perturbations
    ./scripts/benchmark_store FOLDER --cells 50000 --perturbations 100
    ./scripts/benchmark_store FOLDER --only train           # one of make, prepare, train, fit

What lies in FOLDER is not made again: a benchmark that was interrupted goes on. The part that is trained on in memory
(and streamed, to compare) has fewer perturbations of as many cells, the same genes and as many values a cell. Each
number is of a process of its own; memory is its largest resident set (this one holds nothing: a child's begins there).
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
import time
from pathlib import Path
from typing import Any

PART = 50_000  # cells that are made at once
STEPS = ("make", "prepare", "train", "fit")


def make(folder: Path, n_cells: int, n_perturbations: int, args: argparse.Namespace) -> None:
    """Files of `PART` cells, 4 % of them controls."""
    from screens import make_screen

    folder.mkdir(parents=True, exist_ok=True)
    for part, start in enumerate(range(0, n_cells, PART)):
        n = min(PART, n_cells - start)
        path = folder / f"part{part:04d}.h5ad"
        if path.exists():
            continue
        made = make_screen(n - n // 25, n // 25, args.genes, n_perturbations, args.density, part=part)
        made.write_h5ad(path.with_suffix(".tmp"), compression="lzf")
        path.with_suffix(".tmp").rename(path)
        print(f"made {path}", flush=True)


def run(words: list[str]) -> tuple[float, float, str]:
    """Seconds, MB of the largest resident set, and stdout of a child process."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e3, out


def prepare(files: list[Path], store: Path) -> None:
    """Through the command line; goes on where it was."""
    partial = store.with_name(store.name + ".partial")
    resume = ["--resume"] if partial.exists() else []
    seconds, peak, _ = run(["-m", "crlseq", "prepare", *map(str, files), "--output", str(store), "--quiet", *resume])
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    manifest = json.loads((store / "crlseq.json").read_text())
    rate = "resumed" if resume else f"{manifest['n_cells'] / seconds:.0f} cells/s"
    print(
        f"prepare {store.name}: {manifest['n_cells']} cells x {manifest['n_genes']} genes, {manifest['n_nonzero']} values; "
        f"{seconds:.0f} s ({rate}), peak {peak:.0f} MB, {size / 1e9:.2f} GB on disk",
        flush=True,
    )


def train(store: str, streamed: bool, epochs: int, threads: int) -> None:
    """Prints microseconds per perturbed cell by epoch; the first warms up. Random weights: speed is all that counts."""
    import torch

    from crlseq.config import make_config
    from crlseq.data import splits
    from crlseq.data.allocator import give_back, suit_allocator
    from crlseq.data.dataset import read_data
    from crlseq.training.trainer import fit_model

    torch.set_num_threads(threads)
    config = make_config(method="gradient", n_latents=15, epochs=epochs, streamed=streamed, patience=None)
    data = read_data(store, config.data, 0)
    torch.set_num_threads(threads)
    give_back()
    if streamed:
        suit_allocator(streamed)  # as a fit does
    cells = int(((data.split == splits.TRAIN) & (data.condition > 0)).sum())
    times = [time.perf_counter()]
    fit_model(data, config, 15, on_epoch=lambda record, n: times.append(time.perf_counter()))
    each = [(b - a) / cells * 1e6 for a, b in itertools.pairwise(times)]
    print(json.dumps({"cells": cells, "microseconds": each}))


def show_training(name: str, store: Path, streamed: bool, args: argparse.Namespace) -> None:
    """One line."""
    words = [__file__, str(store), "--child", "streamed" if streamed else "memory", "--epochs", str(args.epochs)]
    _, peak, out = run([*words, "--threads", str(args.threads)])
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    each = statistics.median(found["microseconds"][1:] or found["microseconds"])
    how = "streamed" if streamed else "in memory"
    print(
        f"train {name} {how}: {each:.1f} µs/cell ({found['cells']} cells an epoch), peak {peak:.0f} MB, "
        f"{', '.join(f'{value:.1f}' for value in found['microseconds'])}",
        flush=True,
    )


def main() -> None:
    """Make, prepare, train, fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=8_000)
    parser.add_argument("--perturbations", type=int, default=2_000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--share", type=float, default=0.1, help="of cells and perturbations, for the part in memory")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--method", default="linear", help="of the whole fit")
    parser.add_argument("--only", choices=STEPS)
    parser.add_argument("--child", choices=("make", "streamed", "memory"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "make":
        make(args.folder, args.cells, args.perturbations, args)
        return
    if args.child:
        train(str(args.folder), args.child == "streamed", args.epochs, args.threads)
        return
    steps = STEPS if args.only is None else (args.only,)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads", flush=True)
    for name, share in (("whole", 1.0), ("part", args.share)):
        store = args.folder / f"{name}.zarr"
        if ("make" in steps or "prepare" in steps) and not store.exists():
            sizes = ["--cells", str(round(share * args.cells))]
            sizes += ["--perturbations", str(round(share * args.perturbations))]
            kind = ["--genes", str(args.genes), "--density", str(args.density)]
            run([__file__, str(args.folder / name), "--child", "make", *sizes, *kind])
            if "prepare" in steps:
                prepare(sorted((args.folder / name).glob("part*.h5ad")), store)
    if "train" in steps:
        for name, streamed in (("part", False), ("part", True), ("whole", True)):
            show_training(name, args.folder / f"{name}.zarr", streamed, args)
    if "fit" in steps:
        words = [
            "-m",
            "crlseq",
            "fit",
            str(args.folder / "whole.zarr"),
            "--output",
            str(args.folder / "run"),
            "--force",
        ]
        options = ["--streamed", "--method", args.method, "--n-latents", "15", "--epochs", str(args.epochs)]
        seconds, peak, _ = run([*words, *options, "--threads", str(args.threads)])
        print(f"fit whole streamed ({args.method}): {seconds:.0f} s, peak {peak:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
