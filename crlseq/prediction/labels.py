"""What a user asks a run to predict: labels such as ``B+A`` to fitted perturbations, or an error that helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from crlseq.data.combinations import SEPARATORS, cut_label, mark_of
from crlseq.data.controls import is_control_name, is_named
from crlseq.data.matrix import open_screen
from crlseq.data.perturbations import read_perturbations
from crlseq.errors import InputError, UsageError, few, suggestion
from crlseq.run.run import Run
from crlseq.run.summary import combinations_in_words

NO_EFFECT = "No perturbation of this screen has a detectable effect, so the predicted cells are the control cells."


@dataclass(frozen=True)
class Request:
    """A condition to predict."""

    name: str  # as the fit would write it
    parts: tuple[int, ...]  # ascending indices of its perturbations
    programs: str  # those they target, "" for a part without a claim, joined by "+"
    seen: str  # ``fitted``, ``held out`` or ``not measured``; ``extrapolated`` with unseen parts
    unseen: tuple[str, ...] = ()  # genes never perturbed, by name


def understand(run: Run, labels: Sequence[str]) -> tuple[list[Request], list[str]]:
    """Requests in the order of `labels`, each once, and notes on what to know about them.

    InputError if a part was neither fitted nor has a vector or occurs twice in a label, or a label is the control;
    UsageError without a label.
    """
    if not labels:
        raise UsageError("No perturbation to predict was named.", "Give --perturbation at least once.")
    table_programs = run.interventions.set_index("perturbation")["program"]
    names = [str(name) for name in table_programs.index]
    position = {name: i for i, name in enumerate(names)}
    conditions = {tuple(sorted(position[part] for part in row.perturbations)): row for row in run.facts.conditions}
    table = run.extrapolation
    known = {*names, *(() if table is None else table.table.names)}
    requests: dict[tuple[tuple[int, ...], tuple[str, ...]], Request] = {}
    notes: list[str] = []
    for label in labels:
        asked = _read(run, label, names, known)
        if not asked:
            raise InputError(
                f"{label!r} is the control.", "Name a perturbation; virtual cells start from control cells."
            )
        if repeated := [part for i, part in enumerate(asked) if part in asked[:i]]:
            raise InputError(f"{label!r} names {repeated[0]!r} twice.", "Name each perturbation of a combination once.")
        parts = tuple(sorted(position[part] for part in asked if part in position))
        unseen = tuple(sorted(part for part in asked if part not in position))
        if (parts, unseen) in requests:
            notes.append(f"{label!r} was requested twice and is predicted once.")
            continue
        programs = "+".join([*table_programs.iloc[list(parts)], *("" for _ in unseen)])
        row = None if unseen else conditions.get(parts)
        name = fitted_separator(run).join([*(names[k] for k in parts), *unseen]) if row is None else row.name
        seen = "extrapolated" if unseen else "not measured"
        if row is not None:
            seen = "fitted" if "train" in row.cells else "held out"
        requests[parts, unseen] = Request(name, parts, programs, seen, unseen)
    strangers = sorted({name for _, unseen in requests for name in unseen})
    if strangers and table is not None:
        notes.append(
            f"Never perturbed in this screen, so extrapolated from embeddings: {few(strangers)}. {table.in_words()}"
        )
    if run.facts.without_effect:
        return list(requests.values()), [*notes, NO_EFFECT]
    notes += _of_combinations(run, list(requests.values()))
    for k in sorted({k for parts, _ in requests for k in parts}):
        if note := _weak_ground(run, names[k], k):
            notes.append(note)
    return list(requests.values()), notes


def _of_combinations(run: Run, requests: list[Request]) -> list[str]:
    """What combinations without cells in the fit are predicted from."""
    guessed = [each for each in requests if len(each.parts) + len(each.unseen) > 1 and each.seen != "fitted"]
    notes = [combinations_in_words(run.facts)] if guessed and run.facts.combinations else []
    known = {len(row.perturbations) for row in run.facts.conditions if "train" in row.cells}
    large = [each.name for each in guessed if (n := len(each.parts) + len(each.unseen)) > 2 and n not in known]
    if large and notes:
        notes.append(
            f"No combination of as many perturbations is in the fit, so intervals are wider: {few(large)}. The interactions of "
            "all pairs add up in them."
        )
    return notes


def fitted_separator(run: Run) -> str:
    """What joins the parts of combinations in the fitted labels; "+" where none were fitted."""
    for row in run.facts.conditions:
        if len(row.perturbations) > 1:
            first, second = row.perturbations[:2]
            return row.name[len(first) : row.name.index(second, len(first))]
    return run.facts.config.data.separator or "+"


def _read(run: Run, label: str, names: list[str], known: set[str]) -> list[str]:
    """The parts of a label, fitted ones (`names`) or others `known` by their vectors; none for the control."""
    text = label.strip()

    def is_control(part: str) -> bool:
        return part not in known and (is_named(part, run.facts.controls) or is_control_name(part))

    if text in known:
        return [text]
    if is_control(text):
        return []
    by_name = {row.name: row.perturbations for row in run.facts.conditions}
    if text in by_name:
        return list(by_name[text])
    readings = []
    for separator in dict.fromkeys([fitted_separator(run), *SEPARATORS]):
        if mark_of(separator).search(text):
            # "A+ctrl" is "A", as in the fit.
            readings.append(cut_label(text, separator, known, is_control))
    parts = next((reading for reading in readings if set(reading) <= known), None)
    if parts is None:
        # The reading that goes furthest tells what is wrong with it.
        parts = max([*readings, [text]], key=lambda reading: sum(part in known for part in reading))
        raise _not_fitted(run, label, next(part for part in parts if part not in known), names)
    return parts


def _not_fitted(run: Run, label: str, part: str, names: list[str]) -> InputError:
    within = "" if part == label.strip() else f" in {label!r}"
    if not part:
        return InputError(f"{label!r} has an empty part.", "Write combinations like 'A+B'.")
    genes = (run.facts.guides or {}).get("genes") or {}
    if guide := next((name for name in (part, label.strip()) if genes.get(name) in names), None):
        what = (
            f"{guide!r}{within if guide == part else ''} is a guide of {genes[guide]!r}, not a perturbation of its own."
        )
        return InputError(what, f"Name the gene: {genes[guide]!r}, once in a combination.")
    return InputError(
        f"The perturbation {part!r}{within} {_why_not(run, part)}.", suggestion(part, names, "Fitted perturbations are")
    )


def _why_not(run: Run, part: str) -> str:
    """Held out, left out, or unknown: what the labels of the screen say, where it can be read."""
    options = run.facts.config.data
    if part in options.hold_out:
        return "was held out of the fit, so its effect is unknown"
    if run.path is not None:
        try:
            with open_screen(run.path / "crlseq.h5ad", run.preprocessing.layer) as screen:
                key, control = run.facts.perturbation_key, run.facts.controls
                labels = read_perturbations(screen.obs, key, control, options.separator)
        except InputError:  # the folder was moved without its cells: the message is less exact, and no less true
            return "was not fitted"
        if part in labels.names:
            return "is in the screen but was left out of the fit because it has too few cells"
        if part in labels.dropped:
            return "was left out of the fit because it is not a perturbation"
    return "was not fitted" if run.extrapolation is None else "was not fitted and has no vector among the embeddings"


def _weak_ground(run: Run, name: str, k: int) -> str:
    """What to know of a perturbation whose effect through the programs has little or nothing behind it; mostly empty."""
    row = run.interventions.iloc[k]
    if row["n_cells"] == 0 and run.facts.training.epochs_run == 0:
        raise InputError(
            f"The perturbation {name!r} was measured only in combinations, from which the linear method learns nothing.",
            "Fit again with --method straighten.",
        )
    if row["n_cells"] == 0:
        return f"{name!r} was measured only in combinations; its effect was learned from these."
    if row["program"] != "":
        return ""
    if bool((run.model.target_weights(torch.tensor([k])) == 0).all()):
        return (
            f"{name!r} has no detectable effect: the prediction changes no program and keeps only the part of its "
            "measured mean that exceeds sampling noise."
        )
    return f"{name!r} has no detectable effect: its prediction may be learned noise."
