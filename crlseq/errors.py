"""Errors that a user can act on: what is wrong, what to do, and the exit code."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class CrlseqError(Exception):
    """One sentence of what is wrong, and one of what the user can do about it, which may be empty.

    Examples
    --------
    >>> import crlseq
    >>> try:
    ...     crlseq.load("elsewhere")
    ... except crlseq.CrlseqError as error:
    ...     print(error.message, error.exit_code)
    elsewhere is not a run folder: it has no run.json. 3
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(CrlseqError):
    """The options contradict each other or are out of range."""

    exit_code = 2


class InputError(CrlseqError):
    """The data, or the place to write to, cannot be used as they are."""

    exit_code = 3


class ConvergenceError(CrlseqError):
    """The fit did not converge or failed its checks."""

    exit_code = 4


def needs_extra(what: str, package: str, extra: str) -> UsageError:
    """That `what` needs a package of one of crlseq's extras, and how to install it."""
    return UsageError(
        f"{what} needs {package}, which is not installed.",
        f"In the folder of crlseq's source: pip install '.[{extra}]'.",
    )


def few(names: Sequence[str], most: int = 8) -> str:
    """Names in a message, the first ones where there are many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def not_there(what: str, name: str, known: Sequence[str]) -> InputError:
    """That a run has no perturbation, program or gene of this `name`, with the nearest ones of those it has."""
    letters = {one.casefold(): one for one in reversed(known)}
    near = [letters[one] for one in difflib.get_close_matches(name.casefold(), letters, n=3, cutoff=0.5)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are {few(known)}." if known else ""
    return InputError(f"There is no {what} {name!r} in this run.", hint)
