"""Outputs of documents: which lines a page shows, and what a block is filled with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.outputs import differing, of_python, on_terminal, renewed, shown
from tests.paths import shared
from tests.support import ROOT


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ("anything", "one 1\ntwo 2\none 3\nthree 4"),
        ("one 9\n...\nthree 9", "one 1\n...\nthree 4"),
        ("...\none 3\nthree 9", "...\none 3\nthree 4"),
        ("one 9\ntwo 9\n...", "one 1\ntwo 2\n..."),
        ("...\nthree 4\nmore", "...\nthree 4"),
    ],
)
def test_the_lines_that_a_page_shows(old: str, expected: str) -> None:
    assert shown("one 1\ntwo 2  \none 3\nthree 4\n", old) == expected


def test_a_command_writes_to_a_terminal_and_its_messages_come_along(tmp_path: Path) -> None:
    printed = on_terminal("test -t 1 && echo table; echo message >&2; echo table", tmp_path)
    assert printed == "table\nmessage\ntable\n"
    with pytest.raises(SystemExit, match="ended with 3"):
        on_terminal("exit 3", tmp_path)


def test_python_shows_what_is_printed_and_the_last_expression() -> None:
    assert of_python("x = 2\nprint('a')\nx + 1", {}) == "a\n3\n"
    assert of_python("x = 2", {}) == ""


def test_a_page_is_renewed_and_the_rest_of_it_stays(tmp_path: Path) -> None:
    page = "Text\n\n```\n$ echo 1\nold\n$ echo 2\n```\n\n```python\n1 + 1\n```\n```\nold\n```\n\n```\nno command\n```\n"
    expected = (
        page.replace("$ echo 1\nold", "$ echo 1\n1")
        .replace("$ echo 2\n", "$ echo 2\n2\n")
        .replace("```\nold", "```\n2")
    )
    assert renewed(page, tmp_path, {}) == expected


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("L2 0.656 (ridge 1)", "L2 0.657   (ridge 1)", True),  # its last digit, and another width of a column
        ("L2 0.656", "L2 0.714", False),
        ("P0 moves", "P1 moves", False),
        ("FDR 2.4e-07", "FDR 2.5e-07", True),
        ("FDR 2.4e-07", "FDR 2.4e-06", False),
        ("shift −9.6", "shift −9.5", True),
        ("shift -9.6", "shift +9.6", False),
        ("Written in 17 s", "Written in 170.5 s", True),
        ("17 of 25", "10 of 25", False),
        ("one", "one\ntwo", False),
    ],
)
def test_what_is_no_longer_true_is_named(old: str, new: str, same: bool) -> None:
    assert (not differing(old, new)) == same
    assert differing(old, old) == []


def test_what_pages_print_is_what_commands_print_today(tmp_path: Path) -> None:
    """The README's session and the tutorial, on the screens that they are about; a few minutes."""
    screen, sets = shared("data/papalexi2021_thp1_20729x299.h5ad"), shared("genesets/enrichr_Reactome_2022.gmt")
    shutil.copy(screen, tmp_path)
    shutil.copy(sets, tmp_path / "reactome.gmt")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "outputs.py", "--data", tmp_path, "--check"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
