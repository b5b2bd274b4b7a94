"""The pairs of programs as the report shows them: a matrix of marks, and every pair in a sentence."""

from __future__ import annotations

from typing import Any

from crlseq.run.pairs import STATUSES, by_status, counts, legend, matrix, told
from crlseq.run.run import Run

ROWS = 300  # sentences listed: the page must open, whatever the number of programs
LABEL = 28  # characters of a program's label beside a row


def pair_matrix(run: Run) -> dict[str, Any] | None:
    """Rows of cells with mark, class and sentence, counts, legend and sentences by status; None for a run without pairs."""
    if run.pairs is None or run.pairs.empty:
        return None
    names, table = run.program_names, told(run.pairs, run.facts)
    labels = {program.name: program.label for program in run.facts.programs}
    marks = matrix(run.pairs, names)
    about: dict[tuple[str, str], dict[str, str]] = {}
    for row in table.to_dict("records"):
        k, i = row["source"], row["target"]
        own = about.setdefault(
            (k, i), {"look": _look(row["status"], row["change"]), "about": f"{k} ({labels[k]}) → {i} ({labels[i]})"}
        )
        own["about"] += f"\n{row['sentence']}"
    rows = [{"name": k, "cells": [about.get((k, i), {}) | {"mark": marks.loc[k, i]} for i in names]} for k in names]
    groups: list[dict[str, Any]] = []
    left = ROWS
    for status, part in by_status(table).items():
        known = STATUSES.get(status)
        words = "" if known is None else f"{known.means} {known.means_not}"
        groups.append({"status": status, "n": len(part), "words": words, "sentences": part["sentence"].tolist()[:left]})
        left = max(0, left - len(part))
    return {
        "names": names,
        "labels": labels,
        "longest": LABEL,
        "rows": rows,
        "counts": counts(run.pairs),
        "legend": [(mark, _look(status, 1.0), status, means) for mark, status, means in legend(run.pairs)],
        "groups": groups,
        "shown": sum(len(group["sentences"]) for group in groups),
        "n": len(table),
    }


def _look(status: str, change: float) -> str:
    """Class of a cell: the status, and whether the effect raises or lowers."""
    sign = ("raises" if change > 0 else "lowers") if status in ("upstream", "likely") else ""
    return f"{status.replace(' ', '-')} {sign}".strip()
