"""Activities of a run's programs in other cells, and which of them the run's cells do not cover.

    distance = r / exp(a + b log n),    r = rms over genes of x - decoder(activities),    n = genes detected,

over the fitted genes that the other cells have; a and b are the least-squares fit to the run's cells, because r falls with depth.
A cell is outside where its distance is above the 99 % quantile of the run's cells, or its most extreme program above that of
theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch

from crlseq.data.matrix import open_screen
from crlseq.data.preprocess import Alignment, Preprocessing, align
from crlseq.errors import InputError
from crlseq.prediction.predict import control_mean
from crlseq.run.run import Run

if TYPE_CHECKING:
    import anndata as ad

REFERENCE, ROWS = 10_000, 2048  # cells of the run to compare with, and encoded at once
QUANTILE = 0.99
TINY = 1e-12  # deviation, of values without noise
MIN_SHARE = 0.05  # of cells outside from which activities are warned of, beyond that of the run's own


@dataclass(frozen=True)
class Projection:
    """Programs of n cells.

    ``activities`` (n, p) float32 in standard deviations of the run's control cells, ``distance`` (n,), 1 for a usual cell of the
    run, ``outside`` (n,) bool; ``share`` of the cells that are outside, and ``own_share`` of the run's; ``notes`` for users.
    """

    activities: np.ndarray
    distance: np.ndarray
    outside: np.ndarray
    share: float
    own_share: float
    notes: tuple[str, ...]

    def keys(self, run: Run) -> dict[str, dict[str, Any]]:
        """What goes into an AnnData, by slot."""
        about = {
            "program_names": np.array(run.program_names, dtype=str),
            "program_labels": np.array([program.label for program in run.facts.programs], dtype=str),
            "outside": self.share,
            "outside_of_run": self.own_share,
            "notes": np.array(self.notes, dtype=str),
        }
        return {
            "obsm": {"X_crlseq": self.activities},
            "obs": {"crlseq_distance": self.distance, "crlseq_outside": self.outside},
            "uns": {"crlseq_projection": about},
        }


@dataclass(frozen=True)
class _Measured:
    """Of n cells: ``activities`` (n, p), rms deviation from what they say, and number of fitted genes ``detected``."""

    activities: np.ndarray
    deviation: np.ndarray
    detected: np.ndarray


def project(run: Run, source: str | Path | ad.AnnData, note: Callable[[str], None] = lambda text: None) -> Projection:
    """Activities of the programs of a run that was written, in any cells with values of the fitted kind.

    Genes are found by name; up to half may be missing, and are then given their mean over the run's controls. ``note`` is told
    what is missing, and when more cells are outside than of the run's own.

    InputError if more genes are missing, values are of another kind, or the run has no programs or no folder.
    """
    record = run.preprocessing
    if run.facts.without_effect:
        raise InputError("This run has no programs, so cells have no activities.", "Project on a run that has some.")
    with run.screen() as fitted:
        split = fitted.obs["crlseq_split"].astype(str).to_numpy()
        rows = fitted.sample(np.flatnonzero(split != "unused"), REFERENCE)[1]
        own = record.apply(rows)[:, record.columns(fitted)].astype(np.float32)
    with open_screen(source, record.layer) as screen:
        with run.screen() as fitted:
            alignment, notes = align(record, screen, fitted)
        whole = len(alignment.present) == alignment.n_fitted
        fill = np.zeros(alignment.n_fitted) if whole else control_mean(run)
        blocks = (block for _, block in screen.blocks())
        theirs = _measure(run, alignment, fill, (_checked(record, alignment, block, screen.source) for block in blocks))
    ours = _measure(run, alignment, fill, [own[:, alignment.present]])
    by_depth = np.polynomial.Polynomial.fit(
        np.log1p(ours.detected), np.log(np.maximum(ours.deviation, TINY)), 1 if np.ptp(ours.detected) else 0
    )

    def limits(cells: _Measured) -> np.ndarray:
        """(2, n): distance of cells, and their most extreme program."""
        usual = np.exp(by_depth(np.log1p(cells.detected)))
        return np.stack([cells.deviation / usual, np.abs(cells.activities).max(1)])

    own_limits, their_limits = limits(ours), limits(theirs)
    limit = np.quantile(own_limits, QUANTILE, axis=1)[:, None]
    found, share = (their_limits > limit).any(0), float((own_limits > limit).any(0).mean())
    notes += _warnings(screen.source, float(found.mean()), share, float((theirs.detected < ours.detected.min()).mean()))
    for text in notes:
        note(text)
    return Projection(
        theirs.activities.astype(np.float32), their_limits[0], found, float(found.mean()), share, tuple(notes)
    )


def _checked(record: Preprocessing, alignment: Alignment, block: sp.csr_matrix, source: str) -> sp.csr_matrix:
    """Normalised float32 values (cells, present genes) of a block of a screen."""
    record.check(block, source)
    return alignment.expression(record, block)


@torch.no_grad()
def _measure(run: Run, alignment: Alignment, fill: np.ndarray, blocks: Iterable[sp.csr_matrix]) -> _Measured:
    """Cells of `blocks` (cells, present genes), whose other genes get `fill` (fitted genes,)."""
    model, present = run.model, alignment.present
    parts: list[tuple[np.ndarray, ...]] = []
    for block in blocks:
        for start in range(0, block.shape[0], ROWS):
            values = block[start : start + ROWS].toarray()
            x = torch.from_numpy(alignment.filled(values, fill)).to(model.scm.graph.dtype)
            raw = model.latents(x)
            rest = (x - model.decoder(raw))[:, present]
            deviation = rest.square().mean(1).sqrt().double().numpy()
            parts.append((run.facts.in_units(raw.double().numpy()), deviation, np.count_nonzero(values, 1)))
    return _Measured(*(np.concatenate(own) for own in zip(*parts, strict=True)))


def _warnings(source: str, share: float, own: float, shallow: float) -> list[str]:
    """Sentences on cells that the run does not cover."""
    found = []
    if share > own + MIN_SHARE:
        found.append(
            f"{source}: {share:.0%} of the cells lie outside what the run's cells cover; of the run's own {own:.1%} do. "
            "The programs do not describe such cells; see crlseq_outside and crlseq_distance."
        )
    if shallow > MIN_SHARE:
        found.append(f"{source}: {shallow:.0%} of the cells have fewer fitted genes than any of the run's cells.")
    return found
