"""The latent DAG: weights in users' units, the declared edges, and whether the data determine it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crlseq.config import ModelConfig
from crlseq.discovery.result import Discovery
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.interventions import INTERVENTIONS
from crlseq.readout.programs import Programs

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


def find_dag(model: DiscrepancyVAE, programs: Programs, config: ModelConfig, discovery: Discovery | None = None) -> Dag:
    """Standardised adjacency: change of the target, in its standard deviations, for one of the source.

    Edges that a discovery found are declared; of a graph learned by gradient those of `DECLARED_WEIGHT`.
    """
    adjacency = model.scm.adjacency.detach().cpu().double().numpy()
    weights = adjacency * programs.scale[:, None] / programs.scale[None, :]
    if discovery is None:
        return Dag(weights, np.abs(weights) >= DECLARED_WEIGHT, identify_gradient(config))
    return Dag(weights, discovery.adjacency != 0, Identification(discovery.verdict, discovery.reason))


def identify_gradient(config: ModelConfig) -> Identification:
    """What theory and measurement say about a graph learned by gradient with this configuration."""
    if not config.causal_layer:
        return Identification(
            "not identified", "The model was fitted without structural equations, so it has no graph."
        )
    kind = None if config.intervention == "auto" else INTERVENTIONS[config.intervention]
    if config.equations != "nonlinear" and kind is not None and kind.graph == "nothing":
        return Identification(
            "not identified",
            "With linear structural equations and shifts alone the decoder can absorb any graph, the empty one too: "
            "the edges come from the optimiser, not from the data.",
        )
    return Identification(
        "not identified",
        "A graph read off the gradient steps of a single fit was no better than an empty one in simulations: take it "
        "as a sketch, not as a finding.",
    )
