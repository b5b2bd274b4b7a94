"""``crlseq predict`` and ``project``: virtual cells under perturbations, and programs of other cells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crlseq.cli.options import AsJson, Force, Quiet, RunFolder, load, setting, switch
from crlseq.cli.output import refuse_output, say, show_json
from crlseq.errors import InputError

if TYPE_CHECKING:
    import anndata as ad
    import pandas as pd

    from crlseq.run.run import Run


def predict(
    run: RunFolder,
    perturbation: Annotated[
        list[str],
        setting(
            "A perturbation, or a combination such as A+B; may be repeated.", "--perturbation", "-p", metavar="<str>"
        ),
    ],
    output: Annotated[Path, setting("The h5ad file to write.", "--output", "-o")],
    n_cells: Annotated[
        int | None, setting("Control cells to start from.", default="500, or all if fewer", min=1)
    ] = None,
    source: Annotated[
        Path | None, setting("File with the control cells to start from.", "--from", default="the run")
    ] = None,
    hit_cells: Annotated[
        bool, switch("--hit-cells", "Predict hit cells alone. By default cells escape as often as in the screen.")
    ] = False,
    counterfactual: Annotated[
        bool, switch("--counterfactual", "Write each cell with and without the intervention, in pairs; all are hit.")
    ] = False,
    seed: Annotated[int, setting("Seed of the random draws.", min=0)] = 0,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict the effect of perturbations, alone or in combination, on control cells."""
    from crlseq.prediction.predict import predict as predict_cells
    from crlseq.prediction.predict import top_changes
    from crlseq.storage.files import written_whole
    from crlseq.storage.hdf5 import write_h5ad

    found = load(run)
    refuse_output(output, force)
    if source and output.resolve() == source.resolve():
        raise InputError(f"{output} is an input of the prediction.", "Choose another --output.")
    tell = (lambda text: None) if quiet else say
    virtual = predict_cells(
        found, perturbation, source=source, n_cells=n_cells, hit_cells=hit_cells, counterfactual=counterfactual,
        seed=seed,
        note=lambda text: tell(f"note: {text}"),
    )  # fmt: skip
    with written_whole(output) as beside:
        write_h5ad(virtual, beside)
    about = virtual.uns["crlseq_prediction"]
    changes = {name: top_changes(virtual, name) for name in about["perturbations"]}
    if json:
        rows = about["summary"].reset_index().to_dict("records")
        show_json({
            "output": str(output), "n_cells": about["n_cells"], "seed": seed, "interval": about["interval"],
            "notes": list(about["notes"]), "predictions": [{**row, "genes": changes[row["perturbation"]].to_dict("records")} for row in rows],
        })  # fmt: skip
    if not quiet:
        _tell(found, virtual, changes, counterfactual)
        say(f"{virtual.n_obs} cells x {virtual.n_vars} genes: {output}")


def project(
    run: RunFolder,
    cells: Annotated[
        Path, typer.Argument(help="Cells with the genes and the kind of values of the fit.", show_default=False)
    ],
    output: Annotated[Path, setting("The h5ad file to write.", "--output", "-o")],
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write other cells with their activities of a run's programs.

    obsm["X_crlseq"] has the activities, in standard deviations of the run's control cells; obs["crlseq_outside"] tells which
    cells are unlike any that were fitted, and obs["crlseq_distance"] how far they are (1: a usual cell).
    """
    from crlseq.prediction.project import project as project_cells
    from crlseq.run.anndata import write_annotated
    from crlseq.storage.files import written_whole

    found = load(run)
    refuse_output(output, force)
    if output.resolve() == cells.resolve():
        raise InputError(f"{output} is the file to read.", "Choose another --output.")
    tell = (lambda text: None) if quiet else say
    projected = project_cells(found, cells, lambda text: tell(f"note: {text}"))
    with written_whole(output) as beside:
        write_annotated(cells, beside, projected.keys(found))
    n, p = projected.activities.shape
    if json:
        show_json({
            "output": str(output), "n_cells": n, "programs": found.program_names, "outside": projected.share,
            "outside_of_run": projected.own_share, "notes": list(projected.notes),
        })  # fmt: skip
    tell(
        f"{projected.share:.1%} of the cells lie outside what the run covers, and {projected.own_share:.1%} of its own."
    )
    tell(f"{n} cells x {p} programs: {output}")


def _tell(run: Run, virtual: ad.AnnData, changes: dict[str, pd.DataFrame], counterfactual: bool) -> None:
    """The predictions in sentences: how much changes, and which genes most."""
    about = virtual.uns["crlseq_prediction"]
    for name, row in about["summary"].iterrows():
        say(f"{name} ({row['seen']}): {row['n_genes_changed']} of {virtual.n_vars} genes change; total change {row['effect_l2']:.3f} (L2)")  # fmt: skip
        if counterfactual and not run.facts.without_effect:
            say(
                f"  composition error {row['composition']:.2g}, effectiveness error {row['effectiveness']:.3f} SD, "
                f"reversibility error {row['reversibility']:.3f} beside a change of {row['change']:.3f}"
            )
    unit = "change" if run.preprocessing.values == "continuous" else "change of log expression"
    for name, table in changes.items():
        told = ", ".join(f"{row.gene} {row.change:+.2f} ± {row.error:.2f}" for row in table.itertuples())
        say(
            f"{name} changes these genes most ({unit} ± standard error): {told}."
            if told
            else f"{name} changes no gene."
        )
    say(f"Intervals: {about['interval']}.")
