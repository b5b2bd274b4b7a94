"""One row of a benchmark: a screen with its truth, a method fitted to it, and its scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from tempfile import NamedTemporaryFile
from typing import Any

import anndata as ad
import networkx as nx
import numpy as np
import pandas as pd
from scipy.sparse import issparse

from crlseq.data.simulate import CONTROL, simulate
from crlseq.errors import CrlseqError, UsageError
from crlseq.evaluation import recovery
from crlseq.experiments import peers
from crlseq.experiments.external import fit_external
from crlseq.experiments.gene_network import gene_network
from crlseq.experiments.scenarios import BASELINES, EXTERNAL, METHODS, SCENARIOS
from crlseq.pipeline.fit import fit

GENERATORS: dict[str, Callable[..., ad.AnnData]] = {
    "simulate": simulate, "toy": peers.toy, "squires": peers.squires, "buchholz": peers.buchholz, "varici": peers.varici,
    "cauca": peers.cauca, "heavy_tails": peers.heavy_tails, "gene_network": gene_network,
}  # fmt: skip
BLIND = ("sparse-vae",)
TOLD_TARGETS = ("cauca",)  # and their order


def scenario_screen(name: str, seed: int, **changes: Any) -> ad.AnnData:
    """A screen of a scenario, with its truth; `changes` replace options of the simulator."""
    wanted = {**SCENARIOS[name], **changes}
    kept, generator = wanted.pop("n_perturbations", None), GENERATORS[wanted.pop("generator", "simulate")]
    try:
        screen = generator(seed=seed, **wanted)
    except (TypeError, ValueError) as error:
        message = f"The scenario {name} cannot be simulated: {error}"
        raise UsageError(message, "Change the simulator's options.") from None
    if kept is None:
        return screen
    truth = screen.uns["truth"]
    truth["target"] = truth["target"].iloc[:kept]
    label = screen.obs["perturbation"].astype(str)
    return screen[label.isin([CONTROL, *truth["target"].index]).to_numpy()].copy()


def row_of(scenario: str, seed: int, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a method on a scenario: what is in `crlseq.experiments.benchmark.COLUMNS`, and ``supports``, a table."""
    screen = _same_screen(scenario, seed, tuple(settings["simulator"].items()))
    row: dict[str, Any] = {"scenario": scenario, "seed": seed, "method": method}
    if method in BASELINES:
        return row | _baseline(method, screen)
    started = time.perf_counter()
    try:
        scores = (
            fit_external(method, screen, seed) if method in EXTERNAL else _fitted(method, screen.copy(), seed, settings)
        )
    except CrlseqError as error:  # what users could see is a result too
        scores = {"error": str(error)}
    return row | {"seconds": round(time.perf_counter() - started, 2)} | scores


@lru_cache(maxsize=1)
def _same_screen(scenario: str, seed: int, changes: tuple[tuple[str, Any], ...]) -> ad.AnnData:
    """The screen that the methods before this one had; not to be changed."""
    return scenario_screen(scenario, seed, **dict(changes))


def _fitted(method: str, screen: ad.AnnData, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fit and score."""
    truth, true_latents = screen.uns["truth"], screen.obsm["true_latents"]
    told = settings["n_latents"] == "known" or method in ("paper", *BLIND)
    options: dict[str, Any] = {
        "perturbation_key": "perturbation", "control_label": CONTROL,
        "values": "counts" if issparse(screen.X) else "continuous",
        "n_latents": len(truth["adjacency"]) if told else None, "seed": seed, "threads": settings["threads"],
        **METHODS[method], **settings["options"], **settings["of_methods"].get(method, {}),
    }  # fmt: skip
    if method in BLIND:
        screen.obs["perturbation"] = np.random.default_rng(seed).permutation(screen.obs["perturbation"].to_numpy())
    started = time.perf_counter()
    with NamedTemporaryFile("w", suffix=".csv", encoding="utf-8") as table:
        if method in TOLD_TARGETS:
            table.write(known_targets(truth))
            table.flush()
            options["targets"] = table.name
        run = fit(screen, **options)
    seconds = time.perf_counter() - started
    latents = run.latents(screen)
    scores: dict[str, Any] = recovery.score_recovery(
        run.interventions, run.edges, truth, latents, true_latents, run.pairs
    )
    if method in BLIND:  # it claims no targets, and so no graph
        scores = {name: scores[name] for name in recovery.LATENT_SCORES}
    if "loaded" in truth:
        truth = {**truth, "loaded": pd.DataFrame(truth["loaded"], columns=screen.var_names)}
    scores |= recovery.gene_list_scores(run.programs, latents, true_latents, truth)
    if run.facts.bootstrap is not None:
        scores["supports"] = recovery.edge_supports(run.facts.bootstrap.edge, run.interventions, truth)
    return {
        **scores, "n_edges": len(run.edges), "n_latents": run.facts.n_latents,
        "verdict": None if method in BLIND else run.facts.identification.verdict, "seconds": round(seconds, 2),
    }  # fmt: skip


def known_targets(truth: Mapping[str, Any]) -> str:
    """The table of a screen's perturbations and their latents, as ``--targets`` reads it: upstream ones first, if there is an
    order.
    """
    graph = nx.from_numpy_array(np.asarray(truth["adjacency"]) != 0, create_using=nx.DiGraph)
    acyclic = nx.is_directed_acyclic_graph(graph)
    place = {latent: i for i, latent in enumerate(nx.lexicographical_topological_sort(graph) if acyclic else graph)}
    targets = truth["target"]["latent"].astype(int)
    rows = sorted(zip(targets.map(place), targets.index, targets, strict=True))
    return "\n".join(["perturbation,program", *(f"{name},u{latent}" for _, name, latent in rows), ""])


def _baseline(method: str, screen: ad.AnnData) -> dict[str, Any]:
    """Graph scores without looking at any cell."""
    true = np.asarray(screen.uns["truth"]["adjacency"]) != 0
    if method == "empty":
        return {**recovery.graph_scores(np.zeros_like(true), true), "n_edges": 0}
    return {**recovery.random_graph_scores(true), "n_edges": int(true.sum())}
