"""``crlseq evaluate``: a run against cells that it was not fitted on, beside simple baselines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from crlseq.cli.options import AsJson, Force, RunFolder, load, setting, switch
from crlseq.cli.output import refuse_output, say, show_json, show_table
from crlseq.errors import UsageError

if TYPE_CHECKING:
    from crlseq.evaluation.evaluate import Evaluation

SHOWN = (
    "pearson_delta", "pearson_delta_top_de", "pearson_delta_perturbed", "l2", "centroid_accuracy", "discrimination",
    "sign_agreement", "mmd2", "energy_distance", "r2_delta",
)  # fmt: skip
SPLITS = "What --cross-validate holds out: cells, combinations or singles, separated by commas."
LEGACY = ("legacy_mmd2", "legacy_r2", "legacy_rmse")

RECOVERY = {
    "target_accuracy": "target accuracy", "mcc": "MCC", "dci_disentanglement": "disentanglement",
    "dci_completeness": "completeness", "dci_informativeness": "informativeness",
    "irs": "interventional robustness", "ancestor_f1": "ancestor F1", "shd": "SHD",
}  # fmt: skip


def evaluate(
    run: RunFolder,
    data: Annotated[Path | None, setting("Other cells with the same labels.", default="the run's test cells")] = None,
    output: Annotated[
        Path | None, setting("CSV file with one row per condition and predictor.", "--output", "-o")
    ] = None,
    held_out_controls: Annotated[
        bool, switch("--held-out-controls", "Compare with held-out control cells instead of training ones.")
    ] = False,
    cross_validate: Annotated[
        bool, switch("--cross-validate", "Fit again, each time without one part of the screen.")
    ] = False,
    folds: Annotated[int, setting("Number of folds of --cross-validate.", min=2)] = 5,
    splits: Annotated[str | None, setting(SPLITS, default="what the screen has")] = None,
    legacy: Annotated[bool, switch("--legacy", "Also compute the metrics of Zhang et al. 2023.")] = False,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Evaluate a run on cells that it was not fitted to, beside simple baselines that any model must beat."""
    if cross_validate and data is not None:
        message = "--cross-validate evaluates on the run's own screen, and --data names another."
        raise UsageError(message, "Give one of them.")
    if held_out_controls and (cross_validate or data is not None):
        raise UsageError("--held-out-controls refers to the run's own test cells.", "Omit --data or --cross-validate.")
    if splits is not None and not cross_validate:
        raise UsageError("--splits needs --cross-validate.", "Give both.")
    if output is not None:
        refuse_output(output, force)
    from crlseq.evaluation.evaluate import evaluate as judge
    from crlseq.storage.csv import to_csv
    from crlseq.storage.files import written_whole

    fitted = load(run)
    if cross_validate:
        from crlseq.experiments.crossvalidation import cross_validate as judge_folds

        chosen = None if splits is None else [word.strip() for word in splits.split(",")]
        found = judge_folds(fitted, folds, chosen, legacy, note=say)
    else:
        found = judge(fitted, data, legacy, held_out_controls)
    for note in found.notes:
        say(note)
    if output is not None:
        with written_whole(output) as beside:
            beside.write_bytes(to_csv(found.conditions))
    if json:
        show_json({
            "verdict": list(found.verdict), "notes": list(found.notes), "summary": found.summary.to_dict("records"),
            "comparisons": found.comparisons.to_dict("records"), "conditions": found.conditions.to_dict("records"),
            "recovery": found.recovery,
        })  # fmt: skip
    else:
        _show(found, legacy)


def _show(found: Evaluation, legacy: bool) -> None:
    """Means per group of conditions on a terminal, the whole summary into a pipe, and what it comes to in words."""
    from crlseq.evaluation.compare import limits

    if sys.stdout.isatty():
        shown = [*SHOWN, *(LEGACY if legacy else ())]
        for group, rows in found.summary.groupby("group", sort=False):
            n = found.conditions.loc[found.conditions["group"] == group, "condition"].nunique()
            wide = rows.pivot(index="predictor", columns="metric", values="mean")
            wide = wide.loc[list(dict.fromkeys(rows["predictor"])), shown].reset_index()
            show_table(wide, f"{group}, means of {n} conditions")
    else:
        show_table(found.summary, "")
    for line in (*found.verdict, *limits(found.summary)):
        say(line)
    for group, rows in found.summary[found.summary["predictor"] == "model"].groupby("group", sort=False):
        means = rows.set_index("metric")["mean"]
        if means.get("change", float("nan")) > 0:
            say(
                f"{group}, counterfactuals: composition error {means['composition']:.2g}, effectiveness error "
                f"{means['effectiveness']:.2g} SD, reversibility error {means['reversibility']:.2g} beside a change of "
                f"{means['change']:.2g}."
            )
    if found.recovery is not None:
        scores = ", ".join(f"{title} {found.recovery[name]:.3g}" for name, title in RECOVERY.items())
        say(f"Against the known truth: {scores}.")
