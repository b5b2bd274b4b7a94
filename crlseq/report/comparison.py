"""Two runs side by side as a page and as tables."""

from __future__ import annotations

from crlseq.evaluation.replication import SURE, Comparison
from crlseq.report.page import ROWS, render
from crlseq.storage.csv import to_csv
from crlseq.storage.text import to_json


def in_sentences(found: Comparison) -> list[str]:
    """What replicates, in words."""
    s = found.summary
    told = [
        f"{s['matched']} of {s['programs_a']} programs of A match one of the {s['programs_b']} of B"
        + (f" (median |cosine| of loadings {s['median_cosine']:.2f})." if s["matched"] else ".")
    ]
    if s["ari"] is not None:
        told.append(
            f"{s['with_effect_in_both']} of {s['perturbations']} perturbations have an effect in both runs; {s['same_program']} of "
            f"them act on the same program (adjusted Rand index of the partitions {s['ari']:.2f})."
        )
    else:
        told.append(f"{s['with_effect_in_both']} of {s['perturbations']} perturbations have an effect in both runs.")
    if s["sure_ari"] is not None:
        told.append(
            f"Of the {s['sure_in_both']} whose program both runs are sure of (support {SURE} or more), {s['sure_same_program']} act on "
            f"the same one (adjusted Rand index {s['sure_ari']:.2f})."
        )
    if s["effect_correlation"] is not None:
        told.append(
            f"Their effects on genes correlate by {s['effect_correlation']:.2f} (median); their errors alone would let them correlate by {s['ceiling']:.2f}."
        )
    pairs = s["pairs"]
    if not (n := sum(pairs.values())):
        told.append("Neither run claims that one matched program is upstream of another.")
    else:
        parts = ", ".join(f"{count} {name}" for name, count in pairs.items() if count)
        told.append(f"Of {n} pairs of matched programs that one run claims: {parts}.")
    return told


def comparison_files(found: Comparison, names: tuple[str, str]) -> dict[str, bytes]:
    """``programs.csv``, ``perturbations.csv``, ``pairs.csv``, ``cosines.csv``, ``comparison.json``, ``comparison.html``."""
    tables = {name: getattr(found, name) for name in ("programs", "perturbations", "pairs")}
    tables["cosines"] = found.cosines.rename_axis("program").reset_index()
    about = {"a": names[0], "b": names[1], **found.summary, "notes": list(found.notes)}
    return {f"{name}.csv": to_csv(table) for name, table in tables.items()} | {
        "comparison.json": to_json(about, 1).encode(), "comparison.html": page(found, names).encode()
    }  # fmt: skip


def page(found: Comparison, names: tuple[str, str]) -> str:
    """The comparison as HTML; names from the data escaped."""
    matches = {(row.program_a, row.program_b) for row in found.programs.itertuples() if row.match}
    cosines = [
        {"name": a, "cells": [{"value": float(value), "match": (a, b) in matches} for b, value in row.items()]}
        for a, row in found.cosines.iterrows()
    ]
    return render("compare.html.j2", {
        "names": names, "sentences": in_sentences(found), "notes": found.notes, "columns": list(found.cosines.columns),
        "cosines": cosines, "programs": found.programs.to_dict("records"),
        "pairs": found.pairs[found.pairs["outcome"] != ""].to_dict("records"),
        "perturbations": found.perturbations[:ROWS].to_dict("records"), "n_perturbations": len(found.perturbations),
    })  # fmt: skip
