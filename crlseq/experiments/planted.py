"""Screens whose noise is real: control cells drawn with replacement, in which perturbations with a known effect are planted.

Cells that a perturbation misses stay as they were measured; in the others what the programs do is changed, and everything else
of the cell (counting noise, cycle, depth, batch) stays. Values are those of a fit: log-normalised for counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from crlseq.config import DataConfig, InterventionKind
from crlseq.data.dataset import read_data
from crlseq.data.matrix import open_screen
from crlseq.data.simulate import CONTROL
from crlseq.data.simulated_latents import System, draw_effects, draw_graph, solve
from crlseq.errors import InputError, UsageError
from crlseq.prediction.predict import control_cells
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR

EXPECTED_PARENTS, EDGE_SIZE = 1.0, (0.6, 1.4)  # as `crlseq simulate`
PLANNED, LABELS = "planned", (CONTROL, "planned-1", "planned-2")  # which `read_data` needs, and no control is told by


@dataclass(frozen=True)
class Controls:
    """Control cells (n, G) float32, their batches (n,) and the names of the genes (G,)."""

    x: np.ndarray
    batch: np.ndarray
    genes: tuple[str, ...]


@dataclass(frozen=True)
class Planted:
    """A screen and what is true of it. ``truth`` as `crlseq.evaluation.recovery.score_recovery` takes it, with the perturbations
    that have an effect alone; ``without`` are those that have none; ``graph_known``: whether the truth has edges to find.
    """

    screen: ad.AnnData
    truth: Mapping[str, Any]
    without: tuple[str, ...]
    graph_known: bool
    values: str = "continuous"
    batch_key: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is planted into control cells: so many perturbations with an effect, and as many without, on ``programs`` programs."""

    perturbations: int = 20
    programs: int = 5
    penetrance: float = 1.0
    intervention: InterventionKind = "hard"


def controls_of(source: str | Path, config: DataConfig, seed: int, every_cell: bool = False) -> Controls:
    """The control cells of a screen, as a fit would read them; with ``every_cell`` all cells of a file without perturbations.

    InputError as `crlseq.data.dataset.read_data`.
    """
    given: str | Path | ad.AnnData = source
    if every_cell:
        with open_screen(source, config.layer) as screen:
            obs = screen.obs.copy()
            obs[PLANNED] = np.array(LABELS, dtype=object)[np.arange(len(obs)) % len(LABELS)]
            given = ad.AnnData(screen.rows(np.arange(screen.n_cells)), obs, screen.var)
        asked = {"perturbation_key": PLANNED, "control_label": (CONTROL,), "separator": "", "layer": None}
        config = config.model_copy(update=asked)
    data = read_data(given, config, seed)
    own = np.flatnonzero(data.condition >= 0) if every_cell else np.flatnonzero(data.condition == 0)
    return Controls(data.dense(own), data.batch[own].astype(str), data.genes)


def controls_of_run(run: Run) -> Controls:
    """The control cells of a run's folder; InputError if its fit found no effect."""
    if run.facts.without_effect:
        what = f"{run.folder} has no perturbation with a detectable effect."
        raise InputError(what, "Give its screen in place of the run, and the effects to look for: --effect 0.25,0.5,1.")
    x, batch = control_cells(run)
    return Controls(x.toarray().astype(np.float32), batch, run.preprocessing.genes)


def plant(
    controls: Controls, plan: Plan, effect: float, n_cells: int, n_control: int, seed: tuple[int, ...], cell_seed: int
) -> Planted:
    """A screen with effects of one size on programs of the controls' own variation.

    With the whitened leading principal components s (n, p) of the controls, centred by batch, and a random rotation R, the
    noise of p programs is z = s R in place of normal draws. A graph A drawn as in `crlseq.data.simulate` makes the programs
    u = z (I - A)^-1, so that the controls are ``x = u W + rest`` with loadings ``W = (I - A) R' S V`` of the components' deviations
    S and axes V. A hit cell becomes ``x + (u' - u) W``, where u' solves the equations under its intervention, whose shift is
    ``effect`` standard deviations of its target's own noise. ``seed`` is that of graph and targets, ``cell_seed`` that of the cells.
    """
    rng = np.random.default_rng(seed)
    p, k = plan.programs, plan.perturbations
    noise, axes = _components(controls, p)
    rotation = np.linalg.qr(rng.standard_normal((p, p)))[0]
    adjacency, order = draw_graph(p, min(EXPECTED_PARENTS, (p - 1) / 2), EDGE_SIZE, rng)
    system = System(adjacency, order, np.zeros((0, p)))
    effects = draw_effects(p, k, plan.intervention, (effect, effect), (0.5, 0.5), rng)
    loadings = (np.eye(p) - adjacency) @ rotation.T @ axes

    def changed(which: int, rows: np.ndarray, _: np.random.Generator) -> np.ndarray:
        z = noise[rows] @ rotation
        own, kept = z.copy(), np.ones_like(z)
        target = effects.target[which]
        own[:, target] = z[:, target] * np.exp(effects.log_scale[which]) + effects.shift[which]
        kept[:, target] = effects.retention[which]
        difference = solve(system, own, kept, "linear") - solve(system, z, np.ones_like(z), "linear")
        return np.asarray(controls.x[rows] + difference @ loadings)

    with_effect, without = [f"with-{i}" for i in range(k)], tuple(f"without-{i}" for i in range(k))
    chance = np.repeat([plan.penetrance, 0.0], k)
    cells = np.random.default_rng((*seed, cell_seed))
    screen = _screen(controls, [*with_effect, *without], chance, n_cells, n_control, changed, cells)
    truth = {"adjacency": adjacency, "target": pd.DataFrame({"latent": effects.target}, index=with_effect)}
    return Planted(screen, truth, without, bool(adjacency.any()), batch_key=_batch_key(screen))


def plant_run(
    run: Run, controls: Controls, n_cells: int, n_control: int, seed: tuple[int, ...], cell_seed: int
) -> Planted:
    """A screen of a run's perturbations, with the effects and penetrances that it found; those without a detectable effect have
    none. Virtual cells as `crlseq.prediction.predict.predict` makes them.

    The graph is left open: these cells have the means of perturbed ones, and too little of how interventions change the
    covariance of programs, by which edges are told.
    """
    table, names = run.interventions, list(run.interventions["perturbation"].astype(str))
    has = ((table["fdr"] <= DETECTABLE_FDR) & table["program"].notna()).to_numpy()

    @torch.no_grad()
    def changed(which: int, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        x = torch.from_numpy(controls.x[rows])[None]
        eps = torch.from_numpy(rng.standard_normal((1, len(rows), run.facts.n_latents)).astype(np.float32))
        return np.asarray(run.model(x, torch.tensor([[which]]), eps).virtual[0].numpy())

    chance = np.where(has, run.model.penetrance.numpy(), 0.0)
    rng = np.random.default_rng((*seed, cell_seed))
    screen = _screen(controls, names, chance, n_cells, n_control, changed, rng)
    number = {name: i for i, name in enumerate(run.program_names)}
    latents = table.loc[has, "program"].map(number).to_numpy(dtype=int)
    targets = pd.DataFrame({"latent": latents}, index=[name for name, own in zip(names, has, strict=True) if own])
    without = tuple(name for name, own in zip(names, has, strict=True) if not own)
    truth = {"adjacency": np.zeros((len(number), len(number))), "target": targets}
    return Planted(screen, truth, without, False, batch_key=_batch_key(screen))


def _components(controls: Controls, p: int) -> tuple[np.ndarray, np.ndarray]:
    """Whitened scores (n, p) of the leading components, and their axes (p, G) times their deviations."""
    centred = controls.x.astype(np.float64)
    for batch in np.unique(controls.batch):
        own = controls.batch == batch
        centred[own] -= centred[own].mean(0)
    n = len(centred)
    if min(centred.shape) <= p:
        what = f"{p} programs cannot be told from {n} control cells and {centred.shape[1]} genes."
        raise UsageError(what, "Lower --programs.")
    value, vector = np.linalg.eigh(centred.T @ centred / n)
    deviation = np.sqrt(np.maximum(value[::-1][:p], 0))
    if deviation[-1] <= 1e-6 * deviation[0]:
        raise UsageError(f"The control cells vary in fewer than {p} directions.", "Lower --programs.")
    axes = vector[:, ::-1][:, :p]
    return centred @ axes / deviation, deviation[:, None] * axes.T


def _screen(
    controls: Controls,
    names: Sequence[str],
    chance: np.ndarray,
    n_cells: int,
    n_control: int,
    changed: Callable[[int, np.ndarray, np.random.Generator], np.ndarray],
    rng: np.random.Generator,
) -> ad.AnnData:
    """A screen of cells drawn with replacement; ``changed(k, rows, rng)`` are the values of hit cells, ``chance`` (K,) their share."""
    drawn = [rng.integers(len(controls.x), size=size) for size in (n_control, *[n_cells] * len(names))]
    x = controls.x[np.concatenate(drawn)]
    for which, rows in enumerate(drawn[1:]):
        hit = np.flatnonzero(rng.random(n_cells) < chance[which])
        if len(hit):
            x[n_control + which * n_cells + hit] = changed(which, rows[hit], rng)
    labels = np.repeat(np.array([CONTROL, *names], dtype=object), [len(rows) for rows in drawn])
    obs = pd.DataFrame({"perturbation": pd.Categorical(labels)}, index=[f"c{i}" for i in range(len(x))])
    if len(np.unique(controls.batch)) > 1:
        obs["batch"] = pd.Categorical(controls.batch[np.concatenate(drawn)])
    return ad.AnnData(x, obs, pd.DataFrame(index=pd.Index(controls.genes, dtype=object)))


def _batch_key(screen: ad.AnnData) -> str | None:
    return "batch" if "batch" in screen.obs else None
