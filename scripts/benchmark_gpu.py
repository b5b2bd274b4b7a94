"""All that has to be asked of a GPU, in under eight minutes and one JSON: for the day there is one.

    python scripts/benchmark_gpu.py --output gpu.json
    python scripts/benchmark_gpu.py --device cpu --small --slower 20 --output cpu.json  # tries the script itself

Right: the tests marked cuda; one seed twice to the byte. Fast: 100 epochs at Norman's size by stage, a training step against
the device's own bandwidth and arithmetic, its kernels, an ensemble of ten against one fit, steps by CUDA graphs against plain
ones, memory. Every part stands alone: what fails, or takes more than its time, is written down, and the next part runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import anndata as ad
import torch
from screens import make_screen

import crlseq
from crlseq.config import make_config
from crlseq.pipeline.progress import Progress
from crlseq.run.run import Run
from crlseq.training import graph

ROOT = Path(__file__).resolve().parents[1]
NORMAN = {"n_perturbed": 57_831, "n_control": 8_907, "n_genes": 5_000}
SMALL = {"n_perturbed": 1_200, "n_control": 300, "n_genes": 150}
MEDIUM = {"n_perturbed": 12_000, "n_control": 2_000, "n_genes": 1_000}  # 20 steps an epoch, as at Norman's size
DENSITY = 0.1  # share of non-zeros
# Of a step with the default preset at Norman's size: products of rows, decoder and distances.
STEP_BYTES, STEP_FLOPS = 5e9, 1.7e9
FIT = {"n_latents": 15, "bootstrap": 0, "seed": 0}
TOP = 12  # kernels that are named
# Each part's at most: under eight minutes together, imports included.
SECONDS = {
    "machine": 10, "screens": 80, "tests": 110, "limits": 15, "norman": 120, "against limits": 1, "profile": 30,
    "one seed twice": 30, "ensemble": 30, "graphs": 40,
}  # fmt: skip


class OverTimeError(BaseException):
    """A part took its time; no handler of errors within it may go on."""


class Clock:
    """Seconds of each stage of a fit, and of each epoch."""

    def __init__(self, device: str) -> None:
        self.device, self.stages, self.epochs = device, dict[str, float](), list[float]()
        self.name, self.since, self.last = "", time.perf_counter(), 0.0

    def stage(self, text: str) -> None:
        """The next stage begins."""
        wait(self.device)
        now = time.perf_counter()
        if self.name:
            self.stages[self.name] = self.stages.get(self.name, 0.0) + now - self.since
        self.name, self.since, self.last = text, now, now

    def epoch(self, record: dict[str, float], n_epochs: int) -> None:
        """An epoch ends."""
        wait(self.device)
        now = time.perf_counter()
        self.epochs.append(now - self.last)
        self.last = now

    def progress(self) -> Progress:
        """The callbacks of a fit."""
        return Progress(stage=self.stage, epoch=self.epoch)


def wait(device: str) -> None:
    """Until the device has done everything."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(screen: ad.AnnData, device: str, **options: Any) -> tuple[Run, Clock, float]:
    """A fit in memory, its clock, and its seconds."""
    clock, start = Clock(device), time.perf_counter()
    run = crlseq.fit(screen.copy(), progress=clock.progress(), device=device, **{**FIT, **options})
    clock.stage("")
    return run, clock, time.perf_counter() - start


def about(device: str) -> dict[str, Any]:
    """The machine."""
    known: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    if device.startswith("cuda"):
        of = torch.cuda.get_device_properties(0)
        known |= {
            "device": of.name,
            "memory": of.total_memory,
            "processors": of.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return known


def limits(device: str) -> dict[str, float]:
    """Bytes a second of a copy on the device, and floating point operations a second of a product in float32 without TF32."""
    n = 4096 if device.startswith("cuda") else 1024
    x, y = torch.randn(2, n, n, device=device)

    def best(act: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(6):
            wait(device)
            start = time.perf_counter()
            for _ in range(10):
                act()
            wait(device)
            seconds.append((time.perf_counter() - start) / 10)
        return min(seconds)

    return {"bytes": 2 * x.nbytes / best(lambda: y.copy_(x)), "flops": 2 * n**3 / best(lambda: x @ y)}


def norman(screen: ad.AnnData, device: str, epochs: int) -> dict[str, Any]:
    """The whole fit with the default options."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    run, clock, seconds = timed(screen, device, epochs=epochs)
    config = make_config(None).training
    perturbed = int((screen.obs["perturbation"] != "control").sum())
    steps = max(1, round(perturbed / config.batch_size))
    epoch = sorted(clock.epochs)[len(clock.epochs) // 2]
    found = {
        "seconds": seconds,
        "stages": clock.stages,
        "epoch": epoch,
        "steps": steps,
        "step": epoch / steps,
        "epochs": len(run.history),
    }
    if device.startswith("cuda"):
        found["peak memory"] = torch.cuda.max_memory_allocated()
    return found


def against_limits(found: dict[str, Any]) -> dict[str, float]:
    """How many times longer than its bytes, and than its arithmetic, a step of Norman's size takes."""
    step, of = found["norman"]["step"], found["limits"]
    return {
        "times the bandwidth's": step / (STEP_BYTES / of["bytes"]),
        "times the arithmetic's": step / (STEP_FLOPS / of["flops"]),
    }


def profile(screen: ad.AnnData, device: str) -> dict[str, Any]:
    """Kernels of two epochs by their time, and how many there are."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.startswith("cuda") else []
    with torch.profiler.profile(activities=kinds) as seen:
        timed(screen, device, epochs=2, method="gradient")
    rows = seen.key_averages()
    own = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    rows = sorted(rows, key=lambda row: -getattr(row, own))
    total = sum(getattr(row, own) for row in rows)
    return {
        "launches": sum(row.count for row in rows if "LaunchKernel" in row.key),
        "waits": sum(row.count for row in rows if "Synchronize" in row.key),
        "kernels": {row.key[:80]: round(getattr(row, own) / max(total, 1), 4) for row in rows[:TOP]},
    }


def same_twice(screen: ad.AnnData, device: str) -> bool:
    """Whether one seed is one model to the byte."""
    one, other = (timed(screen, device, epochs=2)[0] for _ in range(2))
    assert one.weights is not None and other.weights is not None
    return all(torch.equal(value, other.weights[0][name]) for name, value in one.weights[0].items())


def by_graphs(screen: ad.AnnData, device: str) -> dict[str, Any]:
    """Seconds an epoch with and without CUDA graphs of steps, how far losses and weights are apart, and what CUDA refused."""
    epochs: dict[str, float] = {}
    runs: list[Run] = []
    for name, on in (("plain", False), ("graphs", True)):
        graph.ON = on
        try:
            run, clock, _ = timed(screen, device, epochs=6, method="gradient")
        finally:
            graph.ON = False
        epochs[name] = min(clock.epochs)
        runs.append(run)
    plain, by_graph = runs
    assert plain.weights is not None and by_graph.weights is not None
    weights = [(value.double(), by_graph.weights[0][name].double()) for name, value in plain.weights[0].items()]
    losses = [run.history["validation_total"].iloc[-1] for run in runs]
    return {
        **epochs,
        "ratio": epochs["plain"] / epochs["graphs"],
        "loss": abs(losses[1] / losses[0] - 1),
        "weights": max(float((b - a).norm() / a.norm().clamp_min(1e-12)) for a, b in weights if a.numel()),
        "refused": [note for note in by_graph.info["notes"] if "graphs" in note],
    }


def ensemble(screen: ad.AnnData, device: str) -> dict[str, float]:
    """Seconds an epoch of ten models that share a step's cells, over those of one."""
    one, ten = (timed(screen, device, epochs=3, method="gradient", ensemble=n)[1].epochs for n in (1, 10))
    return {"one": min(one), "ten": min(ten), "ratio": min(ten) / min(one)}


def marked_tests() -> str:
    """The last line of the tests that need a GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "cuda", "-n", "0", "-q", "tests/cuda"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def parts_of(device: str, epochs: int, is_small: bool, found: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is asked, in order; later parts read what earlier ones `found`."""
    screens: dict[str, ad.AnnData] = {}

    def made() -> list[str]:
        sizes = {"norman": SMALL if is_small else NORMAN, "small": SMALL, "medium": SMALL if is_small else MEDIUM}
        for name, size in sizes.items():
            screens[name] = make_screen(**size, n_perturbations=30 if size is SMALL else 100, density=DENSITY, seed=0)
        return [f"{name}: {screen.n_obs} x {screen.n_vars}" for name, screen in screens.items()]

    return {
        "machine": lambda: about(device),
        "screens": made,
        "tests": marked_tests,
        "limits": lambda: limits(device),
        "norman": lambda: norman(screens["norman"], device, epochs),
        **({} if is_small else {"against limits": lambda: against_limits(found)}),
        "profile": lambda: profile(screens["small"], device),
        "one seed twice": lambda: same_twice(screens["small"], device),
        "ensemble": lambda: ensemble(screens["small"], device),
        "graphs": lambda: by_graphs(screens["medium"], device),
    }


def within(seconds: float, part: Callable[[], Any]) -> Any:
    """What a part gives, or OverTimeError after so many seconds, however it waits."""

    def stop(number: int, frame: Any) -> None:
        raise OverTimeError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return part()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ask(parts: dict[str, Callable[[], Any]], found: dict[str, Any], output: Path, slower: float = 1.0) -> None:
    """Ask every part within its time, on a machine that is so many times `slower`, and write the answers after each."""
    for name, part in parts.items():
        start = time.perf_counter()
        try:
            found[name] = within(slower * SECONDS[name], part)
        except (Exception, OverTimeError) as error:  # what fails hides nothing else
            found[name] = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-3)}
        print(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(found[name])[:600]}", flush=True)
        output.write_text(json.dumps(found, indent=1), encoding="utf-8")


def main() -> None:
    """Ask everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--small", action="store_true", help="a screen of 1,500 cells")
    parser.add_argument("--slower", type=float, default=1.0, help="times as long for every part: of a CPU")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    ask(parts_of(given.device, given.epochs, given.small, found), found, given.output, given.slower)


if __name__ == "__main__":
    main()
