"""For every pair of programs, what the data say about "k is upstream of i", and how surely.

A pair is called from `crlseq.discovery.changes` where E[k, i] is seen and E[i, k] is not. Other things than a cut can
look like that, each of which leaves its own trace; the guards ask for the absence of it:

``change``    E beyond `CALL` standard errors, and more among many pairs (Bonferroni)
``one way``   the reverse smaller than half of it, beyond its error: no hidden common cause, cycle or bent equations
``controls``  correlations of exogenous programs in controls leave most of it (`left_by_controls`): no ancestor's hidden
              cause, no axis that is turned by second targets which perturbations share
``beside``    covariances of k beside x_i stay as they are: no turned axis, no cells that are hit because of k
``escaped``   cells that escaped do not differ from controls in k the other way than hit ones: k does not choose them
``dose``      the change is the same at all doses: no shift whose size depends on k (`modulated`)

Wrong calls are weighed at the level of the screen where one screen can show them: a screen whose other changes are the
same at all doses makes a dependence on dose unlikely in a pair that cannot be tested.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from crlseq.discovery.changes import Changes
from crlseq.discovery.effects import benjamini_hochberg
from crlseq.discovery.hits import Floats
from crlseq.storage.stage_cache import cached_on_disk

Bools = NDArray[np.bool_]
CALL, SEEN, BACK = 3.5, 3.0, 3.2  # |z|: of a call, of what takes part in rules, of the reverse of a call
FALSE_CALLS = 0.025  # expected among all pairs, where they are so many that CALL gives more
LEFT, LEFT_LIKELY = 2.5, 1.5  # standard errors that correlations of controls must leave
MARGIN = 1.3  # on what correlations feign: shared background may hide a part of them
SMALL, SMALL_LIKELY = 0.5, 0.6  # share of a change below which the reverse must be, with two and one standard errors
BESIDE = 4.0  # |z| of a change where there is none
CHOSEN, CHOSEN_CALL = 0.25, 3.5  # standard deviations of controls by which escaped cells may differ, and its z
CHOSEN_SHARE = 0.7  # of |E|: hit cells that a true cause brings near controls are taken for escaped ones
MOST_HIT = 0.8  # of the cells: beyond, many of those that seem to have escaped were hit
MODULATED, MODULATED_LIKELY = 0.04, 0.5  # probability that a change is one in proportion to the dose
SHOWN, MODULATED_SHOWN = 0.08, 0.005  # share of such changes that a screen shows, and what is asked for there
DOSE = -5.0  # log-likelihood of the same change at all doses less that of one in proportion, of a pair by itself
MODULATED_PRIOR = (0.3, 6.0)  # modulated and other changes that the prior is worth
AGREE_DEGREES = 4.0  # of freedom, that perturbations of a target agree
LIKELY_FDR = 0.02
POWER = 0.84  # standard normal quantile of 80 % power
SIZE = 0.3  # standard deviations of control cells: a change that matters, and that "excluded" is about
HIDDEN = 0.4  # share of a change both ways from which correlation in controls explains it
STATUSES = ("upstream", "likely", "both ways", "excluded", "undecided")
GUARDS = ("change", "one way", "controls", "beside", "escaped", "dose")


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
    hidden: Bools  # of pairs seen both ways, those that correlate in controls: a hidden common cause, not a cycle
    modulated: Bools  # changes that grow with the shift of i: k sets how strongly i is shifted

    def have(self, *names: str) -> Bools:
        """(p, p): pairs of these statuses."""
        own = np.isin(self.status, [STATUSES.index(name) for name in names])
        return own & ~np.eye(len(own), dtype=bool)

    def reordered(self, order: NDArray[np.int64]) -> Pairs:
        """The same with programs in another order (p,)."""
        both = np.ix_(order, order)
        guards = self.guards[:, order][:, :, order]
        names = ("change", "error", "status", "detectable", "fdr", "hidden", "modulated")
        moved = {name: getattr(self, name)[both] for name in names}
        return replace(self, guards=guards, **moved)


def judge_pairs(found: Changes) -> Pairs:
    """The status of every ordered pair."""
    p, error = len(found.e), found.e_error
    off = ~np.eye(p, dtype=bool)
    size, z = np.abs(found.e), np.abs(found.e) / error * off
    call = max(CALL, float(norm.isf(FALSE_CALLS / 2 / max(p * (p - 1), 1))))
    left, (ratio, of_dose) = left_by_controls(found), doses(found)
    grows = (ratio < DOSE) & (of_dose > call)
    dose, share = modulated(ratio, (z > SEEN) | grows)
    shown = share >= SHOWN
    clean = _beside_unchanged(found, z), _not_chosen(found)
    one_way = SMALL * size > size.T + 2 * error.T
    same_dose = dose < (MODULATED_SHOWN if shown else MODULATED)
    guards = np.stack([z > call, one_way, left > LEFT * error, *clean, same_dose]) & off
    upstream = guards.all(0)
    fdr = np.ones((p, p))
    known = off & np.isfinite(error)
    fdr[known] = benjamini_hochberg(2 * norm.sf(z[known]))
    leaning = SMALL_LIKELY * size > size.T + error.T
    likely = (fdr < LIKELY_FDR) & leaning & (left > LEFT_LIKELY * error) & clean[0] & clean[1]
    likely &= dose < (MODULATED if shown else MODULATED_LIKELY)
    both = (np.maximum(z, z.T) > CALL) & (np.minimum(z, z.T) > BACK) & ~one_way & ~one_way.T & off
    detectable = (call + POWER) * error
    excluded = (detectable <= SIZE) & (size + 2 * error < detectable)
    status = np.where(excluded, STATUSES.index("excluded"), STATUSES.index("undecided"))
    status[likely & off] = STATUSES.index("likely")
    status[both] = STATUSES.index("both ways")
    status[upstream] = STATUSES.index("upstream")
    return Pairs(-found.e, error, status, guards, detectable, fdr, both & _hidden(found), grows)


def left_by_controls(found: Changes) -> Floats:
    """What is left (p, p) of |E| when all of it that correlations c of exogenous programs in controls can feign is off.

    Without background they are Omega, or axes that are turned by -c. A hidden cause of k and i gives E[k, i] = -c_ki; one
    of k and an ancestor j of i, or an axis j that is turned towards k, c_kj E[j, i]; an axis i that is turned towards k,
    c_ki times the change of Var(x_i). `MARGIN` times their sum is taken off.
    """
    e, c = found.e, found.correlation
    sign = np.sign(e)
    cut = np.where(np.isfinite(found.cut), found.cut, -0.5)
    own = np.maximum(0, np.maximum(-sign * c, sign * c * cut))
    seen = np.where(np.abs(e) > SEEN * found.e_error, e, 0)
    feigned = own
    for j in range(len(e)):
        by_j = np.maximum(0, sign * np.outer(c[:, j], seen[j]))
        by_j[:, j] = 0
        feigned = feigned + by_j
    left: Floats = np.abs(e) - MARGIN * feigned
    return left


def doses(found: Changes) -> tuple[Floats, Floats]:
    """Log-likelihood (p, p) of one change at all doses less that of a change in proportion to the shift of i, and |z| of the
    second: perturbations of both signs may change nothing on average.

    A program k that modulates the shift of i gives the second, a cut the first; 0 where one perturbation cannot tell.
    """
    ratio, z = np.zeros(found.e.shape), np.zeros(found.e.shape)
    for i, group in enumerate(found.by_target):
        if len(group) < 2:
            continue
        value, weight = np.stack([one.value for one in group]), 1 / np.stack([one.variance for one in group])
        (same, _), (dose, z_dose) = (
            _in_proportion(value, weight, np.array(x)[:, None])
            for x in ([one.scale for one in group], [one.shift[i] for one in group])
        )
        scatter = (np.minimum(same, dose) + AGREE_DEGREES) / (len(group) + AGREE_DEGREES - 1)
        ratio[:, i] = np.clip((dose - same) / np.maximum(1, scatter) / 2, -50, 50)
        z[:, i] = z_dose / np.sqrt(np.maximum(1, scatter))
    np.fill_diagonal(ratio, 0)
    return ratio, z


def modulated(ratio: Floats, seen: Bools) -> tuple[Floats, float]:
    """Probability (p, p) that E[k, i] is in proportion to the dose, by the ratio of `doses` and the share of such changes
    among all that are seen, and this share, found by EM.
    """
    share = 0.5
    for _ in range(50):
        total = (share / (share + (1 - share) * np.exp(ratio[seen]))).sum()
        share = float(total + MODULATED_PRIOR[0]) / (int(seen.sum()) + sum(MODULATED_PRIOR))
    probability: Floats = share / (share + (1 - share) * np.exp(ratio))
    return probability, share


def _in_proportion(value: Floats, weight: Floats, x: Floats) -> tuple[Floats, Floats]:
    """Chi-square (p,) of values (n, p) about their best multiple of x (n, 1), and |z| of this multiple."""
    square = (weight * x**2).sum(0)
    slope = (weight * x * value).sum(0) / square
    return (weight * (value - x * slope) ** 2).sum(0), np.abs(slope) * np.sqrt(square)


def _beside_unchanged(found: Changes, z: Floats) -> Bools:
    """(p, p): under do(i), covariances of k with itself and with others that x_i loses stay as they are."""
    moved = np.abs(found.beside) > BESIDE
    own = np.einsum("ikk->ki", moved)
    others = np.einsum("ikj,ji->ki", moved.astype(float), (z > CALL).astype(float)) > 0
    unchanged: Bools = ~(own | others)
    return unchanged


def _not_chosen(found: Changes) -> Bools:
    """(p, p): cells of perturbations of i that escaped and those that were hit do not lie on two sides of controls in k."""
    fine = np.ones(found.e.shape, dtype=bool)
    for i, group in enumerate(found.by_target):
        told = [one for one in group if one.hit.told and one.hit.share < MOST_HIT]
        if told:
            n = np.array([one.n_escaped for one in told])
            apart = n @ np.stack([-np.sign(one.shift) * one.escaped for one in told]) / n.sum()
            chosen = apart > np.maximum(CHOSEN, CHOSEN_SHARE * np.abs(found.e[:, i]))
            fine[:, i] = ~(chosen & (apart * np.sqrt(n.sum()) > CHOSEN_CALL))
    return fine


def _hidden(found: Changes) -> Bools:
    """(p, p): controls correlate as well, as Omega makes them; exogenous programs of a cycle do not."""
    least = np.minimum(np.abs(found.e), np.abs(found.e.T))
    hidden: Bools = np.abs(found.correlation) > HIDDEN * least
    return hidden
