"""Recovery of a known truth over scenarios, seeds and methods, beside the empty and the random graph.

Every finished fit is one row of ``benchmark.csv``, written at once: a benchmark that was cut off goes on where it stopped.
What a row means is in ``settings.json``; other settings need another folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.sparse import issparse

from crlseq._version import __version__
from crlseq.data.simulate import CONTROL, simulate
from crlseq.errors import CrlseqError, InputError, UsageError, suggestion
from crlseq.evaluation import recovery
from crlseq.evaluation.recovery import calibration, edge_supports
from crlseq.experiments import peers
from crlseq.experiments.gene_network import gene_network
from crlseq.experiments.scenarios import METHODS, SCENARIOS
from crlseq.pipeline.fit import fit
from crlseq.storage.csv import EXACT, to_csv
from crlseq.storage.files import written_whole
from crlseq.storage.runfolder import locked

GENERATORS: dict[str, Callable[..., ad.AnnData]] = {
    "simulate": simulate, "toy": peers.toy, "squires": peers.squires, "buchholz": peers.buchholz, "varici": peers.varici,
    "cauca": peers.cauca, "heavy_tails": peers.heavy_tails, "gene_network": gene_network,
}  # fmt: skip
BLIND = ("sparse-vae",)
BASELINES = ("random", "empty")

SCORES = (
    *("target_accuracy", "ari", *recovery.LATENT_SCORES, "ancestor_f1", "ancestor_precision", "ancestor_recall"),
    *("shd", "edge_f1", "edge_precision", "edge_recall"),
    *(*recovery.PAIR_SCORES, "penetrance_error"),
    *("list_precision", "list_recall", "program_length"),
)
COUNTS = (*recovery.EDGE_COUNTS, *recovery.PAIR_COUNTS)
COLUMNS = ("scenario", "seed", "method", *SCORES, *COUNTS, "n_edges", "n_latents", "verdict", "seconds", "error")
SHOWN = {"ancestor_f1": "Ancestor F1", "target_accuracy": "Target accuracy", "shd": "SHD", "mcc": "MCC"}
MARKS = {  # Okabe and Ito's colours, which colour-blind readers tell apart, and a shape each
    "default": ("#0072B2", "o"), "sparse": ("#CC79A7", "P"), "linear": ("#009E73", "D"), "paper": ("#D55E00", "s"),
    "sparse-vae": ("#E69F00", "X"), "random": ("#777777", "^"), "empty": ("#333333", "v"),
}  # fmt: skip


def benchmark(
    folder: str | Path,
    *,
    scenarios: Sequence[str] = tuple(SCENARIOS),
    seeds: Sequence[int] = tuple(range(8)),
    methods: Sequence[str] = tuple(METHODS),
    n_latents: str = "known",
    threads: int | None = None,
    simulator: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Simulate, fit and score; write ``benchmark.csv``, ``summary.csv``, ``calibration.csv``, ``benchmark.png`` and ``.svg``.

    Parameters
    ----------
    folder
        Where the results go. Rows there are kept and not computed again.
    seeds
        Each is the seed of a simulation and of the fits of it.
    n_latents
        ``known``: fits are given the true number; ``auto``: they choose it, except ``paper``, which cannot.
    simulator, options
        Options of the simulator and of `crlseq.fit` that replace those of every scenario and method.
    note
        Called with a line about each row.

    Returns
    -------
    The summary of everything in the folder: see `summarise`.

    Raises
    ------
    UsageError
        For an unknown name, no seed, or an option that the simulator refuses.
    InputError
        If the folder holds something else, was filled with other settings, is in use or cannot be written.
    """
    for what, names, known in (("scenario", scenarios, SCENARIOS), ("method", methods, METHODS)):
        for name in names:
            if name not in known:
                raise UsageError(f"There is no {what} {name!r}.", suggestion(name, known, "There are"))
        if not names:
            raise UsageError(f"No {what} was given.", f"There are {', '.join(known)}.")
    if n_latents not in ("known", "auto"):
        raise UsageError(f"n_latents is {n_latents!r} instead of known or auto.", "Give one of them.")
    if not seeds or min(seeds) < 0:
        raise UsageError("Seeds must be whole numbers of at least 0, and at least one.", "Give seeds such as 0-7.")
    settings: dict[str, Any] = {
        "version": __version__, "n_latents": n_latents, "threads": threads,
        "simulator": dict(simulator or {}), "options": dict(options or {}),
    }  # fmt: skip
    with _open_folder(Path(folder), settings) as place:
        rows = _read_rows(place / "benchmark.csv")
        done = {(row["scenario"], row["seed"], row["method"]) for row in rows}
        for scenario in dict.fromkeys(scenarios):
            for seed in dict.fromkeys(map(int, seeds)):
                missing = [name for name in (*BASELINES, *methods) if (scenario, seed, name) not in done]
                screen = scenario_screen(scenario, seed, **settings["simulator"]) if missing else None
                for method in dict.fromkeys(missing):
                    row: dict[str, Any] = {"scenario": scenario, "seed": seed, "method": method}
                    row |= _baseline(method, screen) if method in BASELINES else _fitted(row, screen, settings)
                    if "supports" in row:  # before the row, which says that all of the fit is there
                        _write_table(place / "supports" / f"{scenario}_{seed}_{method}.csv", row.pop("supports"))
                    rows.append(row)
                    _write_table(place / "benchmark.csv", _table(rows))
                    if method not in BASELINES:
                        note(_in_words(row))
        table = _table(rows)
        summary = summarise(table)
        _write_table(place / "summary.csv", summary)
        supports = [pd.read_csv(path.absolute()) for path in sorted((place / "supports").glob("*.csv"))]
        if supports:
            _write_table(place / "calibration.csv", calibration(pd.concat(supports)))
        figure = draw(table)
        for kind in ("png", "svg"):
            with written_whole(place / f"benchmark.{kind}") as beside:
                figure.savefig(beside, format=kind, dpi=150)
    return summary


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


def _fitted(row: Mapping[str, Any], screen: ad.AnnData, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fit and score; an error that users could see is a result too."""
    seed, method = row["seed"], row["method"]
    truth = screen.uns["truth"]
    told = settings["n_latents"] == "known" or method in ("paper", *BLIND)
    options: dict[str, Any] = {
        "perturbation_key": "perturbation", "control_label": CONTROL, "values": "counts" if issparse(screen.X) else "continuous",
        "n_latents": len(truth["adjacency"]) if told else None, "seed": seed, "threads": settings["threads"],
        **METHODS[method], **settings["options"],
    }  # fmt: skip
    if method in BLIND:
        screen = screen.copy()
        screen.obs["perturbation"] = np.random.default_rng(seed).permutation(screen.obs["perturbation"].to_numpy())
    started = time.perf_counter()
    try:
        run = fit(screen, **options)
        seconds = time.perf_counter() - started
        latents = run.latents(screen)
    except CrlseqError as error:
        return {"seconds": round(time.perf_counter() - started, 2), "error": str(error)}
    true_latents = screen.obsm["true_latents"]
    scores: dict[str, Any] = recovery.score_recovery(
        run.interventions, run.edges, truth, latents, true_latents, run.pairs
    )
    if method in BLIND:  # it claims no targets, and so no graph
        scores = {name: scores[name] for name in recovery.LATENT_SCORES}
    if "loaded" in truth:
        truth = {**truth, "loaded": pd.DataFrame(truth["loaded"], columns=screen.var_names)}
    scores |= recovery.gene_list_scores(run.programs, latents, true_latents, truth)
    if run.facts.bootstrap is not None:
        scores["supports"] = edge_supports(run.facts.bootstrap.edge, run.interventions, truth)
    return {
        **scores, "n_edges": len(run.edges), "n_latents": run.facts.n_latents,
        "verdict": None if method in BLIND else run.facts.identification.verdict, "seconds": round(seconds, 2),
    }  # fmt: skip


def _baseline(method: str, screen: ad.AnnData) -> dict[str, Any]:
    """Graph scores without looking at any cell."""
    true = np.asarray(screen.uns["truth"]["adjacency"]) != 0
    if method == "empty":
        return {**recovery.graph_scores(np.zeros_like(true), true), "n_edges": 0}
    return {**recovery.random_graph_scores(true), "n_edges": int(true.sum())}


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Median and quartiles over seeds, one row per scenario and method.

    ``scenario, method, runs, failed, verdict`` (each with its number of runs), for every score
    ``NAME, NAME_q25, NAME_q75``, and the sum of every count, such as ``upstream_right``, from which pooled shares follow;
    failed runs have no score and count under ``failed`` alone.
    """
    rows = []
    for (scenario, method), group in table.groupby(["scenario", "method"], sort=False, observed=True):
        fitted = group[group["error"].isna()]
        verdicts = fitted["verdict"].value_counts()
        row: dict[str, Any] = {
            "scenario": scenario, "method": method, "runs": len(group), "failed": len(group) - len(fitted),
            "verdict": ", ".join(f"{verdict} {n}" for verdict, n in verdicts.items()),
        }  # fmt: skip
        for name in (*SCORES, "n_edges", "n_latents", "seconds"):
            # Not `median`: it warns where no run has the score.
            quartiles = fitted[name].astype(float).quantile([0.5, 0.25, 0.75])
            row |= dict(zip((name, f"{name}_q25", f"{name}_q75"), quartiles, strict=True))
        row |= {name: fitted[name].astype(float).sum(min_count=1) for name in COUNTS}
        rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Small multiples: one row per scenario, column per score and mark per seed, a black bar at each method's median."""
    scenarios = list(dict.fromkeys(table["scenario"]))
    figure = Figure(figsize=(11, 0.9 + 1.6 * len(scenarios)), layout="constrained")
    panels = figure.subplots(len(scenarios), len(SHOWN), squeeze=False, sharey="row")
    for axes, (score, title) in zip(panels[0], SHOWN.items(), strict=True):
        axes.set_title(title + ("\nlower is better" if score == "shd" else "\nhigher is better"), fontsize=9)
    for line, scenario in zip(panels, scenarios, strict=True):
        rows = table[table["scenario"] == scenario]
        methods = [name for name in MARKS if name in set(rows["method"])]
        for axes, score in zip(line, SHOWN, strict=True):
            for at, method in enumerate(methods):
                values = rows.loc[rows["method"] == method].sort_values("seed")[score].dropna().astype(float)
                colour, shape = MARKS[method]
                # Spread over the height, so that seeds with equal scores are all seen.
                height = at + np.linspace(-0.3, 0.3, len(values)) if len(values) > 1 else np.full(len(values), at)
                if len(values):
                    axes.vlines(values.median(), at - 0.42, at + 0.42, colors="black", linewidth=1.8, zorder=4)
                else:
                    why = "not applicable" if method in BASELINES else "all fits failed"
                    across = axes.get_yaxis_transform()
                    axes.text(0.03, at, why, va="center", fontsize=7, color="#666666", transform=across)
                axes.scatter(
                    values, height, s=18, c=colour, marker=shape, alpha=0.7, linewidths=0, clip_on=False, zorder=3,
                )  # fmt: skip
            if score == "shd":
                top = max(1.0, rows[score].astype(float).max())
                axes.set_xlim(-0.03 * top, 1.03 * top)
                axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            else:
                axes.set_xlim(-0.02, 1.02)
                axes.set_xticks([0, 0.5, 1])
            axes.set_yticks(range(len(methods)), methods)
            axes.set_ylim(len(methods) - 0.4, -0.6)
            axes.tick_params(labelsize=8, length=2)
            axes.grid(axis="x", color="#e2e2e2", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        name = scenario.replace("-", "\n")
        line[0].set_ylabel(name, fontsize=9, fontweight="bold", rotation=0, ha="right", va="center")
    return figure


@contextmanager
def _open_folder(folder: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """The folder, if it is new or was filled with these settings, locked against a second process."""
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "settings.json").is_file():
            raise InputError(f"{folder} exists and is not a benchmark.", "Choose another --output.")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            _keep_settings(folder / "settings.json", settings)
            yield folder
    except OSError as error:
        message = f"{folder} cannot be written: {error.strerror or error}."
        raise InputError(message, "Check the path and its permissions.") from error


def _keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write them, or refuse if other ones are there: the rows of one folder are to be compared."""
    text = json.dumps(settings, indent=1)
    if not path.is_file():
        with written_whole(path) as beside:
            beside.write_text(text, encoding="utf-8")
        return
    try:
        there = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged.", "Choose another --output.") from error
    for name, value in json.loads(text).items():  # through JSON, as those there went
        if there.get(name) != value:
            message = f"{name} is {there.get(name)!r} there and {value!r} here."
            raise InputError(
                f"{path.parent} holds a benchmark with other settings: {message}", "Choose another --output."
            )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        table: pd.DataFrame = pd.read_csv(path.absolute(), dtype={"verdict": object, "error": object}, **EXACT)
        if tuple(table.columns) != COLUMNS:
            raise ValueError("its columns differ")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.", "Choose another --output.") from error
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows by scenario and method in the order of their tables, then seed."""
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"n_edges": "Int64", "n_latents": "Int64"})
    order = {name: at for at, name in enumerate((*SCENARIOS, *METHODS, *BASELINES))}
    keys = table["seed"], table["method"].map(order), table["scenario"].map(order)  # the last one comes first
    return table.iloc[np.lexsort(keys)].reset_index(drop=True)


def _write_table(path: Path, table: pd.DataFrame) -> None:
    with written_whole(path) as beside:
        beside.write_bytes(to_csv(table))


def _in_words(row: Mapping[str, Any]) -> str:
    head = f"{row['scenario']}, seed {row['seed']}, {row['method']}"
    if "error" in row:
        return f"{head}: failed: {row['error']}"
    shown = [(text, row[name]) for name, text in SHOWN.items() if name in row]
    return f"{head}: " + ", ".join(f"{text} {value:.2f}" for text, value in shown) + f" ({row['seconds']:.0f} s)"
