"""The latent DAG: weights in users' units, the declared edges, and whether the data determine it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crlseq.config import ModelConfig
from crlseq.discovery.result import Discovery
from crlseq.discovery.verdict import judge_gradient
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.readout.programs import Programs
from crlseq.run.schema import Identification

DECLARED_WEIGHT = 0.1  # one standard deviation of the source moves the target by at least a tenth of its own


@dataclass(frozen=True)
class Dag:
    """``weights`` (p, p) standardised, row -> column; ``declared`` (p, p) bool: the edges that are reported."""

    weights: np.ndarray
    declared: np.ndarray
    identification: Identification


def find_dag(model: DiscrepancyVAE, programs: Programs, config: ModelConfig, discovery: Discovery | None = None) -> Dag:
    """Standardised adjacency: change of the target, in its standard deviations, for one of the source.

    Edges that a discovery found are declared; of a graph learned by gradient those of `DECLARED_WEIGHT`.
    """
    adjacency = model.scm.adjacency.detach().cpu().double().numpy()
    weights = adjacency * programs.scale[:, None] / programs.scale[None, :]
    if discovery is None:
        verdict, declared = judge_gradient(config), np.abs(weights) >= DECLARED_WEIGHT
    else:
        verdict, declared = discovery.verdict, discovery.adjacency != 0
    return Dag(weights, declared, Identification(verdict=verdict.answer, reason=verdict.reason))
