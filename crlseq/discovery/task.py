"""What a discovery method is given: the screen, the options, and what to report to and compute with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from crlseq.config import InterventionKind, ModelConfig
from crlseq.data import splits
from crlseq.data.contexts import gene_and_context
from crlseq.data.dataset import PerturbSeqData
from crlseq.discovery.moments import Crossed
from crlseq.discovery.n_latents import LatentChoice
from crlseq.storage.stage_cache import StageCache, cached_on_disk


@dataclass(frozen=True)
class Task:
    """A discovery to make."""

    data: PerturbSeqData
    effect: np.ndarray  # (K,) of each perturbation; 0 without one, and where it only occurs in combinations
    config: ModelConfig
    seed: int
    stage: Callable[[str], None] = lambda text: None  # called with what is being done
    note: Callable[[str], None] = lambda text: None  # called with what was found
    cache: StageCache = field(default_factory=StageCache)
    threads: int = field(default_factory=torch.get_num_threads)
    targets: Mapping[str, str] | None = None  # program of each perturbation, upstream ones first, where that is known
    device: torch.device = field(
        default_factory=lambda: torch.device("cpu")
    )  # of the fit, see `crlseq.discovery.device`

    @property
    def kind(self) -> InterventionKind | None:
        """The kind of intervention that was asked for."""
        return None if self.config.intervention == "auto" else self.config.intervention

    @property
    def without_effect(self) -> bool:
        """Whether every perturbation has cells of its own, and none of them an effect."""
        cells = self.data.cells_by_condition(splits.TRAIN, splits.VALIDATION)
        alone = {parts[0] for c, parts in enumerate(self.data.conditions) if len(parts) == 1 and len(cells[c])}
        return not self.effect.any() and len(alone) == len(self.effect)

    def environments(self, perturbations: np.ndarray) -> Tensor:
        """(cells,) environments: 0 control, i + 1 the single perturbation ``perturbations[i]``, -1 others and cells of
        batches without controls.
        """
        data = self.data
        number: dict[tuple[int, ...], int] = {(): 0} | {(int(k),): i + 1 for i, k in enumerate(perturbations)}
        of_condition = np.array([*(number.get(parts, -1) for parts in data.conditions), -1])
        return torch.from_numpy(np.where(data.comparable(), of_condition[data.condition], -1))

    def crossed(self, perturbations: np.ndarray) -> Crossed | None:
        """Genes and contexts of ``perturbations`` (m,); None without contexts."""
        names = self.data.context_names
        if not names:
            return None
        gene = np.unique(self.data.gene[perturbations], return_inverse=True)[1]
        own = [names.index(gene_and_context(self.data.perturbation_names[k])[1]) for k in perturbations]
        return Crossed(torch.from_numpy(gene), torch.tensor(own, dtype=torch.int64), len(names))

    def cells_of(self, split: int, environment: Tensor) -> Tensor:
        """(cells,) bool: the cells of a split that belong to an environment."""
        return torch.from_numpy(self.data.split == split) & (environment >= 0)

    def fitted_cells(self) -> np.ndarray:
        """Indices of the training and validation cells."""
        seen = np.isin(self.data.split, (splits.TRAIN, splits.VALIDATION))
        return np.flatnonzero(seen & (self.data.condition >= 0))


@cached_on_disk()
@dataclass(frozen=True)
class Cells:
    """Cells as the likelihood sees them."""

    values: Tensor  # (N, q)
    variances: Tensor | None  # (N, q) posterior variances, if straightened
    environment: Tensor  # (N,)
    train: Tensor  # (N,) bool
    noise: float | None = None  # variance that measurement noise has in every component, if known
    crossed: Crossed | None = None
    context: Tensor | None = None  # (N,) where contexts are crossed

    def training(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Values (n, q) in float64, variances and environments of the training cells."""
        variances = None if self.variances is None else self.variances[self.train]
        return self.values[self.train].double(), variances, self.environment[self.train]

    def training_by_context(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The same, controls of each context an environment of their own (`Crossed.numbered`)."""
        values, variances, environment = self.training()
        if self.crossed is not None and self.context is not None:
            environment = self.crossed.numbered(environment, self.context[self.train])
        return values, variances, environment

    def first(self, q: int) -> Cells:
        """The cells in their first components."""
        return replace(self, values=self.values[:, :q])


@dataclass(frozen=True)
class Start:
    """Cells in whitened components, the perturbations (m,) that shape the graph, and how many programs to look for."""

    cells: Cells
    environments: np.ndarray
    n_latents: int
    choice: LatentChoice | None
