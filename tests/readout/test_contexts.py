"""Differences of shifts between contexts, worked out by hand and by many draws of no difference."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from crlseq.config import DataConfig
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.readout.contexts import context_table
from crlseq.run.contexts import contexts_in_words, seen_errors

N, CONTROLS = 40, 60


def screen(genes: int = 2) -> PerturbSeqData:
    labels = np.concatenate([np.repeat(["control"], CONTROLS), *(np.repeat([f"A{i}"], N) for i in range(genes))] * 2)
    state = np.repeat(["rest", "stim"], len(labels) // 2)
    x = np.random.default_rng(0).poisson(3.0, (len(labels), 20)).astype(np.float32)
    obs = pd.DataFrame({"perturbation": labels, "state": state}, index=[f"c{i}" for i in range(len(labels))])
    return read_data(ad.AnnData(x, obs), DataConfig(context_key="state"), 0)


def test_shifts_errors_and_difference_are_those_of_the_cells() -> None:
    data = screen()
    latents = np.random.default_rng(1).normal(size=(len(data.batch), 2))
    names = data.perturbation_names
    assert names == ("A0@rest", "A0@stim", "A1@rest", "A1@stim")
    latents[data.condition == 1, 1] += 2.0  # A0 in rest
    latents[data.context == 1] += 5.0  # of the context, in controls too
    table = context_table(data, latents, np.array([1, -1, 0, 0]))
    first = table.iloc[0]
    assert list(first[["perturbation", "program", "context", "other"]]) == ["A0", "P1", "rest", "stim"]
    own, other = (latents[data.condition == c, 1] for c in (1, 2))
    control = [latents[(data.condition == 0) & (data.context == c), 1] for c in (0, 1)]
    assert first["shift"] == pytest.approx(own.mean() - control[0].mean())
    assert first["se_other"] == pytest.approx(
        np.hypot(other.std(ddof=1) / N**0.5, control[1].std(ddof=1) / CONTROLS**0.5)
    )
    least = min(abs(first["shift"]), abs(first["shift_other"]))
    assert first["difference_se"] == pytest.approx(
        np.sqrt(first["se"] ** 2 + first["se_other"] ** 2 + (0.1 * least) ** 2)
    )
    z = first["difference"] / first["difference_se"]
    assert first["difference"] == pytest.approx(first["shift"] - first["shift_other"])
    assert first["p_value"] == pytest.approx(2 * norm.sf(abs(z))) and z > 6
    assert first["fdr"] == pytest.approx(2 * first["p_value"]) and table["fdr"].iloc[1] > 0.05
    assert first["n_cells"] == first["n_cells_other"] == N


def test_without_a_claim_in_any_context_nothing_is_compared() -> None:
    table = context_table(screen(), np.zeros((len(screen().batch), 1)), np.array([-1, -1, -1, -1]))
    assert table.empty and table["n_cells"].dtype == int and table["perturbation"].dtype == object


def test_equal_shifts_are_called_different_no_more_often_than_the_fdr_says() -> None:
    data, rng, called = screen(genes=10), np.random.default_rng(2), 0
    target = np.zeros(20, dtype=int)
    for _ in range(100):
        latents = rng.standard_t(6, size=(len(data.batch), 1))
        latents[data.condition > 0] += 0.5
        called += bool((context_table(data, latents, target)["fdr"] <= 0.05).any())
    assert called <= 12  # of 100 at 5 %: more has a probability of 0.2 %


def test_standard_errors_that_are_seen() -> None:
    """One test: 1.96 and .84. Of 20, the first needs p = .05 / 20, the last .05."""
    assert seen_errors(0, 1) == pytest.approx(1.96 + 0.84, abs=0.001)
    assert seen_errors(0, 20) == pytest.approx(3.023 + 0.84, abs=0.001)
    assert seen_errors(19, 20) == seen_errors(20, 20) == seen_errors(0, 1)


def test_contexts_are_compared_in_their_order_and_what_is_in_one_alone_is_named() -> None:
    rows = [("A", "2h", "24h", 0.01), ("A", "rest", "24h", 0.02), ("A", "rest", "2h", 0.5)]
    table = pd.DataFrame(rows, columns=["perturbation", "context", "other", "fdr"]).assign(
        difference_se=0.1, se=0.1, se_other=0.1
    )
    names = ["A@2h", "A@24h", "A@rest", "B@rest"]
    run = SimpleNamespace(
        contexts=table, interventions=pd.DataFrame({"perturbation": names, "fdr": 0.01}),
        facts=SimpleNamespace(contexts=SimpleNamespace(names=["rest", "2h", "24h"], pairs_tested=0)),
    )  # fmt: skip
    words = contexts_in_words(run)
    assert [word.split(" (")[0] for word in words] == [
        "0 of 1 perturbation acts differently in rest and 2h", "1 of 1 perturbation acts differently in rest and 24h",
        "1 of 1 perturbation acts differently in 2h and 24h", "B is in one context alone and not compared.",
    ]  # fmt: skip
