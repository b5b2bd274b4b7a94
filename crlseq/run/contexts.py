"""Contexts in words: in which perturbations they differ, and where a difference could not have been seen."""

from __future__ import annotations

from statistics import NormalDist

import pandas as pd

from crlseq.errors import few
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR

POWER = 0.84  # standard normal quantile of 80 % power
COMPARED = 3  # comparisons of two contexts that are told


def contexts_in_words(run: Run) -> list[str]:
    """A sentence or two for each two contexts, and one on pairs of programs; nothing of a run without contexts."""
    about = run.facts.contexts
    if run.contexts is None or about is None:
        return []
    fdr = dict(zip(run.interventions["perturbation"], run.interventions["fdr"], strict=True))
    words = list[str]()
    place = {name: i for i, name in enumerate(about.names)}
    groups = [((str(a), str(b)), rows) for (a, b), rows in run.contexts.groupby(["context", "other"], sort=False)]
    groups.sort(key=lambda group: (place[group[0][0]], place[group[0][1]]))
    errors = seen_errors(int((run.contexts["fdr"] <= DETECTABLE_FDR).sum()), len(run.contexts))
    for (a, b), rows in groups[:COMPARED]:
        words += _compared(a, b, rows, fdr, errors)
    if len(groups) > COMPARED:
        words.append(f"contexts.csv compares {len(groups) - COMPARED} more pairs of contexts.")
    where = run.interventions["perturbation"].str.rpartition("@")
    alone = sorted(where[0][~where[0].duplicated(keep=False)])
    if alone:
        words.append(f"{few(alone)} {'is' if len(alone) == 1 else 'are'} in one context alone and not compared.")
    if about.pairs_tested:
        told = (
            f"What interventions change differs between contexts in {about.pairs_differ} of {about.pairs_tested} ordered pairs "
            f"of programs (FDR ≤ {DETECTABLE_FDR})"
        )
        least = seen_errors(about.pairs_differ, about.pairs_tested) * (about.pairs_error or 0)
        words.append(f"{told}{_others(least)}.")
    return words


def seen_errors(n: int, m: int) -> float:
    """Standard errors of a difference that is seen with a probability of 80 %, one more beside ``n`` of ``m`` that are seen:
    its p-value has to be (n + 1) / m of the FDR (Benjamini and Hochberg 1995).
    """
    return NormalDist().inv_cdf(1 - min((n + 1) / m, 1) * DETECTABLE_FDR / 2) + POWER


def _others(least: float) -> str:
    return f"; in half of the others a difference of {least:.2g} SD would have been seen (80 % power)" if least else ""


def _compared(a: str, b: str, rows: pd.DataFrame, fdr: dict[str, float], errors: float) -> list[str]:
    """How many perturbations act differently in two contexts; in how many an effect is seen in one alone, and whether the
    other can be without it. So many standard ``errors`` are seen.
    """
    differ = rows["fdr"] <= DETECTABLE_FDR
    n, many = int(differ.sum()), len(rows) != 1
    told = f"{n} of {len(rows)} perturbation{'s' * many} act{'' if many else 's'} differently in {a} and {b} (FDR ≤ {DETECTABLE_FDR})"
    least = 0.0 if differ.all() else errors * rows.loc[~differ, "difference_se"].median()
    words = [f"{told}{_others(least)}."]
    seen = {
        one: rows["perturbation"].map(lambda gene, one=one: fdr.get(f"{gene}@{one}", 1.0) <= DETECTABLE_FDR)
        for one in (a, b)
    }
    for one, other, error in ((a, b, "se_other"), (b, a, "se")):
        alone = seen[one] & ~seen[other]
        if sure := int((alone & differ).sum()):
            least = errors * rows.loc[alone & differ, error].median()
            words.append(
                f"{sure} {'has' if sure == 1 else 'have'} a visible effect in {one} alone: one of {least:.2g} SD would have been seen in {other}."
            )
        if open_ := int((alone & ~differ).sum()):
            words.append(
                f"{open_} more {'is' if open_ == 1 else 'are'} seen in {one} and not in {other}, but the two may be alike: cells are too few to tell."
            )
    return words


def differences(run: Run) -> pd.Series:
    """FDR of the surest difference between contexts of each row of ``interventions``; NaN where there was none to test."""
    assert run.contexts is not None
    least = run.contexts.groupby("perturbation")["fdr"].min()
    gene = run.interventions["perturbation"].str.rpartition("@")[0]
    return gene.map(least).astype(float)
