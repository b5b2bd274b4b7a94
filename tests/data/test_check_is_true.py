"""What ``crlseq check`` says of a file is what a fit then does with it, over files of many styles."""

from __future__ import annotations

import random
import shlex
from collections import Counter
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from crlseq.cli.options import FLAGS
from crlseq.config import DataConfig, make_config
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.inspection import describe
from crlseq.errors import InputError
from tests.data.test_label_columns import column

KINDS = ("counts", "log", "scaled", "fractional", "binary", "with a NaN")


def screen(rng: random.Random) -> tuple[ad.AnnData, DataConfig]:
    """A file as somebody may have it: labels, values, names of genes, columns beside, cells without counts."""
    made = column(rng)
    labels = made.labels * rng.choice([2, 3, 8])
    numbers = np.random.default_rng(rng.randrange(2**32))
    x = numbers.negative_binomial(2, 0.2, (len(labels), 30)).astype(float)
    if rng.random() < 0.2:
        x[rng.sample(range(len(x)), 3)] = 0
    counts, kind = x.copy(), rng.choice(KINDS)
    logs = np.log1p(x / np.maximum(x.sum(1, keepdims=True), 1) * 1e4)
    x = {
        "counts": x, "log": logs, "scaled": (logs - logs.mean(0)) / logs.std(0), "fractional": x * 0.9 + x.mean(0) * 0.07,
        "binary": np.minimum(x, 1), "with a NaN": np.where(np.arange(30) == 29, np.nan, x),
    }[kind]  # fmt: skip
    genes = [f"ENSG{j:011d}" for j in range(30)] if rng.random() < 0.5 else [f"GENE{j}" for j in range(30)]
    obs = pd.DataFrame({rng.choice(["perturbation", "gene", "guide", "target"]): pd.Series(labels, dtype=object)})
    for name in rng.sample(["lane", "cell_line", "leiden", "whatever"], rng.randint(0, 3)):
        obs[name] = numbers.choice(["x", "y"], len(labels))
    adata = ad.AnnData(x, obs=obs.set_axis([f"c{i}" for i in range(len(labels))]), var=pd.DataFrame(index=genes))
    if rng.random() < 0.3:
        adata.layers["counts"] = counts
    key = rng.choice([None, None, "lane", "whatever"])
    return adata, DataConfig(batch_key=key, min_cells=rng.choice([2, 4]), combinations=rng.random() < 0.8)


def as_asked(said: dict[str, Any]) -> DataConfig:
    """The options of the command that check prints."""
    words, given = shlex.split(said["command"])[3:-2], dict[str, Any]()
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if name == "no_combinations":
            given["combinations"] = False
            continue
        value: Any = words.pop(0)
        if name == "control_label":
            given.setdefault(name, []).append(value)
        else:
            given[name] = (
                int(value) if FLAGS[name]["switch"] == "" and value.isdigit() and name == "min_cells" else value
            )
    return make_config(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}).data


def same_labels(said: dict[str, Any], done: PerturbSeqData) -> None:
    labels = done.labels
    counts = np.bincount(labels.condition[labels.condition >= 0], minlength=len(labels.conditions))
    assert said["control_cells"] == counts[0]
    assert said["cells_per_condition"] == dict(zip(labels.condition_names[1:], counts[1:].tolist(), strict=True))
    assert said["dropped"] == labels.dropped
    assert said["fitted_conditions"] == sum(bool(len(done.cells(c, 1, 2))) for c in range(1, len(done.conditions)))
    assert said["targets_reason"] in done.notes


def outcome(seed: int) -> str:
    """``fitted`` or ``refused``, by check and fit alike."""
    adata, config = screen(random.Random(seed))
    said = describe(adata, config)
    if said["problems"]:
        with pytest.raises(InputError) as refusal:
            read_data(adata, config, 0)
        assert str(refusal.value) in said["problems"], seed
        return "refused"
    done = read_data(adata, config, 0)
    same_labels(said, done)
    assert (said["values"], said["values_reason"]) == (done.preprocessing.values, done.preprocessing.reason)
    assert set(said["notes"]) <= set(done.notes), (seed, set(said["notes"]) - set(done.notes))
    asked = as_asked(said)
    again = read_data(adata, asked, 0)
    assert again.labels.names == done.labels.names and again.labels.conditions == done.labels.conditions, seed
    if asked.layer is None:  # its cells without counts are others
        np.testing.assert_array_equal(again.condition >= 0, done.condition >= 0)
    assert again.preprocessing.values == ("counts" if asked.layer == "counts" else done.preprocessing.values)
    return "fitted"


def test_check_says_what_a_fit_does() -> None:
    found = Counter(map(outcome, range(300)))
    assert found["fitted"] > 100 and found["refused"] > 50
