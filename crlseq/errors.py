"""Errors that a user can act on: what is wrong, what to do, and the exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


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


def in_a_line(error: Exception) -> str:
    """What another library's exception says first, without a full stop; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def needs_extra(what: str, package: str, extra: str) -> UsageError:
    """That `what` needs a package of one of crlseq's extras, and how to install it."""
    return UsageError(
        f"{what} needs {package}, which is not installed.",
        f"Install it: pip install {package}. With crlseq's source: pip install '.[{extra}]'.",
    )


def nearest(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """The names most like one that is not among them, the nearest first; upper and lower case are alike.

    >>> nearest("stat2", ["STAT1", "IRF1", "STAT2"])
    ['STAT2', 'STAT1']
    """
    folded: dict[str, str] = {}
    for each in names:
        folded.setdefault(each.casefold(), each)
    return [folded[found] for found in difflib.get_close_matches(name.casefold(), folded, most)]


def suggestion(name: str, names: Iterable[str], what: str) -> str:
    """A hint for a name that is not among `names`: the nearest ones, or where there are none what the names are.

    >>> suggestion("sat1", ["STAT1", "IRF1"], "Perturbations are"), suggestion("x", ["STAT1", "IRF1"], "Perturbations are")
    ("Did you mean 'STAT1'?", 'Perturbations are STAT1, IRF1.')
    """
    known = list(names)
    close = nearest(name, known)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"{what} {few(known)}."


def few(names: Sequence[str], most: int = 8) -> str:
    """Names in a message, the first ones where there are many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def not_there(what: str, name: str, known: Sequence[str]) -> InputError:
    """That a run has no perturbation, program or gene of this `name`, with the nearest ones of those it has."""
    return InputError(f"There is no {what} {name!r} in this run.", suggestion(name, known, f"Its {what}s are"))
