"""Calibration of edge supports: of the edges found in so many bootstrap replicates, how many are true?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from crlseq.evaluation.recovery import claims_of, match_programs

BORDERS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # lower ends of the bins; the last one ends with 1


def edge_supports(
    support: Sequence[Sequence[float]], interventions: pd.DataFrame, truth: Mapping[str, Any]
) -> pd.DataFrame:
    """Every ordered pair of programs with the ``support`` (p, p) of its edge row -> column, and whether that edge is ``true``.

    Programs are matched to latents as in `crlseq.evaluation.recovery.score_recovery`; no edge of one without a latent is
    true.
    """
    share, adjacency = np.asarray(support, dtype=float), np.asarray(truth["adjacency"]) != 0
    targets = truth["target"]["latent"].astype(int)
    latent_of, _ = match_programs(claims_of(interventions, targets.index), targets.to_numpy(), len(adjacency))
    latent = np.array([latent_of.get(f"P{i}", -1) for i in range(len(share))])
    source, target = np.nonzero(~np.eye(len(share), dtype=bool))
    known = (latent[source] >= 0) & (latent[target] >= 0)
    return pd.DataFrame({
        "source": [f"P{i}" for i in source], "target": [f"P{i}" for i in target],
        "support": share[source, target], "true": known & adjacency[latent[source], latent[target]],
    })  # fmt: skip


def calibration(supports: pd.DataFrame) -> pd.DataFrame:
    """Pairs, true edges, their share and the mean support by bin of support: ``support`` (lower end), ``mean_support``,
    ``pairs``, ``true``, ``share_true``. Calibrated supports have a share near their mean; bins without pairs are left out."""
    which = np.searchsorted(BORDERS, supports["support"].to_numpy() + 1e-9, side="right") - 1
    rows = []
    for i in np.unique(which)[::-1]:
        inside = supports[which == i]
        rows.append({
            "support": BORDERS[i], "mean_support": float(inside["support"].mean()), "pairs": len(inside),
            "true": int(inside["true"].sum()), "share_true": float(inside["true"].mean()),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=["support", "mean_support", "pairs", "true", "share_true"])
