"""What a screen shows of assumptions that it breaks: warnings in words, each with what it rests on.

Guards hold single pairs back (`crlseq.discovery.pairs`); these speak of the whole screen. On simulated screens that keep
the assumptions, fewer than one in ten has a warning.
"""

from __future__ import annotations

import numpy as np

from crlseq.discovery.changes import Changes
from crlseq.discovery.pairs import Pairs

OUTSIDE = 2.0  # chi-square a degree of freedom of shifts outside the axes
OUTLIERS = 0.04  # share of slopes
CORRELATED = 0.09  # root mean square of correlations in controls, beyond their sampling error
BESIDE, MANY_BESIDE = 5.0, 2  # |z| of changes where there are none, and how many pairs of programs


def broken_assumptions(
    found: Changes, pairs: Pairs, outside: float, n_control: int, n_alike: int = 0
) -> tuple[str, ...]:
    """Sentences, most consequential first; ``outside`` is `crlseq.discovery.axes.shifts_outside`, ``n_alike`` the number of
    pairs of programs that are `crlseq.discovery.axes.alike`.
    """
    p = len(found.e)
    upper = np.triu_indices(p, 1)
    both = pairs.have("both ways")[upper]
    doubts = []
    if n_alike:
        doubts.append(
            f"{_pairs(n_alike)} of programs move{'s' if n_alike == 1 else ''} nearly the same genes: a program may be split in two. Ask for fewer programs with --n-latents."
        )
    if outside > OUTSIDE:
        doubts.append(
            f"Conditions differ in ways that no program explains (chi-square {outside:.1f} per degree of freedom, 1 by chance). If the screen has batches, name their column with --batch-key."
        )
    elif found.outliers > OUTLIERS:
        doubts.append(
            f"Perturbations of the same program shift others differently ({found.outliers:.0%} of their shifts): they have second targets."
        )
    if both.any():
        cause = "a hidden common cause, or equations that are not linear"
        if not pairs.hidden[upper][both].any():
            cause = "a cycle, or shifts that depend on another program"
        doubts.append(f"{_pairs(int(both.sum()))} of programs change each other: {cause}.")
    spread = float(np.sqrt((found.correlation[upper] ** 2).mean())) if p > 1 else 0.0
    if spread**2 > CORRELATED**2 + 1 / n_control:
        doubts.append(
            f"Programs correlate in control cells beyond what they do to each other (typically {spread:.2f}): hidden common causes, or second targets that all perturbations of a program share."
        )
    if pairs.modulated.any():
        doubts.append(
            "Some changes grow with the size of the shift: one program sets how strongly another is perturbed."
        )
    if int(np.triu(np.abs(found.beside) > BESIDE).sum()) >= MANY_BESIDE:
        doubts.append(
            "Interventions change the variation of programs that they do not act on: second targets, cells that are hit because of their state, or a background that the perturbation changes."
        )
    return tuple(doubts)


def _pairs(n: int) -> str:
    return f"{n} pair{'' if n == 1 else 's'}"
