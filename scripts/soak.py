"""The long form of tests/faults: many generated and damaged files, many signals; ends with a line of counts.

    ./scripts/soak generated --count 2000 --seed 1
    ./scripts/soak damaged --count 2000 --seed 1

Every tenth file goes through a whole fit. Failures are printed with the recipe that makes them again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from tests.faults.isolated import isolated
from tests.faults.screens import bases, damages, recipes
from tests.faults.test_bad_files import ROUTES, SLICE, of_damage, of_recipe

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


KINDS = {"generated": generated, "damaged": damaged}


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
