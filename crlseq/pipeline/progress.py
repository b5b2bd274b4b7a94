"""What a fit says while it runs: the stage, how far it is, and how long it takes; a line on a terminal, a log elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from crlseq.config import FACTORS, NETWORKS, Config
from crlseq.storage.text import visible

SILENCE = 30.0  # seconds, after which a stage adds a line to a log
READING, TESTING, FINDING, LIKELIHOOD, ORDERING, TRAINING, EFFECTS, READING_OFF, WRITING = (
    "reading the screen", "testing effects", "finding the programs", "fitting the likelihood", "ordering the programs",
    "training the network", "estimating effects", "reading off the results", "writing the run",
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """What a fit reports while it runs; by default nothing."""

    stage: Callable[[str], None] = lambda text: None
    note: Callable[[str], None] = lambda text: None
    epoch: Callable[[dict[str, float], int], None] = lambda record, n_epochs: None
    within: Callable[[int, int], None] = lambda done, total: None  # how much of the stage is done, and of how much


def stages_of(config: Config, written: bool) -> tuple[str, ...]:
    """The stages of a fit in order, whose run is `written` to a folder or not. A text of `Progress.stage` that is none of them is a part of the one before."""
    of_likelihood = (FINDING, LIKELIHOOD, ORDERING)
    found = {"gradient": (), **dict.fromkeys((*FACTORS, *NETWORKS), (FINDING,))}.get(config.model.method, of_likelihood)
    stages = (READING, TESTING, *found, TRAINING if config.model.trains else EFFECTS, READING_OFF)
    return (*stages, WRITING) if written else stages


def clock(seconds: float) -> str:
    """A duration in few characters.

    >>> clock(59.6), clock(83), clock(3723)
    ('60 s', '1:23', '1:02:03')
    """
    if round(seconds) <= 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def shown(config: Config, quiet: bool, written: bool = True) -> Iterator[Progress]:
    """The progress of a fit on stderr: one line that changes on a terminal, else a log; nothing where it is `quiet`.

    The first stage is said at once. What cannot be written is dropped.
    """
    if quiet:
        yield Progress()
        return
    display = _Display(stages_of(config, written))
    display.stage(READING)
    try:
        yield Progress(display.stage, display.note, display.epoch, display.within)
    finally:
        display.end()


class _Display:
    """Says what is reported, in whichever form suits the stream."""

    def __init__(self, stages: tuple[str, ...]) -> None:
        self.stages, self.number, self.text = stages, 0, ""
        self.start = self.said = time.monotonic()
        self.part_start, self.part_share, self.done, self.total, self.loss = self.start, 0.0, 0, 0, ""
        console = Console(stderr=True, highlight=False, emoji=False)
        self.bar: Bar | None = None
        # A line that changes is nothing for a file, whatever colours were asked for.
        if console.is_terminal and console.file.isatty() and not console.is_dumb_terminal:
            columns = TextColumn("{task.description}", markup=False), BarColumn(None), _Times(self)
            self.bar = Bar(*columns, console=console, expand=True, transient=True, refresh_per_second=2)
            self.bar.add_task("", total=None)

    def stage(self, text: str) -> None:
        if text == self.text:  # which was said before what reads the screen was imported
            return
        self.text, self.done, self.total, self.loss = text, 0, 0, ""
        if text in self.stages:
            self.number = self.stages.index(text) + 1
        after = f" (after {clock(time.monotonic() - self.start)})" if self.number > 1 else ""
        self._show(f"• {self.where()}{after}")
        if self.bar is not None:
            with suppress(OSError, ValueError):
                self.bar.start()
                self.bar.refresh()

    def note(self, text: str) -> None:
        if self.bar is None:
            self._log(f"  {text}")
        else:
            with suppress(OSError, ValueError):
                self.bar.console.print(Text(f"• {visible(text)}"), soft_wrap=True)

    def epoch(self, record: dict[str, float], n_epochs: int) -> None:
        if self.bar is not None:
            name = "validation_total" if "validation_total" in record else "total"
            self.loss = f", loss {record[name]:.3g}"
        else:
            names = {"mmd": "mmd", "reconstruction": "reconstruction", "kl": "kl", "validation_total": "validation"}
            terms = ", ".join(f"{told} {record[name]:.4g}" for name, told in names.items() if name in record)
            self.loss = f"; epoch {int(record['epoch']) + 1} of at most {n_epochs}: {terms}"
        self.within(int(record["epoch"]) + 1, n_epochs)

    def within(self, done: int, total: int) -> None:
        now, share = time.monotonic(), done / total
        if self.total == 0 or share < self.share - 1e-9:  # a loop of its own
            self.part_start, self.part_share = now, 0.0
        if now - self.part_start < 1:  # epochs before an interrupt are reported at once, and tell no speed
            self.part_share = share
        self.done, self.total = (done, total) if done < total else (0, 0)  # what comes now is not counted
        self._show(f"  {self.times()}{self.loss}", SILENCE if self.total else math.inf)

    @property
    def share(self) -> float:
        """How much of the present loop is done."""
        return self.done / self.total if self.total else 0.0

    def where(self) -> str:
        return f"stage {self.number} of {len(self.stages)}: {self.text}"

    def times(self) -> str:
        """What is done and left of the present loop, and how long the fit has taken."""
        now = time.monotonic()
        elapsed = clock(now - self.start)
        if not self.total:
            return f"{elapsed} elapsed"
        gained = self.share - self.part_share
        left = f", {clock((now - self.part_start) / gained * (1 - self.share))} left" if gained > 0 else ""
        return f"{math.floor(100 * self.share)} %{left}, {elapsed} elapsed"

    def end(self) -> None:
        if self.bar is not None:
            with suppress(OSError, ValueError):
                self.bar.stop()

    def _show(self, line: str, silence: float = 0.0) -> None:
        """The line that changes, or a `line` of a log where the last one is `silence` seconds old."""
        if self.bar is not None:
            with suppress(OSError, ValueError):
                self.bar.tasks[0].total = self.total or None  # `update` takes None for the total that there was
                self.bar.update(self.bar.task_ids[0], description=self.where() + self.loss, completed=self.done)
        elif time.monotonic() - self.said >= silence:
            self._log(line)

    def _log(self, line: str) -> None:
        self.said = time.monotonic()
        with suppress(OSError, ValueError):
            print(visible(line), file=sys.stderr, flush=True)


class _Times(ProgressColumn):
    """What is left, and how long the fit has taken, at this moment."""

    def __init__(self, display: _Display) -> None:
        super().__init__(Column(no_wrap=True))
        self.display = display

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text(self.display.times())
