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
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
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
from tests.faults.isolated import isolated, preload
from tests.faults.outcomes import fitted, read
from tests.faults.screens import bases, damages, recipes
from tests.faults.test_bad_files import ROUTES, SLICE, of_damage, of_recipe
from tests.support import clear_screen, command, environment

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sound = bases(folder)[0]
    preload(lambda: (fitted(sound), read(sound)))

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
    preload(lambda: (fitted(files[0]), read(files[0])))

    @seed(number)
    @settings(max_examples=count, **{**SLICE, "derandomize": False})
    @given(damages(len(files)))
    def go(recipe: Any) -> None:
        fit = tally.counts.total() % FIT_EVERY == 0
        tally.add(lambda: of_damage(recipe, files, folder, fit), (recipe, fit))

    go()
    return tally.close("damaged")


SHARES = {"fit": 0.3, "fit of a store": 0.25, "prepare": 0.15, "predict": 0.1, "export": 0.1, "report": 0.1}
SPAWN_EVERY = 10


def signals(count: int, number: int, folder: Path) -> int:
    """SIGKILL, SIGTERM and SIGINT at random moments of the commands that write; then they go on to the same end.

    An output that is there after a signal is the undisturbed one to the byte; SIGTERM and SIGINT end a command within
    five seconds with 130, unless it was done, or had not yet begun to watch for them. Commands run in forks of this
    process, so that the moments fall into their work and not into imports; every tenth in a process of its own.
    """
    rng = np.random.default_rng(number)
    screen, store, run, wholes = folder / "screen.h5ad", folder / "store", folder / "RUN", folder / "wholes"
    wholes.mkdir()
    clear_screen().write_h5ad(screen)
    options = ["--epochs", 10, "--batch-size", 32, "--n-latents", 3, "--bootstrap", 2, "--output"]
    wanted: dict[str, list[Any]] = {
        "fit": ["fit", screen, *options, "OUT", "--resume"],
        "fit of a store": ["fit", store, "--streamed", *options, "OUT", "--resume"],
        "prepare": ["prepare", screen, "--resume", "--output", "OUT"],
        "predict": ["predict", run, "-p", "g0+g1", "--force", "--output", "OUT"],
        "export": ["export", run, "--force", "--format", "h5ad", "--output", "OUT"],
        "report": ["report", run, "--force", "--output", "OUT"],
    }
    for words in (["prepare", screen, "--output", store], ["fit", screen, *options, run]):
        preload(lambda words=words: _run(list(map(str, words))))
        assert (store if words[0] == "prepare" else run).exists()
    contents, seconds = {}, {}
    for name, words in wanted.items():
        begun = time.monotonic()
        code, err = Started([wholes / name if word == "OUT" else word for word in words], folder, fork=True).ended()
        assert code == 0, err
        seconds[name] = time.monotonic() - begun
        contents[name] = _content(wholes / name)
    tally: Counter[str] = Counter()
    slowest = 0.0
    for i in range(count):
        name = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        out = folder / f"out{i}"
        words = [out if word == "OUT" else word for word in wanted[name]]
        kind = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT][int(rng.integers(3))]
        fork = i % SPAWN_EVERY > 0
        moment = rng.uniform(0, seconds[name] + 6.0 * (not fork))  # imports take some seconds
        process = Started(words, folder, fork)
        time.sleep(moment)
        sent = time.monotonic()
        process.send(kind)
        code, err = process.ended()
        took = time.monotonic() - sent
        # Five seconds, and on a busy machine as many times more as there are processes to a core.
        limit = 5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        told = code in (0, 130, -kind) and "Traceback" not in err and (took < limit or code == 0)
        half = (out.exists() and _content(out) != contents[name]) or not told
        slowest = max(slowest, took if kind != signal.SIGKILL and code else 0)
        after, said = Started(words, folder, fork).ended()
        same = after == 0 and _content(out) == contents[name]
        fault = half or not same
        met = "met" if code else "done before"
        tally["fault" if fault else f"{name} {kind.name} {met}"] += 1
        if os.environ.get("SOAK_DETAILS"):
            print(
                i,
                name,
                kind.name,
                f"after {moment:.2f} s of {seconds[name]:.2f} s: exit {code} in {took:.1f} s",
                flush=True,
            )
        if fault:
            print(
                f"FAULT {name} {kind.name} after {moment:.2f} s of {seconds[name]:.2f} s: exit {code} in {took:.1f} s, then {after},"
                f" same {same}\n{err}\n{said}",
                flush=True,
            )
        for left in (out, out.with_name(out.name + ".partial")):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    counted = ", ".join(f"{n} {name}" for name, n in sorted(tally.items()))
    print(f"signals: {tally.total()} tried: {counted}; slowest end {slowest:.1f} s")
    return int(tally["fault"] > 0)


class Started:
    """A command that runs in a fork of this process, or in a new one."""

    def __init__(self, words: Sequence[object], folder: Path, fork: bool) -> None:
        self.err = folder / "stderr"
        sys.stdout.flush()
        with self.err.open("wb") as err:
            if not fork:
                self.pid = subprocess.Popen(command(*words), stdout=err, stderr=err, env=environment()).pid
                return
            self.pid = os.fork()
            if self.pid == 0:
                os.dup2(err.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os._exit(_run(list(map(str, words))))

    def send(self, number: int) -> None:
        """Send a signal; nobody has waited yet, so that the process is there, dead or alive."""
        os.kill(self.pid, number)

    def ended(self) -> tuple[int, str]:
        """Exit code, or minus the signal that ended it, and what was said."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.err.read_text(errors="replace")


def _run(words: list[str]) -> int:
    """``crlseq WORDS`` in this process, which is a fork and does nothing else."""
    from crlseq.cli.app import main as crlseq

    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", errors="replace") for n in (1, 2))
    sys.argv = ["crlseq", *words]
    try:
        crlseq()
        return 0
    except SystemExit as done:
        return int(done.code or 0)
    except KeyboardInterrupt:  # before the command had begun to watch
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()


def _content(path: Path) -> object:
    """What must be the same: the results of a run, the numbers of an h5ad, every byte of a store or a page."""
    if (path / "run.json").exists():
        return results(path)
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
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
