"""What users hold: a run that also predicts and projects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crlseq.run.run import Run

if TYPE_CHECKING:
    import anndata as ad

    from crlseq.prediction.project import Projection


class FittedRun(Run):
    """What `crlseq.fit` and `crlseq.load` return: a `Run` with shortcuts to what is made from runs."""

    def predict(self, perturbations: str | Sequence[str], **options: Any) -> ad.AnnData:
        """Virtual cells under fitted perturbations and combinations of them; see `crlseq.prediction.predict.predict`.

        Examples
        --------
        >>> import crlseq
        >>> virtual = crlseq.load("RUN").predict(["g0", "g0+g1"], n_cells=50)
        >>> virtual.shape, virtual.varm["crlseq_effect"].shape
        ((100, 40), (40, 2))
        """
        from crlseq.prediction.predict import predict  # with torch

        return predict(self, perturbations, **options)

    def project(self, source: str | Path | ad.AnnData) -> Projection:
        """Activities of the programs in other cells, and how far these are from the run's; see `crlseq.prediction.project.project`.

        Examples
        --------
        >>> import crlseq
        >>> cells = crlseq.load("RUN").project("screen.h5ad")
        >>> cells.activities.shape, cells.outside.shape
        ((740, 3), (740,))
        """
        from crlseq.prediction.project import project  # with torch

        return project(self, source)


def load(path: str | Path) -> FittedRun:
    """Read a run folder; InputError as `crlseq.run.run.Run.load`.

    Examples
    --------
    >>> import crlseq
    >>> run = crlseq.load("RUN")
    >>> sorted(run.dag.nodes), sorted(run.described)
    (['P0', 'P1', 'P2'], ['P0', 'P1', 'P2'])
    """
    return FittedRun.load(path)
