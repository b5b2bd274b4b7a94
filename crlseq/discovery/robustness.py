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

# How many components, and which cells (n,) and perturbations (K,): copies of cells are made where they are used.
Variant = tuple[int, Bools, Bools]


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
        components, own, kept = variant
        number = np.concatenate([[0], np.cumsum(kept)])[environment[own]]
        there = None if context is None else context[own]
        again = order_programs(y[own, :components], number, targets[kept], p, context=there)
        n = min(q, len(again.axes))
        turned = np.sign((again.axes[:n] * ordering.axes[:n]).sum(0))  # an axis has no sign of its own
        same = np.sign(again.pairs.change) * np.outer(turned, turned) == np.sign(ordering.pairs.change)
        called: Bools = again.pairs.have(*CALLED) & same
        return called

    variants = list(_variants(q, y.shape[1], environment, targets, guide))
    for again in counted(in_parallel(called_again, variants, threads), len(variants)):
        robust &= again
    return robust


def _variants(q: int, most: int, environment: Ints, targets: Ints, guide: Ints | None) -> Iterator[Variant]:
    """Other numbers of components than ``q``, at most ``most``; and without some of the cells."""
    p, every = len(np.unique(targets)), np.ones(len(targets), dtype=bool)

    def of(kept: Bools) -> Bools:
        own: Bools = np.concatenate([[True], kept])[environment]
        return own

    for share in COMPONENTS:
        n = round(share * q)
        if p < n <= most and n != q:
            yield n, of(every), every
    sizes = np.bincount(targets)
    place = np.array([int((targets[:c] == target).sum()) for c, target in enumerate(targets)])  # within its program
    for left_out in range(min(MAX_LEFT_OUT, int(sizes.max()))):
        kept = (place != left_out) | (sizes[targets] == 1)
        yield q, of(kept), kept
    if guide is not None:
        half = np.zeros(len(guide), dtype=np.int64)
        for c in range(1, len(targets) + 1):  # of the guides of one perturbation every other one
            own = environment == c
            half[own] = np.unique(guide[own], return_inverse=True)[1] % 2
        for side in (0, 1):
            own = (environment == 0) | (half == side)
            kept = np.bincount(environment[own], minlength=len(targets) + 1)[1:] > 1
            if len(np.unique(targets[kept])) == p:
                yield q, own & of(kept), kept
