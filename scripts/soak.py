"""The long form of tests/faults: many generated and damaged files, many signals; ends with a line of counts.

    ./scripts/soak generated --count 2000 --seed 1
    ./scripts/soak damaged --count 2000 --seed 1
    ./scripts/soak signals --count 100 --seed 1

Every tenth file goes through a whole fit. Failures are printed with the recipe that makes them again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import anndata as ad
import h5py
import numpy as np
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from tests.cli.test_repeat import results
from tests.faults.isolated import isolated
from tests.faults.screens import bases, damages, recipes
from tests.faults.test_bad_files import ROUTES, SLICE, of_damage, of_recipe
from tests.support import clear_screen, command, environment, spawn

FIT_EVERY = 10


class Tally:
    """Counts outcomes and prints faults."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0

    def add(self, function: Callable[[], dict[str, Any]], what: object) -> None:
        """Run in a child process and count."""
        found = isolated(function)
        self.counts[found["outcome"]] += 1
        if os.environ.get("SOAK_DETAILS"):
            print(found["outcome"], found.get("detail", ""))
        self.slowest = max(self.slowest, found["seconds"])
        if found["outcome"] == "fault":
            print(f"FAULT {what}\n{found['detail']}\n", flush=True)

    def close(self, kind: str) -> int:
        """Print the counts; the exit code."""
        counted = ", ".join(f"{n} {name}" for name, n in sorted(self.counts.items()))
        print(f"{kind}: {self.counts.total()} tried: {counted}; slowest {self.slowest:.1f} s")
        return int(self.counts["fault"] > 0)


def generated(count: int, number: int, folder: Path) -> int:
    """Generated screens."""
    tally = Tally()

    @seed(number)
    @settings(max_examples=count, **{**SLICE, "derandomize": False})
    @given(recipes(), st.sampled_from(ROUTES))
    def go(recipe: Any, route: str) -> None:
        fit = tally.counts.total() % FIT_EVERY == 0
        tally.add(lambda: of_recipe(recipe, "file" if fit else route, folder, fit), (recipe, route, fit))

    go()
    return tally.close("generated")


def damaged(count: int, number: int, folder: Path) -> int:
    """Damaged files."""
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = bases(folder)

    @seed(number)
    @settings(max_examples=count, **{**SLICE, "derandomize": False})
    @given(damages(len(files)))
    def go(recipe: Any) -> None:
        fit = tally.counts.total() % FIT_EVERY == 0
        tally.add(lambda: of_damage(recipe, files, folder, fit), (recipe, fit))

    go()
    return tally.close("damaged")


def signals(count: int, number: int, folder: Path) -> int:
    """SIGKILL, SIGTERM and SIGINT at random moments of fit, predict, export and report; then they go on to the same end.

    An output that is there after a signal is the undisturbed one to the byte; SIGTERM and SIGINT end a command within
    five seconds with 130, unless it was done, or had not yet begun to watch for them.
    """
    rng = np.random.default_rng(number)
    screen = folder / "screen.h5ad"
    clear_screen().write_h5ad(screen)
    run, wholes = folder / "RUN", folder / "wholes"
    fit = ["fit", screen, "--epochs", 30, "--batch-size", 16, "--n-latents", 3, "--bootstrap", 2, "--output"]
    wanted: dict[str, list[Any]] = {
        "fit": [*fit, "OUT", "--resume"],
        "predict": ["predict", run, "-p", "g0+g1", "--force", "--output", "OUT"],
        "export": ["export", run, "--force", "--format", "h5ad", "--output", "OUT"],
        "report": ["report", run, "--output", "OUT"],
    }
    spawn(*fit, run).check_returncode()
    contents, seconds = {}, {}
    for name, words in wanted.items():
        started = time.monotonic()
        spawn(*[wholes / name if word == "OUT" else word for word in words]).check_returncode()
        seconds[name] = time.monotonic() - started
        contents[name] = _content(wholes / name)
    tally: Counter[str] = Counter()
    slowest = 0.0
    for i in range(count):
        name = list(wanted)[int(rng.choice(4, p=[0.7, 0.1, 0.1, 0.1]))]
        out = folder / f"out{i}"
        words = [out if word == "OUT" else word for word in wanted[name]]
        kind = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT][int(rng.integers(3))]
        moment = rng.uniform(0.3, seconds[name])
        with subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True, env=environment()) as process:
            time.sleep(moment)
            sent = time.monotonic()
            process.send_signal(kind)
            _, err = process.communicate()
            took = time.monotonic() - sent
        told = (
            process.returncode in (0, 130, -kind) and "Traceback" not in err and (took < 5 or process.returncode == 0)
        )
        half = (out.exists() and _content(out) != contents[name]) or not told
        slowest = max(slowest, took if kind != signal.SIGKILL and process.returncode else 0)
        after = spawn(*words)
        same = after.returncode == 0 and _content(out) == contents[name]
        fault = half or not same
        tally["fault" if fault else f"{name} survived"] += 1
        if fault:
            print(
                f"FAULT {name} {kind.name} after {moment:.2f} s: exit {process.returncode} in {took:.1f} s\n{err}\n{after.stderr}"
            )
        for left in (out, out.with_name(out.name + ".partial")):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    counted = ", ".join(f"{n} {name}" for name, n in sorted(tally.items()))
    print(f"signals: {tally.total()} tried: {counted}; slowest end {slowest:.1f} s")
    return int(tally["fault"] > 0)


def _content(path: Path) -> object:
    """What must be the same: the results of a run, the numbers of an h5ad, the bytes of a page."""
    if path.is_dir():
        return results(path)
    if h5py.is_hdf5(path):
        adata = ad.read_h5ad(path)
        return [
            np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X).tobytes(),
            list(adata.obs),
            list(adata.uns),
        ]
    return path.read_bytes()


KINDS = {"generated": generated, "damaged": damaged, "signals": signals}


def main() -> int:
    """Run one kind."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description="The long form of tests/faults.")
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return KINDS[given.kind](given.count, given.seed, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
