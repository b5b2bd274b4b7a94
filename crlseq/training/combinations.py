"""What measured combinations say of the law of combination (`crlseq.model.combination_law`).

1. Factors. Least squares over genes and combinations, with a prior: beta and gamma were found to be .60 and .43 in one
   technology and .42 and .60 in another, so that of a new screen each is 0.5 +- `FACTOR_SPREAD`. Their errors are those of
   few clusters (a combination is one): its genes are not independent.
2. Terms. What the factors leave of a combination is a normal vector with a part of all combinations, one of each of its
   perturbations and one of its own, in the ratios of variances that predict left-out combinations best (a linear mixed
   model; left out one at a time in closed form). They are kept if they gain more than one standard error over combinations.
3. Spread. What is left of left-out combinations, regressed on squared single effects. Intervals are those in which the
   measured mean of a combination lies, since only of measured ones is it known how they differ from the law.
4. Of measured combinations, what is left of their own cells' mean, gene by gene, shrunk by its sampling error.

Below `MIN_COMBINATIONS` the law is that of the prior. Only training cells take part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.mean_effects import MIN_CELLS, cells_alone, controls_by_batch, mean_effect
from crlseq.model.combination_law import PRIOR_FACTORS, CombinationLaw
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.threads import counted
from crlseq.training.effects import shrink
from crlseq.training.residuals import SOURCE_CELLS

MIN_COMBINATIONS = 5
FACTOR_SPREAD = 0.25  # twice the spread of the two screens: two say little of it
MIN_HIT = 0.25  # share of a combination's cells that all parts must hit for it to tell what they do together
ENOUGH, ENOUGH_ERRORS = 500, 50  # perturbations that tell the mean effect, and the sampling error of a mean
REWEIGHTED = 5
RATIOS = (0.0, *(2.0 ** np.arange(-5, 4)))  # variances of the terms to that of a combination's own part


class Measured(NamedTuple):
    """Combinations with cells of their own: (n, G) arrays of hit cells, in the model's rows."""

    parts: list[tuple[int, ...]]
    single: list[np.ndarray]  # (M, G) effects of the parts
    unsure: list[np.ndarray]  # (M,) summed squared errors of these
    effect: np.ndarray  # mean change of cells that all parts hit
    noise: np.ndarray  # squared sampling errors


@dataclass(frozen=True)
class FittedLaw:
    """The law, the measured combinations, what these do past its factors (n, G), and what terms gain: the share of the
    squared error of left-out ones.
    """

    law: CombinationLaw
    measured: Measured
    left: np.ndarray
    gain: tuple[float, float] = (0.0, 0.0)  # and its standard error

    def summary(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        (beta, gamma), (beta_error, gamma_error) = self.law.factors.tolist(), self.law.factor_error.tolist()
        return {
            "beta": beta, "beta_error": beta_error, "gamma": gamma, "gamma_error": gamma_error,
            "n_measured": len(self.left), "fitted": len(self.left) >= MIN_COMBINATIONS, "n_terms": len(self.law.terms),
            "gain": self.gain[0], "gain_error": self.gain[1], "spread": self.law.spread.tolist(),
            "by_equations": len(self.law.equations),
        }  # fmt: skip


@torch.no_grad()
def fit_law(model: DiscrepancyVAE, data: PerturbSeqData, equations: np.ndarray, seed: int) -> FittedLaw:
    """The law of a screen whose single effects are those of `model`; ``equations`` as in `CombinationLaw`."""
    z = _noise(model, data, seed)
    alone = list(cells_alone(data, data.cells_by_condition(splits.TRAIN)))
    combined = {k for parts in data.conditions if len(parts) > 1 for k in parts}
    typical = {*np.random.default_rng([seed, 16]).permutation(alone)[:ENOUGH].tolist()}
    singles = {k: model.mean_effect(z, [k]).double() for k in alone if k in combined | typical}
    common = torch.stack([singles[k] for k in sorted(typical)]).mean(0) if typical else model.common.double()
    law = CombinationLaw.prior(common, _sampling_error(data, seed), torch.from_numpy(equations))
    measured = _measured(model, data, singles, law)
    if len(measured.parts) < MIN_COMBINATIONS:
        return FittedLaw(_with_own(law, measured), measured, measured.effect - _predicted(law, measured))
    law = _with_factors(law, measured)
    left = measured.effect - _predicted(law, measured)
    law, missed, gain = _with_terms(law, measured, left)
    law = replace(law, spread=_spread(law, measured, missed))
    return FittedLaw(_with_own(law, measured), measured, left, gain)


def _sampling_error(data: PerturbSeqData, seed: int) -> torch.Tensor:
    """(G,) squared sampling error of the mean change of a perturbation, over some of them."""
    cells = data.cells_by_condition(splits.TRAIN)
    known = [c for c, own in enumerate(cells) if c and len(own) >= MIN_CELLS]
    if not known:
        return torch.zeros(data.n_genes, dtype=torch.float64)
    some = np.random.default_rng([seed, 15]).permutation(known)[:ENOUGH_ERRORS]
    by_batch = controls_by_batch(data, cells[0])
    squares = sum(np.add(*mean_effect(data, cells[c], by_batch)[1:]) for c in some)
    return torch.from_numpy(np.asarray(squares) / len(some))


def _noise(model: DiscrepancyVAE, data: PerturbSeqData, seed: int) -> torch.Tensor:
    """(n, p) noise of some training controls."""
    controls = data.cells_by_condition(splits.TRAIN)[0]
    rng = np.random.default_rng([seed, 8])
    some = np.sort(rng.choice(controls, min(SOURCE_CELLS, len(controls)), replace=False))
    weight = model.encoder.hidden.weight
    mean: torch.Tensor = model.encoder(torch.from_numpy(data.dense(some)).to(weight.device, weight.dtype)[None])[0]
    return mean[0]


def _measured(
    model: DiscrepancyVAE, data: PerturbSeqData, singles: dict[int, torch.Tensor], law: CombinationLaw
) -> Measured:
    """Combinations of perturbations with cells of their own that the law governs, and that often enough hit together."""
    cells = data.cells_by_condition(splits.TRAIN)
    by_batch, control_error = controls_by_batch(data, cells[0]), model.control_error.cpu().double().numpy()
    parts, single, unsure, effect, noise = [], [], [], [], []
    for c, rows in enumerate(counted(data.conditions, len(data.conditions))):
        groups = [(k,) for k in rows]
        if len(rows) < 2 or len(cells[c]) < MIN_CELLS or not singles.keys() >= {*rows} or not law.governs(groups):
            continue
        own = torch.stack([singles[k] for k in rows])
        change, squared, of_controls = mean_effect(data, cells[c], by_batch)
        change = change + control_error
        together = 0.0
        for chance, kind, _ in model.mixture(torch.tensor(rows), torch.empty(0)):
            hit = [i for i, k in enumerate(kind[0].tolist()) if k >= 0]
            if len(hit) == len(rows):
                together = chance
            elif hit:
                some = [groups[i] for i in hit]
                change = change - chance * (law.effect(some, own[hit]) if len(hit) > 1 else own[hit[0]]).numpy()
        if together >= MIN_HIT:
            parts.append(rows)
            single.append(own.numpy())
            unsure.append((model.residual_error[list(rows)].cpu().double() ** 2).sum(1).numpy())
            effect.append(change / together)
            noise.append((squared + of_controls) / together**2)
    shape = (len(parts), data.n_genes)
    return Measured(parts, single, unsure, np.reshape(effect, shape), np.reshape(noise, shape))


def _predicted(law: CombinationLaw, measured: Measured) -> np.ndarray:
    """(n, G) by the law."""
    if not measured.parts:
        return np.zeros_like(measured.effect)
    return np.stack([
        law.effect([(k,) for k in parts], torch.from_numpy(single)).numpy()
        for parts, single in zip(measured.parts, measured.single, strict=True)
    ])  # fmt: skip


def _with_factors(law: CombinationLaw, measured: Measured) -> CombinationLaw:
    """Beta and gamma, each combination a cluster; the law is linear in both."""
    at = [_predicted(replace(law, factors=law.factors.new_tensor(f)), measured) for f in ((0, 0), (1, 0), (0, 1))]
    columns = np.stack([at[1] - at[0], at[2] - at[0]], 1)  # (n, 2, G)
    gram = np.einsum("nig,njg->ij", columns, columns)
    found = np.linalg.solve(gram, np.einsum("nig,ng->i", columns, measured.effect - at[0]))
    left = measured.effect - at[0] - np.einsum("nig,i->ng", columns, found)
    score = np.einsum("nig,ng->ni", columns, left)
    n = len(score)
    covariance = np.linalg.solve(gram, np.linalg.solve(gram, score.T @ score * n / (n - 2)).T)
    precision, prior = np.linalg.pinv(covariance), np.eye(2) / FACTOR_SPREAD**2
    posterior = np.linalg.inv(precision + prior)
    factors = posterior @ (precision @ found + prior @ PRIOR_FACTORS)
    error = np.sqrt(np.diag(posterior))
    return replace(law, factors=torch.from_numpy(factors), factor_error=torch.from_numpy(error))


def _with_terms(
    law: CombinationLaw, measured: Measured, left: np.ndarray
) -> tuple[CombinationLaw, np.ndarray, tuple[float, float]]:
    """The law with terms where they are worth it, what it misses (n, G) of each combination left out, and their gain.

    A combination's own part has the variance v_c of its parts' effects; mu has r_mu, and f has r_f v_p, of the perturbation,
    or r_f. The covariance over combinations is C = r_mu 1 1' + r_f S V S' + diag(v), S (n, T) the parts of each. Terms predict
    C^-1 left times what two combinations share, and miss (C^-1 left)_i / (C^-1)_ii of a left-out one. Squares count in units
    of v_c.
    """
    term_of = sorted({k for parts in measured.parts for k in parts})
    parts_of = np.array([[float(k in parts) for k in term_of] for parts in measured.parts])
    size = {k: float((effect**2).sum()) for parts, single in zip(measured.parts, measured.single, strict=True)
            for k, effect in zip(parts, single, strict=True)}  # fmt: skip
    of_term = np.array([size[k] for k in term_of])
    of_term = (of_term + of_term.mean()) / (2 * of_term.mean())
    own = parts_of @ of_term / parts_of.sum(1).mean()
    candidates = {}
    for mu in counted(RATIOS, len(RATIOS)):
        for f in RATIOS:
            for variance in (of_term, np.ones_like(of_term)) if f else (of_term,):
                shared = (parts_of * (f * variance)) @ parts_of.T + mu
                candidates[mu, f, variance[0]] = shared, f * variance, _left_out(shared + np.diag(own), left)
    of_law = (left**2).sum(1) / own
    found = min(candidates, key=lambda ratio: float(((candidates[ratio][2] ** 2).sum(1) / own).sum()))
    shared, variance, missed = candidates[found]
    gain = of_law - (missed**2).sum(1) / own
    error = float(gain.std(ddof=1) / len(gain) ** 0.5)
    told = float(gain.mean() / of_law.mean()), error / float(of_law.mean())
    if gain.mean() <= error * (1 + 1e-9):  # they are equal but for rounding where one combination has all of the gain
        return law, left, told
    weights = np.linalg.solve(shared + np.diag(own), left)
    terms = torch.from_numpy(variance[:, None] * (parts_of.T @ weights))
    mean = torch.from_numpy(found[0] * weights.sum(0))
    return replace(law, mean=mean, terms=terms, term_of=torch.tensor(term_of)), missed, told


def _left_out(covariance: np.ndarray, left: np.ndarray) -> np.ndarray:
    inverse = np.linalg.inv(covariance)
    return np.asarray(inverse @ left / np.diag(inverse)[:, None])


def _spread(law: CombinationLaw, measured: Measured, missed: np.ndarray) -> torch.Tensor:
    """Squares that are missed, without sampling noise, on squared single effects and on their mean.

    Least squares of ratios to what is expected, so that small effects count as large ones do; drawn to the prior as one
    combination more, so that none is 0.
    """
    design = np.stack([np.concatenate(each) for each in zip(*map(_squares, measured.single), strict=True)], 1)
    noise, squares, found = measured.noise.ravel(), (missed**2).ravel(), law.spread.numpy()
    for _ in range(REWEIGHTED):
        expected = np.maximum(design @ found + noise, 1e-30)
        found = nnls(design / expected[:, None], (squares - noise) / expected)[0]
        found = np.maximum(found, 1e-3 * law.spread.numpy())
    n = len(missed)
    return torch.from_numpy((n * found + law.spread.numpy()) / (n + 1))


def _squares(single: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    squares = (single**2).sum(0) * (len(single) - 1)
    return squares, np.full_like(squares, squares.mean())


def _with_own(law: CombinationLaw, measured: Measured) -> CombinationLaw:
    """What is left of each measured combination."""
    if not measured.parts:
        return law
    left = measured.effect - _predicted(law, measured)
    own, squared = np.empty_like(left), np.empty_like(left)
    for i in range(len(left)):
        own[i], squared[i] = shrink(left[i], np.sqrt(measured.noise[i]))
    table = np.full((len(left), max(map(len, measured.parts))), -1)
    for row, parts in zip(table, measured.parts, strict=True):
        row[: len(parts)] = parts
    return replace(
        law, own=torch.from_numpy(own), own_error=torch.from_numpy(np.sqrt(squared)), measured=torch.from_numpy(table)
    )
