"""What the values are: counts, logarithms of normalised counts, or values of another kind; read off the file itself.

A cell's counts are multiples of 1, and after normalising they are multiples of a unit of the cell. So, of the fractional
values of some cells:

- multiples of a unit once the logarithm is undone: *log* (this also tells its base);
- multiples of a unit as they are: normalised, and no logarithm taken, which is refused;
- else most of them whole: *counts*, some of which reads were shared out (pseudo-alignment);
- else cells' totals more alike without the logarithm than with it: *log*, of corrected counts;
- else *counts*, corrected for ambient RNA.
"""

from __future__ import annotations

import math
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

from crlseq.config import DataConfig
from crlseq.data.cluster import mapped
from crlseq.data.matrix import Rows, Screen, open_screen
from crlseq.errors import InputError
from crlseq.threads import counted

MAX_LOG = 20.0  # base 2 of a million, the largest total that counts are scaled to
TRANSFORMED_SHARE = 0.05  # share of negative values among the non-zero ones above which they are meant
SAMPLE = 200  # cells that are looked at closely
FEWEST, ROUNDING = 3, 2e-3  # distinct values of a cell that say something of its unit; error of float32 and files
PARTS, MOST_UNITS = (1, 2, 3), 1000.0  # counts that a cell's smallest value may be; values beyond are not told apart
ALMOST_ALL = 0.9
SAME_TOTAL = 0.01  # coefficient of variation of totals below which they were made the same
HINT = "Give raw counts or log-normalised values (`sc.pp.normalize_total`, `sc.pp.log1p`) in X or with --layer."


@dataclass
class Scan:
    """What passing over values found."""

    totals: np.ndarray  # (cells,) sums
    detected: np.ndarray  # (genes,) cells with a value other than 0
    n_nonzero: int = 0
    n_negative: int = 0
    n_fractional: int = 0
    minimum: float = 0.0  # zeros that are stored nowhere count as well
    maximum: float = 0.0

    @classmethod
    def of(cls, screen: Screen) -> Scan:
        """Of nothing yet."""
        return cls(np.zeros(screen.n_cells), np.zeros(screen.n_genes, dtype=np.int64))

    def add(self, screen: Screen, rows: slice, part: Part) -> None:
        """Take in the cells `rows`; InputError at the first NaN or infinite value, with its cell and gene."""
        if part.odd is not None:
            cell, gene, value = part.odd
            name = str(screen.obs.index[rows.start + cell])
            raise InputError(
                f"{screen.source}: the value of gene {screen.genes[gene]!r} in cell {name!r} is {value}.",
                "Remove or replace NaN and infinite values first.",
            )
        self.totals[rows] = part.totals
        self.detected += part.detected
        self.n_nonzero += part.n_nonzero
        self.n_negative += part.n_negative
        self.n_fractional += part.n_fractional
        self.minimum = min(self.minimum, part.minimum)
        self.maximum = max(self.maximum, part.maximum)


class Part(NamedTuple):
    """What a block of cells adds to a `Scan`; ``odd`` is the cell, gene and value of the first that is not finite."""

    totals: np.ndarray
    detected: np.ndarray
    n_nonzero: int
    n_negative: int
    n_fractional: int
    minimum: float
    maximum: float
    odd: tuple[int, int, float] | None


def scan_block(block: sp.csr_matrix) -> Part:
    """What canonical cells (n, genes) hold."""
    values = block.data
    finite = np.isfinite(values)
    odd = None
    if not finite.all():
        at = int(np.flatnonzero(~finite)[0])
        cell = int(np.searchsorted(block.indptr, at, side="right")) - 1
        odd = cell, int(block.indices[at]), float(values[at])
    return Part(
        np.asarray(block.sum(1)).ravel(), np.bincount(block.indices, minlength=block.shape[1]), len(values),
        int((values < 0).sum()), int((values != np.rint(values)).sum()), float(values.min(initial=0.0)),
        float(values.max(initial=0.0)), odd,
    )  # fmt: skip


def scan(screen: Screen) -> Scan:
    """One pass over the matrix in blocks; InputError at the first NaN or infinite value, with its cell and gene."""
    found, stretches = Scan.of(screen), screen.stretches()
    parts = mapped(partial(_scanned, screen.reader), stretches, torch.get_num_threads())
    for rows, part in zip(counted(stretches, len(stretches)), parts, strict=True):
        found.add(screen, rows, part)
    return found


def _scanned(reader: Rows, rows: slice) -> Part:
    return scan_block(reader[rows])


@dataclass(frozen=True)
class Values:
    """What values are: ``counts``, ``log`` or ``continuous``; why, in words; and what to know about them."""

    kind: str
    reason: str
    fractional: bool = False  # counts that are not whole
    base: float = math.e  # of logarithms
    doubt: str = ""  # a sentence, where they may not be what they look like


def kind_of_values(screen: Screen, scanned: Scan, asked: str = "auto") -> Values:
    """Tell the kind from the values; see the head of this file.

    Continuous values (scaled data, residuals, simulations) are negative for a good part: a few negative values are a
    mistake in the file. InputError if the values are of no kind, or contradict what was asked for.
    """
    source = screen.source
    if not scanned.n_nonzero:
        raise InputError(f"{source}: all values are zero.", HINT)
    whole, share = scanned.n_fractional == 0, scanned.n_negative / scanned.n_nonzero
    if scanned.n_negative:
        meant = asked == "continuous" or (not whole and TRANSFORMED_SHARE <= share <= 1 - TRANSFORMED_SHARE)
        if not meant or asked in ("counts", "log"):
            raise InputError(
                f"{source} has negative values ({scanned.n_negative}, the smallest {scanned.minimum:g}).",
                HINT + " If they are intended, use --values continuous.",
            )
        return Values("continuous", f"{share:.0%} of the non-zero values are negative: used unchanged")
    if asked == "continuous":
        return Values("continuous", "as requested: used unchanged")
    if whole and asked != "log":
        if asked == "auto":
            _refuse_odd_integers(scanned, source)
        return Values("counts", f"all values are whole numbers, the largest {scanned.maximum:g}")
    return _fractional(screen, scanned, asked)


def _fractional(screen: Screen, scanned: Scan, asked: str) -> Values:
    rows = screen.sample(np.arange(screen.n_cells), SAMPLE)[1]
    share, base = scanned.n_fractional / scanned.n_nonzero, _base(rows, screen.log_base or math.e)
    counts = Values(
        "counts", f"{share:.0%} of the non-zero values are fractional, the largest is {scanned.maximum:.4g}: corrected "
        "or shared-out counts", fractional=True,
    )  # fmt: skip
    if asked == "log" or (base is not None and asked == "auto"):
        return _log(screen, scanned, rows, base)
    if base is not None:
        raise InputError(f"{screen.source} does not hold counts: its values are logarithms of normalised counts.", HINT)
    totals = np.asarray(rows.sum(1)).ravel()
    if asked == "counts" or share < 0.5:
        return counts
    if _are_multiples(rows, rows.data) or _variation(totals) < SAME_TOTAL:
        what = f"values are fractional, reach {scanned.maximum:.4g}, and have the same unit or total in every cell"
        raise InputError(
            f"{screen.source}: {what}: normalised, but without the logarithm.", "Run `sc.pp.log1p`. " + HINT
        )
    if scanned.maximum > MAX_LOG or _variation(totals) <= _variation(_undone(rows, math.e)):
        return counts
    return _log(screen, scanned, rows, None)


def _log(screen: Screen, scanned: Scan, rows: sp.csr_matrix, base: float | None) -> Values:
    """Logarithms in a `base` that was seen; None: of values that are no multiples, in the base on record."""
    if scanned.maximum > MAX_LOG:
        what = f"values reach {scanned.maximum:.4g}, which no logarithm of a count does"
        raise InputError(f"{screen.source}: {what}.", HINT)
    used = base or screen.log_base or math.e
    named = "" if abs(used - math.e) < 1e-6 else f", logarithms to base {used:g}: converted to natural ones"
    doubt = ""
    if base is None and _variation(_undone(rows, used)) < SAME_TOTAL:
        doubt = (
            "All cells have the same total, but their values are no multiples of a count: the values may have been "
            "normalised twice, or corrected before. Check them, or fit raw counts."
        )
    elif base is None and scanned.maximum < np.log1p(MAX_LOG) and _are_multiples(rows, np.expm1(np.expm1(rows.data))):
        doubt = "The logarithm of these values seems to have been taken twice. Check them, or fit raw counts."
    return Values("log", f"values are fractional and at most {scanned.maximum:.3g}{named}", base=used, doubt=doubt)


def _base(rows: sp.csr_matrix, first: float) -> float | None:
    """The base of logarithms without which cells' values are multiples of a unit."""
    if not rows.nnz or rows.data.max() > MAX_LOG:
        return None
    bases = dict.fromkeys([float(first), math.e, 2.0, 10.0])
    return next((base for base in bases if _are_multiples(rows, np.expm1(rows.data * np.log(base)))), None)


def _are_multiples(rows: sp.csr_matrix, values: np.ndarray) -> bool:
    """Whether in almost all cells almost all `values` are multiples of a unit of the cell.

    `values` are in the places of those of `rows`. Almost all of the fractional ones of `rows` must be: whole numbers are
    multiples whatever is made of them.
    """
    fitting, fractional = [], rows.data != np.rint(rows.data)
    for start, stop in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
        own, odd = values[start:stop], fractional[start:stop]
        if odd.any() and len(np.unique((own / own.min()).round(3))) >= FEWEST:
            fitting.append(max(_fit(own, odd, unit) for unit in _units(own)) >= ALMOST_ALL)
    return bool(fitting) and float(np.mean(fitting)) >= ALMOST_ALL


def _units(values: np.ndarray) -> list[float]:
    """What the unit can be: a part of the smallest value, or, where all are large, the smallest difference."""
    steps = np.diff(np.sort(values))
    steps = steps[steps > MOST_UNITS**-1 * values.min()]
    return [values.min() / n for n in PARTS] + ([float(steps.min())] if len(steps) else [])


def _fit(values: np.ndarray, odd: np.ndarray, unit: float) -> float:
    """Share of the values, or of the `odd` ones if it is smaller, that are multiples; very large ones say nothing."""
    for most in (30.0, MOST_UNITS):  # more exact with values that are sure already
        n = np.rint(values / unit)
        sure = (n > 0) & (n <= most)
        unit = float((values * n)[sure].sum() / max((n * n)[sure].sum(), 1.0)) if sure.any() else unit
    ratio = values / unit
    near = np.abs(ratio - np.rint(ratio)) <= np.minimum(ROUNDING * np.maximum(ratio / 20, 1), 0.1)
    small = ratio <= MOST_UNITS
    shares = [float(near[part].mean()) if part.any() else 0.0 for part in (small, small & odd)]
    return min(shares) if 2 * small.sum() >= len(values) else 0.0


def _undone(rows: sp.csr_matrix, base: float) -> np.ndarray:
    undone = np.expm1(np.minimum(rows.data * np.log(base), 700.0))
    return np.asarray(sp.csr_matrix((undone, rows.indices, rows.indptr), shape=rows.shape).sum(1)).ravel()


def _variation(totals: np.ndarray) -> float:
    """Coefficient of variation."""
    return float(totals.std() / max(totals.mean(), 1e-300))


def _refuse_odd_integers(scanned: Scan, source: str) -> None:
    no_zero = scanned.n_nonzero == len(scanned.totals) * len(scanned.detected)
    if scanned.maximum <= 1:
        odd = "all values are 0 or 1"
    elif no_zero and len(scanned.totals) > 1 and np.ptp(scanned.totals) == 0:
        odd = "all cells have the same total and no zero, as ranks do"
    elif no_zero and scanned.maximum <= 20:
        odd = f"all values are whole, none is zero and the largest is {scanned.maximum:g}, as of rounded logarithms"
    else:
        return
    raise InputError(f"{source}: {odd}, neither counts nor log-normalised values.", HINT + " --values overrides this.")


def values_of(source: str | Path | ad.AnnData, screen: Screen, scanned: Scan, config: DataConfig) -> Values:
    """`kind_of_values`, with the layer that would be better where the values are of no kind, or scaled."""
    try:
        found = kind_of_values(screen, scanned, config.values)
    except InputError as error:
        hint = _use(better_layers(source, screen.layers, config.layer))
        raise InputError(error.message, hint or error.hint) from None
    if found.kind == "continuous" and config.values == "auto":
        better = _use(better_layers(source, screen.layers, config.layer))
        return replace(found, doubt=f"These values are scaled or transformed. {better}" if better else "")
    return found


def _use(better: dict[str, str]) -> str:
    named = {"counts": "counts", "log": "log-normalised values"}
    return next(
        (f"Layer {name!r} holds {named[kind]}: use --layer {shlex.quote(name)}." for name, kind in better.items()), ""
    )


def better_layers(source: str | Path | ad.AnnData, layers: tuple[str, ...], used: str | None) -> dict[str, str]:
    """Layers, and ``raw``, whose values are counts or logarithms, with their kind by a few cells; counts first."""
    found = {}
    for name in layers:
        with suppress(InputError), open_screen(source, name) as screen:
            if name != used:
                rows = screen.sample(np.arange(screen.n_cells), SAMPLE)[1]
                some = replace(screen, matrix=rows, features={}, obs=screen.obs.iloc[: rows.shape[0]])
                found[name] = kind_of_values(some, scan(some)).kind
    return {name: kind for wanted in ("counts", "log") for name, kind in found.items() if kind == wanted}
