"""Attacks the command line with what strangers, clusters and containers do to it, and counts kinds of failure.

    ./scripts/attack --minutes 30 --seed 1
    ./scripts/attack --only limits --seed 1 --first 40 --count 1     # one attack again

Every attack is drawn from its number. It may not end with a fault, a traceback, a signal that nobody sent, an exit code
that docs/reliability.md does not name, after `PATIENCE` seconds, with more than `MEMORY` of memory, or with a run that is
half there. Nothing here is shared with scripts/soak or the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

PATIENCE, MEMORY = 180.0, 4 << 30
CODES = {0, 1, 2, 3, 4, 130, 141, 143}
WEIRD = [
    "", " ", "0", "-1", "nan", "inf", "1e400", "9" * 40, "-", "--", "~", "/dev/null", "/dev/zero", "/", ".", "..", "'",
    "a" * 5000, "ŝ", "\u202e", "\x1b[31m", "*", "$HOME", "=1+1", "control", "P0", "P999", "g0+g0", "+", "true", "[all]",
]  # fmt: skip
OPTIONS = [
    "--perturbation-key", "--control-label", "--separator", "--layer", "--values", "--batch-key", "--min-cells", "--hold-out",
    "--hold-out-cells", "--n-latents", "--method", "--intervention", "--epochs", "--batch-size", "--seed", "--threads",
    "--bootstrap", "--device", "--genes", "--gene-sets", "--embeddings", "--guide-key", "--guide-counts", "--config", "--ensemble",
]  # fmt: skip
READERS = [
    ["inspect", "RUN"], ["inspect", "interventions", "RUN"], ["inspect", "programs", "RUN"], ["inspect", "dag", "RUN"],
    ["inspect", "pairs", "RUN", "--json"], ["inspect", "program", "RUN", "P0"], ["inspect", "perturbation", "RUN", "g0"],
    ["inspect", "ancestry", "RUN"], ["report", "RUN", "-o", "out.html"], ["plot", "RUN", "effects-map", "-o", "out.png"],
    ["plot", "RUN", "activity", "-o", "out.png"], ["plot", "RUN", "dag", "-o", "out.svg"], ["evaluate", "RUN"],
    ["predict", "RUN", "--perturbation", "g0", "-o", "out.h5ad"], ["export", "RUN", "-f", "cytoscape", "-o", "out.cyjs"],
    ["export", "RUN", "-f", "csv", "-o", "out"], ["export", "RUN", "-f", "h5ad", "-o", "out.h5ad"], ["rerun", "RUN"],
]  # fmt: skip
FIT = ["--method", "linear", "--bootstrap", "0", "--n-latents", "3", "--seed", "2", "--quiet"]


@dataclass
class Ended:
    """How a command ended."""

    words: list[str]
    code: int
    out: str
    err: str
    seconds: float
    sent: bool = False  # a signal was sent


@dataclass
class Attack:
    """What one attack may use: its own random numbers, a folder, and the screen and run that are copied into it."""

    draw: random.Random
    folder: Path
    screen: Path
    run: Path
    ended: list[Ended] = field(default_factory=list)

    def command(self, words: list[str], kill: float | None = None, **how: Any) -> Ended:
        """Run crlseq; killed after so many seconds by a signal of `how`, if any."""
        deadly, limits, stdin, stdout = (how.pop(name, None) for name in ("signal", "limits", "stdin", "stdout"))

        def before() -> None:
            for kind, value in (limits or {}).items():
                resource.setrlimit(kind, (value, value))

        start = time.monotonic()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"} | how.pop("environment", {})
        words = [word.replace("\0", "") for word in words]
        process = subprocess.Popen(
            [sys.executable, "-m", "crlseq", *words], cwd=self.folder, env=environment, preexec_fn=before,
            stdin=stdin or subprocess.DEVNULL, stdout=stdout or subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=kill or PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(deadly or signal.SIGKILL)
            out, err = process.communicate()
        ended = Ended(
            words, process.returncode, (out or b"").decode(errors="replace"), err.decode(errors="replace"),
            time.monotonic() - start, kill is not None,
        )  # fmt: skip
        self.ended.append(ended)
        return ended


def judged(ended: Ended) -> str:
    """The kind of failure of a command; empty if it ended as it should."""
    text = ended.err
    if found := re.search(r"A fault in crlseq: (.*)", text):
        return f"fault: {re.sub(r'[0-9]+|/[^ ]+', '#', found[1])[:90]}"
    if "Traceback (most recent call last)" in text:
        return f"traceback: {text.strip().splitlines()[-1][:90]}"
    if ended.code < 0 and not ended.sent:
        slow = ended.seconds >= PATIENCE
        return "not done in time" if slow else f"died of {signal.Signals(-ended.code).name}"
    if ended.code >= 0 and ended.code not in CODES:
        return f"exit code {ended.code}"
    if ended.code in (2, 3, 4) and not text.strip():
        return f"exit code {ended.code} without a word"
    return ""


def whole(run: Path) -> str:
    """What is wrong with a run that should be whole or not there."""
    if run.exists() and not (run / "report.html").is_file():
        return f"half a run: {', '.join(sorted(path.name for path in run.iterdir()))[:80]}"
    return ""


def attack_bytes(a: Attack) -> str:
    """A file that was damaged on its way."""
    file = a.folder / "screen.h5ad"
    content = bytearray(file.read_bytes())
    for _ in range(a.draw.choice([1, 3, 30])):
        at, n = a.draw.randrange(len(content)), a.draw.choice([1, 4, 64])
        content[at : at + n] = a.draw.randbytes(n) if a.draw.random() < 0.7 else b"\0" * n
    if a.draw.random() < 0.2:
        del content[a.draw.randrange(len(content)) :]
    file.write_bytes(bytes(content))
    return _read_and_fit(a)


def attack_structure(a: Attack) -> str:
    """A file whose parts are of another kind, shape or content than anndata writes."""
    with h5py.File(a.folder / "screen.h5ad", "r+") as handle:
        for _ in range(a.draw.choice([1, 1, 2, 4])):
            names: list[str] = []
            handle.visit(names.append)
            name = a.draw.choice(names)
            parent, part = handle[name].parent, handle[name]
            kind = a.draw.randrange(7)
            if kind == 0:
                del handle[name]
            elif kind == 1 and isinstance(part, h5py.Dataset) and part.shape and part.dtype.kind in "iuf":
                values = part[()]
                values.flat[:: a.draw.choice([1, 7, 1000])] = a.draw.choice([-1, 0, np.iinfo(np.int32).max, 3])
                part[...] = values
            elif kind == 2 and isinstance(part, h5py.Dataset) and part.dtype.kind == "f" and part.shape:
                part[...] = np.where(
                    np.random.default_rng(a.draw.randrange(99)).random(part.shape) < 0.1, np.nan, part[()]
                )
            elif kind == 3:
                for key in list(part.attrs):
                    if a.draw.random() < 0.5:
                        del part.attrs[key]
                    else:
                        part.attrs[key] = a.draw.choice([0, -5, "x", 2**60])
            elif kind == 4:
                short = name.rsplit("/", 1)[-1]
                del handle[name]
                parent[short] = a.draw.choice(
                    [np.arange(3), "text", np.float64(1), np.zeros((0, 5)), np.zeros((2, 2, 2))]
                )
            elif kind == 5:
                short = name.rsplit("/", 1)[-1]
                del handle[name]
                parent[short] = h5py.SoftLink(a.draw.choice([f"/{name}", "/", "/nowhere", "/X"]))
            elif kind == 6 and isinstance(part, h5py.Dataset) and part.shape:
                short, values = name.rsplit("/", 1)[-1], part[()]
                about = dict(part.attrs)
                del handle[name]
                parent[short] = (
                    values[: len(values) // 2] if a.draw.random() < 0.5 else np.concatenate([values, values])
                )
                parent[short].attrs.update(about)
    return _read_and_fit(a)


def _read_and_fit(a: Attack) -> str:
    a.command(["check", "screen.h5ad"])
    a.command(["fit", "screen.h5ad", "-o", "NEW", *FIT])
    return whole(a.folder / "NEW")


def attack_words(a: Attack) -> str:
    """Words that mean nothing."""
    words = a.draw.choice([["fit", "screen.h5ad", "-o", "NEW", *FIT], ["check", "screen.h5ad"], *map(list, READERS)])
    for _ in range(a.draw.choice([1, 1, 2, 3])):
        kind, word = a.draw.randrange(4), a.draw.choice(WEIRD)
        if kind == 0 and len(words) > 1:
            words[a.draw.randrange(1, len(words))] = word
        elif kind == 1:
            words += [a.draw.choice(OPTIONS), word]
        elif kind == 2 and len(words) > 2:
            del words[a.draw.randrange(1, len(words))]
        elif kind == 3:
            words.insert(a.draw.randrange(1, len(words) + 1), word)
    if words and "benchmark" not in words:
        a.command(words)
    return whole(a.folder / "NEW")


def attack_run(a: Attack) -> str:
    """A run folder that somebody changed."""
    file = a.draw.choice(sorted(path for path in (a.folder / "RUN").iterdir() if path.suffix not in (".html", ".pt")))
    text = file.read_bytes()
    kind = a.draw.randrange(5)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_bytes(text[: a.draw.randrange(len(text) + 1)])
    elif kind == 2 and file.suffix == ".json":
        _change(a.draw, content := json.loads(text))
        file.write_text(json.dumps(content))
    elif kind == 3 and file.suffix == ".csv":
        rows = [line.split(",") for line in text.decode().splitlines()]
        row = a.draw.choice(rows)
        row[a.draw.randrange(len(row))] = a.draw.choice(["", "nan", "x", "1e999", "P9", "-1"])
        file.write_text("\n".join(map(",".join, rows)))
    else:
        content_bytes = bytearray(text)
        for _ in range(3):
            content_bytes[a.draw.randrange(len(text))] = a.draw.randrange(256)
        file.write_bytes(bytes(content_bytes))
    for words in a.draw.sample(READERS, 3):
        a.command(words)
    return ""


def _change(draw: random.Random, content: Any) -> None:
    """One value of nested JSON becomes another kind of value."""
    while isinstance(content, dict | list) and content:
        key = draw.choice(list(content)) if isinstance(content, dict) else draw.randrange(len(content))
        if isinstance(content[key], dict | list) and content[key] and draw.random() < 0.7:
            content = content[key]
            continue
        content[key] = draw.choice([None, "x", -1, [], {}, 1e300, True, [[1]]])
        return


def attack_limits(a: Attack) -> str:
    """Little memory, small files, few open files, no terminal, no home, a full disk behind the streams."""
    words = a.draw.choice([["fit", "screen.h5ad", "-o", "NEW", *FIT], ["simulate", "-o", "new.h5ad"], *READERS])
    limits: dict[int, int] = {}
    kind = a.draw.randrange(5)
    if kind == 0:
        limits[resource.RLIMIT_AS] = a.draw.choice([200, 500, 900, 1500, 2500, 4000]) << 20
    elif kind == 1:
        limits[resource.RLIMIT_FSIZE] = a.draw.choice([0, 100, 10_000, 200_000, 1_000_000])
    elif kind == 2:
        limits[resource.RLIMIT_NOFILE] = a.draw.choice([8, 16, 40, 64])
    environment = a.draw.choice(
        [
            {},
            {"HOME": "/nowhere"},
            {"COLUMNS": "1"},
            {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
            {"TMPDIR": "/nowhere"},
        ]
    )
    full = open("/dev/full", "wb") if kind == 3 else None  # noqa: SIM115
    a.command(words, limits=limits, environment=environment, stdout=full)
    if full is not None:
        full.close()
    if (a.folder / "new.h5ad").exists() and words[0] == "simulate":
        a.command(["check", "new.h5ad"])
    return whole(a.folder / "NEW")


def attack_kills(a: Attack) -> str:
    """Signals at any time, and what the next command makes of it."""
    commands = [
        (["fit", "screen.h5ad", "-o", "NEW", *FIT[:-1]], "NEW"), (["fit", "screen.h5ad", "-o", "RUN", "--force", *FIT], "RUN"),
        (["fit", "screen.h5ad", "-o", "NEW", "--epochs", "3", "--bootstrap", "0", "-q"], "NEW"),
        (["rerun", "RUN", "-o", "NEW", "-q"], "NEW"), (["benchmark", "-o", "BENCH", "--seeds", "1"], ""),
        (["evaluate", "RUN", "--cross-validate", "2", "-o", "new.csv"], ""), (["prepare", "screen.h5ad", "-o", "STORE"], ""),
    ]  # fmt: skip
    words, target = a.draw.choice(commands)
    deadly = a.draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
    a.command(words, kill=a.draw.uniform(0.2, 12), signal=deadly)
    if target:
        if wrong := whole(a.folder / target):
            return wrong
        if words[0] == "fit":
            again = a.command([word for word in words if word != "--force"] + ["--resume"])
            if again.code not in (0, 3) or (again.code == 0 and wrong_run(a, target)):
                return f"{signal.Signals(deadly).name}, then --resume ended with {again.code}"
    return ""


def wrong_run(a: Attack, name: str) -> bool:
    """Whether a run cannot be inspected."""
    return a.command(["inspect", "interventions", name]).code != 0


KINDS: dict[str, Callable[[Attack], str]] = {
    name.removeprefix("attack_"): function for name, function in dict(globals()).items() if name.startswith("attack_")
}


def prepared(folder: Path) -> tuple[Path, Path]:
    """A small screen and a run of it, which every attack gets copies of."""
    crlseq = [sys.executable, "-m", "crlseq"]
    sizes = "--n-genes 30 --perturbations-per-latent 3 --n-latents 3 --cells-per-perturbation 30 --n-control 80"
    subprocess.run(
        [*crlseq, "simulate", *sizes.split(), "-o", folder / "screen.h5ad"], check=True, stderr=subprocess.DEVNULL
    )
    subprocess.run([*crlseq, "fit", folder / "screen.h5ad", "-o", folder / "RUN", *FIT], check=True)
    return folder / "screen.h5ad", folder / "RUN"


def attacks(given: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Numbers and kinds, until the time is over or as many as were asked for."""
    end, kinds = time.monotonic() + 60 * given.minutes, [given.only] if given.only else list(KINDS)
    number = given.first
    while number < given.first + given.count if given.count else time.monotonic() < end:
        yield number, kinds[number % len(kinds)]
        number += 1


def main() -> None:
    """Attack until the time is over, print each new kind of failure with its number, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=0)
    given = parser.parse_args()
    done: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    slowest, commands = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        base = Path(name)
        screen, run = prepared(base)
        for number, kind in attacks(given):
            folder = base / "attack"
            folder.mkdir()
            shutil.copy(screen, folder)
            shutil.copytree(run, folder / "RUN")
            attack = Attack(random.Random(f"{given.seed} {number} {kind}"), folder, screen, run)
            left = KINDS[kind](attack)
            for failure in filter(None, [left, *map(judged, attack.ended)]):
                if not failures[f"{kind}: {failure}"]:
                    print(f"--seed {given.seed} --only {kind} --first {number}: {failure}", flush=True)
                    print(
                        "\n".join(
                            f"    {e.code} {' '.join(e.words)[:200]}\n      {e.err.strip()[-300:]}"
                            for e in attack.ended
                        ),
                        flush=True,
                    )
                failures[f"{kind}: {failure}"] += 1
            done[kind] += 1
            commands += len(attack.ended)
            slowest = max([slowest, *(e.seconds for e in attack.ended)])
            shutil.rmtree(folder)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"{dict(done)}: {commands} commands, slowest {slowest:.0f} s, most memory {most:.0f} MB; {len(failures)} kinds of failure"
    )
    raise SystemExit(1 if failures or most > MEMORY >> 20 else 0)


if __name__ == "__main__":
    main()
