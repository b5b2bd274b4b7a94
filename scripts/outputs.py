"""Runs the commands and the Python of documents, and puts what they print in the place of what stood there.

    python scripts/outputs.py --data FOLDER [PAGE ...]
    python scripts/outputs.py --data FOLDER --check [PAGE ...]   # writes nothing, names what is no longer true

A block that starts with ``$ `` holds commands and their output on a terminal of 110 columns; a block after a ``python``
block holds what that prints. A command that several pages share runs once. A line ``...`` stands for lines that a page
leaves out: the line after it is the one that is most like it, the others follow one another. A notebook is run whole; that
its outputs are true `tests/test_documents.py` checks.

Processors round sums differently, and training enlarges that until weakly determined numbers differ in their second
digit. `docs/arithmetic.txt` names the arithmetic of the machine that made the pages. Where it is the same, `--check` lets no
line differ; elsewhere a fiftieth of them may.

FOLDER holds the files that the pages name: papalexi2021_thp1_20729x299.h5ad and reactome.gmt (Reactome 2022 of Enrichr).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import fcntl
import hashlib
import io
import itertools
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/tutorial.md", "docs/compare.md", "docs/contexts.md", "docs/notebook.ipynb")
ARITHMETIC = ROOT / "docs" / "arithmetic.txt"
ELSEWHERE = 0.02  # share of lines; of two processors, one with fewer instructions too, three of 327 lines differed
COLUMNS, ROWS = 110, 60
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELIDED = "..."
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
TIME = re.compile(r"\d+(?:\.\d+)? ?(?:s|ms|min|MB|GB)\b|\d+(?::\d\d)+")
STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(command: str, folder: Path) -> str:
    """What a command prints, results and messages in their order: tables as on a terminal, progress as in a log."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    terminal = {"COLUMNS": str(COLUMNS), "LINES": str(ROWS), "NO_COLOR": "1", "TERM": "dumb"}  # no line that changes
    environment = os.environ | terminal | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    words = re.sub(r"^crlseq ", f"{sys.executable} -m crlseq ", command)
    process = subprocess.Popen(
        words, shell=True, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave
    )
    os.close(slave)
    parts = []
    with contextlib.suppress(OSError):  # a terminal that nobody writes to any more
        while part := os.read(master, 1 << 16):
            parts.append(part)
    os.close(master)
    if process.wait():
        raise SystemExit(f"{command} ended with {process.returncode}:\n{b''.join(parts).decode()}")
    return STYLE.sub("", b"".join(parts).decode()).replace("\r\n", "\n")


def of_python(code: str, names: dict[str, Any]) -> str:
    """What code prints, and its expressions as in a notebook."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for part in ast.parse(code).body:
            if not isinstance(part, ast.Expr):
                exec(compile(ast.Module([part], []), "page", "exec"), names)
                continue
            value = eval(compile(ast.Expression(part.value), "page", "eval"), names)
            if value is not None and "Axes" not in type(value).__name__:
                print(repr(value))
    return printed.getvalue()


def alike(a: str, b: str) -> float:
    """Share of the letters and digits that two lines have in common, in order."""
    return difflib.SequenceMatcher(None, "".join(a.split()), "".join(b.split()), autojunk=False).ratio()


def shown(new: str, old: str) -> str:
    """The lines of an output that a page shows."""
    lines, wanted = [line.rstrip() for line in new.strip("\n").split("\n")], old.strip("\n").split("\n")
    if ELIDED not in map(str.strip, wanted):
        return "\n".join(lines)
    kept, place, skip = [], 0, False
    for line in wanted:
        if line.strip() == ELIDED:
            kept.append(line)
            skip = True
            continue
        if skip:
            place = max(range(place, len(lines)), key=lambda i: alike(lines[i], line), default=len(lines))
            skip = False
        kept += lines[place : place + 1]
        place += 1
    return "\n".join(kept)


def renewed(page: str, folder: Path, outputs: dict[str, str]) -> str:
    """A page with the outputs of today."""
    names: dict[str, Any] = {}
    printed: str | None = None

    def block(found: re.Match[str]) -> str:
        nonlocal printed
        language, text = found[1], found[2]
        before, printed = printed, None
        if language == "python":
            printed = of_python(text, names)
        elif before is not None and not language:
            return f"```\n{shown(before, text)}\n```"
        elif text.startswith("$ "):
            parts = []
            for command, old in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
                if command not in outputs:
                    print(f"$ {command}", file=sys.stderr, flush=True)
                    outputs[command] = on_terminal(command, folder).replace(f"{folder}/", "")
                parts += [f"$ {command}", *([shown(outputs[command], old)] if outputs[command].strip() else [])]
            return f"```{language}\n" + "\n".join(parts) + "\n```"
        return found[0]

    here = os.getcwd()
    os.chdir(folder)
    try:
        return BLOCK.sub(block, page)
    finally:
        os.chdir(here)


def executed(notebook: str, folder: Path) -> str:
    """A notebook with the outputs of today."""
    import nbclient
    import nbformat

    read = nbformat.reads(notebook, as_version=4)
    folder = folder / "notebook"  # its own: pages have runs of the same name
    folder.mkdir()
    nbclient.NotebookClient(
        read, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, record_timing=False
    ).execute()
    for cell in read.cells:
        cell.metadata.clear()
    return nbformat.writes(read) + "\n"


def differing(old: str, new: str) -> list[str]:
    """Lines of `new` that are not those of `old`: other words, or numbers that differ by more than their last digit.

    Times are those of the machine.
    """
    before, after = ([" ".join(TIME.sub("…", line).split()) for line in text.split("\n")] for text in (old, new))
    words = ([NUMBER.sub("#", line) for line in lines] for lines in (before, after))
    found = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        pairs = itertools.zip_longest(before[a:b], after[c:d], fillvalue="nothing")
        found += [f"{now}   (printed: {then})" for then, now in pairs if kind != "equal" or not _same(then, now)]
    return found


def printed_lines(page: str) -> int:
    """Lines in the blocks of a page."""
    return sum(found[2].count("\n") for found in BLOCK.finditer(page))


def arithmetic() -> str:
    """Names how this machine rounds: a digest of products, factors and functions in both libraries and precisions."""
    torch.set_num_threads(1)
    a = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 500)))
    square = a @ a.T
    tensors = [square, a.float() @ a.float(), torch.linalg.cholesky(square + 500 * torch.eye(500)), a.sum(0), a.sum(1)]
    tensors += [torch.linalg.eigvalsh(square), a.exp(), a.tanh(), torch.softmax(a, 1), a.float().exp()]
    b = a.numpy()
    arrays = [b @ b.T, np.linalg.eigvalsh(b @ b.T), np.exp(b), np.log1p(b * b), b.sum(0), b.sum(1)]
    return hashlib.sha256(b"".join(x.tobytes() for x in [*(t.numpy() for t in tensors), *arrays])).hexdigest()[:16]


def _same(then: str, now: str) -> bool:
    return all(
        abs(_value(a) - _value(b)) <= 1.001 * _last_digit(a)
        for a, b in zip(*map(NUMBER.findall, (then, now)), strict=True)
    )


def _value(number: str) -> float:
    return float(number.replace("−", "-"))


def _last_digit(number: str) -> float:
    """The unit of the last digit of a number: 0.01 of 1.25, 1e-8 of 2.4e-07."""
    mantissa, _, power = number.partition("e")
    return float(10.0 ** (int(power or 0) - len(mantissa.partition(".")[2])))


def main() -> None:
    """Renew the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="Change nothing; fail if a page is no longer true.")
    parser.add_argument("--keep", type=Path, help="Folder to work in, kept; pictures are drawn into it.")
    given = parser.parse_args()
    outputs: dict[str, str] = {}
    wrong: list[str] = []
    lines = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for file in given.data.iterdir():
            if file.is_file():
                shutil.copy(file, folder)
        for page in map(ROOT.__truediv__, given.pages):
            old = page.read_text(encoding="utf-8")
            if page.suffix == ".ipynb" and not given.check:
                page.write_text(executed(old, folder), encoding="utf-8")
                continue
            new = old if page.suffix == ".ipynb" else renewed(old, folder, outputs)
            if given.check:
                wrong += [f"{page.name}: {line}" for line in differing(old, new)]
                lines += printed_lines(new)
            else:
                page.write_text(new, encoding="utf-8")
    if not given.check:
        ARITHMETIC.write_text(arithmetic() + "\n", encoding="utf-8")
        return
    print("\n".join(wrong))
    here = arithmetic() == ARITHMETIC.read_text(encoding="utf-8").strip()
    if len(wrong) > (0 if here else ELSEWHERE * lines):
        raise SystemExit(f"{len(wrong)} of {lines} printed lines are no longer true.")


if __name__ == "__main__":
    main()
