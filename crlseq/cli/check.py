"""``crlseq check``: what is in a file, and the command that fits it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from crlseq.cli.output import say, show_json, show_table, show_text

FEW, MANY = 8, 30


def check(
    file: Annotated[Path, typer.Argument(help="An .h5ad or .h5mu file, or a zarr store.", show_default=False)],
    perturbation_key: Annotated[
        str | None, typer.Option(help="Column of obs with the perturbations. [detected]")
    ] = None,
    control_label: Annotated[str | None, typer.Option(help="Label of control cells. [detected]")] = None,
    separator: Annotated[
        str | None, typer.Option(help="Between the parts of a combination; '' for none. [detected]")
    ] = None,
    guide_key: Annotated[str | None, typer.Option(help="Column of guides, read as the genes they target.")] = None,
    guide_counts: Annotated[
        str | None, typer.Option(help="Guide counts to assign cells by: a table in obsm, or a modality of an .h5mu.")
    ] = None,
    guide_map: Annotated[Path | None, typer.Option(help="Table of guides and genes. [by the names of guides]")] = None,
    guide_min_umis: Annotated[int | None, typer.Option(help="Fewest UMIs of a gene that a cell has. [5]")] = None,
    guide_min_share: Annotated[float | None, typer.Option(help="Their smallest share of a cell's UMIs. [0.8]")] = None,
    combinations: Annotated[
        bool | None, typer.Option("--combinations/--no-combinations", help="Fit on combinations too, or hold them out.")
    ] = None,
    batch_key: Annotated[str | None, typer.Option(help="Column of experimental batches.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer to use instead of X.")] = None,
    values: Annotated[str | None, typer.Option(help="auto, counts, log or continuous.")] = None,
    min_cells: Annotated[int | None, typer.Option(help="Fewest cells a perturbation is fitted with. [10]")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON to stdout.")] = False,
) -> None:
    """Look into a file before fitting: cells, values, labels, batches, and the exact fit command."""
    from crlseq.config import make_config
    from crlseq.data.inspection import describe
    from crlseq.errors import InputError

    config = make_config(
        perturbation_key=perturbation_key, control_label=control_label, separator=separator, batch_key=batch_key,
        guide_key=guide_key, guide_counts=guide_counts, guide_map=None if guide_map is None else str(guide_map),
        guide_min_umis=guide_min_umis, guide_min_share=guide_min_share, combinations=combinations,
        layer=layer, values=values, min_cells=min_cells,
    )  # fmt: skip
    found = describe(file, config.data)
    if json:
        show_json(found)
    else:
        _show(found)
    if found["problems"]:
        for problem in [] if json else found["problems"][1:]:
            say(f"problem: {problem}")
        raise InputError(found["problems"][0], "Nothing can be fitted before this is mended.")


def _show(found: dict[str, Any]) -> None:
    import pandas as pd

    rows = {"cells": found["n_cells"], "genes": found["n_genes"]}
    if "values" in found:
        rows["values"] = f"{found['values']}: {found['values_reason']}"
    if "density" in found:
        rows["non-zero values"] = f"{found['density']:.1%}; {found['n_silent_genes']} genes are zero in every cell"
    rows["layers"] = ", ".join(found["layers"]) or "none"
    if "perturbation_key" in found:
        cells = found["cells_per_condition"]
        rows["labels"] = found["label_reason"]
        rows["control cells"] = found["control_cells"]
        rows["perturbations"] = f"{found['n_singles']} single, {found['n_combinations']} combinations"
        if cells:
            ordered = sorted(cells, key=lambda name: (-cells[name], name))
            rows["cells per condition"] = f"{cells[ordered[-1]]} ({ordered[-1]}) to {cells[ordered[0]]} ({ordered[0]})"
        rows["dropped cells"] = ", ".join(f"{n} {label!r}" for label, n in found["dropped"].items()) or "none"
        measured, total = found["targets_measured"], len(found["targets_measured"]) + len(found["targets_not_measured"])
        rows["targets measured"] = f"{len(measured)} of {total} are genes in this file" + (
            f": {_few(measured)}" if measured else ""
        )
    rows["batches"] = (
        "; ".join(f"{b['column']} ({b['levels']} levels)" for b in found["batches"]) or "no column looks like one"
    )
    if "fitted_conditions" in found:
        rows["fit would use"] = f"{found['fitted_conditions']} conditions and the control"
    show_table(pd.DataFrame({"what": list(rows), "value": [str(value) for value in rows.values()]}), found["file"])
    for note in found.get("left_out", []):
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
        rows = {gene: _few(own) for gene, own in list(guides.items())[:MANY]}
        title = "Guides of each perturbation" + (f" (the first {MANY} of {len(guides)})" if len(guides) > MANY else "")
        show_text("")
        show_table(pd.DataFrame({"perturbation": list(rows), "guides": list(rows.values())}), title)
    if "cells_per_condition" in found:
        cells = found["cells_per_condition"]
        ordered = sorted(cells, key=lambda name: (-cells[name], name))
        show_text("")
        title = "Cells per condition" + (f" (the first {MANY} of {len(ordered)})" if len(ordered) > MANY else "")
        show_table(
            pd.DataFrame({"condition": ordered[:MANY], "cells": [cells[name] for name in ordered[:MANY]]}), title
        )
    if "command" in found:
        show_text("")
        show_text(f"To fit it:\n{found['command']}" if sys.stdout.isatty() else f"command\n{found['command']}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
