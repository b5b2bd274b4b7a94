"""Effects on genes: changes, fold changes and errors by hand, calibration of few cells, own transcripts, large screens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.readout import effects
from crlseq.readout.effects import PRIOR_CELLS, control_sums, effect_table, measured_effect
from crlseq.readout.programs import Interventions, Programs
from crlseq.run.columns import EFFECT_COLUMNS
from crlseq.run.consistency import read_effects
from crlseq.run.tables import effect_matrix, significant
from crlseq.storage import csv
from crlseq.storage.csv import to_csv


def screen(
    rows: Mapping[str, np.ndarray], batch: Mapping[str, list[str]] | None = None, **options: Any
) -> PerturbSeqData:
    """Cells of labels as they are, none normalised."""
    if len(rows) == 2:  # a screen has two perturbations at least
        rows, batch = {**rows, "B": rows["A"][:2]}, batch and {**batch, "B": batch["A"][:2]}
    adata = ad.AnnData(np.concatenate(list(rows.values())).astype(np.float32))
    adata.obs["perturbation"] = [name for name, own in rows.items() for _ in own]
    adata.obs["batch"] = [b for name, own in rows.items() for b in (batch[name] if batch else ["one"] * len(own))]
    adata.obs_names = [f"c{i}" for i in range(adata.n_obs)]
    adata.var_names = ["A", "B", "C"][: adata.n_vars] + [f"gene{i}" for i in range(adata.n_vars - 3)]
    return read_data(adata, make_config(batch_key="batch", min_cells=2, **options).data, 0)


def found_of(data: PerturbSeqData, target: list[int], shift: list[float]) -> tuple[Programs, Interventions]:
    p, k = max(target) + 1 or 1, len(target)
    total = np.tile(np.arange(1.0, data.n_genes + 1), (p, 1))
    weights = np.eye(p)[np.maximum(target, 0)]
    known = Interventions(weights, np.array(target), np.array(shift), np.ones(k), np.ones(k))
    return Programs(total, total, np.ones(p), np.zeros(p)), known


def test_a_change_its_error_and_the_fold_change_by_hand() -> None:
    logs = {
        "control": np.log1p([[3.0, 1.0], [3.0, 1.0], [0.0, 2.0], [2.0, 4.0]]),
        "A": np.log1p([[1.0, 0.0], [0.0, 3.0]]),
    }
    data = screen(logs, values="log")
    object.__setattr__(data, "split", np.full(8, splits.TRAIN))
    controls = control_sums(data, np.arange(4))
    found = measured_effect(data, np.array([4, 5]), controls)
    own, other = np.asarray(logs["A"]), np.asarray(logs["control"])
    change = own.mean(0) - other.mean(0)
    assert found.change == pytest.approx(change, abs=1e-6)
    spread = other.var(0, ddof=1)
    of_cells = (PRIOR_CELLS * spread + own.var(0, ddof=1)) / (PRIOR_CELLS + 1) / 2
    total = of_cells + spread / 4
    assert found.se == pytest.approx(np.sqrt(total), abs=1e-6)
    degrees = total**2 / (of_cells**2 / (PRIOR_CELLS + 1) + (spread / 4) ** 2 / 3)
    assert found.p_value == pytest.approx(2 * t.sf(np.abs(change) / np.sqrt(total), degrees), rel=1e-4)
    # Sums of expression are 1 and 8 in the first gene, 3 and 8 in the second.
    means = np.array([[1.5 / 2, 8.5 / 4], [3.5 / 2, 8.5 / 4]])
    assert found.log2_fold_change == pytest.approx(np.log2(means[:, 0] / means[:, 1]), abs=1e-5)
    raw_own, raw_other = np.expm1(own), np.expm1(other)
    of_cells = (PRIOR_CELLS * raw_other.var(0, ddof=1) + raw_own.var(0, ddof=1)) / (PRIOR_CELLS + 1) / 2
    relative = of_cells / means[:, 0] ** 2 + raw_other.var(0, ddof=1) / 4 / means[:, 1] ** 2
    assert found.log2_fold_change_se == pytest.approx(np.sqrt(relative) / np.log(2), rel=1e-4)


def test_a_batch_is_compared_with_its_own_controls() -> None:
    rng = np.random.default_rng(0)
    level = {"one": 1.0, "two": 3.0}
    batch = {"control": ["one"] * 30 + ["two"] * 30, "A": ["two"] * 20}
    rows = {
        name: np.array([[level[b]] * 2 for b in own]) + 0.01 * rng.normal(size=(len(own), 2))
        for name, own in batch.items()
    }
    data = screen(rows, batch, values="continuous")
    cells = data.cells_by_condition(0, 1, 2)
    found = measured_effect(data, cells[1], control_sums(data, cells[0]))
    assert np.abs(found.change).max() < 0.02
    assert np.isnan(found.log2_fold_change).all()  # values are no logarithms


@pytest.mark.parametrize("n", [2, 5, 40])
def test_groups_of_control_cells_have_no_effect(n: int) -> None:
    """Sparse expression, in which a few cells often have no count at all: their own variance would be 0."""
    rng = np.random.default_rng(1)
    rate = rng.gamma(1.0, 0.6, 200)
    x = np.log1p(rng.poisson(rate * rng.gamma(4.0, 0.25, (600, 1)))).astype(np.float32)
    data = screen({"control": x, "A": x[:2]}, values="log")
    p_values = []
    object.__setattr__(data, "split", np.full(len(data.split), splits.TRAIN))
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(600)
        p_values.append(measured_effect(data, order[:n], control_sums(data, order[n:])).p_value)
    p_value = np.concatenate(p_values)
    assert np.mean(p_value < 0.05) < 0.06
    assert np.mean(p_value < 0.001) < 0.004
    assert np.mean(p_value < 0.3) > 0.15  # and they are no smaller than they have to be


def test_parts_of_the_program_own_transcripts_and_rows() -> None:
    rng = np.random.default_rng(2)
    rows = {name: rng.poisson(mean, (60, 3)) for name, mean in {"control": 8, "A": [2, 8, 8], "B": 8, "D": 8}.items()}
    data = screen({name: np.log1p(own) for name, own in rows.items()}, values="log")
    programs, interventions = found_of(data, [0, -1, 0], [2.0, np.nan, -1.0])
    programs.total_effect[0, 0] = np.nan  # no other perturbation tells of gene A
    table, knock_down, _ = effect_table(data, programs, interventions, np.array([0.5, 1.0, 1.0]))
    assert list(table) == list(EFFECT_COLUMNS)
    assert table.groupby("perturbation", sort=False).size().to_dict() == {"A": 3, "B": 3, "D": 3}
    assert table.groupby("perturbation")["p_value"].apply(lambda own: own.is_monotonic_increasing).all()
    by = table.set_index(["perturbation", "gene"])
    assert by.loc[("A", "B"), "program_part"] == 2.0 and by.loc[("D", "C"), "program_part"] == -3.0
    assert np.isnan(by.loc[("A", "A"), ["program_part", "residual"]].astype(float)).all()
    assert by.loc["B"]["program_part"].isna().all()
    told = by.dropna(subset="residual")
    assert told["residual"].to_numpy() == pytest.approx((told["change"] - told["program_part"]).to_numpy(), abs=1e-4)
    assert knock_down["knock_down"][:2] == pytest.approx(by.loc[[("A", "A"), ("B", "B")], "log2_fold_change"], abs=1e-4)
    assert knock_down["knock_down"][0] == pytest.approx(-2.0, abs=0.4)  # from 8 to 2
    assert np.isnan(knock_down["knock_down"][2])  # D is no gene of the screen
    wide = effect_matrix(table)
    assert wide is not None and wide.shape == (3, 3)
    assert wide.loc["C", "D"] == by.loc[("D", "C"), "change"]


def test_of_a_large_screen_the_table_has_what_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    rows = {name: rng.normal(mean, 1, (60, 3)) for name, mean in {"control": 0, "A": [0, 0, 4], "B": 0}.items()}
    data = screen(rows, values="continuous")
    monkeypatch.setattr(effects, "MOST_ROWS", 5)
    programs, interventions = found_of(data, [-1, -1], [np.nan, np.nan])
    table, _, _ = effect_table(data, programs, interventions, np.ones(2))
    assert set(zip(table["perturbation"], table["gene"], strict=True)) == {("A", "A"), ("A", "C"), ("B", "B")}
    assert effect_matrix(table) is None


def test_six_digits() -> None:
    values = np.array([0.0, 1.23456789, np.nan, 2.36257999e-64, -123456789.0, np.inf, 9.9999999, 0.1 + 0.2])
    assert [f"{value!r}" for value in significant(values).tolist()] == [
        "0.0", "1.23457", "nan", "2.36258e-64", "-123457000.0", "inf", "10.0", "0.3",
    ]  # fmt: skip


def test_a_damaged_table_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from crlseq.errors import InputError

    row = dict.fromkeys(EFFECT_COLUMNS, 0.5) | {"perturbation": "A", "gene": "B"}
    path = tmp_path / "effects.csv"
    path.write_bytes(to_csv(pd.DataFrame([row])))
    assert len(read_effects(path, ["A"], ["B"])) == 1
    for perturbations, genes, rows in ((["X"], ["B"], 1), (["A"], ["X"], 1), (["A"], ["B"], 2)):
        path.write_bytes(to_csv(pd.DataFrame([row] * rows)))
        with pytest.raises(InputError, match="damaged"):
            read_effects(path, perturbations, genes)
    path.unlink()
    with pytest.raises(InputError, match="damaged"):
        read_effects(path, ["A"], ["B"])


def test_a_table_is_written_in_pieces_as_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame({"gene": ["=A", "B", "B", "C"], "n": [1, 2, 3, 4], "change": [0.1, np.nan, 3.0, -1e-9]})
    monkeypatch.setattr(csv, "ROWS", 3)
    csv.write_csv(tmp_path / "table.csv", table)
    assert (tmp_path / "table.csv").read_text() == "gene,n,change\n'=A,1,0.1\nB,2,\nB,3,3.0\nC,4,-1e-09\n"
