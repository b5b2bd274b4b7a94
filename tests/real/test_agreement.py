"""Tables of programs agree with the cells: on every real screen and simulation, what programs tell against what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

import crlseq
from tests.paths import shared

FILES = {
    "papalexi2021_thp1_20729x299": {"batch_key": "bio_rep"},
    "norman2019_k562_perturbench_3375x500": {},
    "adamson2016_trishift_320x160": {},
    **{f"sim_{kind}_{seed}": {} for kind in ("linear_counts", "linear_gaussian", "mlp_counts", "mlp_gaussian") for seed in (100, 101)},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_programs_tell_is_what_was_measured(name: str) -> None:
    run = crlseq.fit(shared(f"data/{name}.h5ad"), method="linear", bootstrap=0, **FILES[name])
    rows = run.interventions.set_index("perturbation")
    told = run.effects.dropna(subset="program_part")
    told = told[told["perturbation"].map(rows["fdr"] <= 0.05)]
    own = told[told["perturbation"].map(rows["explained"] > 0.5)].groupby("perturbation")
    agreement = [np.corrcoef(part["change"], part["program_part"])[0, 1] for _, part in own]
    assert len(agreement) >= 5
    assert np.median(agreement) >= 0.85
    # No product is surely beyond twice a significant effect: a bound on all genes together, by their errors.
    sure = told[told["fdr"] <= 0.05]
    beyond = (sure["program_part"].abs() - 2 * sure["change"].abs()) / (2 * sure["se"])
    assert beyond.max() < norm.isf(0.01 / len(sure))
    assert (beyond > 0).mean() < 0.01
