"""Plots of a run, in scanpy's manner: ``crlseq.pl.dag(run, ax=ax)`` draws and returns the Axes."""

from crlseq.plotting.activity import activity, violin
from crlseq.plotting.cells import embedding
from crlseq.plotting.charts import effects, history, interventions, programs
from crlseq.plotting.genes import effects_map, volcano
from crlseq.plotting.graph import dag
from crlseq.plotting.pairs import pairs

__all__ = [
    "activity",
    "dag",
    "effects",
    "effects_map",
    "embedding",
    "history",
    "interventions",
    "pairs",
    "programs",
    "violin",
    "volcano",
]
