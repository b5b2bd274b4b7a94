"""For every pair of programs, what the data say about "k is upstream of i", and how surely.

A pair is called from `crlseq.discovery.changes` where E and F both show a change and the reverse is seen to be small.
Guards hold a call back, each against a way in which other things than a cut look like one:

``change``    E beyond `CALL` standard errors
``slope``     F beyond `CALL_F` with the same sign: no turned axis (second targets, batches)
``one way``   the reverse smaller than half of it, beyond its error: no hidden cause, cycle or bent equations
``cut``       an intervention on k is itself seen to cut: a mere shift proves nothing by its small reverse
``resolved``  no partner of k that is not ordered against k reaches i as well: no ancestor's hidden cause
``dose``      the change is the same at all doses: no shift whose size depends on k
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from crlseq.discovery.changes import Changes
from crlseq.discovery.effects import benjamini_hochberg
from crlseq.discovery.hits import Floats
from crlseq.storage.stage_cache import cached_on_disk

Bools = NDArray[np.bool_]
CALL, CALL_F, LINKED, REACHES = 3.5, 2.5, 3.0, 4.0  # |z|
SMALL = 0.5  # share of a change below which the reverse must be, with two standard errors
LEAST_CUT = 0.15
DOSE = 6.0  # chi-square by which a constant change must beat one in proportion to the shift
POWER = 0.84  # standard normal quantile of 80 % power
SIZE = 0.3  # standard deviations of control cells: a change that matters, and that "excluded" is about
STATUSES = ("upstream", "likely", "both ways", "excluded", "undecided")
GUARDS = ("change", "slope", "one way", "cut", "resolved", "dose")


@cached_on_disk()
@dataclass(frozen=True)
class Pairs:
    """All (p, p), row k -> column i; the diagonal means nothing."""

    change: Floats  # -E, in standard deviations of control cells: its sign is the effect's
    error: Floats  # infinite where nothing can be told
    status: NDArray[np.int64]  # index in STATUSES
    guards: Bools  # (len(GUARDS), p, p) passed
    detectable: Floats  # smallest |change| seen with 80 % power
    fdr: Floats  # of no change (Benjamini and Hochberg 1995)

    def reordered(self, order: NDArray[np.int64]) -> Pairs:
        """The same with programs in another order (p,)."""
        both = np.ix_(order, order)
        return Pairs(
            self.change[both], self.error[both], self.status[both], self.guards[:, order][:, :, order],
            self.detectable[both], self.fdr[both],
        )  # fmt: skip

    def have(self, *names: str) -> Bools:
        """(p, p): pairs of these statuses."""
        own = np.isin(self.status, [STATUSES.index(name) for name in names])
        return own & ~np.eye(len(own), dtype=bool)


def judge_pairs(found: Changes) -> Pairs:
    """The status of every ordered pair."""
    p = len(found.e)
    off = ~np.eye(p, dtype=bool)
    z, zf = np.abs(found.e) / found.e_error * off, np.abs(found.f) / found.f_error * off
    guards = _guards(found, z, zf)
    change, slope, one_way, cut, resolved, dose = guards
    called = change & one_way
    upstream = called & slope & cut & resolved & dose
    both = change & change.T & ~one_way & ~one_way.T
    fdr = np.ones((p, p))
    known = off & np.isfinite(found.e_error)
    fdr[known] = benjamini_hochberg(2 * norm.sf(z[known]))
    detectable = (CALL + POWER) * found.e_error
    status = np.where(detectable <= SIZE, STATUSES.index("excluded"), STATUSES.index("undecided"))
    status[change] = STATUSES.index("undecided")
    status[called] = STATUSES.index("likely")
    status[both] = STATUSES.index("both ways")
    status[upstream] = STATUSES.index("upstream")
    return Pairs(-found.e, found.e_error, status, guards, detectable, fdr)


def _guards(found: Changes, z: Floats, zf: Floats) -> Bools:
    """(len(GUARDS), p, p): which guards each pair passes."""
    e, f, off = np.abs(found.e), np.abs(found.f), ~np.eye(len(z), dtype=bool)
    strong, weak = np.minimum(e, f), np.maximum(e + 2 * found.e_error, f + 2 * found.f_error)
    change = (z > CALL) & off
    slope = (zf > CALL_F) & (np.sign(found.e) == np.sign(found.f)) & off
    one_way = (SMALL * strong > weak.T) & off
    cut_z = np.abs(found.cut) / found.cut_error
    cuts = (cut_z > CALL) & (np.abs(found.cut) > LEAST_CUT) | (np.minimum(z, zf) > REACHES).any(0)
    cut = np.broadcast_to(cuts[:, None], z.shape) & off
    dose = _same_at_all_doses(found) & off
    called = change & slope & one_way & cut & dose
    linked = (z > LINKED) | (zf > LINKED)
    unresolved = (linked | linked.T) & ~called & ~called.T & off
    resolved = ((unresolved.astype(float) @ (z > REACHES)) == 0) & off
    return np.stack([change, slope, one_way, cut, resolved, dose])


def _same_at_all_doses(found: Changes) -> Bools:
    """(p, p): a constant change fits a target's perturbations better than one in proportion to their shifts."""
    same = np.zeros(found.e.shape, dtype=bool)
    for i, group in enumerate(found.by_target):
        if len(group) < 2:
            continue
        a = np.array([one.shift[i] for one in group])[:, None]
        d = np.stack([one.covariance.value for one in group])
        w = 1 / np.stack([one.covariance.variance for one in group])
        constant = (w * (d - (w * d).sum(0) / w.sum(0)) ** 2).sum(0)
        proportional = (w * (d - a * (w * a * d).sum(0) / (w * a * a).sum(0)) ** 2).sum(0)
        scatter = np.maximum(1, (constant + 4) / (len(group) + 3))
        same[:, i] = (proportional - constant) / scatter > DOSE
    return same
