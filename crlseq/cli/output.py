"""What commands print: tables to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import pandas as pd

    from crlseq.fitting import Progress

messages = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


# What moves a cursor, changes a title or turns the direction of writing: C0 but for tab and line feed, C1, and bidi.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters written out as ``\\x1b``: a name from a file must not steer the terminal."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str) -> None:
    """One plain line to stderr; names in it are neither markup nor control sequences."""
    messages.print(visible(text), markup=False)


def show_table(table: pd.DataFrame, title: str, as_json: bool = False, decimals: int = 3) -> None:
    """A table for people on a terminal, tab-separated text into a pipe, a list of records as JSON."""
    if as_json:
        show_json(json.loads(table.to_json(orient="records", double_precision=15)))
        return
    if not sys.stdout.isatty():
        show_text(table.to_csv(sep="\t", index=False).rstrip("\n"))
        return
    from rich.table import Table
    from rich.text import Text

    shown = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    numeric = [kind.kind in "iuf" for kind in table.dtypes]
    for name, number in zip(table.columns, numeric, strict=True):
        # Words of a name below one another keep columns of numbers narrow.
        shown.add_column(Text(str(name).replace("_", "\n")), justify="right" if number else "left", overflow="fold")
    for row in table.itertuples(index=False):
        shown.add_row(*(Text(visible(_cell(value, decimals))) for value in row))
    console = Console(emoji=False)
    if title:
        console.print(Text(visible(title), style="bold"))
    console.print(shown)


def show_json(value: Any) -> None:
    """JSON to stdout and nothing else there; NaN becomes null."""
    text = json.dumps(_without_nan(value), indent=1, ensure_ascii=False)
    show_text(CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def show_text(text: str) -> None:
    """Lines to stdout; a reader that has seen enough, such as ``head``, ends the command without a fault."""
    try:
        print(visible(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _cell(value: Any, decimals: int) -> str:
    if isinstance(value, float):
        if value != value:
            return "–"
        return f"{value:.{decimals}f}" if value == 0 or abs(value) >= 10.0**-decimals else f"{value:.1e}"
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return str(value)
    return ", ".join(map(str, value))


class FitProgress:
    """Shows a fit: bars with the loss terms on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.last_line = -1

    def callbacks(self) -> Progress:
        """The callbacks that `crlseq.fit` takes."""
        from crlseq.fitting import Progress

        return Progress() if self.quiet else Progress(self._stage, self._note, self._epoch)

    def _stage(self, text: str) -> None:
        self.close()
        say(f"• {text}")

    def _note(self, text: str) -> None:
        say(f"  {text}")

    def _epoch(self, record: dict[str, float], n_epochs: int) -> None:
        epoch = int(record["epoch"]) + 1
        terms = " ".join(f"{name} {record[name]:.4f}" for name in ("mmd", "reconstruction", "kl"))
        if "validation_total" in record:
            terms += f" | validation {record['validation_total']:.4f}"
        if messages.is_terminal:
            if self.bar is None:
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                columns = (
                    TextColumn("  epoch"),
                    MofNCompleteColumn(),
                    BarColumn(20),
                    TimeRemainingColumn(),
                    TextColumn("{task.description}"),
                )
                self.bar = Progress(*columns, console=messages)
                self.bar.start()
                self.bar.add_task("", total=n_epochs)
            self.bar.update(self.bar.task_ids[0], completed=epoch, description=terms)
        elif epoch * 10 // n_epochs > self.last_line or epoch == n_epochs:
            # Ten lines a fit keep the log of a batch system readable.
            self.last_line = epoch * 10 // n_epochs
            say(f"  epoch {epoch}/{n_epochs} {terms}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
