"""``crlseq check``: what is in a file, and the command that fits it."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from crlseq.cli.options import AsJson, read_config, takes_config
from crlseq.cli.output import say, show_json, show_table, show_text
from crlseq.errors import InputError, few


@takes_config(
    "perturbation_key", "control_label", "separator", "guide_key", "guide_counts", "guide_map", "guide_min_umis",
    "guide_min_share", "combinations", "batch_key", "context_key", "layer", "values", "min_cells", "gene_positions",
)  # fmt: skip
def check(
    file: Annotated[
        Path,
        typer.Argument(help="An .h5ad or .h5mu file, a zarr store, or what Cell Ranger wrote.", show_default=False),
    ],
    json: AsJson = False,
    **given: Any,
) -> None:
    """Inspect a file before fitting: cells, values, labels, batches, and the command that fits it."""
    from crlseq.data.inspection import describe

    found = describe(file, read_config(given).data)
    if json:
        show_json(found)
    else:
        _show(found)
    if found["problems"]:
        for problem in [] if json else found["problems"][1:]:
            say(f"problem: {problem}")
        raise InputError(found["problems"][0], "Correct this before fitting.")


def _show(found: dict[str, Any]) -> None:
    import pandas as pd

    facts = _facts(found)
    show_table(pd.DataFrame({"what": list(facts), "value": [str(value) for value in facts.values()]}), found["file"])
    for note in found["notes"]:
        say(f"note: {note}")
    if found["columns"]:
        columns = pd.DataFrame(found["columns"]).drop(columns="why")
        columns["separator"] = [value if value is not None else "–" for value in columns["separator"]]
        show_text("")
        show_table(columns, "Columns that could hold the perturbations")
    if found.get("guides"):
        guides: dict[str, list[str]] = {}
        for guide, gene in found["guides"]["genes"].items():
            guides.setdefault(gene, []).append(guide)
        rows = [(gene, few(own)) for gene, own in guides.items()]
        _show_pairs("Guides of each perturbation", "perturbation", "guides", rows)
    if "cells_per_condition" in found:
        _show_pairs("Cells per condition", "condition", "cells", _by_size(found["cells_per_condition"]))
    if "command" in found:
        title = "To fit it:" if sys.stdout.isatty() else "command"
        show_text(f"\n{title}\n{found['command']}")


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    """What is in the file, a line each."""
    facts = {"cells": found["n_cells"], "genes": found["n_genes"]}
    if "values" in found:
        facts["values"] = f"{found['values']}: {found['values_reason']}"
    if "density" in found:
        facts["non-zero values"] = f"{found['density']:.1%}; {found['n_silent_genes']} genes are zero in every cell"
    kinds = found.get("layers_hold", {})
    layers = [f"{name} ({kinds[name]})" if name in kinds else name for name in found["layers"]]
    facts["layers"] = ", ".join(layers) or "none"
    if "perturbation_key" in found:
        facts["labels"] = found["label_reason"]
        facts["control cells"] = found["control_cells"]
        facts["perturbations"] = f"{found['n_singles']} single, {found['n_combinations']} combinations"
        if cells := _by_size(found["cells_per_condition"]):
            facts["cells per condition"] = f"{cells[-1][1]} ({cells[-1][0]}) to {cells[0][1]} ({cells[0][0]})"
        facts["dropped cells"] = ", ".join(f"{n} {label!r}" for label, n in found["dropped"].items()) or "none"
        facts["targets measured"] = found["targets_reason"]
        facts["gene positions"] = found["positions"] or (
            "none in var; --gene-positions FILE (GTF, BED or CSV) would tell whether cells lost chromosome arms"
        )
    if "covariates" in found:
        facts |= _beside(found["covariates"])
    if "fitted_conditions" in found:
        facts["fit would use"] = f"{found['fitted_conditions']} conditions and the control"
        if share := found["hold_out_cells"]:
            facts["could hold out"] = (
                f"{share:.0%} of the cells of each, to judge the fit by cells that it has not seen"
            )
    return facts


def _beside(covariates: list[dict[str, Any]]) -> dict[str, str]:
    """Columns beside the labels, by what they seem to be."""
    from crlseq.data.covariates import CERTAIN, CONTEXT, OUTCOME, UNKNOWN, Covariate

    found = [Covariate(**{f.name: row[f.name] for f in fields(Covariate)}) for row in covariates]
    numbers = [each for each in found if not each.levels and each.role == UNKNOWN]
    groups = {
        "batches": [each for each in found if each.looks_like_batch],
        "contexts": [each for each in found if each.role == CONTEXT],
        "outcomes": [each for each in found if each.role == OUTCOME],
        "numbers": [each for each in numbers if each.matters],
    }
    facts = {what: "; ".join(each.in_words() for each in own) for what, own in groups.items() if own}
    others = [each for each in found if each.role == UNKNOWN and each.levels and not each.looks_like_batch]
    telling = [each for each in others if each.matters]
    if telling:
        named = "; ".join(each.in_words() for each in telling)
        facts["unclear"] = f"{named}: these go with the labels, as outcomes do and unbalanced batches"
    if not groups["batches"]:
        facts["batches"] = "no column is named like a batch"
        if tested := [each.column for each in others if not each.matters and each.explained == each.explained]:
            facts["batches"] += (
                f"; control cells show no difference (p below {CERTAIN:g}) between levels of {few(tested)}"
            )
        if untested := [each.column for each in others if each.explained != each.explained]:
            facts["batches"] += f"; control cells are too few to test {few(untested)}"
    if "outcomes" in facts:
        facts["outcomes"] += ": perturbations can change these, so they are no batches"
    return facts


def _by_size(cells: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(cells.items(), key=lambda pair: (-pair[1], pair[0]))


def _show_pairs(title: str, what: str, value: str, rows: list[tuple[str, Any]]) -> None:
    import pandas as pd

    show_text("")
    show_table(pd.DataFrame(rows, columns=[what, value]), title)
