"""What models of other seeds agree on with the kept one: programs, interventions and edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment

from crlseq.data.dataset import PerturbSeqData
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.readout.programs import DECLARED_WEIGHT, find_programs
from crlseq.run.columns import ENSEMBLE_COLUMNS


@dataclass(frozen=True)
class Reading:
    """What a model says: ``loading`` (p, G), ``shift`` (K, p) and ``edges`` (p, p), all in standard deviations."""

    loading: np.ndarray
    shift: np.ndarray
    edges: np.ndarray


@torch.no_grad()
def read_model(model: DiscrepancyVAE, data: PerturbSeqData) -> Reading:
    """Read a model on the screen it was fitted to; `shift` is what each perturbation alone does to every program."""
    programs = find_programs(model, data, known_targets=False)  # each by its own decoder
    alone = torch.arange(len(model.scm.shift))[:, None]
    shift = model.scm.mechanism(alone, model.target_weights(alone)).shift.double().numpy()
    edges = model.scm.adjacency.double().numpy() * programs.scale[:, None] / programs.scale
    return Reading(programs.loading, shift / programs.scale, edges)


def align(reading: Reading, to: Reading) -> tuple[Reading, np.ndarray]:
    """The reading with programs in the order and of the sign of those of `to`, and their correlations (p,).

    Programs are matched one to one for the largest sum of absolute correlations of loadings (the Hungarian method).
    """
    p = len(to.loading)
    correlation = np.nan_to_num(np.corrcoef(to.loading, reading.loading)[:p, p:])
    _, match = linear_sum_assignment(-np.abs(correlation))
    matched = correlation[np.arange(p), match]
    sign = np.where(matched < 0, -1.0, 1.0)
    aligned = Reading(
        reading.loading[match] * sign[:, None],
        reading.shift[:, match] * sign,
        reading.edges[np.ix_(match, match)] * np.outer(sign, sign),
    )
    return aligned, np.abs(matched)


def seed_agreement(
    kept: Reading, others: Sequence[Reading], interventions: pd.DataFrame, edges: pd.DataFrame
) -> pd.DataFrame:
    """Table ``kind, source, target, agreement, mean, sd`` of what the kept model claims in its `interventions` and `edges`.

    One row per ``program``, whose agreement is the mean absolute correlation of its loadings with those of the others; per
    ``intervention``, whose agreement is the share of the others in which the perturbation moves that program most; and
    per ``edge``, whose agreement is the share of the others with an edge of that sign and of at least 0.1. Mean and
    standard deviation, over all seeds, are of the shift or of the edge's weight.
    """
    aligned, correlations = zip(*(align(other, kept) for other in others), strict=True)
    shifts = np.stack([reading.shift for reading in (kept, *aligned)])  # (S, K, p)
    weights = np.stack([reading.edges for reading in (kept, *aligned)])  # (S, p, p)
    found = np.mean(correlations, 0)
    names = {f"P{k}": k for k in range(len(kept.loading))}
    rows = [("program", name, "", found[k], np.nan, np.nan) for name, k in names.items()]
    for i, (perturbation, program) in enumerate(
        zip(interventions["perturbation"], interventions["program"], strict=True)
    ):
        if program in names:
            own = shifts[:, i, names[program]]
            same = np.abs(shifts[1:, i]).argmax(-1) == names[program]
            rows.append(("intervention", perturbation, program, same.mean(), own.mean(), own.std(ddof=1)))
    for source, target in zip(edges["source"], edges["target"], strict=True):
        own = weights[:, names[source], names[target]]
        same = (np.sign(own[1:]) == np.sign(own[0])) & (np.abs(own[1:]) >= DECLARED_WEIGHT)
        rows.append(("edge", source, target, same.mean(), own.mean(), own.std(ddof=1)))
    return pd.DataFrame(rows, columns=list(ENSEMBLE_COLUMNS))
