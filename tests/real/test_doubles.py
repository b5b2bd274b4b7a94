"""Norman's doubles, predicted by a fit on singles alone; skipped where the file is absent."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from tests.paths import shared
from tests.support import invoke


def test_norman_doubles(tmp_path: Path) -> None:
    path = shared("data/norman2019_k562_perturbench_3375x500.h5ad")
    answer = invoke(
        "fit", path, "--output", tmp_path / "RUN", "--no-combinations", "--epochs", 3, "--n-latents", 4,
        "--bootstrap", 0,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    answer = invoke("evaluate", tmp_path / "RUN", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    conditions = pd.DataFrame(found["conditions"])
    groups = conditions.drop_duplicates("condition")["group"].value_counts().to_dict()
    assert groups == {f"combinations, {k} of 2 parts seen": n for k, n in ((0, 7), (1, 3), (2, 5))}
    both = conditions[conditions["group"] == "combinations, 2 of 2 parts seen"].groupby("predictor")
    l2, correlation = both["l2"].mean(), both["pearson_delta"].mean()
    # Known of these five: adding the single effects is far better than no change, and the mean of all is no help.
    assert l2["additive"] < 0.5 * l2["no_change"] and correlation["additive"] > 0.8
    assert l2["mean"] > 0.8 * l2["no_change"]
    assert l2["sampling_floor"] < l2["split_half"] < l2["no_change"]
    assert correlation["split_half"] > 0.8
    assert l2["model"] < 0.6 * l2["no_change"]
