"""The latent DAG: weights in users' units, the declared edges, and whether the data determine it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crlseq.analysis.programs import Programs
from crlseq.config import ModelConfig
from crlseq.model.discrepancy_vae import DiscrepancyVAE

DECLARED_WEIGHT = 0.1  # one standard deviation of the source moves the target by at least a tenth of its own


@dataclass(frozen=True)
class Identification:
    """``identified``, ``ancestry only`` or ``not identified``, with the reason in one sentence."""

    verdict: str
    reason: str


@dataclass(frozen=True)
class Dag:
    """``weights`` (p, p) standardised, row -> column; ``declared`` (p, p) bool: the edges that are reported."""

    weights: np.ndarray
    declared: np.ndarray
    identification: Identification


def find_dag(model: DiscrepancyVAE, programs: Programs, config: ModelConfig) -> Dag:
    """Standardised adjacency: change of the target, in its standard deviations, for one of the source."""
    adjacency = model.scm.adjacency.detach().cpu().double().numpy()
    weights = adjacency * programs.scale[:, None] / programs.scale[None, :]
    return Dag(weights, np.abs(weights) >= DECLARED_WEIGHT, identify(config))


def identify(config: ModelConfig) -> Identification:
    """What theory and measurement say about the graph of a fit with this configuration."""
    if not config.causal_layer:
        return Identification(
            "not identified", "The model was fitted without structural equations, so it has no graph."
        )
    if config.equations == "linear" and config.intervention == "shift":
        return Identification(
            "not identified",
            "With linear structural equations and shifts alone the decoder can absorb any graph, the empty one too: "
            "the edges come from the optimiser, not from the data.",
        )
    return Identification(
        "not identified",
        "Interventions that change mechanisms can determine the graph in theory, but a graph read off the gradient "
        "steps of a single fit was no better than an empty one in simulations: take it as a sketch, not as a finding.",
    )
