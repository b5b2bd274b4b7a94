"""Plots of a run, in scanpy's manner: ``crlseq.pl.dag(run, ax=ax)`` draws and returns the Axes."""

from crlseq.plotting.cells import embedding
from crlseq.plotting.charts import effects, history
from crlseq.plotting.graph import dag
from crlseq.plotting.maps import interventions, programs

__all__ = ["dag", "effects", "embedding", "history", "interventions", "programs"]
