"""The law of combination: what two perturbations do together, from what each does alone.

Measured combinations are far from the sum of single effects, in the same way in two technologies (CRISPRa doubles of Norman
et al. 2019, Science; Cas13 doubles of Wessels et al. 2023, Nature Methods): by least squares they are about half the sum and
half the mean effect m of all perturbations. With the single effects e_p of the parts in hit cells and w_p the share of
part p in the sum of their sizes (Euclidean norms),

    D = sum_p c_p e_p + g m,    c_p = 1 - 2 (1 - beta)(1 - w_p),    g = 2 gamma (1 - sum_p w_p^2).

Two effects of one size give beta (e_1 + e_2) + gamma m; beside a large effect a small one matters less, and a part that does
nothing leaves the other as it is. (Of the 125 doubles whose two coefficients Norman et al. published, those of the part with
more differentially expressed genes have the median .81, the others .56; in the fifth with the least equal parts .85 and .39.) Where combinations were measured, each gene that was perturbed may have a term of its own,
f_p, of its acting in combinations otherwise than alone, and all combinations a mean mu:

    D' = D + mu + sum_p f_p;

a measured combination has besides what is left of its own cells' mean. `crlseq.training.combinations` fits all of this.

A measured mean differs from the law with the variance ``spread[0] sum_p e_p^2 + spread[1] mean over genes of the same``, gene
by gene, and by its own sampling error, ``noise`` for a typical number of cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

PRIOR_FACTORS = (0.5, 0.5)  # beta and gamma: .60, .43 of 130 CRISPRa doubles and .42, .60 of 158 Cas13 doubles
# Of those doubles the law leaves .48 and .43 of the squares, which are about .9 of both parts' squares.
PRIOR_SPREAD = (0.25, 0.15)

Group = tuple[int, ...]  # rows of a model that are one perturbation


@dataclass(frozen=True)
class CombinationLaw:
    """Factors, terms and spread, float64 tensors of a model with K perturbations and G genes.

    ``factors`` (2,) beta and gamma, ``factor_error`` (2,); ``common`` (G,) m; ``spread`` (2,); ``noise`` (G,); ``mean`` (G,) mu;
    ``terms`` (T, G) f of the perturbations ``term_of`` (T,) int64; ``own`` (n, G) what is left of the measured combinations
    ``measured`` (n, M) int64, filled up with -1, and ``own_error`` (n, G); ``equations`` (q, 2) int64, ascending pairs
    whose combination is left to the structural equations.
    """

    factors: Tensor
    factor_error: Tensor
    common: Tensor
    spread: Tensor
    noise: Tensor
    mean: Tensor
    terms: Tensor
    term_of: Tensor
    own: Tensor
    own_error: Tensor
    measured: Tensor
    equations: Tensor

    @classmethod
    def prior(cls, common: Tensor, noise: Tensor, equations: Tensor) -> Self:
        """The law of a screen without measured combinations."""
        none, no_index = common.new_zeros((0, len(common))), torch.zeros((0, 2), dtype=torch.int64)
        factors = common.new_tensor(PRIOR_FACTORS)
        return cls(
            factors, torch.zeros_like(factors), common, common.new_tensor(PRIOR_SPREAD), noise, torch.zeros_like(common),
            none, no_index[:, 0], none, none, no_index, equations,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def _term(self) -> dict[int, int]:
        return {int(k): i for i, k in enumerate(self.term_of.tolist())}

    @cached_property
    def _own(self) -> dict[Group, int]:
        return {tuple(k for k in row if k >= 0): i for i, row in enumerate(self.measured.tolist())}

    @cached_property
    def _equations(self) -> frozenset[tuple[int, int]]:
        return frozenset((a, b) for a, b in self.equations.tolist())

    def governs(self, groups: Sequence[Group]) -> bool:
        """Whether these perturbations (rows of the model) together are a matter of the law, and not of the equations."""
        rows = sorted(k for group in groups for k in group)
        pairs = ((a, b) for i, a in enumerate(rows) for b in rows[i + 1 :])
        return len(groups) > 1 and not any(pair in self._equations for pair in pairs)

    def is_measured(self, groups: Sequence[Group]) -> bool:
        """Whether this combination has a mean of its own."""
        return tuple(sorted(k for group in groups for k in group)) in self._own

    def coefficients(self, single: Tensor) -> tuple[Tensor, Tensor]:
        """c (M,) and g () of parts with effects (M, G)."""
        size = single.norm(dim=1)
        share = size / size.sum().clamp_min(1e-30)
        beta, gamma = self.factors.to(single.dtype)
        return 1 - 2 * (1 - beta) * (1 - share), 2 * gamma * (1 - (share**2).sum())

    def effect(self, groups: Sequence[Group], single: Tensor) -> Tensor:
        """Effect (G,) of hit cells of parts with effects (M, G) in hit cells."""
        c, g = self.coefficients(single)
        found = c @ single + g * self.common.to(single.dtype) + self.mean.to(single.dtype)
        rows = [self._term[k] for group in groups for k in group if k in self._term]
        found = found + self.terms[rows].to(single.dtype).sum(0)
        place = self._own.get(tuple(sorted(k for group in groups for k in group)))
        return found if place is None else found + self.own[place].to(single.dtype)

    def error(self, groups: Sequence[Group], single: Tensor) -> Tensor:
        """Standard deviation (G,) of a measured mean about the law; of a measured combination that of its own mean.

        Beyond two parts the pairs' interactions add up.
        """
        place = self._own.get(tuple(sorted(k for group in groups for k in group)))
        if place is not None:
            return self.own_error[place].to(single.dtype)
        near, far = self.spread.to(single.dtype)
        squares = (single**2).sum(0) * (len(groups) - 1)
        missed: Tensor = (near * squares + far * squares.mean() + self.noise.to(single.dtype)).sqrt()
        return missed
