"""Recovery of a known truth over scenarios, seeds and methods, beside the empty and the random graph.

Every finished fit is one row of ``benchmark.csv``, written at once: a benchmark that was cut off goes on where it stopped.
What a row means is in ``settings.json``; other settings need another folder.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crlseq._version import __version__
from crlseq.errors import InputError, UsageError, suggestion
from crlseq.evaluation import recovery
from crlseq.evaluation.recovery import calibration
from crlseq.experiments.fits import row_of
from crlseq.experiments.picture import SHOWN, draw
from crlseq.experiments.scenarios import BASELINES, EXTERNAL, METHODS, SCENARIOS
from crlseq.plotting.style import write_figure
from crlseq.storage.csv import EXACT, write_csv
from crlseq.storage.files import written_whole
from crlseq.storage.runfolder import locked

SCORES = (
    *("target_accuracy", "ari", *recovery.LATENT_SCORES, "ancestor_f1", "ancestor_precision", "ancestor_recall"),
    *("shd", "edge_f1", "edge_precision", "edge_recall"),
    *(*recovery.PAIR_SCORES, "penetrance_error"),
    *("list_precision", "list_recall", "program_length"),
)
COUNTS = (*recovery.EDGE_COUNTS, *recovery.PAIR_COUNTS)
COLUMNS = ("scenario", "seed", "method", *SCORES, *COUNTS, "n_edges", "n_latents", "verdict", "seconds", "error")


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
    of_methods: Mapping[str, Mapping[str, Any]] | None = None,
    jobs: int = 1,
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
    of_methods
        Further options of `crlseq.fit` for single methods, by name.
    jobs
        Fits at a time, in processes of their own; their results do not depend on it.
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
    _refuse_wrong(scenarios, seeds, methods, n_latents)
    settings: dict[str, Any] = {
        "version": __version__, "n_latents": n_latents, "threads": threads,
        "simulator": dict(simulator or {}), "options": dict(options or {}), "of_methods": dict(of_methods or {}),
    }  # fmt: skip
    with _open_folder(Path(folder), settings) as place:
        rows = read_rows(place / "benchmark.csv")
        done = {(row["scenario"], row["seed"], row["method"]) for row in rows}
        wanted = [
            key for scenario in scenarios for seed in seeds for method in (*BASELINES, *methods)
            if (key := (scenario, int(seed), method)) not in done
        ]  # fmt: skip
        for row in _computed(list(dict.fromkeys(wanted)), settings, jobs):
            if "supports" in row:  # before the row, which says that all of the fit is there
                name = f"{row['scenario']}_{row['seed']}_{row['method']}.csv"
                write_csv(place / "supports" / name, row.pop("supports"))
            rows.append(row)
            write_csv(place / "benchmark.csv", _table(rows))
            if row["method"] not in BASELINES:
                note(_in_words(row))
        table = _table(rows)
        summary = summarise(table)
        write_csv(place / "summary.csv", summary)
        supports = [pd.read_csv(path.absolute()) for path in sorted((place / "supports").glob("*.csv"))]
        if supports:
            write_csv(place / "calibration.csv", calibration(pd.concat(supports)))
        figure = draw(table)
        for kind in ("png", "svg"):
            write_figure(figure, place / f"benchmark.{kind}")
    return summary


def _refuse_wrong(scenarios: Sequence[str], seeds: Sequence[int], methods: Sequence[str], n_latents: str) -> None:
    for what, names, known in (("scenario", scenarios, [*SCENARIOS]), ("method", methods, [*METHODS, *EXTERNAL])):
        for name in names:
            if name not in known:
                raise UsageError(f"There is no {what} {name!r}.", suggestion(name, known, "There are"))
        if not names:
            raise UsageError(f"No {what} was given.", f"There are {', '.join(known)}.")
    if n_latents not in ("known", "auto"):
        raise UsageError(f"n_latents is {n_latents!r} instead of known or auto.", "Give one of them.")
    if not seeds or min(seeds) < 0:
        raise UsageError("Seeds must be whole numbers of at least 0, and at least one.", "Give seeds such as 0-7.")


def _computed(keys: Sequence[tuple[str, int, str]], settings: Mapping[str, Any], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of scenarios, seeds and methods, as they are finished: in this process, or in ``jobs`` others."""
    if jobs == 1:
        yield from (row_of(*key, settings) for key in keys)
        return
    settings = {**settings, "threads": settings["threads"] or 1}
    # spawned: a fork of a process with threads may hang
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(row_of, *key, settings) for key in keys]):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of ``benchmark.csv``, none if it is not there; an `InputError` if it is something else."""
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
    order = {name: at for at, name in enumerate((*SCENARIOS, *METHODS, *EXTERNAL, *BASELINES))}
    keys = table["seed"], table["method"].map(order), table["scenario"].map(order)  # the last one comes first
    return table.iloc[np.lexsort(keys)].reset_index(drop=True)


def _in_words(row: Mapping[str, Any]) -> str:
    head = f"{row['scenario']}, seed {row['seed']}, {row['method']}"
    if "error" in row:
        return f"{head}: failed: {row['error']}"
    shown = [(text, row[name]) for name, text in SHOWN.items() if name in row]
    return f"{head}: " + ", ".join(f"{text} {value:.2f}" for text, value in shown) + f" ({row['seconds']:.0f} s)"
