"""Which perturbations share a target: k-lines on the whitened mean shifts."""

import torch
from torch import Tensor

from crlseq.discovery.moments import DTYPE, Moments

RACE_ROUNDS = 5  # after which tries are far enough apart to go on with the best alone
LEFT_OF_RACE = 4  # one in so many


def propose_targets(
    moments: Moments, n_latents: int, n: int, generator: torch.Generator, tries: int = 256, rounds: int = 30
) -> Tensor:
    """The ``n`` best distinct partitions (n, K) of perturbations into lines through 0, best first.

    k-lines (k-means without sign and length) on the mean shifts, whitened by the covariance within environments
    and divided by their standard errors: what a line leaves over is then noise of unit variance, and a perturbation
    without effect weighs nothing. Repeats the last when there are fewer than ``n`` distinct partitions.
    """
    k = len(moments.counts) - 1
    if not 1 <= n_latents <= k:
        raise ValueError(f"n_latents must lie between 1 and the {k} perturbations, not {n_latents}.")
    root = torch.linalg.cholesky(moments.pooled() + 1e-9 * torch.eye(moments.means.shape[1], dtype=DTYPE))
    error = (1 / moments.counts[1:] + 1 / moments.counts[0]).sqrt()
    shifts = (moments.means[1:] - moments.means[0]) / error[:, None]
    shifts = torch.linalg.solve_triangular(root, shifts.T, upper=False).T
    length = (shifts**2).sum(1)
    lines = torch.empty(tries, n_latents, shifts.shape[1], dtype=DTYPE)
    left = length.repeat(tries, 1).clamp_min(1e-9)
    for j in range(n_latents):  # as in k-means++: far from the lines that are there
        i = torch.multinomial(left, 1, generator=generator)[:, 0]
        lines[:, j] = shifts[i] / length[i, None].sqrt().clamp_min(1e-9)
        left = torch.minimum(left, (length - (lines[:, j] @ shifts.T) ** 2).clamp_min(1e-9))
    lines, labels, cost = _k_lines(shifts, lines, RACE_ROUNDS)
    ahead = cost.argsort(stable=True)[: max(n, -(-tries // LEFT_OF_RACE))]
    lines, labels, cost = _k_lines(shifts, lines[ahead], rounds)
    failed = 0
    for _ in range(4 * n_latents):  # two lines on one latent and one line on two: move a line, keep what is better
        best = int(cost.argmin())
        moved = lines[best].repeat(n_latents, 1, 1)
        left = length - ((shifts @ lines[best].T) ** 2).max(1).values
        for j in range(n_latents):
            i = torch.multinomial(torch.where(labels[best] == j, 0.0, left).clamp_min(1e-9), 1, generator=generator)
            moved[j, j] = shifts[i[0]] / length[i[0]].sqrt().clamp_min(1e-9)
        further = _k_lines(shifts, moved, 8)
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


def _k_lines(shifts: Tensor, lines: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lines (T, p, q), labels (T, K) and cost (T,) after rounds of assigning and refitting lines (T, p, q)."""
    projection = (shifts @ lines.transpose(1, 2)) ** 2  # (T, K, p)
    length = (shifts**2).sum(1)
    for _ in range(rounds):
        assigned = torch.nn.functional.one_hot(projection.argmax(2), lines.shape[1]).to(DTYPE)
        for _ in range(3):  # power steps towards each line's leading direction, from where it was
            new = (assigned * (shifts @ lines.transpose(1, 2))).transpose(1, 2) @ shifts
            new = new / new.norm(dim=2, keepdim=True).clamp_min(1e-9)
            change = 1 - (new * lines).sum(2).abs().min()
            lines = new
        worst = shifts[(length - projection.max(2).values).argmax(1)]  # an empty line takes the worst explained
        worst = worst / worst.norm(dim=1, keepdim=True).clamp_min(1e-9)
        lines = torch.where((assigned.sum(1) == 0)[..., None], worst[:, None], lines)
        projection = (shifts @ lines.transpose(1, 2)) ** 2
        if change < 1e-9:
            break
    return lines, projection.argmax(2), length.sum() - projection.max(2).values.sum(1)
