"""crlseq: causal gene programs from Perturb-seq screens.

>>> import crlseq
>>> run = crlseq.load("RUN")  # what crlseq.fit("screen.h5ad", "RUN") returns
>>> run.program_names, run.interventions["perturbation"].tolist()
(['P0', 'P1', 'P2'], ['g0', 'g1', 'g2', 'g3', 'g4', 'g5', 'g6'])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from crlseq._version import __version__

__all__ = [
    "CrlseqError",
    "Run",
    "__version__",
    "compare_runs",
    "cross_validate",
    "enrich",
    "evaluate",
    "evaluate_predictions",
    "fit",
    "load",
    "pl",
    "prepare",
    "register_baseline",
    "register_metric",
    "simulate",
]

if TYPE_CHECKING:
    from crlseq import plotting as pl
    from crlseq.data.prepare import prepare
    from crlseq.data.simulate import simulate
    from crlseq.errors import CrlseqError
    from crlseq.evaluation.baselines import register_baseline
    from crlseq.evaluation.compare import register_metric
    from crlseq.evaluation.evaluate import evaluate
    from crlseq.evaluation.foreign import evaluate_predictions
    from crlseq.evaluation.replication import compare_runs
    from crlseq.experiments.crossvalidation import cross_validate
    from crlseq.pipeline.fit import fit
    from crlseq.pipeline.fitted import FittedRun as Run
    from crlseq.pipeline.fitted import load
    from crlseq.readout.enrichment import enrich

# Imported when first used: torch and scanpy take seconds, and `crlseq --help` needs neither.
_HOME = {
    "CrlseqError": "crlseq.errors",
    "Run": "crlseq.pipeline.fitted",
    "compare_runs": "crlseq.evaluation.replication",
    "cross_validate": "crlseq.experiments.crossvalidation",
    "enrich": "crlseq.readout.enrichment",
    "evaluate": "crlseq.evaluation.evaluate",
    "evaluate_predictions": "crlseq.evaluation.foreign",
    "fit": "crlseq.pipeline.fit",
    "load": "crlseq.pipeline.fitted",
    "prepare": "crlseq.data.prepare",
    "register_baseline": "crlseq.evaluation.baselines",
    "register_metric": "crlseq.evaluation.compare",
    "simulate": "crlseq.data.simulate",
}


def __getattr__(name: str) -> Any:
    if name == "pl":
        return import_module("crlseq.plotting")
    if name not in _HOME:
        raise AttributeError(f"module 'crlseq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), "FittedRun" if name == "Run" else name)
