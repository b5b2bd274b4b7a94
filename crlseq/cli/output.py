"""What commands print: tables to stdout, everything else to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crlseq.errors import InputError, UsageError
from crlseq.storage.text import to_json, visible

if TYPE_CHECKING:
    import pandas as pd

    from crlseq.run.run import Run

GAP = 2  # blanks between the columns of a table
DIGITS = 6  # significant ones, in a pipe
ROWS, AROUND, LAST = 20, 6, 3  # of a table on a terminal: shown of any, lines around it, rows kept at its end
FIGURES = (".png", ".svg", ".pdf")
ONES = ("weight", "retention", "noise_scale")  # columns that say nothing where they are 1 throughout
messages = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def say(text: str) -> None:
    """One plain line to stderr, whole so that it can be copied; names in it are neither markup nor control sequences."""
    messages.print(visible(text), markup=False)


def say_paragraph(text: str) -> None:
    """Sentences to stderr, broken between words where that is a terminal."""
    messages.print(visible(text), markup=False, soft_wrap=not messages.is_terminal)


def say_verdict(run: Run) -> None:
    """Whether the data determine the graph, and why; and which assumptions the screen is seen to break."""
    from crlseq.export.graph import verdict

    say_paragraph(verdict(run))
    for warning in run.facts.identification.warnings:
        say_paragraph(f"warning: {warning}")


def refuse_output(output: Path, force: bool, folder: bool = False, replaceable: str = "") -> None:
    """Refuse, by `InputError`, a file (or folder) that must not be written, before any work is done.

    It may be no folder where a file is wanted, nor a part of a run other than `replaceable`, nor exist unless `force`.
    """
    from crlseq.storage.files import refuse_special
    from crlseq.storage.runfolder import refuse_part_of_run

    try:
        is_folder, exists = output.is_dir(), output.exists()
    except OSError as error:  # a name that is too long
        raise InputError(f"{output} cannot be written: {error.strerror}.", "Choose another --output.") from None
    if is_folder and not folder:
        raise InputError(f"{output} is a folder.", "Name a file to write.")
    refuse_special(output)
    if output.name != replaceable:
        refuse_part_of_run(output)
    if exists and not force:
        raise InputError(f"The output {output} exists.", "Choose another --output, or replace it with --force.")


def refuse_no_figure(output: Path) -> None:
    """Refuse, by `UsageError`, a file whose name does not end as a figure's."""
    if output.suffix.lower() not in FIGURES:
        raise UsageError(f"{output} does not end in .png, .svg or .pdf.", "Choose one of these formats.")


def show_table(
    table: pd.DataFrame,
    title: str,
    as_json: bool = False,
    decimals: int = 3,
    looks: Mapping[str, str] | None = None,
    form: Callable[[float], str] | None = None,
) -> None:
    """A table for people on a terminal, tab-separated text into a pipe, a list of records as JSON.

    On a terminal it is no longer than that, and a value with an error beside it ends at the error's second digit.
    ``looks``: rich styles of cells by their text. ``form`` writes the fractions, into a pipe too.
    """
    if as_json:
        show_json(json.loads(table.to_json(orient="records", double_precision=15)))
        return
    if not sys.stdout.isatty():
        digits: Any = form or f"%.{DIGITS}g"
        text = table.to_csv(sep="\t", index=False, float_format=digits)
        show_text(text.rstrip("\n"))
        return
    table = table.drop(columns=[name for name in ONES if name in table and bool((table[name] == 1).all())])
    cells = _cells(table, decimals, form)
    # Words of a name below one another keep columns of numbers narrow.
    columns = [(str(name).replace("_", "\n"), kind.kind in "iuf") for name, kind in table.dtypes.items()]
    console = Console(emoji=False)
    most = max(ROWS, console.height - AROUND)
    left_out = len(cells) - most + 1 if len(cells) > most else 0
    if left_out:
        cells[most - LAST - 1 : -LAST] = [["⋮"] * len(columns)]
    if title:
        console.print(Text(visible(title), style="bold"))
    for i, block in enumerate(_blocks(columns, cells, console.width)):
        if i:
            console.print()
        shown = Table(header_style="bold", box=None, padding=(0, GAP, 0, 0))
        for k, least in block:
            name, number = columns[k]
            shown.add_column(Text(name), justify="right" if number else "left", overflow="fold", min_width=least)
        for row in cells:
            shown.add_row(*(Text(row[k], (looks or {}).get(row[k], "")) for k, _ in block))
        console.print(shown)
    if left_out:
        console.print(Text(f"{left_out} of {len(table)} rows are left out. To see all, add --json or a pipe: | less."))


def _cells(table: pd.DataFrame, decimals: int, form: Callable[[float], str] | None) -> list[list[str]]:
    """What stands in the rows of a table."""
    columns = {name: [_cell(value, decimals, form) for value in table[name]] for name in table}
    for name, error in {} if form else _errors([str(name) for name in table]).items():
        for i, (value, width) in enumerate(zip(table[name], table[error], strict=True)):
            if math.isfinite(value) and math.isfinite(width) and width > 0:
                own = min(max(1 - math.floor(math.log10(width)), 0), DIGITS)
                columns[name][i], columns[error][i] = f"{value:.{own}f}", f"{width:.{own}f}"
    return [[visible(text) for text in row] for row in zip(*columns.values(), strict=True)]


def _errors(names: list[str]) -> dict[str, str]:
    """The column with the error of each column that has one: called after it, or ``se`` and behind it."""
    found = {}
    for before, name in zip(["", *names], names, strict=False):
        stem = name.removesuffix("_se").removesuffix("_error")
        if stem != name and stem in names:
            found[stem] = name
        elif name in ("se", "error") and before:
            found[before] = name
    return found


def _blocks(columns: list[tuple[str, bool]], cells: list[list[str]], width: int) -> list[list[tuple[int, int]]]:
    """Columns that stand side by side without breaking a word, the first in every block; each with its least width."""
    least = []
    for k, (name, number) in enumerate(columns):
        texts = [*name.split("\n"), *(row[k] for row in cells)]
        words = texts if number else [word for text in texts for word in text.split()]
        least.append(min(max(map(cell_len, words), default=1), width // 2 if k else width // 3))
    blocks = [[(0, least[0])]]
    for k in range(1, len(columns)):
        if sum(n + GAP for _, n in blocks[-1]) + least[k] > width and len(blocks[-1]) > 1:
            blocks.append([(0, least[0])])
        blocks[-1].append((k, least[k]))
    return blocks


def show_json(value: Any) -> None:
    """JSON to stdout and nothing else there; NaN becomes null."""
    show_text(to_json(_without_nan(value)))


def show_text(text: str) -> None:
    """Lines to stdout."""
    print(visible(text), flush=True)


def show_paragraph(text: str) -> None:
    """Sentences to stdout, broken between words where that is a terminal."""
    if not sys.stdout.isatty():
        show_text(text)
        return
    Console(emoji=False).print(Text(visible(text)))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _cell(value: Any, decimals: int, form: Callable[[float], str] | None) -> str:
    if isinstance(value, float):
        if value != value:
            return "–"
        if form is not None:
            return form(value)
        return f"{value:.{decimals}f}" if value == 0 or abs(value) >= 10.0**-decimals else f"{value:.1e}"
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return str(value)
    return ", ".join(map(str, value))
