"""Second targets: perturbations whose mean shift moves a second program beside their own.

Under linear equations the mean shift of perturbation c, in exogenous coordinates, is a sum over programs

    m_c = sum_j s[c, j] d_j,      d_i = e_i + b_i,

where d_i is the direction in which interventions on i alone move the cells, and s is sparse: its target, sometimes a
second one. Escaped cells shorten m_c and do not turn it. The lean b[i, j] is what most perturbations of target i agree
on: the minimum of a sum of squares that are cut off at `OUTLYING`, so that those with a second target on j do not draw
the axis towards it. What is left is divided by its error, widened where errors of one screen are larger than those of
sampling (an empirical null, Efron 2004, JASA 99:96).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from crlseq.discovery.effects import benjamini_hochberg
from crlseq.discovery.hits import Floats
from crlseq.storage.stage_cache import cached_on_disk

OUTLYING = 3.0  # standard errors
ROUNDS = 10  # of directions and shifts in turn
SETTLED = 1e-4
SPREAD = 0.03  # of the shift: by which directions of one target differ beyond sampling
LEAN_DEVIATION = (
    0.3  # prior standard deviation of a lean about that of uncorrelated control cells; decides where few agree
)
MAD_TO_SD = 1.4826
MIN_CELLS = 10
MIN_AGREEING = 2  # perturbations of a target, or what leans is not told from what has a second target


@cached_on_disk()
@dataclass(frozen=True)
class SecondTargets:
    """What each of K perturbations does to every program (K, p), in standard deviations of control cells."""

    shift: Floats  # s; of the target too
    error: Floats  # NaN at the target, where too few agree on its direction, and with fewer than `MIN_CELLS` cells
    z: Floats
    fdr: Floats  # of all that can be told (Benjamini and Hochberg 1995)
    directions: Floats  # (p, p) d_i in rows, in the coordinates that were given

    def reordered(self, order: NDArray[np.int64]) -> "SecondTargets":
        """The same with programs in another order (p,)."""
        shift, error, z, fdr = (table[:, order] for table in (self.shift, self.error, self.z, self.fdr))
        return SecondTargets(shift, error, z, fdr, self.directions[np.ix_(order, order)])


def second_targets(x: Floats, environment: NDArray[np.int64], targets: NDArray[np.int64]) -> SecondTargets:
    """Shifts of all programs by each perturbation from exogenous coordinates ``x`` (n, p), of unit variance over controls
    (`crlseq.discovery.changes.exogenous_axes`), ``environment`` (n,) 0 for control and c + 1 for perturbation c, and
    ``targets`` (K,).
    """
    k, p = len(targets), x.shape[1]
    n = np.bincount(environment, minlength=k + 1)
    means = (
        np.stack([np.bincount(environment, x[:, j], minlength=k + 1) for j in range(p)], 1) / np.maximum(n, 1)[:, None]
    )
    control = np.cov(x[environment == 0].T).reshape(p, p)
    own = np.stack([np.cov(x[environment == c + 1].T).reshape(p, p) if n[c + 1] > 1 else control for c in range(k)])
    sampling = own / np.maximum(n[1:], 1)[:, None, None] + control / n[0]
    mean, known = means[1:] - means[0], n[1:] >= MIN_CELLS
    directions = np.eye(p)
    for _ in range(ROUNDS):
        inverse = np.linalg.inv(directions)
        shift = mean @ inverse
        error = np.sqrt(np.einsum("aj,cab,bj->cj", inverse, sampling, inverse) + (SPREAD * _at(shift, targets)) ** 2)
        spread = inverse.T @ control @ inverse
        prior = spread / spread.diagonal()[:, None]
        lean = np.stack([_leans(shift[at], error[at], prior[i], i) for i, at in enumerate(_groups(targets, known, p))])
        directions = directions + lean @ directions
        directions /= directions.diagonal()[:, None]
        if np.abs(lean).max() < SETTLED:
            break
    shift = mean @ np.linalg.inv(directions)
    within = (np.abs(shift) < OUTLYING * error) & known[:, None]
    agreeing = np.stack([within[at].sum(0) for at in _groups(targets, known, p)])
    tested = (np.arange(p) != targets[:, None]) & known[:, None] & (agreeing[targets] >= MIN_AGREEING)
    z = np.where(tested, shift / error, np.nan)
    if tested.any():
        wider = max(1.0, MAD_TO_SD * float(np.median(np.abs(z[tested]))))
        error, z = error * wider, z / wider
    fdr = benjamini_hochberg(2 * norm.sf(np.abs(z)).ravel()).reshape(k, p)
    return SecondTargets(shift, np.where(tested, error, np.nan), z, fdr, directions)


def _at(values: Floats, targets: NDArray[np.int64]) -> Floats:
    """Entries (K, 1) at the targets."""
    return np.take_along_axis(values, targets[:, None], 1)


def _groups(targets: NDArray[np.int64], known: NDArray[np.bool_], p: int) -> list[NDArray[np.int64]]:
    """Perturbations of each target."""
    return [np.flatnonzero((targets == i) & known) for i in range(p)]


def _leans(shift: Floats, error: Floats, prior: Floats, i: int) -> Floats:
    """Lean (p,) of target ``i``'s direction that explains the shifts (m, p) of its perturbations but for outlying ones."""
    p = shift.shape[1]
    if not len(shift):
        return np.zeros(p)
    along = shift[:, [i]]
    slopes = shift / np.where(np.abs(along) > 1e-9, along, 1e-9)
    tried = np.concatenate([slopes, prior[None]])  # (m + 1, p)
    weight = (along / error) ** 2
    for _ in range(3):  # from each slope to the mean of those that agree with it
        apart = (shift - tried[:, None] * along) / error  # (m + 1, m, p)
        agree = (np.abs(apart) < OUTLYING) * weight
        tried = ((agree * slopes).sum(1) + prior / LEAN_DEVIATION**2) / (agree.sum(1) + LEAN_DEVIATION**-2)
    apart = (shift - tried[:, None] * along) / error
    cost = np.minimum(apart**2, OUTLYING**2).sum(1) + ((tried - prior) / LEAN_DEVIATION) ** 2
    best: Floats = np.take_along_axis(tried, cost.argmin(0)[None], 0)[0]
    best[i] = 0.0
    return best
