"""Labels that are asked of a run: parts in any order, what was seen, and what cannot be predicted."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import pytest

import crlseq
from crlseq.errors import InputError, UsageError
from crlseq.prediction.labels import understand
from crlseq.prediction.predict import predict
from crlseq.run.run import Run
from tests.prediction.test_predict import hand_run
from tests.support import FAST


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("B+A", "A+B"),
        ("A , B", "A+B"),
        ("A || B", "A+B"),
        ("B_A", "A+B"),
        ("A+ctrl", "A"),
        (" A ", "A"),
        ("control+B", "B"),
    ],
)
def test_labels(label: str, name: str) -> None:
    (request,), _ = understand(hand_run(), [label])
    assert request.name == name


def test_separator_of_the_fit_and_what_was_seen() -> None:
    conditions = [
        {"name": "A", "perturbations": ["A"], "cells": {"train": 9}},
        {"name": "A|B", "perturbations": ["A", "B"], "cells": {"train": 9}},
        {"name": "A|N", "perturbations": ["A", "N"], "cells": {"test": 9}},
    ]
    requests, notes = understand(hand_run(conditions=conditions), ["R|A", "B|A", "N|A", "A|B"])
    assert [(r.name, r.seen) for r in requests] == [("A|R", "not measured"), ("A|B", "fitted"), ("A|N", "held out")]
    assert requests[1].programs == "P0+P1"
    assert any("requested twice" in note for note in notes)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("A+A", "names 'A' twice"),
        ("control", "is the control"),
        ("ctrl+control", "is the control"),
        ("H", "'H' was held out of the fit"),
        ("AB", "'AB' was not fitted"),
        ("A+X", "'X' in 'A+X' was not fitted"),
        ("A+", "empty part"),
        ("", "empty part"),
    ],
)
def test_labels_that_cannot_be_predicted(label: str, says: str) -> None:
    with pytest.raises(InputError, match=says.replace("+", r"\+")):
        understand(hand_run(), [label])


@pytest.mark.parametrize("label", ["A_g2", "A+A_g2"])
def test_a_guide_is_no_perturbation_of_its_own(label: str) -> None:
    with pytest.raises(InputError, match=r"'A_g2'.* is a guide of 'A'") as error:
        understand(hand_run(guides={"genes": {"A_g1": "A", "A_g2": "A"}}), [label])
    assert "'A'" in error.value.hint


def test_combinations_without_cells_are_told_their_law() -> None:
    law = {
        "beta": 0.5, "beta_error": 0.0, "gamma": 0.5, "gamma_error": 0.0, "n_measured": 0, "fitted": False,
        "n_terms": 0, "gain": 0.0, "gain_error": 0.0, "spread": [0.25, 0.15], "by_equations": 0,
    }  # fmt: skip
    conditions = [{"name": "A+B", "perturbations": ["A", "B"], "cells": {"train": 9}}]
    run = hand_run(combinations=law, conditions=conditions)
    assert not any("Combinations:" in note for note in understand(run, ["A", "A+B"])[1])
    (note,) = [note for note in understand(run, ["A+N"])[1] if "Combinations:" in note]
    assert "0.5 of their sum and 0.5 of the mean effect" in note and "No measured combinations were" in note
    assert not any("wider" in note for note in understand(run, ["A+N"])[1])
    assert any("intervals are wider: A+B+N" in note for note in understand(run, ["A+B+N"])[1])


def test_closest_names_and_why(finished: Run) -> None:
    with pytest.raises(InputError) as error:
        understand(finished, ["G55"])
    assert "'g5'" in error.value.hint
    fewer = {**finished.info, "conditions": [row for row in finished.info["conditions"] if row["name"] != "g6"]}
    run = replace(finished, info=fewer, interventions=finished.interventions.iloc[:6])
    with pytest.raises(InputError, match="'g6' is in the screen but was left out of the fit"):
        understand(run, ["g6"])
    with pytest.raises(UsageError):
        understand(finished, [])


def test_perturbation_of_combinations_alone(screen: ad.AnnData) -> None:
    labels = screen.obs["perturbation"].astype(str)
    double = next(label for label in labels.unique() if "+" in label)
    alone = double.split("+")[0]
    kept = screen[(labels != alone).to_numpy()].copy()
    linear_run = crlseq.fit(kept, method="linear", n_latents=2, bootstrap=0)
    with pytest.raises(InputError, match="only in combinations"):
        predict(linear_run, alone, source=kept)
    run = crlseq.fit(kept, **FAST)
    assert any(
        "only in combinations" in text for text in predict(run, alone, source=kept).uns["crlseq_prediction"]["notes"]
    )
