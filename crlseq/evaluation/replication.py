"""Two runs side by side: which programs, targets, effects and pairs of programs of one are found again in the other.

Programs are compared by the cosine of their loadings over the genes that both runs fitted, and matched one to one so that the
sum of |cosines| is largest (Hungarian method). A pair is a match where |cosine| is beyond what it is at its best among all
programs of either run when genes are exchanged at random, among genes of similar loadings: at most 5 % false matches
(Benjamini and Hochberg 1995).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from crlseq.discovery.effects import benjamini_hochberg
from crlseq.errors import InputError, few
from crlseq.run import schema
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR

Floats = NDArray[np.float64]
MIN_GENES, FDR = 20, 0.05
EXCHANGES, STRATA = 999, 10
SURE = 0.8  # bootstrap support of a target from which a run is sure of it
CLAIMS = ("upstream", "likely")  # statuses of a pair that say so


@dataclass(frozen=True)
class Comparison:
    """Tables of two runs, A and B.

    ``programs``: ``program_a, label_a, program_b, label_b, cosine, p_value, fdr, match``, those of one run alone at the end.
    ``perturbations``: of those in both, ``perturbation, fdr_a, fdr_b, program_a, program_b, support_a, support_b, shift_a,
    shift_b, same_program, effect_correlation, ceiling``; shifts of B in the sign of A. ``pairs``: ordered pairs of matched programs, ``source_a,
    target_a, source_b, target_b, status_a, status_b, change_a, change_b, weight_a, weight_b, outcome``. ``summary`` by name,
    and ``notes`` for users.
    """

    programs: pd.DataFrame
    perturbations: pd.DataFrame
    pairs: pd.DataFrame
    cosines: pd.DataFrame  # programs of A x programs of B
    summary: dict[str, Any]
    notes: tuple[str, ...]


def compare_runs(a: Run, b: Run, seed: int = 0) -> Comparison:
    """Compare two runs; InputError if they share fewer than 20 genes, or one has no programs.

    Examples
    --------
    >>> import crlseq
    >>> run = crlseq.load("RUN")
    >>> crlseq.compare_runs(run, run).summary["matched"]
    3
    """
    for run in (a, b):
        if run.facts.without_effect:
            raise InputError(
                f"{run.path or 'A run'} has no programs.", "Compare runs whose perturbations have effects."
            )
    genes, places = shared_genes(a, b)
    loadings = [_loadings(run, at) for run, at in zip((a, b), places, strict=True)]
    cosines = _cosines(*loadings)
    programs = _match(cosines, _null(loadings[0], loadings[1], seed))
    matched = programs[programs["match"]]
    names = a.program_names, b.program_names
    of_b = {names[1][j]: names[0][i] for i, j in zip(matched["i"], matched["j"], strict=True)}
    sign = {names[0][i]: float(np.sign(c)) for i, c in zip(matched["i"], matched["cosine"], strict=True)}
    perturbations = _perturbations(a, b, of_b, sign, places)
    pairs = _pairs(a, b, of_b, sign)
    return Comparison(
        _named(programs, a, b), perturbations, pairs, pd.DataFrame(cosines, names[0], names[1]),
        _summary(len(genes), names, matched, perturbations, pairs), _notes(a, b, len(genes)),
    )  # fmt: skip


def shared_genes(a: Run, b: Run) -> tuple[list[str], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Genes of A that B fitted as well, under any of their names, and their places in both; InputError if they are few."""
    record, other = a.preprocessing, b.preprocessing
    found = [other.gene_names.find(name) for name in record.genes]
    by_symbol = [other.gene_names.find(str(name)) for name in record.gene_names.symbols]
    pairs = {}
    for i, ways in enumerate(zip(found, by_symbol, strict=True)):
        j = next((own[0] for own in ways if len(own) == 1), None)
        if j is not None and j not in pairs:
            pairs[j] = i
    if len(pairs) < MIN_GENES:
        raise InputError(
            f"The runs share {len(pairs)} genes: A fitted {few(record.genes, 2)}, B {few(other.genes, 2)}.",
            f"At least {MIN_GENES} are needed; name genes alike in both files, or fit more with --n-top-genes.",
        )
    mine, theirs = np.array([*pairs.values()]), np.array([*pairs])
    return [record.genes[i] for i in mine], (mine, theirs)


def _loadings(run: Run, places: NDArray[np.int64]) -> Floats:
    """(p, genes) loadings of a run's programs; 0 where a gene tells nothing."""
    wide = run.programs.pivot(index="program", columns="gene", values="loading")
    table = wide.loc[run.program_names, [run.preprocessing.genes[i] for i in places]]
    found: Floats = np.nan_to_num(table.to_numpy(dtype=float))
    return found


def _cosines(a: Floats, b: Floats) -> Floats:
    """(p, q) between rows."""
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    return np.asarray(a @ b.T / np.maximum(lengths, 1e-300))


def _null(a: Floats, b: Floats, seed: int) -> Floats:
    """(exchanges, p, q) largest |cosine| in the row or column of a pair, with genes of similar loadings in B exchanged."""
    rng = np.random.default_rng([seed, 13])
    size = np.sqrt((a**2).mean(0) * (b**2).mean(0))
    strata = np.array_split(np.argsort(size, kind="stable"), min(STRATA, a.shape[1] // 2))
    found = np.empty((EXCHANGES, len(a), len(b)))
    for each in found:
        order = np.arange(a.shape[1])
        for own in strata:
            order[own] = rng.permutation(own)
        size_of = np.abs(_cosines(a, b[:, order]))
        each[:] = np.maximum(size_of.max(1)[:, None], size_of.max(0))
    return found


def _match(cosines: Floats, null: Floats) -> pd.DataFrame:
    """One-to-one pairs, ``i, j, cosine, p_value, fdr, match``."""
    i, j = linear_sum_assignment(-np.abs(cosines))
    value = cosines[i, j]
    p_value = (1 + (null[:, i, j] >= np.abs(value)).sum(0)) / (1 + len(null))
    fdr = benjamini_hochberg(p_value)
    table = pd.DataFrame({"i": i, "j": j, "cosine": value, "p_value": p_value, "fdr": fdr, "match": fdr <= FDR})
    return table


def _named(matched: pd.DataFrame, a: Run, b: Run) -> pd.DataFrame:
    """The table of programs, with those that have no partner."""
    rows: list[dict[str, Any]] = []
    for row in matched.to_dict("records"):
        rows.append({"program_a": a.program_names[row["i"]], "program_b": b.program_names[row["j"]]} | {
            name: row[name] for name in ("cosine", "p_value", "fdr", "match")
        })  # fmt: skip
    for key, run, taken in (("program_a", a, matched["i"]), ("program_b", b, matched["j"])):
        rows += [{key: name, "match": False} for k, name in enumerate(run.program_names) if k not in set(taken)]
    table = pd.DataFrame(rows, columns=["program_a", "program_b", "cosine", "p_value", "fdr", "match"])
    for side, run in (("a", a), ("b", b)):
        labels = {program.name: program.label for program in run.facts.programs}
        table[f"program_{side}"] = table[f"program_{side}"].fillna("")
        table.insert(1 if side == "a" else 3, f"label_{side}", table[f"program_{side}"].map(labels).fillna(""))
    return table


def _perturbations(
    a: Run, b: Run, of_b: dict[str, str], sign: dict[str, float], places: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> pd.DataFrame:
    """See `Comparison`."""
    tables = [run.interventions.set_index("perturbation") for run in (a, b)]
    common = tables[0].index[tables[0].index.isin(tables[1].index)]
    mine, theirs = (table.loc[common] for table in tables)
    translated = theirs["program"].map(of_b).fillna("")
    correlation, ceiling = _effect_correlations(a, b, list(common), places)
    table = pd.DataFrame({
        "perturbation": common, "fdr_a": mine["fdr"].to_numpy(), "fdr_b": theirs["fdr"].to_numpy(),
        "program_a": mine["program"].fillna("").to_numpy(), "program_b": theirs["program"].fillna("").to_numpy(),
        "support_a": mine["support"].to_numpy(), "support_b": theirs["support"].to_numpy(),
        "shift_a": mine["shift"].to_numpy(), "shift_b": (theirs["shift"] * translated.map(sign).fillna(1.0)).to_numpy(),
        "same_program": ((mine["program"] == translated) & (translated != "")).to_numpy(),
        "effect_correlation": correlation, "ceiling": ceiling,
    })  # fmt: skip
    surest = table[["fdr_a", "fdr_b"]].max(axis=1)
    return table.iloc[np.lexsort((-table["ceiling"], surest))].reset_index(drop=True)


def _effect_correlations(
    a: Run, b: Run, names: list[str], places: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[Floats, Floats]:
    """Correlation over genes of the effects of perturbations in two runs, and what noise lets it be at most.

    Of variance V of measured changes, E of errors, the share 1 - E/V is no noise; the ceiling is the root of the product of
    both runs' shares, what two halves of one screen would correlate on average.
    """
    if not names or min(run.facts.format for run in (a, b)) < schema.WITH_EFFECTS:
        return np.full(len(names), np.nan), np.full(len(names), np.nan)
    parts = []
    for run, at in zip((a, b), places, strict=True):
        genes = [run.preprocessing.genes[i] for i in at]
        wide = [run.effects.pivot(index="perturbation", columns="gene", values=value) for value in ("change", "se")]
        parts.append([table.reindex(index=names, columns=genes).to_numpy(dtype=float) for table in wide])
    (first, first_se), (second, second_se) = parts
    correlation, ceiling = np.full(len(names), np.nan), np.full(len(names), np.nan)
    for k in range(len(names)):
        both = np.isfinite(first[k]) & np.isfinite(second[k])
        if both.sum() < MIN_GENES:
            continue
        sides = ((first[k, both], first_se[k, both]), (second[k, both], second_se[k, both]))
        real = [1 - float((error**2).mean() / max(change.var(), 1e-300)) for change, error in sides]
        correlation[k] = np.corrcoef(first[k, both], second[k, both])[0, 1]
        ceiling[k] = np.sqrt(real[0] * real[1]) if min(real) > 0 else 0.0
    return correlation, ceiling


def _pairs(a: Run, b: Run, of_b: dict[str, str], sign: dict[str, float]) -> pd.DataFrame:
    """See `Comparison`. An outcome is of what either run claims: a declared edge, or a pair that is upstream or likely."""
    in_b = {mine: theirs for theirs, mine in of_b.items()}
    sides = [_claims(run) for run in (a, b)]
    rows = []
    for source in (name for name in a.program_names if name in in_b):
        for target in (name for name in a.program_names if name in in_b and name != source):
            flip = sign[source] * sign[target]
            one, other = sides[0][source, target], sides[1][in_b[source], in_b[target]]
            reverse = sides[0][target, source], sides[1][in_b[target], in_b[source]]
            rows.append({
                "source_a": source, "target_a": target, "source_b": in_b[source], "target_b": in_b[target],
                "status_a": one["status"], "status_b": other["status"], "change_a": one["change"],
                "change_b": flip * other["change"], "weight_a": one["weight"], "weight_b": flip * other["weight"],
                "outcome": _outcome(one, other, reverse),
            })  # fmt: skip
    names = ["source_a", "target_a", "source_b", "target_b", "status_a", "status_b", "change_a", "change_b"]
    return pd.DataFrame(rows, columns=[*names, "weight_a", "weight_b", "outcome"])


def _claims(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    """Of every ordered pair of programs: its status, change, the least that could be seen, and the declared weight."""
    found: dict[tuple[str, str], dict[str, Any]] = {
        (source, target): {"status": "", "change": np.nan, "detectable": np.nan, "weight": 0.0, "claimed": False}
        for source in run.program_names
        for target in run.program_names
    }
    for pair in [] if run.pairs is None else run.pairs.to_dict("records"):
        about = {name: pair[name] for name in ("status", "change", "detectable")}
        found[str(pair["source"]), str(pair["target"])] |= {**about, "claimed": pair["status"] in CLAIMS}
    if run.facts.identification.verdict == "identified" or run.pairs is None:
        for edge in run.edges.to_dict("records"):
            found[str(edge["source"]), str(edge["target"])] |= {"weight": edge["weight"], "claimed": True}
    return found


def _outcome(one: dict[str, Any], other: dict[str, Any], reverse: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """What becomes of a claim of either run in the other; "" if neither claims the pair."""
    if not one["claimed"] and not other["claimed"]:
        return ""
    if one["claimed"] and other["claimed"]:
        return "found again"
    claim, answer, back = (one, other, reverse[1]) if one["claimed"] else (other, one, reverse[0])
    if back["claimed"]:
        return "reversed"
    if answer["status"] == "excluded":
        return "not found"
    seen = answer["detectable"] <= abs(claim["change"])
    return "not found" if seen else "could not be seen"


def _summary(
    n_genes: int,
    names: tuple[list[str], list[str]],
    matched: pd.DataFrame,
    perturbations: pd.DataFrame,
    pairs: pd.DataFrame,
) -> dict[str, Any]:
    """Numbers that the tables come to; None for those of nothing."""
    seen = (perturbations["fdr_a"] <= DETECTABLE_FDR) & (perturbations["fdr_b"] <= DETECTABLE_FDR)
    both = perturbations[seen & (perturbations["program_a"] != "") & (perturbations["program_b"] != "")]
    sure = both[both[["support_a", "support_b"]].min(axis=1, skipna=False) >= SURE]
    told = perturbations[seen & (perturbations["ceiling"] > 0)]
    medians = {name: float(told[name].median()) if len(told) else None for name in ("effect_correlation", "ceiling")}
    outcomes = {name: int((pairs["outcome"] == name).sum()) for name in OUTCOMES}
    return {
        "genes": n_genes, "programs_a": len(names[0]), "programs_b": len(names[1]), "matched": len(matched),
        "median_cosine": float(matched["cosine"].abs().median()) if len(matched) else None,
        "perturbations": len(perturbations), "with_effect_in_both": int(seen.sum()), "ari": _ari(both),
        "same_program": int(both["same_program"].sum()), "sure_in_both": len(sure), "sure_ari": _ari(sure),
        "sure_same_program": int(sure["same_program"].sum()), **medians, "pairs": outcomes,
    }  # fmt: skip


def _ari(some: pd.DataFrame) -> float | None:
    """Adjusted Rand index of both runs' partitions of perturbations; None of fewer than two."""
    return float(adjusted_rand_score(some["program_a"], some["program_b"])) if len(some) > 1 else None


OUTCOMES = ("found again", "not found", "could not be seen", "reversed")


def _notes(a: Run, b: Run, n_genes: int) -> tuple[str, ...]:
    smaller = min(len(run.preprocessing.genes) for run in (a, b))
    if n_genes >= smaller / 2:
        return ()
    return (f"Only {n_genes} of the {smaller} fitted genes are in both runs: matches are less certain.",)
