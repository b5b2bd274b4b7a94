"""``crlseq evaluate``: a run against cells that it was not fitted on, beside simple baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crlseq.cli.options import AsJson, Force, load, setting, switch, takes_config
from crlseq.cli.output import refuse_output, say, show_json, show_table
from crlseq.errors import UsageError

if TYPE_CHECKING:
    from crlseq.evaluation.evaluate import Evaluation

COLUMNS = 8  # of the table that is printed
SHOWN = ("pearson_delta", "l2", "r2_weighted_delta", "de_score", "discrimination", "mae")
SPLITS = "What --cross-validate holds out: cells, combinations or singles, separated by commas."
LEGACY = ("legacy_mmd2", "legacy_r2", "legacy_rmse")

RECOVERY = {
    "target_accuracy": "target accuracy", "mcc": "MCC", "dci_disentanglement": "disentanglement",
    "dci_completeness": "completeness", "dci_informativeness": "informativeness",
    "irs": "interventional robustness", "ancestor_f1": "ancestor F1", "shd": "SHD",
}  # fmt: skip


@takes_config("perturbation_key", "control_label", "separator", "layer")
def evaluate(
    run: Annotated[
        Path, typer.Argument(help="Run folder, or a file with another tool's predictions.", show_default=False)
    ],
    data: Annotated[
        Path | None, setting("Other measured cells with the same labels.", default="the run's test cells")
    ] = None,
    output: Annotated[
        Path | None, setting("CSV file with one row per condition and predictor.", "--output", "-o", default="none")
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
    **given: Any,
) -> None:
    """Evaluate a run on cells that it was not fitted to, beside simple baselines that any model must beat.

    A file of predicted cells or means is judged by the measured cells of --data; no run is needed.
    """
    labels = {name: value for name, value in given.items() if value not in (None, [])}
    foreign = run.is_file() or run.suffix == ".zarr"
    if foreign and data is None:
        raise UsageError(f"{run} is judged by measured cells, and none are given.", "Name their file with --data.")
    for name in () if foreign else labels:
        raise UsageError(f"--{name.replace('_', '-')} is for files of predictions; a run has its own.", "Omit it.")
    _refuse(foreign, data is not None, cross_validate, held_out_controls, splits is not None, legacy)
    if output is not None:
        refuse_output(output, force)
    from crlseq.evaluation.evaluate import evaluate as judge
    from crlseq.storage.csv import write_csv

    if foreign and data is not None:
        from crlseq.evaluation.foreign import evaluate_predictions

        found = evaluate_predictions(run, data, **labels)
    elif cross_validate:
        from crlseq.experiments.crossvalidation import cross_validate as judge_folds

        chosen = None if splits is None else [word.strip() for word in splits.split(",")]
        found = judge_folds(load(run), folds, chosen, legacy, note=say)
    else:
        found = judge(load(run), data, legacy, held_out_controls)
    for note in found.notes:
        say(note)
    if output is not None:
        write_csv(output, found.conditions)
    if json:
        show_json({
            "verdict": list(found.verdict), "notes": list(found.notes), "summary": found.summary.to_dict("records"),
            "comparisons": found.comparisons.to_dict("records"), "conditions": found.conditions.to_dict("records"),
            "recovery": found.recovery,
        })  # fmt: skip
    else:
        _show(found, legacy)


def _refuse(
    foreign: bool, data: bool, cross_validate: bool, held_out_controls: bool, splits: bool, legacy: bool
) -> None:
    """Refuse, by `UsageError`, options that contradict one another."""
    if foreign and (cross_validate or held_out_controls or legacy or splits):
        message = "--cross-validate, --splits, --held-out-controls and --legacy need a run, not a file of predictions."
        raise UsageError(message, "Omit them.")
    if cross_validate and data:
        message = "--cross-validate evaluates on the run's own screen, and --data names another."
        raise UsageError(message, "Give one of them.")
    if held_out_controls and (cross_validate or data):
        raise UsageError("--held-out-controls refers to the run's own test cells.", "Omit --data or --cross-validate.")
    if splits and not cross_validate:
        raise UsageError("--splits needs --cross-validate.", "Give both.")


def _show(found: Evaluation, legacy: bool) -> None:
    """A table of means, a sentence a group, and what the known truth says."""
    from crlseq.evaluation.compare import RANGE, digits

    shown = [*(LEGACY if legacy else ()), *SHOWN][: COLUMNS - 2]
    wide = found.summary.pivot(index=["group", "predictor"], columns="metric", values="mean")
    rows = list(dict.fromkeys(zip(found.summary["group"], found.summary["predictor"], strict=True)))
    wide = wide.loc[[row for row in rows if row[1] != RANGE], [name for name in shown if name in wide]]
    show_table(wide.reset_index().rename(columns={"group": "held out"}), "Means over conditions", form=digits)
    for line in found.verdict:
        say(line)
    if found.recovery is not None:
        scores = ", ".join(f"{title} {found.recovery[name]:.3g}" for name, title in RECOVERY.items())
        say(f"Against the known truth: {scores}.")
