"""Which cells of a perturbation were hit, and what share of them: a mixture of two normals along its mean shift.

    s ~ (1 - pi) N(0, v) + pi N(mu, w)

of the scores s of a perturbation's cells along its shift, centred on control cells. The escaped cells are control cells, so
that v is known; pi, mu and w are found by EM (Dempster, Laird and Rubin 1977), with weak priors that keep w off 0 and pi
off both ends. The idea is mixscape's (Papalexi et al. 2021, Nature Genetics 53:322).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crlseq.storage.stage_cache import cached_on_disk

Floats = NDArray[np.float64]
STEPS, TOLERANCE = 200, 1e-5
SEPARATED = 2.0  # |mu| / sqrt(v) from which hit and escaped cells are told apart
SHARES = (0.05, 0.995)
MIN_WIDTH = 0.2  # of w over v
WIDTH_CELLS, ALL_HIT_CELLS = 10.0, 4.0  # cells that the priors are worth: on w = v, and on pi = 1


@cached_on_disk()
@dataclass(frozen=True)
class Hit:
    """The mixture of one perturbation."""

    share: float  # pi
    error: float  # standard error of the share, from the cells' scores of (pi, mu, log w)
    mean: float  # mu
    width: float  # w
    variance: float  # v

    @property
    def told(self) -> bool:
        """Whether hit and escaped cells can be told apart at all."""
        return self.separation >= SEPARATED

    @property
    def separation(self) -> float:
        """|mu| in standard deviations of control cells."""
        return abs(self.mean) / float(np.sqrt(self.variance))

    def posterior(self, s: Floats) -> Floats:
        """Probability (n,) of cells with scores ``s`` (n,) to have been hit."""
        return _posterior(s, 0.5 * s**2 / self.variance, self.share, self.mean, self.width, self.variance)


def hit_cells(s: Floats, variance: float) -> Hit:
    """The mixture of scores ``s`` (n,) of a perturbation's cells, ``variance`` being that of control cells about 0."""
    excess = max(float(s.var()) - variance, 0.0)
    square = float(s.mean()) ** 2
    share = float(np.clip(square / max(square + excess, 1e-300), 0.15, 0.97))
    mean, width = float(s.mean()) / share, variance
    escaped = 0.5 * s**2 / variance
    for _ in range(STEPS):
        r = _posterior(s, escaped, share, mean, width, variance)
        total = float(r.sum())
        new = (total + ALL_HIT_CELLS) / (len(s) + ALL_HIT_CELLS + 1)
        mean = float(r @ s) / max(total, 1e-12)
        spread = float(r @ (s - mean) ** 2) + WIDTH_CELLS * variance
        width = max(spread / (total + WIDTH_CELLS), MIN_WIDTH * variance)
        done = abs(new - share) < TOLERANCE
        share = min(max(new, SHARES[0]), SHARES[1])
        if done:
            break
    r = _posterior(s, escaped, share, mean, width, variance)
    scores = np.stack(
        [r / share - (1 - r) / (1 - share), r * (s - mean) / width, r * ((s - mean) ** 2 / width - 1) / 2]
    )
    information = scores @ scores.T + np.diag([1e-9, 1e-9, WIDTH_CELLS / 2])
    error = float(np.sqrt(np.linalg.inv(information)[0, 0]))
    return Hit(share, error, mean, width, variance)


def _posterior(s: Floats, escaped: Floats, share: float, mean: float, width: float, variance: float) -> Floats:
    """Probability (n,) to have been hit; ``escaped`` (n,) are s^2 / 2 v, and are the same in all steps."""
    against = np.log((1 - share) / share) + 0.5 * np.log(width / variance) + 0.5 * (s - mean) ** 2 / width
    against -= escaped
    # Millions of these are computed: np.clip takes longer than the arithmetic.
    np.minimum(np.maximum(against, -50, out=against), 50, out=against)
    r: Floats = 1 / (1 + np.exp(against, out=against))
    return r
