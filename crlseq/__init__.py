"""crlseq: causal gene programs from Perturb-seq screens.

>>> import crlseq
>>> run = crlseq.load("RUN")  # what crlseq.fit("screen.h5ad", "RUN") returns
>>> run.program_names, run.interventions["perturbation"].tolist()
(['P0', 'P1', 'P2'], ['g0', 'g1', 'g2', 'g3', 'g4', 'g5', 'g6'])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "CrlseqError",
    "Run",
    "__version__",
    "cross_validate",
    "enrich",
    "evaluate",
    "fit",
    "load",
    "pl",
    "prepare",
    "simulate",
]

if TYPE_CHECKING:
    from crlseq import plotting as pl
    from crlseq.analysis.enrichment import enrich
    from crlseq.analysis.evaluation import evaluate
    from crlseq.crossvalidation import cross_validate
    from crlseq.data.simulate import simulate
    from crlseq.errors import CrlseqError
    from crlseq.fitting import fit
    from crlseq.preparation import prepare
    from crlseq.run import Run, load

# Imported when first used: torch and scanpy take seconds, and `crlseq --help` needs neither.
_HOME = {
    "CrlseqError": "crlseq.errors",
    "Run": "crlseq.run",
    "cross_validate": "crlseq.crossvalidation",
    "enrich": "crlseq.analysis.enrichment",
    "evaluate": "crlseq.analysis.evaluation",
    "fit": "crlseq.fitting",
    "load": "crlseq.run",
    "prepare": "crlseq.preparation",
    "simulate": "crlseq.data.simulate",
}


def __getattr__(name: str) -> Any:
    if name == "pl":
        return import_module("crlseq.plotting")
    if name not in _HOME:
        raise AttributeError(f"module 'crlseq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
