"""Scoring of many parameters: products with the information instead of its factor, which is made now and then.

Each step solves the damped system by conjugate gradients, preconditioned by the factor of an earlier information (Nocedal and
Wright 2006, ch. 7), and goes the best of a few lengths along it: an objective costs little, a factor a thousand times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.discovery.moments import DTYPE
from crlseq.discovery.scoring import MAX_STEP, NO_HOPE, TOLERANCE

Product = Callable[[Tensor], Tensor]
ACCURACY = 0.1  # of a step, in the norm of the preconditioner
FEW, MOST = 20, 60  # products of a step: after more than few the next one has a new factor; most that are tried
ROUNDING = 1e-6  # on the diagonal of what is factored in float32, scaled to 1
LEAST_DAMPING = 1e-3  # after a step that did not help: less changes nothing
SHORTER = 0.25


@dataclass(frozen=True)
class Problem:
    """What is minimised over parameters (P,): per cell, infinite where undefined."""

    value: Callable[[Tensor], Tensor]
    score: Callable[[Tensor], tuple[Tensor, Tensor]]  # value and gradient (P,)
    product: Callable[[Tensor], Product]  # with the information there
    information: Callable[[Tensor], Tensor]  # itself (P, P)
    free: Tensor  # (P,) positive for those that may move
    logarithms: slice  # of variances: where one goes to 0 its step has no bound


class _Factor:
    """Preconditioner of the damped system of the parameters that move."""

    def __init__(self, information: Tensor, moving: Tensor, damping: float, steep: Tensor) -> None:
        if len(moving) < len(information):
            information = information[moving][:, moving]
        self.diagonal = information.diagonal().clone()
        self.scale = (self.diagonal * (1 + damping) + 1e-9 + steep).rsqrt()
        scaled = information.mul_(self.scale).mul_(self.scale[:, None]).float()
        del information
        on_top = ROUNDING
        while True:
            scaled.diagonal().fill_(1 + on_top)
            self.root, failed = torch.linalg.cholesky_ex(scaled)
            if not failed or on_top >= 1:
                break
            on_top *= 10

    def __call__(self, v: Tensor) -> Tensor:
        # Two triangular solves: for one vector `cholesky_solve` takes seven times as long.
        half = torch.linalg.solve_triangular(self.root, (v * self.scale).float()[:, None], upper=False)
        whole = torch.linalg.solve_triangular(self.root.T, half, upper=True)
        v = whole[:, 0].to(DTYPE) * self.scale
        return v


def conjugate_gradients(times: Product, precondition: Product, b: Tensor) -> tuple[Tensor, int]:
    """``x`` (m,) of ``A x = b`` to `ACCURACY`, and after how many products; after `MOST` as it is then."""
    x, r = torch.zeros_like(b), b
    z = precondition(r)
    direction, square = z, r @ z
    goal = ACCURACY**2 * square
    n = 0
    while n < MOST:
        n += 1
        moved = times(direction)
        length = square / (direction @ moved)
        x, r = x + length * direction, r - length * moved
        z = precondition(r)
        before, square = square, r @ z
        if square <= goal:
            break
        direction = z + square / before * direction
    return x, n


def search(problem: Problem, theta: Tensor, cells: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Damped scoring from ``theta`` (P,): where it ends, the value there, and whether it converged, as `scoring.solve` does."""
    moving = torch.nonzero(problem.free > 0)[:, 0]
    (value, gradient), damping, factor = problem.score(theta), 1e-2, None
    for _ in range(steps):
        times, steep = problem.product(theta), torch.zeros_like(theta)
        # The curvature of a logarithm beyond the information: without it steps of variances that go to 0 have no bound.
        steep[problem.logarithms] = gradient[problem.logarithms].abs()
        steep = steep[moving]
        n = MOST
        while n == MOST:
            fresh = factor is None
            factor = factor or _Factor(problem.information(theta), moving, damping, steep)
            on_top = damping * factor.diagonal + 1e-9 + steep
            solved, n = conjugate_gradients(_among(times, moving, on_top, theta), factor, -gradient[moving])
            factor = factor if n <= FEW else None
            if fresh:
                break
        step = torch.zeros_like(theta)
        step[moving] = solved
        if -0.5 * float(gradient @ step) * cells < TOLERANCE:
            return theta, value, torch.isfinite(value)
        tried = [(float(problem.value(theta + way)), way) for way in _lengths(step, problem.logarithms)]
        best, way = min(tried, key=lambda pair: pair[0])
        if best < float(value):
            theta, damping = theta + way, max(damping / 4, 1e-9)
            value, gradient = problem.score(theta)
        else:
            damping = max(damping * 6, LEAST_DAMPING)
            if damping > NO_HOPE:
                break
    return theta, value, torch.tensor(False)


def _among(times: Product, moving: Tensor, on_top: Tensor, like: Tensor) -> Product:
    """The product among the parameters that move, with ``on_top`` on the diagonal."""

    def product(v: Tensor) -> Tensor:
        whole = torch.zeros_like(like)
        whole[moving] = v
        return times(whole)[moving] + on_top * v

    return product


def _lengths(step: Tensor, logarithms: slice) -> list[Tensor]:
    """Steps to try: with logarithms of variances cut to `MAX_STEP`, the whole of it scaled to that, and a part of this."""
    cut = step.clone()
    cut[logarithms] = cut[logarithms].clamp(-MAX_STEP, MAX_STEP)
    whole, cut = (way * (MAX_STEP / way.abs().max().clamp_min(MAX_STEP)) for way in (step, cut))
    return [cut, whole, SHORTER * whole]
