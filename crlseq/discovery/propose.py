"""Which perturbations share a target: k-lines on what each changes most, its mean or its variances.

The mean shifts of one target lie on a line through 0, in whitened coordinates that of S^-1 x for a row x of T W
(`crlseq.discovery.likelihood`). An intervention that moves no mean changes the precision by b b' - a a', where a of the
controls lies on the same line, and b of the intervention in one direction for all of the target (Squires et al. 2023).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.discovery.moments import DTYPE, Moments

RACE_ROUNDS = 5  # after which tries are far enough apart to go on with the best alone
LEFT_OF_RACE = 4  # one in so many
CLEAR_SHIFT = 6.0  # standard deviations by chance of a squared shift
CELLS_PER_COMPONENT = 3  # fewer tell no precision


@dataclass(frozen=True)
class Leading:
    """What each of K perturbations changes most, and second most: unit ``directions`` (K, 2, q) in coordinates whitened
    by the covariance within environments, ``lengths`` (K,) of the first in standard errors, ``of_means`` (K,) whether it
    is a mean shift, ``errors`` (K,) of a mean in standard deviations, ``root`` (q, q) of the covariance (a direction d of
    the components is ``root @ d``), and differences of ``covariances`` (K, q, q).
    """

    directions: Tensor
    lengths: Tensor
    of_means: Tensor
    errors: Tensor
    root: Tensor
    covariances: Tensor

    def in_components(self, angles: Tensor) -> Tensor:
        """The changes (..., K, q) in the units of components, turned by ``angles`` (..., K) towards the second."""
        turned = self.directions[:, 0] * angles.cos()[..., None] + self.directions[:, 1] * angles.sin()[..., None]
        return turned * (self.lengths * self.errors)[:, None] @ self.root.T


def leading_changes(moments: Moments) -> Leading:
    """The mean shift of a perturbation where it is clear; else that, or the eigenvectors of its difference of precisions,
    by what is further from chance: the squared shift beyond its expectation, or the square of the largest eigenvalue of
    the difference of covariances beyond that of the largest one by chance (Marchenko and Pastur 1967).
    """
    q, n, control = moments.means.shape[1], moments.n_controls, moments.control
    shifts, variance, root = _in_errors(moments)
    size = shifts.norm(dim=1)
    white = torch.linalg.solve_triangular(root, moments.covariances, upper=False)
    white = torch.linalg.solve_triangular(root, white.transpose(1, 2), upper=False)
    enough = moments.counts > CELLS_PER_COMPONENT * q
    white[:n] = torch.where(enough[:n, None, None], white[:n], torch.eye(q, dtype=DTYPE))
    white[n:] = torch.where(enough[n:, None, None], white[n:], white[control])
    change = white[n:] - white[control]
    largest = torch.linalg.eigvalsh(change).abs().amax(1) / variance.sqrt()
    beyond = (largest**2 - (2 * math.sqrt(q) + q * variance.sqrt()) ** 2).clamp_min(0) / 2  # Var of a variance is 2
    precision = torch.linalg.inv(white + 1e-9 * torch.eye(q, dtype=DTYPE))
    value, vector = torch.linalg.eigh(precision[n:] - precision[control])
    order = value.abs().argsort(1, descending=True)[:, None].expand_as(vector)
    first, second = (
        vector.gather(2, order)[:, :, : min(2, q)].transpose(1, 2).unbind(1) if q > 1 else (vector[:, 0],) * 2
    )
    mean = shifts / size[:, None].clamp_min(1e-9)
    of_means = size**2 - q >= beyond.clamp_max(CLEAR_SHIFT * math.sqrt(2 * q))
    by_mean = of_means[:, None]
    directions = torch.stack([torch.where(by_mean, mean, first), torch.where(by_mean, first, second)], 1)
    return Leading(directions, torch.where(of_means, size, beyond.sqrt()), of_means, variance.sqrt(), root, change)


def _in_errors(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Mean shifts (K, q) in standard errors, whitened by the root (q, q) of the covariance within environments, and the
    variances (K,) of a whitened mean.
    """
    root = torch.linalg.cholesky(moments.pooled() + 1e-9 * torch.eye(moments.means.shape[1], dtype=DTYPE))
    variance = 1 / moments.counts[moments.n_controls :] + 1 / moments.counts[moments.control]
    shifts = torch.linalg.solve_triangular(root, moments.shifts().T, upper=False).T
    return shifts / variance.sqrt()[:, None], variance, root


def most_telling(moments: Moments, n: int) -> Tensor:
    """The ``n`` perturbations (n,), ascending, whose mean shifts tell most of all programs together.

    One after the other that which adds most to ``log|I + sum_k z_k' z_k|``, ``log(1 + z A^-1 z')``: a D-optimal design
    (Chaloner and Verdinelli 1995), ``z`` in standard errors. The strongest alone may all be of a few programs.
    """
    z = _in_errors(moments)[0]
    inverse, left = torch.eye(z.shape[1], dtype=DTYPE), torch.ones(len(z), dtype=torch.bool)
    for _ in range(n):
        told = torch.where(left, ((z @ inverse) * z).sum(1), -1.0)
        k = told.argmax()
        left[k] = False
        along = inverse @ z[k]
        inverse = inverse - along[:, None] * along / (1 + told[k])
    return torch.nonzero(~left)[:, 0]


def propose_targets(
    moments: Moments, n_latents: int, n: int, generator: torch.Generator, tries: int = 256, rounds: int = 30
) -> Tensor:
    """The ``n`` best distinct partitions (n, K) of perturbations into lines through 0, best first.

    k-lines (k-means without sign and length) on the leading changes, in standard errors: what a line leaves over is
    then noise of unit variance, and a perturbation without effect weighs nothing. Repeats the last when there are fewer
    than ``n`` distinct partitions.
    """
    k = len(moments.control)
    if not 1 <= n_latents <= k:
        raise ValueError(f"n_latents must lie between 1 and the {k} perturbations, not {n_latents}.")
    leading = leading_changes(moments)
    shifts = leading.directions[:, 0] * leading.lengths[:, None]
    length = (shifts**2).sum(1)
    lines = torch.empty(tries, n_latents, shifts.shape[1], dtype=DTYPE)
    left = length.repeat(tries, 1).clamp_min(1e-9)
    for j in range(n_latents):  # as in k-means++: far from the lines that are there
        i = torch.multinomial(left, 1, generator=generator)[:, 0]
        lines[:, j] = shifts[i] / length[i, None].sqrt().clamp_min(1e-9)
        left = torch.minimum(left, (length - (lines[:, j] @ shifts.T) ** 2).clamp_min(1e-9))
    together = moments.together
    lines, labels, cost = _k_lines(shifts, lines, RACE_ROUNDS, together)
    ahead = cost.argsort(stable=True)[: max(n, -(-tries // LEFT_OF_RACE))]
    lines, labels, cost = _k_lines(shifts, lines[ahead], rounds, together)
    failed = 0
    for _ in range(4 * n_latents):  # two lines on one latent and one line on two: move a line, keep what is better
        best = int(cost.argmin())
        moved = lines[best].repeat(n_latents, 1, 1)
        left = length - ((shifts @ lines[best].T) ** 2).max(1).values
        for j in range(n_latents):
            i = torch.multinomial(torch.where(labels[best] == j, 0.0, left).clamp_min(1e-9), 1, generator=generator)
            moved[j, j] = shifts[i[0]] / length[i[0]].sqrt().clamp_min(1e-9)
        further = _k_lines(shifts, moved, 8, together)
        failed = 0 if bool(further[2].min() < cost.min() - 1e-6) else failed + 1
        lines, labels, cost = (torch.cat(both) for both in zip((lines, labels, cost), further, strict=True))
        if failed == 3:
            break
    found: dict[tuple[int, ...], Tensor] = {}
    for i in cost.argsort().tolist():
        names: dict[int, int] = {}
        key = tuple(names.setdefault(v, len(names)) for v in labels[i].tolist())
        found.setdefault(key, labels[i])
        if len(found) == n:
            break
    chosen = list(found.values())
    return torch.stack((chosen + [chosen[-1]] * n)[:n])


def _k_lines(
    shifts: Tensor, lines: Tensor, rounds: int, together: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines (T, p, q), labels (T, K) and cost (T,) after rounds of assigning and refitting lines (T, p, q); ``together``
    sums what is explained over perturbations that share their line.
    """
    projection = (shifts @ lines.transpose(1, 2)) ** 2  # (T, K, p)
    length = (shifts**2).sum(1)
    for _ in range(rounds):
        assigned = torch.nn.functional.one_hot(together(projection).argmax(2), lines.shape[1]).to(DTYPE).transpose(1, 2)
        for _ in range(3):  # power steps towards each line's leading direction, from where it was
            # As two large products: a batch of small ones takes twice as long.
            along = assigned * (lines.flatten(0, 1) @ shifts.T).view(*lines.shape[:2], -1)
            new = (along.flatten(0, 1) @ shifts).view_as(lines)
            new = new / new.norm(dim=2, keepdim=True).clamp_min(1e-9)
            change = 1 - (new * lines).sum(2).abs().min()
            lines = new
        worst = shifts[(length - projection.max(2).values).argmax(1)]  # an empty line takes the worst explained
        worst = worst / worst.norm(dim=1, keepdim=True).clamp_min(1e-9)
        lines = torch.where((assigned.sum(2) == 0)[..., None], worst[:, None], lines)
        projection = (shifts @ lines.transpose(1, 2)) ** 2
        if change < 1e-9:
            break
    labels = together(projection).argmax(2)
    return lines, labels, length.sum() - projection.gather(2, labels[..., None])[..., 0].sum(1)
