"""The latent DAG: weights in users' units, the declared edges, and whether the data determine it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crlseq.config import ModelConfig
from crlseq.discovery.result import Discovery
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
        return Dag(weights, np.abs(weights) >= DECLARED_WEIGHT, identify_gradient(config))
    return Dag(weights, discovery.adjacency != 0, Identification(verdict=discovery.verdict, reason=discovery.reason))


def identify_gradient(config: ModelConfig) -> Identification:
    """What theory and measurement say about a graph learned by gradient with this configuration."""
    if not config.causal_layer:
        return Identification(
            verdict="not identified",
            reason="The model was fitted without structural equations, so it has no graph.",
        )
    if config.equations != "nonlinear" and config.intervention == "shift":
        return Identification(
            verdict="not identified",
            reason="With linear structural equations and shifts alone the decoder can absorb any graph, including the empty one: "
            "the edges come from the optimiser, not from the data.",
        )
    return Identification(
        verdict="not identified",
        reason="In simulations, a graph learned by gradient in a single fit was no better than an empty one: treat it as a "
        "sketch, not a finding.",
    )
