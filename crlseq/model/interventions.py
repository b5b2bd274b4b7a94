"""Kinds of intervention: all that sets them apart. A new kind is an entry here, and its name in `crlseq.config`.

An intervention multiplies what its target receives from its parents by the retention r, multiplies the target's noise
by exp(s), and adds a shift (`crlseq.model.scm`).
"""

from dataclasses import dataclass
from typing import Literal

from crlseq.config import InterventionKind


@dataclass(frozen=True)
class Intervention:
    """What is free under one kind of intervention, and what its likelihood says about the graph."""

    retention: float | None  # share of its parents' contribution that a target keeps; None: learned, in (0, 1)
    scales: bool  # whether the noise scale of the target is learned for each perturbation; else it stays as it is
    # What linear equations identify. ``nothing``: any graph has the same likelihood, so that none is fitted.
    graph: Literal["edges", "ancestry", "nothing"]
    # First sentence of the verdict's reason: what the interventions were seen to do, or that they were asked for.
    reason: str


INTERVENTIONS: dict[InterventionKind, Intervention] = {
    "hard": Intervention(0.0, True, "edges", "Interventions cut their targets off from upstream programs."),
    "soft": Intervention(
        None, True, "ancestry", "Interventions weaken the input of their targets from upstream programs."
    ),
    "shift": Intervention(1.0, False, "nothing", "Shifts were asked for."),
}
