"""Outputs of documents: which lines a page shows, and what a block is filled with."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.outputs import of_python, on_terminal, renewed, shown


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
    printed = on_terminal("test -t 1 && echo table; test -t 2 || echo message >&2", tmp_path)
    assert sorted(printed.split()) == ["message", "table"]
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
