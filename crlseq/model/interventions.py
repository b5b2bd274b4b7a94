"""Kinds of intervention: all that sets them apart. A new kind is an entry here, and its name in `crlseq.config`.

An intervention multiplies what its target receives from its parents by the retention r, multiplies the target's noise
by exp(s), and adds a shift (`crlseq.model.scm`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crlseq.config import InterventionKind


@dataclass(frozen=True)
class Intervention:
    """What is free under one kind of intervention, and what its likelihood says about the graph.

    Attributes
    ----------
    retention
        Share of its parents' contribution that a target keeps; None: learned for each perturbation, in (0, 1).
    scales
        Whether the noise scale of the target is learned for each perturbation; else it stays as it is.
    graph
        What linear equations identify. ``nothing``: any graph has the same likelihood, so that none is fitted.
    reason
        First sentence of the verdict's reason: what the interventions were seen to do, or that they were asked for.
    """

    retention: float | None
    scales: bool
    graph: Literal["edges", "ancestry", "nothing"]
    reason: str


INTERVENTIONS: dict[InterventionKind, Intervention] = {
    "hard": Intervention(
        retention=0.0,
        scales=True,
        graph="edges",
        reason="Interventions cut their targets off from upstream programs.",
    ),
    "soft": Intervention(
        retention=None,
        scales=True,
        graph="ancestry",
        reason="Interventions weaken the input of their targets from upstream programs.",
    ),
    "shift": Intervention(
        retention=1.0,
        scales=False,
        graph="nothing",
        reason="Shifts were asked for.",
    ),
}
