"""Runs the commands and the Python of documents, and puts what they print in the place of what stood there.

    python scripts/outputs.py --data FOLDER [PAGE ...]

A block that starts with ``$ `` holds commands and their output on a terminal of 110 columns; a block after a ``python``
block holds what that prints. A command that several pages share runs once. A line ``...`` stands for lines that a page
leaves out: the line after it is the one that is most like it, the others follow one another.

FOLDER holds the files that the pages name: papalexi2021_thp1_20729x299.h5ad and reactome.gmt (Reactome 2022 of Enrichr).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import fcntl
import io
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/tutorial.md")
COLUMNS, ROWS = 110, 60
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELIDED = "..."
STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(command: str, folder: Path) -> str:
    """What a command prints: tables as on a terminal, progress as in a log, in the order in which they come."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | {"COLUMNS": str(COLUMNS), "NO_COLOR": "1", "TERM": "xterm", "MPLBACKEND": "agg"}
    words = re.sub(r"^crlseq ", f"{sys.executable} -m crlseq ", command)
    process = subprocess.Popen(
        words, shell=True, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.PIPE
    )
    os.close(slave)
    assert process.stderr is not None
    sources, parts = [master, process.stderr.fileno()], []
    while sources:
        for source in select.select(sources, [], [])[0]:
            try:
                part = os.read(source, 1 << 16)
            except OSError:  # a terminal that nobody writes to any more
                part = b""
            parts.append(part)
            if not part:
                sources.remove(source)
    os.close(master)
    process.stderr.close()
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


def main() -> None:
    """Renew the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=Path, help="Folder to work in, kept; pictures are drawn into it.")
    given = parser.parse_args()
    outputs: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for file in given.data.iterdir():
            if file.is_file():
                shutil.copy(file, folder)
        for page in map(ROOT.__truediv__, given.pages):
            page.write_text(renewed(page.read_text(encoding="utf-8"), folder, outputs), encoding="utf-8")


if __name__ == "__main__":
    main()
