"""Perturb-seq screens with a known truth: structural equations, interventions, mixing, counts.

`simulate` draws control and perturbed cells of the model that crlseq looks for, with what real screens add to it, and keeps
what made them, so that a fit can be scored. Equal arguments give equal cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from crlseq.config import InterventionKind
from crlseq.data.simulated_contexts import draw_worlds, latents_in_contexts, set_apart, truth_of
from crlseq.data.simulated_expression import (
    DISPERSION,
    LOG_RATE_SCALE,
    Mixing,
    Noise,
    background_loadings,
    counts,
    draw_background,
    draw_dispersions,
    mixed,
)
from crlseq.data.simulated_latents import (
    CAUSED,
    Effects,
    Equations,
    Floats,
    Rng,
    System,
    draw_effects,
    draw_graph,
    draw_hidden,
    draw_pairs,
    draw_penetrance,
    with_loop,
    with_second_targets,
)

CONTROL = "control"
GAUSSIAN_NOISE = 0.3  # measurement noise, in standard deviations of the signal
ALL_HIT = (1.0, 1.0)  # penetrance
SAME_NOISE = (1.0, 1.0)
# What has a generator of its own: an option draws from there and leaves the rest of the screen as it was.
STREAMS = ("cycle", "hidden", "second_targets", "hits", "background", "dispersion", "depth", "contexts")
Hits = list[tuple[NDArray[np.int64], NDArray[np.bool_]]]


def simulate(
    *,
    n_latents: int = 10,
    perturbations_per_latent: int = 4,
    n_genes: int = 500,
    cells_per_perturbation: int = 150,
    n_control: int = 2000,
    expected_parents: float = 1.0,
    edge_size: tuple[float, float] = (0.6, 1.4),
    equations: Equations = "linear",
    intervention: InterventionKind = "hard",
    shift_size: tuple[float, float] = (1.0, 3.0),
    retention: tuple[float, float] = (0.2, 0.6),
    penetrance: tuple[float, float] = ALL_HIT,
    guides: int = 1,
    second_targets: float = 0.0,
    hidden: int = 0,
    cycle: bool = False,
    mixing: Mixing = "linear",
    background: int = 0,
    cell_cycle: bool = False,
    noise: Noise = "counts",
    depth: float = 5000.0,
    depth_by_condition: float = 0.0,
    log_rate_scale: float = LOG_RATE_SCALE,
    genewise_dispersion: bool = False,
    n_doubles: int = 0,
    n_batches: int = 1,
    batch_scale: float = 0.0,
    contexts: int = 1,
    own_shifts: float = 0.0,
    own_edges: int = 0,
    context_noise: tuple[float, float] = SAME_NOISE,
    context_scale: float = 0.0,
    loading_density: float = 1.0,
    seed: int = 0,
) -> anndata.AnnData:
    """Simulate a Perturb-seq screen whose latent graph and intervention targets are known.

    Structural equations of latent ``k``, for a cell that the perturbations ``c`` in its label hit::

        u_k = g_k * (sum_j G[j, k] phi(u_j) + sum_h L[h, k] v_h) + exp(s_k) z_k + a_k,      z_k, v_h ~ N(0, 1)

    with ``phi`` the identity or ReLU, ``g_k`` the product of the retentions, ``s_k`` and ``a_k`` the sums of
    the log noise scales and shifts of those perturbations that target ``k`` (1, 0 and 0 where none does, and in cells that
    are not hit). ``hard``: retention 0, scale 0.7; ``soft``: retention in `retention`, scale 0.7; ``shift``: retention 1,
    scale 1. Shifts and edges have sizes in `shift_size` and `edge_size` and random signs; the causal order
    is a random permutation of the latents, and each pair is joined with the same probability. ``v`` are the hidden
    common causes, each with weights of size 0.7 to 1.2 on three latents.

    The signal is ``e = u W`` (linear) or ``e = LeakyReLU0.2(u W1 + b1) W2`` (network, ``4 n_latents`` hidden units),
    scaled to unit standard deviation. With ``loading_density`` < 1 each latent moves that share of the genes, drawn at
    random, and with the network mixing each has hidden units of its own, so that it moves no other gene. Background factors
    are added to the signal. Gaussian values
    are ``e + 0.3 N(0, 1)``; counts are negative binomial with mean ``d * softmax(b + r e)`` and variance
    ``mean + 0.2 mean^2``, ``b`` normal with standard deviation 1.2, ``d`` log-normal about ``depth``, ``r`` the `log_rate_scale`.

    What an option adds is drawn by a generator of its own, so that the same seed gives the same screen otherwise.

    Parameters
    ----------
    n_latents, n_genes
        Sizes ``p`` and ``G``.
    perturbations_per_latent
        Single perturbations ``g0 .. g{K-1}``, ``K = p * perturbations_per_latent``. The first ``p`` target each
        latent once; the targets of the others are drawn, so that this is an average.
    cells_per_perturbation, n_control
        Cells of every single or double perturbation, and control cells.
    expected_parents
        Edges per latent on average; at most ``(p - 1) / 2``, the complete DAG.
    edge_size, shift_size, retention
        Lowest and highest size of an edge and of a shift, the latter in standard deviations of the target's own noise, and
        lowest and highest retention of soft interventions.
    equations, intervention, mixing, noise
        The kinds described above.
    penetrance
        Lowest and highest share of a perturbation's cells that it hits; the others are as control cells, such as those
        with an in-frame repair. Shares are uniform between the two, and 0, 0 is a screen without any effect.
    guides
        Guides of each perturbation and of the controls; each cell of a perturbation has one of them. The penetrances of
        a perturbation's guides differ with a standard deviation of 0.15, within the bounds.
    second_targets
        Share of the perturbations that also shift a second latent, by 0.3 to 0.8 of their shift's size, with random sign.
    hidden
        Number of hidden common causes.
    cycle
        Whether one edge leads back from a latent to one of its ancestors. Its size is reduced until the spectral radius of
        ``|G|`` is at most 0.8; latents are the fixed point of the equations.
    background, cell_cycle
        Normal factors that nobody perturbs, and whether there are two more on a circle: ``sqrt(2) cos t, sqrt(2) sin t``,
        ``t`` uniform. Each moves 40 % of the genes, and each of these with as much variance as a latent has on average
        over the genes it moves and control cells.
    depth, depth_by_condition
        Median of the expected counts per cell, and the standard deviation between conditions of its logarithm.
    log_rate_scale
        Standard deviation of a log rate for one of the signal; like `depth` unused for Gaussian values.
    genewise_dispersion
        Whether dispersions are drawn by gene, from a gamma distribution with mean 0.2 and shape 2, within 0.02 and 1.
    n_doubles
        Combinations of two perturbations, drawn without repetition, named ``gA+gB``; each hits for itself.
    n_batches, batch_scale
        Cells fall into batches at random; ``batch_scale`` is the standard deviation of the batches' effects on
        genes, in units of the signal's.
    contexts, own_shifts, own_edges, context_noise, context_scale
        Cells fall into contexts at random. In each further one that share of the perturbations shifts its latent by none,
        half or the opposite of its shift in the first, so many more edges join latents, the latents' own noise has
        standard deviations in that range, and genes lie apart by the last, as between batches.
    loading_density
        Share of the genes that a latent moves, in (0, 1].
    seed
        Seed of all random numbers.

    Returns
    -------
    anndata.AnnData
        Cells x genes: ``X`` CSR float32 counts or dense float32 values; ``obs["perturbation"]`` (categorical,
        ``control`` among them), ``obs["batch"]``, ``obs["context"]`` and ``obs["guide"]`` if there are several, ``obs["hit"]`` (bool, whether
        any perturbation of the label hit the cell) if not all cells are hit; ``obsm["true_latents"]`` (cells, p) and
        ``obsm["true_background"]`` (cells, factors);
        ``uns["truth"]`` with ``adjacency`` (p, p) and ``target``, a table of the single perturbations with ``latent``,
        ``shift``, ``retention``, ``penetrance`` (share of its cells that are hit), ``second_latent`` (-1: none) and
        ``second_shift``; where they were asked for ``loaded`` (p, n_genes) bool, ``hidden`` (hidden causes, p) the weights,
        ``background`` (factors, n_genes) the loadings, ``dispersion`` (n_genes,), ``log_depth``, a table of
        the conditions, ``adjacency_by_context`` (contexts, p, p) and ``shift_by_context``, a table of the single
        perturbations; ``orientation`` and ``note``.

    Raises
    ------
    ValueError
        If a size is not positive, a kind is unknown, more edges than the complete DAG or more doubles than
        pairs are asked for, a number is negative or not finite, or a range or an option does not fit.

    Examples
    --------
    >>> import crlseq
    >>> adata = crlseq.simulate(n_latents=3, n_genes=50, cells_per_perturbation=20, n_control=60, seed=1)
    >>> adata.shape, adata.obs["perturbation"].nunique()
    ((300, 50), 13)
    >>> adata.uns["truth"]["adjacency"].shape, adata.obsm["true_latents"].shape
    ((3, 3), (300, 3))
    """
    given = dict(locals())
    _refuse_impossible(given)
    rng = np.random.default_rng(seed)
    own = dict(zip(STREAMS, map(np.random.default_rng, np.random.SeedSequence(seed).spawn(len(STREAMS))), strict=True))
    system, effects = _draw_system(given, rng, own)
    n_single = len(effects.target)
    conditions: list[tuple[int, ...]] = [(), *((i,) for i in range(n_single)), *draw_pairs(n_single, n_doubles, rng)]
    sizes = [n_control] + [cells_per_perturbation] * (len(conditions) - 1)
    hits = _draw_hits(conditions, sizes, draw_penetrance(n_single, guides, penetrance, own["hits"]), own["hits"])
    worlds = draw_worlds(system, effects, given, own["contexts"])
    context = own["contexts"].integers(contexts, size=sum(sizes))
    latents = latents_in_contexts(worlds, conditions, hits, context, equations, (rng, own["hidden"]))
    signal, factors, loadings = _draw_signal(latents, given, rng, own["background"])
    obs = _columns(conditions, hits, given)
    if n_batches > 1:
        batch = rng.integers(n_batches, size=len(latents))
        signal += (batch_scale * rng.standard_normal((n_batches, n_genes)))[batch]
        obs["batch"] = pd.Categorical([f"b{i}" for i in batch], categories=[f"b{i}" for i in range(n_batches)])
    obs |= set_apart(signal, context, given, own["contexts"])
    values, made = _measured(signal, conditions, sizes, given, rng, own)
    truth = _truth(system, effects, hits) | loadings | made | truth_of(worlds) | {"note": _note(given)}
    cells, genes = pd.DataFrame(obs, index=_names("c", len(latents))), pd.DataFrame(index=_names("gene", n_genes))
    return anndata.AnnData(values, cells, genes, uns={"truth": truth}, obsm={"true_latents": latents} | factors)


def _names(kind: str, n: int) -> pd.Index:
    return pd.Index([f"{kind}{i}" for i in range(n)], dtype=object)


def _parts(members: Sequence[int]) -> list[str]:
    """The names in a condition's label."""
    return [f"g{i}" for i in members] or [CONTROL]


def _label(members: Sequence[int]) -> str:
    return "+".join(_parts(members))


def _draw_system(given: Mapping[str, Any], rng: Rng, own: Mapping[str, Rng]) -> tuple[System, Effects]:
    """Structural equations and the effects of single perturbations, of the arguments of `simulate`."""
    p, sizes = given["n_latents"], given["edge_size"]
    adjacency, order = draw_graph(p, given["expected_parents"], sizes, rng)
    if given["cycle"]:
        adjacency = with_loop(adjacency, order, sizes, own["cycle"])
    n_single = p * given["perturbations_per_latent"]
    effects = draw_effects(p, n_single, given["intervention"], given["shift_size"], given["retention"], rng)
    if given["second_targets"]:
        effects = with_second_targets(effects, p, given["second_targets"], own["second_targets"])
    return System(adjacency, order, draw_hidden(given["hidden"], p, own["hidden"])), effects


def _draw_hits(conditions: Sequence[Sequence[int]], sizes: Sequence[int], penetrance: Floats, rng: Rng) -> Hits:
    """For each condition the guides of its cells (n, m), one for each part of its label, and by which of its perturbations
    they are hit (n, m); ``penetrance`` (K, guides).
    """
    hits = []
    for members, n in zip(conditions, sizes, strict=True):
        guide = rng.integers(penetrance.shape[1], size=(n, len(_parts(members))))
        share = penetrance[list(members), guide] if members else np.zeros((n, 0))
        hits.append((guide, rng.random(share.shape) < share))
    return hits


def _columns(conditions: Sequence[Sequence[int]], hits: Hits, given: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of obs: the condition of each cell, its guides where there are several, whether it is hit where not all are."""
    names = np.array([_label(members) for members in conditions], dtype=object)
    columns: dict[str, Any] = {"perturbation": pd.Categorical(np.repeat(names, [len(hit) for _, hit in hits]))}
    if given["guides"] > 1:
        columns["guide"] = pd.Categorical([
            "|".join(f"{part}_{which}" for part, which in zip(_parts(members), row, strict=True))
            for members, (guide, _) in zip(conditions, hits, strict=True)
            for row in guide
        ])  # fmt: skip
    if tuple(given["penetrance"]) != ALL_HIT:
        columns["hit"] = np.concatenate([hit.any(1) for _, hit in hits])
    return columns


def _truth(system: System, effects: Effects, hits: Hits) -> dict[str, Any]:
    """What made the latents, as ``uns["truth"]`` has it."""
    n_single = len(effects.target)
    target = pd.DataFrame(
        {
            "latent": effects.target, "shift": effects.shift, "retention": effects.retention,
            "penetrance": [hit.mean() for _, hit in hits[1 : n_single + 1]],
            "second_latent": effects.second_latent, "second_shift": effects.second_shift,
        },
        index=_names("g", n_single),
    )  # fmt: skip
    about = "adjacency[i, j] != 0 means latent i -> latent j"
    truth = {"adjacency": system.adjacency, "target": target, "orientation": about}
    return truth | ({"hidden": system.hidden} if len(system.hidden) else {})


def _draw_signal(
    latents: Floats, given: Mapping[str, Any], rng: Rng, background_rng: Rng
) -> tuple[Floats, dict[str, Floats], dict[str, Any]]:
    """Signal (n, n_genes) of latents and background; the factors of the background, and the loadings, where there are any."""
    p, n_genes, density = given["n_latents"], given["n_genes"], given["loading_density"]
    loadings: dict[str, Any] = {"loaded": rng.random((p, n_genes)) < density} if density < 1 else {}
    signal = mixed(latents, n_genes, given["mixing"], loadings.get("loaded"), rng)
    signal /= signal.std() or 1.0
    if not (given["background"] or given["cell_cycle"]):
        return signal, {}, loadings
    factors = draw_background(len(latents), given["background"], given["cell_cycle"], background_rng)
    strength = np.sqrt(signal[: given["n_control"]].var(0).mean() / (p * density))
    loadings["background"] = background_loadings(factors.shape[1], n_genes, strength, background_rng)
    return signal + factors @ loadings["background"], {"true_background": factors}, loadings


def _measured(
    signal: Floats,
    conditions: Sequence[Sequence[int]],
    sizes: Sequence[int],
    given: Mapping[str, Any],
    rng: Rng,
    own: Mapping[str, Rng],
) -> tuple[Any, dict[str, Any]]:
    """Values of a signal (n, n_genes), and what the truth says about them."""
    if given["noise"] == "gaussian":
        return (signal + GAUSSIAN_NOISE * rng.standard_normal(signal.shape)).astype(np.float32), {}
    made: dict[str, Any] = {}
    dispersion, log_depth = np.full(signal.shape[1], DISPERSION), np.zeros(len(conditions))
    if given["genewise_dispersion"]:
        made["dispersion"] = dispersion = draw_dispersions(len(dispersion), own["dispersion"])
    if given["depth_by_condition"]:
        log_depth = given["depth_by_condition"] * own["depth"].standard_normal(len(conditions))
        made["log_depth"] = pd.DataFrame({"log_depth": log_depth}, index=[_label(members) for members in conditions])
    depth = given["depth"] * np.exp(np.repeat(log_depth, sizes))
    return counts(given["log_rate_scale"] * signal, depth, dispersion, rng), made


def _note(given: Mapping[str, Any]) -> str:
    return (
        f"{given['equations']} structural equations, {given['intervention']} interventions, {given['mixing']} mixing of "
        f"{given['n_latents']} latents into {given['n_genes']} genes, {given['noise']} noise, seed {given['seed']}"
    )


def _refuse_impossible(given: Mapping[str, Any]) -> None:
    """The arguments of `simulate`, by name."""
    _refuse_numbers(given)
    _refuse_ranges(given)
    kinds = {"equations": Equations, "intervention": InterventionKind, "mixing": Mixing, "noise": Noise}
    for name, kind in kinds.items():
        if given[name] not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {given[name]!r}.")
    p, n_single = given["n_latents"], given["n_latents"] * given["perturbations_per_latent"]
    if given["expected_parents"] > (p - 1) / 2:
        raise ValueError(
            f"expected_parents = {given['expected_parents']:g} asks for more edges than a DAG of {p} latents can have"
            f" (at most {(p - 1) / 2:g} per latent)."
        )
    if given["n_doubles"] > n_single * (n_single - 1) // 2:
        raise ValueError(f"n_doubles = {given['n_doubles']} exceeds the number of pairs of {n_single} perturbations.")
    for name, needed in {"cycle": 2, "second_targets": 2, "hidden": CAUSED}.items():
        if given[name] and p < needed:
            raise ValueError(f"{name} needs at least {needed} latents, not {p}.")
    for name in ("own_shifts", "own_edges", "context_scale"):
        if given[name] and given["contexts"] < 2:
            raise ValueError(f"{name} needs at least two contexts.")
    for name in ("depth_by_condition", "genewise_dispersion"):
        if given[name] and given["noise"] != "counts":
            raise ValueError(f"{name} needs counts, not {given['noise']} noise.")


def _refuse_numbers(given: Mapping[str, Any]) -> None:
    positive = ("n_latents", "perturbations_per_latent", "n_genes", "cells_per_perturbation", "n_control", "n_batches")
    for name in (*positive, "guides", "contexts"):
        if given[name] < 1 or given[name] != int(given[name]):
            raise ValueError(f"{name} must be a whole number of at least 1, not {given[name]}.")
    whole = ("n_doubles", "background", "hidden", "seed", "own_edges")
    free = ("expected_parents", "second_targets", "batch_scale", "depth_by_condition", "own_shifts", "context_scale")
    for name in (*whole, *free):
        if not (np.isfinite(given[name]) and given[name] >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, not {given[name]}.")
        if name in whole and given[name] != int(given[name]):
            raise ValueError(f"{name} must be a whole number, not {given[name]}.")
    for name in ("depth", "log_rate_scale"):
        if not (np.isfinite(given[name]) and given[name] > 0):
            raise ValueError(f"{name} must be a positive number, not {given[name]}.")
    if not 0 < given["loading_density"] <= 1:
        raise ValueError(f"loading_density must be above 0 and at most 1, not {given['loading_density']}.")
    for name in ("second_targets", "own_shifts"):
        if given[name] > 1:
            raise ValueError(f"{name} is a share of the perturbations, not {given[name]:g}.")


def _refuse_ranges(given: Mapping[str, Any]) -> None:
    for name, top in {
        "edge_size": np.inf,
        "shift_size": np.inf,
        "retention": 1.0,
        "penetrance": 1.0,
        "context_noise": np.inf,
    }.items():
        bounds = tuple(given[name])
        if len(bounds) != 2 or not np.isfinite(bounds).all() or not 0 <= bounds[0] <= bounds[1] <= top:
            least = "0 <= LOW <= HIGH" + (f" <= {top:g}" if top < np.inf else "")
            raise ValueError(f"{name} must be two numbers with {least}, not {','.join(f'{x:g}' for x in bounds)}.")
    if given["edge_size"][0] == 0:
        raise ValueError("edge_size must be above 0. Without edges expected_parents is 0.")
