"""What was measured, and how predictions of means are scored against it: in blocks of conditions, however many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.special import stdtr

from crlseq.discovery.effects import benjamini_hochberg
from crlseq.evaluation import metrics
from crlseq.evaluation.baselines import GroupMoments
from crlseq.evaluation.compare import CEILING, INTERPOLATED, METRICS, RANGE, REGISTERED
from crlseq.evaluation.metrics import Rivals
from crlseq.threads import in_parallel

TOP_EXPRESSED, TOP_DE, DE_FDR = 1000, 20, 0.05
BLOCK_VALUES = 1_000_000  # of a block of conditions: 8 MB for each of its arrays
MAX_RIVALS = 500  # conditions that one is told apart from; of more, some are drawn: the share's error is 2 % for one
AGAINST_MEAN = (
    "pearson_delta_perturbed",
    "r2_weighted_delta",
)  # which the mean of all perturbations cannot predict at all

Rows = Callable[[slice], np.ndarray]  # changes (conditions, genes) of some conditions


@dataclass(frozen=True)
class Truth:
    """Measured conditions, the controls of their batches, and what perturbations have in common.

    `measured` are moments (conditions, genes), `shares` (conditions, batches + 1) of `controls`, `mean_effect` (genes,),
    and `targets` the genes that each condition's perturbations are named after. `spread` (genes,) stands in for standard
    errors where each condition is a single row: the standard deviation of the conditions' changes.
    """

    measured: GroupMoments
    shares: np.ndarray
    controls: GroupMoments
    mean_effect: np.ndarray
    targets: Sequence[np.ndarray]
    spread: np.ndarray | None = None

    @property
    def n(self) -> int:
        """Number of conditions."""
        return len(self.measured.n)

    def blocks(self) -> Iterator[slice]:
        """Consecutive conditions."""
        step = max(1, BLOCK_VALUES // len(self.mean_effect))
        return (slice(start, min(start + step, self.n)) for start in range(0, self.n, step))

    def block(self, rows: slice) -> Block:
        """Some of the conditions."""
        mean, variance, n = (np.asarray(part[rows], dtype=float) for part in self.measured)
        return Block(self, GroupMoments(mean, variance, n), self.shares[rows], self.shares[rows] @ self.controls.mean)

    @cached_property
    def top_expressed(self) -> np.ndarray:
        """(genes,) places of the `TOP_EXPRESSED` genes in controls."""
        return np.argsort(-self.controls.mean[-1], kind="stable")[:TOP_EXPRESSED]

    @cached_property
    def _rivals(self) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.arange(self.n)
        if self.n > MAX_RIVALS:
            chosen = np.sort(np.random.default_rng(13).choice(self.n, MAX_RIVALS, replace=False))
        return chosen, self.measured.mean[chosen] - self.shares[chosen] @ self.controls.mean

    def rivals(self, rows: slice) -> Rivals:
        """Changes of the conditions that these are told apart from."""
        chosen, changes = self._rivals
        return Rivals(changes, np.arange(self.n)[rows, None] == chosen)

    def scores(self, predictors: Mapping[str, Rows]) -> dict[str, dict[str, np.ndarray]]:
        """Every metric of means (conditions,) by predictor, of the changes that each predicts."""
        names = [*predictors]

        def scored(rows: slice) -> list[dict[str, np.ndarray]]:
            block, rivals, targets = self.block(rows), self.rivals(rows), self.targets[rows]
            return [block.score(np.asarray(predictors[k](rows), dtype=float), rivals, targets) for k in names]

        _ = self._rivals, self.top_expressed  # once, before there are threads
        parts = [*in_parallel(scored, self.blocks(), torch.get_num_threads())]
        return {
            name: {metric: np.concatenate([part[i][metric] for part in parts]) for metric in parts[0][i]}
            for i, name in enumerate(names)
        }

    def squared_error(self, rows: slice) -> np.ndarray:
        """(conditions, genes) sampling variances of measured means."""
        _, variance, n = (np.asarray(part[rows], dtype=float) for part in self.measured)
        return np.asarray(variance / n[:, None])

    def floor(self) -> dict[str, np.ndarray]:
        """Distances to the measured mean that the true mean would have."""
        parts = []
        for rows in self.blocks():
            squared = self.squared_error(rows)
            top = squared[:, self.top_expressed]
            parts.append((squared.sum(1), top.sum(1), squared.mean(1), top.mean(1)))
        names = ("l2", "l2_top_expressed", "rmse", "rmse_top_expressed")
        return {name: np.sqrt(np.concatenate(own)) for name, own in zip(names, zip(*parts, strict=True), strict=True)}


@dataclass(frozen=True)
class Block:
    """Some conditions of a `Truth`, in float64: (conditions, genes) each."""

    truth: Truth
    measured: GroupMoments
    shares: np.ndarray
    control: np.ndarray

    @cached_property
    def perturbed(self) -> np.ndarray:
        """The mean of perturbed cells, P."""
        return np.asarray(self.control + self.truth.mean_effect)

    @cached_property
    def _against_controls(self) -> tuple[np.ndarray, np.ndarray]:
        """Squared standard errors of changes, and two-sided p-values."""
        change = self.measured.mean - self.control
        if self.truth.spread is not None:
            return np.broadcast_to(self.truth.spread**2, change.shape), np.ones(change.shape)
        return welch(self.measured, self.shares, self.truth.controls, change)

    @property
    def error(self) -> np.ndarray:
        """Squared standard errors of measured changes."""
        return self._against_controls[0]

    @cached_property
    def is_de(self) -> np.ndarray:
        """Genes that differ from controls, FDR 0.05 in their condition."""
        return np.stack([benjamini_hochberg(row) <= DE_FDR for row in self._against_controls[1]])

    @cached_property
    def top_de(self) -> np.ndarray:
        """(conditions, TOP_DE) places of the genes that change most by their standard error."""
        strength = self.strength(self.measured.mean - self.control)
        if strength.shape[1] > TOP_DE:
            return np.argpartition(-strength, TOP_DE, axis=1)[:, :TOP_DE]
        return np.argsort(-strength, axis=1)

    def strength(self, change: np.ndarray) -> np.ndarray:
        """|change| in standard errors of the measured one; 0 where these are 0."""
        return np.asarray(np.abs(change) / np.sqrt(np.where(self.error > 0, self.error, np.inf)))

    @cached_property
    def _against_perturbed(self) -> tuple[np.ndarray, np.ndarray]:
        """t and degrees of freedom of the difference to P: as many cells a side, as in scanpy's ``overestim_var``."""
        n = self.measured.n[:, None]
        own, other = self.measured.variance, self.shares @ self.truth.controls.variance
        if self.truth.spread is not None:
            own, other, n = np.broadcast_to(self.truth.spread**2, own.shape), np.zeros(own.shape), np.ones(n.shape)
        noise = np.sqrt((own + other) / n)
        there = noise > 0
        t = np.where(there, (self.measured.mean - self.perturbed) / np.where(there, noise, 1.0), 0.0)
        freedom = (n - 1) * (own + other) ** 2 / np.where(there, own**2 + other**2, 1.0)
        return t, np.where(there & (freedom > 0), freedom, 1.0)

    @cached_property
    def weights(self) -> np.ndarray:
        """Of genes by how surely each differs from P: `metrics.gene_weights`."""
        return metrics.gene_weights(self._against_perturbed[0])

    @property
    def certainty(self) -> np.ndarray:
        """1 - p of the difference to P, p adjusted within the condition: the interpolated duplicate's weights."""
        t, freedom = self._against_perturbed
        return 1 - np.stack([benjamini_hochberg(row) for row in 2 * stdtr(freedom, -np.abs(t))])

    def score(self, change: np.ndarray, rivals: Rivals, targets: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Every metric of predicted changes (conditions, genes), (conditions,) each."""
        control, measured, top = self.control, self.measured.mean, self.truth.top_expressed
        predicted, measured_change = control + change, measured - control
        de_of = [np.take_along_axis(values, self.top_de, 1) for values in (predicted, measured, control)]
        return {
            "pearson_delta": metrics.pearson_delta(predicted, measured, control),
            "l2": metrics.l2_distance(predicted, measured),
            "l2_top_expressed": metrics.l2_distance(predicted[:, top], measured[:, top]),
            "rmse": metrics.rmse(predicted, measured),
            "rmse_top_expressed": metrics.rmse(predicted[:, top], measured[:, top]),
            "mae": metrics.mean_absolute_error(predicted, measured),
            "wmse": metrics.weighted_mse(predicted, measured, self.weights),
            "r2_weighted_delta": metrics.weighted_r2_delta(predicted, measured, self.perturbed, self.weights),
            "pearson_delta_top_de": metrics.pearson_delta(*de_of),
            "pearson_delta_perturbed": metrics.pearson_delta(predicted, measured, self.perturbed),
            # Against each condition's own controls, since conditions may lie in different batches.
            "centroid_accuracy": metrics.centroid_accuracy(change, measured_change, rivals),
            "discrimination": metrics.perturbation_discrimination(change, measured_change, targets, rivals),
            "sign_agreement": metrics.sign_agreement(predicted, measured, control, self.is_de),
            "de_score": metrics.de_score(self.strength(change), self.is_de),
            "r2_delta": metrics.r2_delta(predicted, measured, control),
            **{name: function(predicted, measured, control) for name, function in REGISTERED.items()},
        }  # fmt: skip


def welch(measured: GroupMoments, shares: np.ndarray, controls: GroupMoments, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Squared standard errors and two-sided p-values (conditions, genes) of changes; Welch and Satterthwaite."""
    n = measured.n[:, None]
    error = np.where(n > 1, measured.variance / np.maximum(n, 1), 0.0)  # one cell says nothing of its error
    squares = error**2 / np.maximum(n - 1, 1)
    for b in np.flatnonzero(shares.any(0)):
        own = shares[:, b, None] ** 2 * controls.variance[b] / controls.n[b]
        error, squares = error + own, squares + own**2 / (controls.n[b] - 1)
    there = error > 0
    freedom = np.where(there, error**2 / np.where(there, squares, 1.0), 1.0)
    p_value = 2 * stdtr(freedom, -np.abs(change) / np.sqrt(np.where(there, error, 1.0)))
    return error, np.where(there & (n > 1), p_value, 1.0)


def ceilings(first: Truth, second: Truth) -> dict[str, dict[str, np.ndarray]]:
    """How well one half of a condition's cells, made the best of, predicts the other half.

    The half itself is the `CEILING`; the `INTERPOLATED` duplicate takes the mean of all perturbations where the half does
    not surely differ from it (Miller et al. 2025, bioRxiv 2025.10.20.683304). `RANGE` has each metric's dynamic range
    fraction in its place: how much of the way from a prediction without information to a perfect one that duplicate goes.
    The second half's differentially expressed genes and weights count.
    """

    def duplicate(rows: slice) -> np.ndarray:
        block = first.block(rows)
        return np.asarray(block.measured.mean - block.control)

    def interpolated(rows: slice) -> np.ndarray:
        block = first.block(rows)
        return np.asarray(first.mean_effect + block.certainty * (block.measured.mean - block.perturbed))

    def same(rows: slice) -> np.ndarray:
        return np.broadcast_to(first.mean_effect, (rows.stop - rows.start, len(first.mean_effect)))

    predictors: dict[str, Rows] = {CEILING: duplicate, INTERPOLATED: interpolated, "mean": same}
    found = second.scores({**predictors, "no_change": lambda rows: 0 * same(rows)})
    best = found[INTERPOLATED]
    worst = found.pop("mean") | {metric: found["no_change"][metric] for metric in AGAINST_MEAN}
    del found["no_change"]
    found[RANGE] = {m: metrics.dynamic_range(best[m], worst[m], float(METRICS[m])) for m in best}
    return found
