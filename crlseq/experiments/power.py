"""How many cells does a screen need? Screens with known effects, from few cells to many, tested and fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.sparse import issparse
from scipy.stats import norm

from crlseq.config import Config, DataConfig, make_config
from crlseq.data.dataset import read_data
from crlseq.data.projection import principal_components
from crlseq.data.simulate import CONTROL
from crlseq.discovery.effects import effect_tests
from crlseq.errors import InputError, UsageError, suggestion
from crlseq.evaluation.recovery import score_recovery
from crlseq.experiments.fits import scenario_screen
from crlseq.experiments.planted import Plan, Planted, controls_of, controls_of_run, plant, plant_run
from crlseq.experiments.scenarios import SCENARIOS
from crlseq.model.interventions import INTERVENTIONS
from crlseq.pipeline.fit import N_COMPONENTS, fit
from crlseq.plotting.power import by_effect
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR
from crlseq.threads import on_threads

CELLS, EFFECTS, REPEATS = (25, 50, 100, 200, 400), (0.25, 0.5, 1.0), 3
FEWEST = 10  # cells of a perturbation that is tested, as `min_cells` of a fit
WANTED = 0.9  # the share that a sentence asks for
WITH_POWER = 0.8  # of `detectable` in pairs.csv
# What a share is of, and how it is said.
SHARES = {"detected": "detected", "targets": "assigned to the right program", "edges": "edges found"}
COLUMNS = ["effect", "cells", "screens", *(part for name in (*SHARES, "false") for part in (name, f"{name}_se"))]
Make = Callable[[int, int], Planted]  # of cells a perturbation and the number of the repeat


@dataclass(frozen=True)
class Power:
    """What was found. ``table`` has a row per effect and number of cells: `COLUMNS`; ``title`` says of what."""

    table: pd.DataFrame
    title: str
    sentences: tuple[str, ...]


def power(
    source: str | Path | Run,
    *,
    cells: Sequence[int] = CELLS,
    effects: Sequence[float] = EFFECTS,
    plan: Plan | None = None,
    repeats: int = REPEATS,
    detection_only: bool = False,
    n_control: int | None = None,
    data: DataConfig | None = None,
    every_cell: bool = False,
    seed: int = 0,
    threads: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Power:
    """Shares of perturbations detected, of targets right and of edges found, by cells a perturbation.

    Parameters
    ----------
    source
        A screen (its control cells and `plan` make the simulated ones: `crlseq.experiments.planted.plant`), a run (its own
        effects: `crlseq.experiments.planted.plant_run`), or the name of a scenario of `crlseq benchmark`.
    cells
        Cells a perturbation, each at least 10.
    effects
        Sizes of shifts in standard deviations of the target's own noise; of a screen alone.
    repeats
        Simulated screens of each size and effect. The graph and the targets differ between them and not between sizes.
    detection_only
        Test the perturbations, and fit nothing: targets and edges are NaN.
    n_control
        Control cells of a simulated screen; by default as many as there are. Not of a scenario, which has its own.
    data, every_cell
        How a screen is read, and whether all of its cells are controls.

    Returns
    -------
    A table with ``effect`` (NaN: the run's or scenario's own), ``cells``, ``screens``, shares and their standard errors
    (see `share`): ``detected`` of the perturbations that have an effect (FDR 5 %), ``targets`` of them assigned to the right
    program, ``edges`` of the true ones declared (of a run: see `pairs_seen`), ``false``: the perturbations without effect that
    were called. NaN where there is nothing to find.

    Raises
    ------
    UsageError
        For numbers that are out of range.
    InputError
        If the source cannot be read, or a run has no effect.
    """
    _refuse_wrong(cells, effects, repeats, n_control, plan or Plan())
    of, title = _makers(source, effects, plan or Plan(), n_control, data or DataConfig(), every_cell, seed)
    rows = []
    for effect, make in of:
        for n in sorted(set(cells)):
            counts = np.zeros((len(SHARES) + 1, 2), dtype=np.int64)
            for repeat in range(repeats):
                counts += _judged(make(n, repeat), seed + repeat, threads, detection_only)
            shares = [share(*pair) for pair in counts.tolist()]
            if isinstance(source, Run) and not detection_only:
                shares[2] = pairs_seen(source, n)
            rows.append([effect, n, repeats, *(value for pair in shares for value in pair)])
            size = "" if np.isnan(effect) else f"effect {effect:g}, "
            note(f"{size}{n} cells: {counts[0, 0]} of {counts[0, 1]} effects detected")
    table = pd.DataFrame(rows, columns=COLUMNS)
    return Power(table, title, tuple(in_sentences(table, detection_only, isinstance(source, Run))))


def share(part: int, whole: int) -> tuple[float, float]:
    """A share and its binomial standard error, by the shrunken share of Agresti and Coull (1998), which is never without error:
    sqrt(q (1 - q) / (n + 4)), q = (k + 2) / (n + 4). NaN of nothing.
    """
    if not whole:
        return float("nan"), float("nan")
    q = (part + 2) / (whole + 4)
    return part / whole, float(np.sqrt(q * (1 - q) / (whole + 4)))


def pairs_seen(run: Run, n_cells: int) -> tuple[float, float]:
    """Share of the pairs of programs that a run calls upstream which so many cells a perturbation would show, and its standard
    error. NaN where it calls none.

    With n cells in place of the n_0 of the target's perturbations, a change of z standard errors is seen beyond t of them with
    probability Phi((|z| r - t) / sqrt(1 + r^2)), r^2 = n / n_0: the run's error of the change counts as well as the new one.
    """
    pairs = None if run.pairs is None else run.pairs[run.pairs["status"] == "upstream"]
    if pairs is None or not len(pairs):
        return float("nan"), float("nan")
    cells = {row.name: sum(row.cells.values()) for row in run.facts.conditions}
    own = run.interventions["perturbation"].map(cells).groupby(run.interventions["program"]).mean()
    r = np.sqrt(n_cells / own[pairs["target"]].to_numpy())
    beyond = pairs["detectable"].to_numpy() / pairs["se"].to_numpy() - norm.ppf(WITH_POWER)
    seen = norm.cdf((pairs["z"].abs().to_numpy() * r - beyond) / np.sqrt(1 + r**2))
    return float(seen.mean()), float(np.sqrt((seen * (1 - seen)).sum()) / len(seen))


def in_sentences(table: pd.DataFrame, detection_only: bool = False, of_run: bool = False) -> list[str]:
    """What the table says, of a run or of planted effects: for each the fewest cells from which on 90 % are found, in all
    tried numbers.
    """
    found = []
    for effect, rows in by_effect(table):
        of = f"effects of {effect:g} SD" if effect else "the effects of this screen"
        for name in ("detected",) if detection_only else SHARES:
            known = rows.dropna(subset=[name])
            if len(known):
                found.append(_sentence(known, name, of, of_run))
    found += _falling(table)
    if not detection_only and table["edges"].isna().all():
        why = "this run calls no program upstream of another" if of_run else "no simulated screen has one"
        found.append(f"Edges could not be judged: {why}.")
    if table["false"].notna().any():
        found.append(f"{100 * table['false'].mean():.1f} % of the perturbations without effect were called detected.")
    return found


def _falling(table: pd.DataFrame) -> list[str]:
    """What is to be said where with more cells fewer edges are found, beyond two errors of the difference."""
    for _, rows in by_effect(table.dropna(subset=["edges"])):
        best, last = rows.sort_values("edges", kind="stable").iloc[-1], rows.iloc[-1]
        if best["edges"] - last["edges"] > 2 * np.hypot(best["edges_se"], last["edges_se"]):
            return [
                f"With {last['cells']:.0f} cells fewer edges are found than with {best['cells']:.0f}: more cells show more clearly"
                " where noise like theirs does not fit linear equations, and a fit then claims fewer edges."
            ]
    return []


def _sentence(rows: pd.DataFrame, name: str, of: str, of_run: bool) -> str:
    """The one about a share; ``rows`` are of one effect, by ascending numbers of cells."""
    enough = (rows[name] >= WANTED).to_numpy()[::-1].cumprod()[::-1].astype(bool)  # and all larger numbers
    row = rows.iloc[int(enough.argmax())] if enough.any() else rows.iloc[-1]
    told = f"{100 * row[name]:.0f} ± {100 * row[f'{name}_se']:.0f} %"
    what = {
        "detected": f"detect {told} of {of}",
        "targets": f"assign {told} of {of} to the right program",
        "edges": f"show {told} of the pairs of programs that this run calls upstream"
        if of_run
        else f"find {told} of the edges, with {of}",
    }[name]
    n = f"{row['cells']:.0f} cells a perturbation"
    return f"{n} {what}." if enough.any() else f"{n}, the most tried, {what}: below {100 * WANTED:.0f} %."


def _refuse_wrong(
    cells: Sequence[int], effects: Sequence[float], repeats: int, n_control: int | None, plan: Plan
) -> None:
    if not cells or min(cells) < FEWEST:
        raise UsageError(
            f"Perturbations of {min(cells, default=0)} cells are not tested.", f"Give {FEWEST} cells or more."
        )
    if not effects or not all(np.isfinite(effect) and effect > 0 for effect in effects):
        raise UsageError("Effects must be above 0.", "As many perturbations without effect are simulated in any case.")
    if n_control is not None and n_control < 2 * FEWEST:
        raise UsageError(f"{n_control} control cells are too few.", f"Give {2 * FEWEST} or more.")
    if min(repeats, plan.perturbations, plan.programs) < 1 or plan.perturbations < plan.programs:
        raise UsageError(
            f"{plan.perturbations} perturbations cannot target {plan.programs} programs.",
            "Give at least one repeat, one program, and one perturbation a program.",
        )
    if not 0 < plan.penetrance <= 1:
        raise UsageError(f"A penetrance of {plan.penetrance:g} is no share of cells.", "Give one above 0 and up to 1.")
    if plan.intervention not in INTERVENTIONS:
        raise UsageError(
            f"There is no intervention {plan.intervention!r}.",
            suggestion(plan.intervention, INTERVENTIONS, "There are"),
        )


def _makers(
    source: str | Path | Run, effects: Sequence[float], plan: Plan, n_control: int | None, data: DataConfig,
    every_cell: bool, seed: int,
) -> tuple[list[tuple[float, Make]], str]:  # fmt: skip
    """What makes the screens of each effect, and what they are of."""
    if isinstance(source, Run):
        controls = controls_of_run(source)
        size = n_control or len(controls.x)
        return [(float("nan"), lambda n, i: plant_run(source, controls, n, size, (seed, 21, i), n))], source.folder.name
    if str(source) in SCENARIOS:
        name = str(source)
        if "generator" in SCENARIOS[name]:
            raise UsageError(f"The cells of {name} have no number that can be chosen.", _simulated())
        return [(float("nan"), lambda n, i: _of_scenario(name, n, seed + i))], name
    if not Path(source).exists():
        raise InputError(
            f"{source} is no file, run or scenario.", suggestion(str(source), [*SCENARIOS], "Scenarios are")
        )
    controls = controls_of(source, data, seed, every_cell)
    size = n_control or len(controls.x)

    def of(effect: float) -> Make:
        return lambda n, i: plant(controls, plan, effect, n, size, (seed, 21, i), n)

    return [(float(effect), of(effect)) for effect in dict.fromkeys(effects)], Path(source).name


def _simulated() -> str:
    return "Choose one of " + ", ".join(name for name, own in SCENARIOS.items() if "generator" not in own) + "."


def _of_scenario(name: str, n_cells: int, seed: int) -> Planted:
    """A scenario with so many cells a perturbation; those that hit no cell have no effect."""
    screen = scenario_screen(name, seed, cells_per_perturbation=n_cells)
    truth, target = screen.uns["truth"], screen.uns["truth"]["target"]
    has = target["penetrance"] > 0
    values = "counts" if issparse(screen.X) else "continuous"
    known = bool(has.any() and np.any(truth["adjacency"]))
    return Planted(screen, {**truth, "target": target[has]}, tuple(target.index[~has]), known, values)


def _judged(made: Planted, seed: int, threads: int | None, detection_only: bool) -> np.ndarray:
    """(4, 2) numbers found and there: effects, targets, edges, and perturbations without effect that were called."""
    config = make_config(
        None, None, method="linear", bootstrap=0, perturbation_key="perturbation", control_label=CONTROL, separator="",
        values=made.values, n_top_genes="all", batch_key=made.batch_key, min_cells=FEWEST, seed=seed, threads=threads,
    )  # fmt: skip
    counts = np.zeros((len(SHARES) + 1, 2), dtype=np.int64)
    names = made.truth["target"].index
    if detection_only:
        fdr = _tested(made, config)
    else:
        run = fit(made.screen, config=config)
        fdr = run.interventions.set_index("perturbation")["fdr"]
        if len(names):
            scores = score_recovery(run.interventions, run.edges, made.truth)
            counts[1] = round(scores["target_accuracy"] * len(names)), len(names)
            counts[2] = (scores["edges_right"], scores["edges_true"]) if made.graph_known else (0, 0)
    called = fdr <= DETECTABLE_FDR
    counts[0] = called.reindex(names, fill_value=False).sum(), len(names)
    counts[3] = called.reindex(list(made.without), fill_value=False).sum(), len(made.without)
    return counts


def _tested(made: Planted, config: Config) -> pd.Series:
    """The false discovery rate of each perturbation, as a fit tests them."""
    seed = config.training.seed
    with on_threads(config.training.threads or torch.get_num_threads()):
        data = read_data(made.screen, config.data, seed)
        scores = principal_components(data, N_COMPONENTS, seed).adjusted
        return pd.Series(effect_tests(data, scores, seed)["fdr"], index=list(data.perturbation_names))
