"""Power: planted effects by hand, the share detected against that of a z-test, a pilot's truth, sentences and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

import crlseq
from crlseq.config import DataConfig
from crlseq.experiments.planted import Controls, Plan, controls_of, controls_of_run, plant, plant_run
from crlseq.experiments.power import in_sentences, pairs_seen, power, share
from crlseq.run.run import Run
from tests.support import check_refusal, clear_screen, invoke, succeeds

GENES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def one_axis() -> Controls:
    """Normal cells with a deviation of 2 along the first gene, and 0.1 along others."""
    noise = np.random.default_rng(3).standard_normal((4000, len(GENES)))
    return Controls((noise * [2.0, 0.1, 0.1, 0.1]).astype(np.float32), np.zeros(4000).astype(str), GENES)


def cells_of(screen: ad.AnnData, name: str) -> np.ndarray:
    return np.asarray(screen.X)[(screen.obs["perturbation"] == name).to_numpy()]


def test_a_shift_moves_cells_and_changes_nothing_else(one_axis: Controls) -> None:
    """One program is the first component, of deviation 2: a shift of 1.5 moves every hit cell by 3 along it."""
    made = plant(one_axis, Plan(4, 1, 0.5, "shift"), 1.5, 200, 300, (0,), 1)
    there = {row.tobytes() for row in one_axis.x}
    assert len(cells_of(made.screen, "control")) == 300
    for name in made.truth["target"].index:
        own = cells_of(made.screen, name)
        hit = own[[row.tobytes() not in there for row in own]]
        assert 70 <= len(hit) <= 130  # of 200 at a half: four standard deviations
        # Moved back by 3, every hit cell is near a real one on its axis: nearer than 0.02 on average, of 4000 in a deviation of 2.
        gap = [np.abs(one_axis.x[:, 0] - hit[:, :1] + 3 * sign).min(1).mean() for sign in (-1, 1)]
        sign = -1 if hit[:, 0].mean() < 0 else 1
        assert hit[:, 0].mean() == pytest.approx(3 * sign, abs=4 * 2 / np.sqrt(len(hit)))
        assert gap[(sign + 1) // 2] < 0.02
    for name in made.without:
        assert {row.tobytes() for row in cells_of(made.screen, name)} <= there


def test_a_hard_intervention_narrows_its_program(one_axis: Controls) -> None:
    """z becomes 0.7 z + 2: mean 2 x 2 = 4 and variance (0.7 x 2)^2 = 1.96 along the first gene; the others stay."""
    made = plant(one_axis, Plan(1, 1, 1.0, "hard"), 2.0, 20_000, 20, (1,), 1)
    own = cells_of(made.screen, "with-0")
    assert abs(own[:, 0].mean()) == pytest.approx(4.0, abs=0.08)
    assert own[:, 0].var() == pytest.approx(1.96, rel=0.06)
    assert own[:, 1:].var(0) == pytest.approx(np.full(3, 0.01), rel=0.15)


def test_the_planted_graph_leaves_controls_as_they_are(one_axis: Controls) -> None:
    """Programs are written in the controls' own components: whatever the graph, an unhit cell is a real one."""
    x = np.random.default_rng(4).standard_normal((500, 6)).astype(np.float32)
    made = plant(Controls(x, np.zeros(500).astype(str), tuple("abcdef")), Plan(6, 3), 1.0, 30, 100, (5,), 1)
    assert made.truth["adjacency"].any()
    assert {row.tobytes() for row in cells_of(made.screen, "control")} <= {row.tobytes() for row in x}
    assert sorted(set(made.truth["target"]["latent"])) == [0, 1, 2]


@pytest.fixture(scope="module")
def normal_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unlabelled cells that vary along one direction, beside little noise."""
    noise = np.random.default_rng(11).standard_normal((6000, 5)) * [1.0, 0.02, 0.02, 0.02, 0.02]
    cells = ad.AnnData(noise.astype(np.float32), var=pd.DataFrame(index=list("abcde")))
    path = tmp_path_factory.mktemp("power") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


def of_z_test(effect: float, n: int, m: int) -> float:
    """Power of a two-sided z-test of the means of n and m cells at 5 % of false discoveries, half of the hypotheses true.

    By Benjamini and Hochberg (1995) the level is 0.05 times the share that is rejected, half of the power but for false
    ones. The smaller of two tests' p-values has half of it.
    """
    d = effect / np.sqrt(1 / n + 1 / m)

    def at(rejected: float) -> float:
        c = norm.isf(0.05 * rejected / 2 / 2 / 2)
        return float(norm.sf(c - d) + norm.cdf(-c - d))

    return float(brentq(lambda q: at(q) - q, 0.02, 1.0))


@pytest.mark.parametrize(("effect", "n"), [(0.5, 50), (0.3, 100)])
def test_detection_is_that_of_a_z_test(normal_file: Path, effect: float, n: int) -> None:
    """The energy distance compares with 500 controls; in one dimension it loses little to the z-test."""
    found = power(
        normal_file, cells=[n], effects=[effect], plan=Plan(60, 1, 1.0, "shift"), repeats=3, detection_only=True,
        data=DataConfig(values="continuous"), every_cell=True, seed=1, threads=1,
    ).table.iloc[0]  # fmt: skip
    expected = of_z_test(effect, n, 500)
    assert found["detected"] == pytest.approx(expected, abs=0.02 + 3 * found["detected_se"])
    assert found["false"] <= 0.05
    assert np.isnan(found["targets"]) and np.isnan(found["edges"])


def test_targets_and_edges_are_found_where_noise_is_normal(tmp_path: Path) -> None:
    """With 300 cells and shifts of 1.5 all is found that was planted into cells of the model's own kind, and nothing else."""
    noise = np.random.default_rng(2).standard_normal((3000, 30)) * ([1.5] * 4 + [0.3] * 26)
    ad.AnnData(noise.astype(np.float32)).write_h5ad(tmp_path / "cells.h5ad")
    found = power(
        tmp_path / "cells.h5ad", cells=[300], effects=[1.5], plan=Plan(12, 4), repeats=2, n_control=1500,
        data=DataConfig(values="continuous"), every_cell=True, threads=1,
    ).table.iloc[0]  # fmt: skip
    assert found["detected"] == found["targets"] == 1
    assert found["edges"] >= 0.9
    assert found["false"] <= 0.05


def test_a_share_and_its_error() -> None:
    """9 of 10: q = 11/14, and sqrt(11/14 * 3/14 / 14) = 0.10966; all of 0 is not known."""
    assert share(9, 10) == pytest.approx((0.9, 0.109664), abs=1e-6)
    assert share(10, 10)[1] > 0
    assert np.isnan(share(0, 0)).all()


def table_of(**columns: Any) -> pd.DataFrame:
    table = pd.DataFrame({"screens": 1, **columns})
    for name in ("detected", "targets", "edges", "false"):
        table[name] = table.get(name, np.nan)
        table[f"{name}_se"] = 0.02
    return table


def test_sentences() -> None:
    """The fewest cells from which on 90 % are found; a number that only falls above by chance does not count."""
    table = table_of(effect=0.5, cells=[25, 50, 100, 200], detected=[0.91, 0.6, 0.92, 0.99], edges=[0.2, 0.9, 0.8, 0.3])
    said = in_sentences(table)
    assert said[0] == "100 cells a perturbation detect 92 ± 2 % of effects of 0.5 SD."
    assert said[1].startswith("200 cells a perturbation, the most tried, find 30 ± 2 % of the edges")
    assert said[2].startswith("With 200 cells fewer edges are found than with 50")
    of_run = in_sentences(table_of(effect=np.nan, cells=[50], detected=[1.0], false=[0.02]))
    assert of_run[0] == "50 cells a perturbation detect 100 ± 2 % of the effects of this screen."
    assert of_run[1].startswith("Edges could not be judged")
    assert of_run[2] == "2.0 % of the perturbations without effect were called detected."


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a screen with six clear effects, and ``g6`` without any."""
    folder = tmp_path_factory.mktemp("pilot") / "RUN"
    return crlseq.fit(clear_screen(), folder, method="linear", n_latents=3, bootstrap=0, batch_key="batch", threads=1)


def test_a_pilot_is_simulated_as_it_predicts(pilot: Run) -> None:
    """Mean changes of many planted cells are those of `predict`, gene by gene, within four standard errors."""
    controls, n = controls_of_run(pilot), 3000
    made = plant_run(pilot, controls, n, 3000, (0,), 1)
    assert "g6" in made.without and made.batch_key == "batch"
    names = list(made.truth["target"].index)
    assert set(names) == set(pilot.interventions.loc[pilot.interventions["fdr"] <= 0.05, "perturbation"])
    predicted = crlseq.load(pilot.folder).predict(names, n_cells=len(controls.x))
    control = cells_of(made.screen, "control")
    for i, name in enumerate(names):
        own = cells_of(made.screen, name)
        error = np.sqrt(own.var(0) / n + control.var(0) / n)
        gap = (own.mean(0) - control.mean(0) - predicted.varm["crlseq_effect"][:, i]) / error
        assert np.abs(gap).max() < 4.5, name
        assert gap.std() < 1.5


def test_a_pilots_truth_is_recovered(pilot: Run) -> None:
    """More cells find no fewer effects, and with many all are found, on their programs."""
    found = power(pilot, cells=(20, 300), repeats=2, threads=1)
    few, many = found.table.iloc[0], found.table.iloc[1]
    assert many["detected"] == many["targets"] == 1
    assert few["detected"] <= many["detected"]
    assert few["targets"] <= many["targets"]
    assert found.sentences[0].endswith("of the effects of this screen.")


def test_pairs_that_more_or_fewer_cells_show() -> None:
    """z = 4 against t = 2.16. With the pilot's 100 cells Phi(1.84 / sqrt(2)) = 0.9034, with 25 Phi(-0.16 / sqrt(1.25)) = 0.4431;
    with a million Phi(4), up to the pilot's own error.
    """
    pairs = pd.DataFrame({"source": ["A"], "target": ["B"], "status": ["upstream"], "se": [0.1], "z": [-4.0]})
    pairs["detectable"] = (2.16 + norm.ppf(0.8)) * 0.1
    conditions = [
        SimpleNamespace(name=name, cells={"train": n, "test": 10}) for name, n in (("b", 70), ("c", 110), ("a", 7))
    ]
    run = SimpleNamespace(
        pairs=pairs, facts=SimpleNamespace(conditions=conditions),
        interventions=pd.DataFrame({"perturbation": ["a", "b", "c", "d"], "program": ["A", "B", "B", None]}),
    )  # fmt: skip
    for n, seen in ((100, 0.9034), (25, 0.4431), (10**6, norm.cdf(4))):
        assert pairs_seen(run, n) == pytest.approx((seen, np.sqrt(seen * (1 - seen))), abs=2e-2 if n > 100 else 2e-4)
    run.pairs = pairs.assign(status="likely")
    assert np.isnan(pairs_seen(run, 100)).all()


def test_the_command(pilot: Run, tmp_path: Path) -> None:
    screen, table, figure = tmp_path / "screen.h5ad", tmp_path / "power.csv", tmp_path / "power.svg"
    crlseq.simulate(n_latents=3, n_genes=60, cells_per_perturbation=20, n_control=500, depth=2000.0).write_h5ad(screen)
    words = ["power", screen, "--cells", "20,150", "--effect", "1", "--perturbations", 6, "--programs", 2]
    first = succeeds(*words, "--repeats", 1, "--threads", 1, "--json", "--output", table, "--plot", figure)
    told = json.loads(first.out)
    assert [row["cells"] for row in told["table"]] == [20, 150]
    assert told["table"][1]["detected"] == 1
    assert pd.read_csv(table)["detected"].tolist() == [row["detected"] for row in told["table"]]
    drawing = figure.read_text()
    for text in ("effects detected", "on the right program", "cells per perturbation", "screen.h5ad"):
        assert text in drawing
    again = invoke(*words, "--repeats", 1, "--threads", 1, "--json", "--quiet")
    assert json.loads(again.out) == told
    assert again.err == ""


def test_a_scenario() -> None:
    """Without any effect there is nothing to detect, and little is called."""
    found = power("real-null", cells=[30], repeats=1, detection_only=True, threads=1).table.iloc[0]
    assert np.isnan(found["detected"]) and found["false"] <= 0.05


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--cells", "5,50"], 2, "5 cells"),
        (["--cells", "50.5"], 2, "--cells is '50.5'"),
        (["--effect", "0"], 2, "above 0"),
        (["--effect", "big"], 2, "--effect is 'big'"),
        (["--perturbations", "3"], 2, "3 perturbations cannot target 5 programs"),
        (["--penetrance", "1.5"], 2, "penetrance of 1.5"),
        (["--n-control", "3"], 2, "3 control cells"),
        (["--intervention", "knock"], 2, "no intervention 'knock'"),
        (["--programs", "50", "--perturbations", "50"], 2, "Lower --programs"),
        (["--plot", "power.txt"], 2, ".png"),
        (["--batch-key", "plate"], 3, "plate"),
    ],
)
def test_refusals(screen_file: Path, words: list[str], code: int, says: str) -> None:
    check_refusal(*invoke("power", screen_file, *words), code, says)


def test_options_of_screens_belong_to_screens(pilot: Run, tmp_path: Path) -> None:
    for source, word in ((pilot.folder, "a run"), ("linear-counts", "a scenario")):
        check_refusal(*invoke("power", source, "--effect", "1"), 2, "--effect", word)
    for source, code, says in (("toy", 2, "toy"), (tmp_path / "none.h5ad", 3, "none.h5ad")):
        check_refusal(*invoke("power", source), code, says)


def test_a_run_without_effect(tmp_path: Path) -> None:
    screen = crlseq.simulate(n_latents=3, n_genes=40, cells_per_perturbation=20, n_control=100, penetrance=(0.0, 0.0))
    crlseq.fit(screen, tmp_path / "RUN", method="linear", bootstrap=0, threads=1)
    check_refusal(*invoke("power", tmp_path / "RUN"), 3, "no perturbation with a detectable effect")


def test_controls_of_a_screen_are_its_control_cells(screen: ad.AnnData, screen_file: Path) -> None:
    controls = controls_of(screen_file, DataConfig(), 0)
    assert len(controls.x) == (screen.obs["perturbation"] == "control").sum()
    assert len(controls_of(screen_file, DataConfig(), 0, every_cell=True).x) == screen.n_obs
