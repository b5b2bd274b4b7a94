"""The order of programs by what interventions change: axes, pairs, direct edges, and how often they are found again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from crlseq.discovery.assumptions import broken_assumptions
from crlseq.discovery.axes import SAME, alike, exogenous_axes, shifts_outside
from crlseq.discovery.changes import Changes, bend_of, measure_changes, retained, widened
from crlseq.discovery.context_changes import changes_by_context, differences
from crlseq.discovery.direct_edges import Direct, beside_mediators, direct_edges, through_silent
from crlseq.discovery.hits import Floats, Hit
from crlseq.discovery.pairs import SEEN, Bools, Pairs, judge_pairs
from crlseq.storage.stage_cache import cached_on_disk
from crlseq.threads import counted, in_parallel

Ints = NDArray[np.int64]
MAYBE = 1.5  # standard errors from which a pair may be a link of a chain
DIFFER_FDR = 0.05  # of pairs that differ between contexts
BEFORE = 1e6  # likely pairs are ordered before those
COPIED = 1 << 27  # bytes of cells that replicates draw at the same time, at most


@cached_on_disk()
@dataclass(frozen=True)
class InContext:
    """What cells of one context say by themselves."""

    pairs: Pairs
    direct: Direct
    declared: Bools

    def reordered(self, order: Ints) -> InContext:
        """The same with programs in another order (p,)."""
        return InContext(self.pairs.reordered(order), self.direct.reordered(order), self.declared[np.ix_(order, order)])


@cached_on_disk()
@dataclass(frozen=True)
class Ordering:
    """What is known of the order of p programs; programs as the targets name them."""

    center: Floats  # (q,)
    axes: Floats  # (q, p): exogenous coordinates x = (y - center) @ axes, of unit variance over control cells
    pairs: Pairs
    direct: Direct
    declared: Bools  # (p, p) direct edges between pairs that pass every guard; a DAG
    hits: dict[int, Hit]  # by perturbation: the mixture of hit and escaped cells, where they are told apart
    along: dict[int, Floats]  # (q,) their scores are (y - center) @ along
    retained: dict[int, tuple[float, float]]  # share of its target's change that a perturbation leaves, and its error
    robust: Bools  # (p, p) pairs that are called whatever is left out, see `crlseq.discovery.robustness`
    support: Floats  # (p, p) share of replicates that declare the edge again; NaN without replicates
    ancestor: Floats  # (p, p) likewise the pair to be upstream
    warnings: tuple[str, ...] = ()  # of assumptions that the screen breaks
    bend: float | None = None  # of coordinates that a network straightened, see `crlseq.discovery.changes.bend_of`
    contexts: tuple[InContext, ...] = ()  # where some pair differs between contexts
    differ: Floats | None = None  # (p, p) FDR that what interventions change differs between contexts, NaN untested
    differ_error: Floats | None = None  # (p, p) standard error of such a difference

    def directions(self) -> Floats:
        """Read-out (q, p) of the programs, u = (y - center) @ directions = x (I - G)^-1 with the declared G."""
        graph = self.direct.effect * self.declared
        directions: Floats = self.axes @ np.linalg.inv(np.eye(len(graph)) - graph)
        return directions

    def exogenous(self, y: Floats) -> Floats:
        """Coordinates x (n, p) of cells (n, q)."""
        x: Floats = y @ self.axes - self.center @ self.axes
        return x

    def posterior(self, y: Floats, perturbation: int) -> Floats:
        """Probability (n,) of cells (n, q) of a perturbation to have been hit; NaN where it cannot be told."""
        if perturbation not in self.hits:
            return np.full(len(y), np.nan)
        return self.hits[perturbation].posterior((y - self.center) @ self.along[perturbation])

    def reordered(self, order: Ints) -> Ordering:
        """The same with programs in another order (p,)."""
        both = np.ix_(order, order)
        return replace(
            self,
            axes=self.axes[:, order],
            pairs=self.pairs.reordered(order),
            direct=self.direct.reordered(order),
            declared=self.declared[both],
            robust=self.robust[both],
            support=self.support[both],
            ancestor=self.ancestor[both],
            contexts=tuple(one.reordered(order) for one in self.contexts),
            differ=None if self.differ is None else self.differ[both],
            differ_error=None if self.differ_error is None else self.differ_error[both],
        )


def order_programs(
    y: Floats,
    environment: Ints,
    targets: Ints,
    p: int,
    straightened: bool = False,
    readout: Floats | None = None,
    context: Ints | None = None,
) -> Ordering:
    """The order from cells ``y`` (n, q), ``environment`` (n,) 0 for control and c + 1 for perturbation c, and the program
    that each perturbation targets, ``targets`` (K,). Errors are widened by what bends a network left where it straightened.
    Programs have the signs of the ``readout`` (q, p) where there is one. ``context`` (n,) of each cell if there are several.
    """
    center, axes = exogenous_axes(y, environment, targets, p)
    x = y @ axes - center @ axes
    if readout is not None:
        sign = np.where(((y @ readout - center @ readout) * x).mean(0) < 0, -1.0, 1.0)
        axes, x = axes * sign, x * sign
    found = measure_changes(x, environment, targets, context)
    bend = bend_of(found) if straightened else None
    found = widened(found, bend)
    pairs = judge_pairs(found)
    direct, declared = _direct(found, pairs)
    told = [one for group in found.by_target for one in group if one.hit.told]
    hits = {one.perturbation: one.hit for one in told}
    along = {one.perturbation: axes @ one.along for one in told}
    robust = np.zeros((p, p), dtype=bool)  # not tried
    n_control = int((environment == 0).sum())
    same = int(alike(axes, SAME).sum()) // 2
    warnings = broken_assumptions(found, pairs, shifts_outside(y, x, environment), n_control, same)
    unknown = np.full((p, p), np.nan)
    kept = retained(found)
    contexts, *differ = _by_context(y, environment, targets, axes, context, bend)
    return Ordering(
        center, axes, pairs, direct, declared, hits, along, kept, robust, unknown, unknown, warnings, bend, contexts, *differ
    )  # fmt: skip


def _by_context(
    y: Floats, environment: Ints, targets: Ints, axes: Floats, context: Ints | None, bend: float | None
) -> tuple[tuple[InContext, ...], Floats | None, Floats | None]:
    """What each context says by itself, where some pair differs; FDR and errors (p, p) of differences. Nothing without contexts."""
    if context is None:
        return (), None, None
    found, level_error = changes_by_context(y, environment, targets, axes, context)
    found = [widened(one, bend) for one in found]
    differ, error = differences(found, level_error)
    if not (differ <= DIFFER_FDR).any():
        return (), differ, error
    judged = [(one, judge_pairs(one)) for one in found]
    return tuple(InContext(pairs, *_direct(one, pairs)) for one, pairs in judged), differ, error


def with_support(
    ordering: Ordering,
    x: Floats,
    environment: Ints,
    targets: Ints,
    n: int,
    seed: int,
    threads: int,
    context: Ints | None = None,
) -> Ordering:
    """With the support of edges and of pairs over ``n`` replicates, which draw the cells of each environment again;
    ``x`` (n, p) are `Ordering.exogenous` coordinates.
    """
    order = np.argsort(environment, kind="stable")
    start = np.cumsum(np.bincount(environment))
    sizes = np.diff(start, prepend=0)

    def replicate(i: int) -> Bools:
        rng = np.random.default_rng([seed, 11, i])
        drawn = np.concatenate([rng.integers(end - m, end, m) for m, end in zip(sizes, start, strict=True)])
        rows = order[drawn]
        own = None if context is None else context[rows]
        found = measure_changes(x[rows], environment[rows], targets, own)
        found = widened(found, ordering.bend)
        pairs = judge_pairs(found)
        return np.stack([_direct(found, pairs)[1], pairs.have("upstream")])

    threads = max(1, min(threads, COPIED // max(x.nbytes, 1)))
    again = list(counted(in_parallel(replicate, range(n), threads), n))
    if not again:
        return ordering
    edges, upstream = np.mean(again, axis=0)
    return replace(ordering, support=edges, ancestor=upstream)


def _direct(found: Changes, pairs: Pairs) -> tuple[Direct, Bools]:
    """Direct edges that explain what is seen; those between pairs that pass every guard are declared. Weak pairs take part,
    since a program may be upstream of another through one that is not called.
    """
    upstream, likely, z = pairs.have("upstream"), pairs.have("likely"), np.abs(pairs.change) / pairs.error
    ordered = _acyclic(upstream | likely | (z > MAYBE), np.where(upstream, np.inf, np.where(likely, BEFORE + z, z)))
    both = pairs.have("both ways")
    direct = direct_edges(found, ordered | (both & ~pairs.hidden), both & pairs.hidden)
    edges = direct.effect != 0
    possible = ~(pairs.have("excluded") | upstream.T | edges.T)
    left = beside_mediators(found, direct, edges | upstream | likely | both | (z > SEEN), possible)
    return direct, left & upstream & ~through_silent(found, direct, upstream | likely)


def _acyclic(edges: Bools, z: Floats) -> Bools:
    """The pairs (p, p) without those that would close a cycle with pairs of larger ``z``."""
    reach, kept = np.eye(len(edges), dtype=bool), np.zeros_like(edges)
    for j, k in sorted(zip(*np.nonzero(edges), strict=True), key=lambda edge: (-z[edge], edge)):
        if not reach[k, j]:
            kept[j, k] = True
            reach |= np.outer(reach[:, j], reach[k])
    return kept
