"""Which pairs do not hang on one choice: they are called again with other components, perturbations and guides.

A pair is robust if it is called, with the same sign, with three quarters and five quarters of the components, without
any one perturbation of its programs, and from either half of the guides where guides are known.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crlseq.discovery.hits import Floats
from crlseq.discovery.ordering import Ints, Ordering, order_programs
from crlseq.discovery.pairs import Bools
from crlseq.threads import counted, in_parallel

COMPONENTS = (0.75, 1.25)  # times those of the fit
MAX_LEFT_OUT = 10  # perturbations of a program that are left out, one at a time, at most
CALLED = ("upstream", "likely")

# Cells, environments and targets, as `order_programs` takes them, and contexts of the cells
Variant = tuple[Floats, Ints, Ints, Ints | None]


def robust_pairs(
    ordering: Ordering,
    y: Floats,
    environment: Ints,
    targets: Ints,
    guide: Ints | None,
    threads: int,
    context: Ints | None = None,
) -> Bools:
    """Robust pairs (p, p) among those called in ``ordering``, which was made of the first ``len(center)`` components.

    ``y`` (n, q) has more components where there are more; ``guide`` (n,) is each cell's guide, None if unknown.
    """
    p, q = len(ordering.declared), len(ordering.center)
    robust = ordering.pairs.have(*CALLED)
    if not robust.any():
        return robust

    def called_again(variant: Variant) -> Bools:
        again = order_programs(*variant[:3], p, context=variant[3])
        n = min(q, len(again.axes))
        turned = np.sign((again.axes[:n] * ordering.axes[:n]).sum(0))  # an axis has no sign of its own
        same = np.sign(again.pairs.change) * np.outer(turned, turned) == np.sign(ordering.pairs.change)
        called: Bools = again.pairs.have(*CALLED) & same
        return called

    variants = list(_variants(y, q, (environment, targets, context), guide))
    for again in counted(in_parallel(called_again, variants, threads), len(variants)):
        robust &= again
    return robust


def _variants(y: Floats, q: int, screen: tuple[Ints, Ints, Ints | None], guide: Ints | None) -> Iterator[Variant]:
    """The screen with other components, and without some of its cells."""
    environment, targets, context = screen
    p = len(np.unique(targets))
    for share in COMPONENTS:
        n = round(share * q)
        if p < n <= y.shape[1] and n != q:
            yield y[:, :n], environment, targets, context
    y = y[:, :q]
    sizes = np.bincount(targets)
    place = np.array([int((targets[:c] == target).sum()) for c, target in enumerate(targets)])  # within its program
    for left_out in range(min(MAX_LEFT_OUT, int(sizes.max()))):
        kept = (place != left_out) | (sizes[targets] == 1)
        yield _without(y, environment, targets, context, kept)
    if guide is not None:
        half = np.zeros(len(guide), dtype=np.int64)
        for c in range(1, len(targets) + 1):  # of the guides of one perturbation every other one
            own = environment == c
            half[own] = np.unique(guide[own], return_inverse=True)[1] % 2
        for side in (0, 1):
            own = (environment == 0) | (half == side)
            there = np.bincount(environment[own], minlength=len(targets) + 1)[1:] > 1
            if len(np.unique(targets[there])) == p:
                yield _without(y[own], environment[own], targets, None if context is None else context[own], there)


def _without(y: Floats, environment: Ints, targets: Ints, context: Ints | None, kept: Bools) -> Variant:
    """The perturbations ``kept`` (K,) alone, numbered again."""
    number = np.concatenate([[0], np.where(kept, np.cumsum(kept), -1)])[environment]
    own = number >= 0
    return y[own], number[own], targets[kept], None if context is None else context[own]
