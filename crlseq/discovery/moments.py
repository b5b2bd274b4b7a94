"""Sufficient statistics of environments: means, covariances and counts of their cells."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.storage.stage_cache import cached_on_disk

DTYPE = torch.float64


@cached_on_disk()
@dataclass(frozen=True)
class Crossed:
    """Perturbations in several contexts: which (K,) are of the same ``gene``, in which ``context`` (K,) each is, and how
    many contexts there are, in each of which are controls.
    """

    gene: Tensor
    context: Tensor
    n_contexts: int

    def numbered(self, environment: Tensor, context: Tensor) -> Tensor:
        """Environments of cells (N,) with controls by ``context`` (N,): those first, then perturbations; -1 stays."""
        return torch.where(
            environment == 0, context, torch.where(environment > 0, environment + self.n_contexts - 1, -1)
        )


@cached_on_disk()
@dataclass(frozen=True)
class Moments:
    """Sufficient statistics: means (C, q), covariances (C, q, q), counts (C,); environment 0 is control, the others are K
    perturbations. Where contexts are ``crossed``, the first environments are the controls of each.
    """

    means: Tensor
    covariances: Tensor
    counts: Tensor
    crossed: Crossed | None = None

    @property
    def n_controls(self) -> int:
        """Number of environments of controls, which are the first."""
        return 1 if self.crossed is None else self.crossed.n_contexts

    @property
    def control(self) -> Tensor:
        """The environment (K,) of controls that each perturbation is compared with."""
        n = len(self.counts) - self.n_controls
        return torch.zeros(n, dtype=torch.int64) if self.crossed is None else self.crossed.context

    def shifts(self) -> Tensor:
        """Mean of each perturbation less that of its controls (K, q)."""
        return self.means[self.n_controls :] - self.means[self.control]

    def together(self, values: Tensor) -> Tensor:
        """Values (..., K, p), of perturbations and targets, summed over those of one gene, which share their target."""
        if self.crossed is None:
            return values
        gene = self.crossed.gene
        sums = values.new_zeros((*values.shape[:-2], int(gene.max()) + 1, values.shape[-1]))
        return sums.index_add(-2, gene, values).index_select(-2, gene)

    def cells(self) -> Tensor:
        """Number of cells."""
        return self.counts.sum()

    def weight(self) -> Tensor:
        """Share of the cells (C,)."""
        return self.counts / self.counts.sum()

    def pooled(self) -> Tensor:
        """Mean covariance within environments (q, q)."""
        return (self.covariances * self.weight()[:, None, None]).sum(0)


def environment_moments(
    values: Tensor,
    environment: Tensor,
    variances: Tensor | None = None,
    n_environments: int | None = None,
    crossed: Crossed | None = None,
) -> Moments:
    """Moments of cells (N, q) by environment (N,), 0 for control; covariances divide by the number of cells. Where contexts
    are ``crossed``, environments are those of `Crossed.numbered`.

    Posterior ``variances`` (N, q) are added to the covariances (aggregated posterior). With ``n_environments`` those
    without cells have count, mean and covariance 0; without, one of fewer than two cells is a `ValueError`.
    """
    n = int(environment.max()) + 1 if n_environments is None else n_environments
    counts = torch.bincount(environment, minlength=n).to(DTYPE)
    if n_environments is None and bool((counts < 2).any()):
        raise ValueError("every environment needs at least two cells.")
    values = values.to(DTYPE)
    q, at_least_one = values.shape[1], counts.clamp_min(1)
    means = torch.zeros(n, q, dtype=DTYPE).index_add_(0, environment, values) / at_least_one[:, None]
    covariances = torch.zeros(n, q, q, dtype=DTYPE)
    order = torch.argsort(environment, stable=True)
    for c, cells in enumerate(torch.split(order, counts.long().tolist())):
        centred = values[cells] - means[c]
        covariances[c] = centred.T @ centred / at_least_one[c]
        if variances is not None and len(cells):
            covariances[c] += torch.diag(variances[cells].to(DTYPE).mean(0))
    return Moments(means, covariances, counts, crossed)


def fold_moments(
    values: Tensor,
    environment: Tensor,
    variances: Tensor | None,
    n_folds: int,
    generator: torch.Generator,
    crossed: Crossed | None = None,
) -> list[tuple[Moments, Moments]]:
    """Moments of the other cells and of the fold, for each of `n_folds`; every environment is spread over all folds.

    An environment may be without cells in a fold; `environment` has every number up to its largest at least twice.
    """
    shuffled = torch.randperm(len(values), generator=generator)
    order = shuffled[torch.argsort(environment[shuffled], stable=True)]  # by environment, in random order within
    fold = torch.empty(len(values), dtype=torch.long)
    fold[order] = torch.arange(len(values)) % n_folds
    n = int(environment.max()) + 1

    def side(cells: Tensor) -> Moments:
        some = None if variances is None else variances[cells]
        return environment_moments(values[cells], environment[cells], some, n, crossed)

    return [(side(fold != f), side(fold == f)) for f in range(n_folds)]


def noise_level(moments: Moments) -> float:
    """Mean of the smallest quarter of the eigenvalues within environments: what measurement noise must be at least."""
    values = torch.linalg.eigvalsh(moments.pooled())
    return float(values[: max(1, len(values) // 4)].mean())
