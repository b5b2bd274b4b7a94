"""Plots of a run, in scanpy's manner: ``crlseq.pl.dag(run, ax=ax)`` draws and returns the Axes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["dag", "effects", "embedding", "history", "interventions", "programs"]

if TYPE_CHECKING:
    from crlseq.plotting.cells import embedding
    from crlseq.plotting.charts import effects, history
    from crlseq.plotting.graph import dag
    from crlseq.plotting.maps import interventions, programs

# Imported when first used: the report lays its drawing out here, without matplotlib.
_HOME = {
    "dag": "graph", "effects": "charts", "embedding": "cells", "history": "charts", "interventions": "maps",
    "programs": "maps",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'crlseq.plotting' has no attribute {name!r}")
    return getattr(import_module(f"crlseq.plotting.{_HOME[name]}"), name)
