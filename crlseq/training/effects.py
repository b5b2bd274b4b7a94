"""Effects of single perturbations with their noise, by empirical Bayes: one estimate of all of them together.

Measured effects are ``d_kg = theta_kg - e_kg + noise_kg``: perturbed mean minus mean of controls of the same batches, over
penetrance. The noise is of a perturbation's own cells; ``e`` is the sampling error of the controls' means, which
perturbations measured against the same controls have in common, and which is therefore no effect. In units of noise
(perturbation times gene) both have known variances, and the estimate has three steps:

1. *What perturbations do alike*. The K effects in one gene are a draw from a mixture of normals ``N(0, w Sigma)``, with one
   (K, K) covariance for the screen and many scales w, among them 0: perturbations of one program move together, and a gene
   answers much or not at all. Covariance and shares of scales are fitted by EM to all genes; the controls' error is in the
   likelihood as noise that perturbations share (Urbut et al. 2019, Nature Genetics 51).
   Unlike a cut at some rank this shrinks every direction by its own strength. Without a direction beyond the edge of noise
   (singular value sqrt(K) + sqrt(G); Gavish and Donoho 2017) there is nothing alike, and of more than `MOST`
   perturbations only directions beyond it are read.
2. *What one does alone*, its own transcript first of all: of what that leaves, gene by gene, the posterior mean under a
   unimodal prior (`shrink`).
3. *No effect is made smaller than it is*. Posterior means are too small a set of effects, most of all for perturbations
   that are like no other. Where one is smaller than its measured squares less those of its noise say, it is moved towards
   the measured effect until it is not (limited translation: Efron and Morris 1972, JASA 67).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import svds

from crlseq.threads import counted, in_parallel

EM_STEPS = 50
PATTERN_STEPS = 100  # of the EM for the covariance
NULL_COUNT = 10.0  # genes without effect that the prior has seen: in doubt there is none
MOST = 100  # perturbations whose whole covariance is fitted; of more it has at most so many directions
AT_ONCE = 512  # genes


@dataclass(frozen=True)
class Effects:
    """Estimated effects (n, G), their root mean squared errors (n, G), and the controls' errors e (n_controls, G)."""

    effect: np.ndarray
    error: np.ndarray
    control_error: np.ndarray


@dataclass(frozen=True)
class _Noise:
    """Standard errors are ``row[k] gene[g]`` of perturbed means, and ``control[b] gene[g]`` of control means."""

    row: np.ndarray  # (n,)
    gene: np.ndarray  # (G,), 0 of genes that vary nowhere
    control: np.ndarray  # (n_controls,)

    @property
    def per_gene(self) -> np.ndarray:
        """1 / gene, 0 where it is."""
        return np.asarray(np.where(self.gene > 0, 1 / np.where(self.gene > 0, self.gene, 1.0), 0.0))


@dataclass(frozen=True)
class _Patterns:
    """Posterior in units of noise: of each scale w ``basis @ (kept * score)``, by the shares of the scales in a gene."""

    basis: np.ndarray  # (n, r)
    score: np.ndarray  # (r, G)
    kept: np.ndarray  # (scales, r): variance / (variance + 1) of what is alike
    share: np.ndarray  # (scales, G)


def estimate_effects(measured: np.ndarray, noise: np.ndarray, shares: np.ndarray, control_noise: np.ndarray) -> Effects:
    """Effects with their errors.

    ``measured`` (n, G) with squared errors ``noise`` (n, G) of the perturbed cells are against ``shares`` (n, n_controls)
    of control means with squared errors ``control_noise`` (n_controls, G): ``e = shares @`` their errors. A gene that
    varies nowhere has no effect.
    """
    scale = _noise(noise, control_noise)
    effect, squared, control_error = _alike(measured, shares, scale)
    alone = in_parallel(
        lambda k: _alone(
            np.where(scale.gene > 0, measured[k], 0.0), effect[k], squared[k],
            (noise[k] + (scale.row[k] * scale.gene) ** 2) / 2,  # half its own variances, half those of all cells
            shares[k] @ control_error,
        ),
        range(len(measured)), torch.get_num_threads(),
    )  # fmt: skip
    for k, (own, error) in enumerate(counted(alone, len(measured))):
        effect[k], squared[k] = own, error
    return Effects(effect, np.sqrt(squared, out=squared), control_error)


def _noise(noise: np.ndarray, control_noise: np.ndarray) -> _Noise:
    """Variances of genes are the means of their relative ones over perturbations and controls."""
    n_genes = noise.shape[1]
    total, of_controls = noise.sum(1), control_noise.sum(1)
    least = total[total > 0].min(initial=np.inf)
    if not np.isfinite(least):
        least = 1.0
    total = np.where(total > 0, total, least)  # cells that are all alike are not surer than the surest others
    gene = (1 / total) @ noise + (1 / np.where(of_controls > 0, of_controls, np.inf)) @ control_noise
    gene *= n_genes / max(float(gene.sum()), 1e-300)
    return _Noise(np.sqrt(total / n_genes), np.sqrt(gene), np.sqrt(of_controls / n_genes))


def _alike(measured: np.ndarray, shares: np.ndarray, noise: _Noise) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step 1: posterior means and variances (n, G) of effects, and the controls' errors (n_controls, G)."""
    load = shares * noise.control / noise.row[:, None]  # of the controls' errors, in units of noise
    axes, length, _ = np.linalg.svd(load, full_matrices=False)
    grow, per_row = np.sqrt(1 + length**2), 1 / noise.row

    def scaled(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Along the controls' errors by `factor`: by 1 / grow all noise becomes 1, grow undoes it."""
        return np.asarray(x + axes @ ((factor - 1)[:, None] * (axes.T @ x)))

    # So many genes at once: of many perturbations each such array is as large as many cells.
    blocks = [slice(start, start + AT_ONCE) for start in range(0, len(noise.gene), AT_ONCE)]
    effect = np.empty_like(measured)
    for own in blocks:
        effect[:, own] = scaled(measured[:, own] * per_row[:, None] * noise.per_gene[own], 1 / grow)
    patterns = _patterns(effect, int((noise.gene > 0).sum()))
    squared = np.zeros_like(measured)
    if patterns is None:  # what is seen is of one perturbation alone, or the controls' error
        errors = np.sqrt(1 + (load**2).sum(1))
        for k, row in enumerate(measured):
            effect[k], squared[k] = shrink(row * per_row[k] * noise.per_gene, np.where(noise.gene > 0, errors[k], 0.0))
    else:
        basis = scaled(patterns.basis, grow)
        for own in blocks:
            effect[:, own], squared[:, own] = _posterior(patterns, basis, own)
    of_controls = np.linalg.solve(np.eye(load.shape[1]) + load.T @ load, load.T)
    left = of_controls @ effect - (of_controls * per_row) @ measured * noise.per_gene
    unit = noise.row[:, None]
    effect *= unit
    effect *= noise.gene
    squared *= unit**2
    squared *= noise.gene**2
    return effect, squared, noise.control[:, None] * left * noise.gene


def _posterior(patterns: _Patterns, basis: np.ndarray, genes: slice) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances (n, genes) of the mixture."""
    mean, square = np.zeros((2, len(basis), patterns.score[:, genes].shape[1]))
    for kept, share in zip(patterns.kept, patterns.share[:, genes], strict=True):
        of_scale = basis @ (kept[:, None] * patterns.score[:, genes])
        mean += share * of_scale
        square += share * (of_scale**2 + (basis**2 @ kept)[:, None])
    return mean, np.maximum(square - mean**2, 0.0)


def _patterns(y: np.ndarray, n_genes: int) -> _Patterns | None:
    """The mixture of normals fitted to genes of y (n, G), of which `n_genes` vary, with noise of 1; None without directions."""
    if not n_genes:
        return None
    axes, noise = _directions(y, n_genes)
    x = axes.T @ y / np.sqrt(noise)
    r = len(x)
    if not r:
        return None
    values, turn = np.linalg.eigh(x @ x.T / n_genes - np.eye(r))
    values = _normalised(np.maximum(values, 1e-3))
    most = max(float((x**2).sum(0).max()) / r, 1.0)
    scales = np.concatenate([[0.0], 4.0 ** np.arange(-4, np.ceil(np.log(most) / np.log(4)) + 2)])
    share, null = np.full(len(scales), 1 / len(scales)), NULL_COUNT * (scales == 0)
    for step in counted(range(PATTERN_STEPS + 1), PATTERN_STEPS + 1):
        score, variance = turn.T @ x, scales[:, None] * values + 1
        kept = 1 - 1 / variance
        log_share = np.log(np.maximum(share, 1e-300)) - 0.5 * np.log(variance).sum(1)
        log_likelihood = log_share[:, None] - 0.5 * (1 / variance) @ score**2
        of_gene = np.exp(log_likelihood - log_likelihood.max(0))
        of_gene /= of_gene.sum(0)
        if step == PATTERN_STEPS:
            break
        share = of_gene.sum(1) + null
        share /= share.sum()
        moment = np.zeros((r, r))
        for w, f, weight in zip(scales[1:], kept[1:], of_gene[1:], strict=True):
            mean = f[:, None] * score
            moment += ((mean * weight) @ mean.T + np.diag(f * weight.sum())) / w
        values, again = np.linalg.eigh(moment)
        values, turn = _normalised(np.maximum(values, 0.0)), turn @ again
    return _Patterns(axes @ turn * np.sqrt(noise), score, kept, of_gene)


def _normalised(values: np.ndarray) -> np.ndarray:
    """With a mean of 1: how large effects are is said by the scales."""
    return np.asarray(values / max(float(values.mean()), 1e-300))


def _directions(y: np.ndarray, n_genes: int) -> tuple[np.ndarray, float]:
    """Axes (n, r) that y (n, G) is read along, none if all of it is noise of 1, and the noise along each of them.

    A few directions that were chosen from n take along a part of the noise in all n.
    """
    n = len(y)
    edge = np.sqrt(n) + np.sqrt(n_genes)
    if n <= MOST:
        there = n == 1 or np.linalg.eigvalsh(y @ y.T)[-1] > edge**2
        return np.eye(n)[:, : n if there else 0], 1.0
    least = min(y.shape)
    if least <= MOST or not y.any():
        axes, length, _ = np.linalg.svd(y, full_matrices=False)
    else:
        axes, length, _ = svds(y, k=MOST, v0=np.ones(least))
    return axes[:, length > edge], 1 + n / n_genes


def _alone(
    measured: np.ndarray, alike: np.ndarray, squared: np.ndarray, noise: np.ndarray, control_error: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Steps 2 and 3: effect of one perturbation and its mean squared errors (G,)."""
    own, own_squared = shrink(measured + control_error - alike, np.sqrt(noise))
    made = alike + own - control_error  # as the measured effect is made
    moved = _as_large(made, measured, max(float((measured**2).sum() - noise.sum()), 0.0)) - made
    return alike + own + moved, squared + own_squared + moved**2


def _as_large(effect: np.ndarray, measured: np.ndarray, squares: float) -> np.ndarray:
    """The point nearest to `effect` on the way to `measured` whose sum of squares is at least `squares`."""
    way = measured - effect
    a, b, c = float(way @ way), float(effect @ way), float(effect @ effect) - squares
    if c >= 0 or a == 0:
        return effect
    return np.asarray(effect + min((np.sqrt(b**2 - a * c) - b) / a, 1.0) * way)


def shrink(effect: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and variances (n,) of effects measured with normal standard errors (n,); 0 where the error is.

    The prior is a mixture of normals about 0 whose weights are fitted to all of them (Stephens 2017, Biostatistics 18,
    "False discovery rates: a new deal").
    """
    shrunk, squared = np.zeros_like(effect), np.zeros_like(effect)
    known = error > 0
    d, s = effect[known], error[known]
    if not len(d):
        return shrunk, squared
    largest, smallest = 2 * np.sqrt(max(float((d**2 - s**2).max()), 0.0)), float(s.min()) / 10
    n_scales = max(0, int(np.ceil(np.log2(max(largest / smallest, 1.0)))))
    scales = np.concatenate([[0.0], smallest * 2.0 ** np.arange(1, n_scales + 1)])  # of the prior's normals
    variance = s[:, None] ** 2 + scales**2
    log_likelihood = -0.5 * (d[:, None] ** 2 / variance + np.log(variance))
    likelihood = np.exp(log_likelihood - log_likelihood.max(1, keepdims=True))
    share, pseudo = np.full(len(scales), 1 / len(scales)), np.eye(len(scales))[0] * NULL_COUNT
    for _ in range(EM_STEPS - 1):  # sums of what each effect's posterior is, without forming it
        share = (share * ((1 / (likelihood @ share)) @ likelihood) + pseudo) / (len(d) + NULL_COUNT)
    posterior = likelihood * share
    posterior /= posterior.sum(1, keepdims=True)
    factor = scales**2 / variance
    shrunk[known] = d * (posterior * factor).sum(1)
    second = (posterior * (factor * s[:, None] ** 2 + (factor * d[:, None]) ** 2)).sum(1)
    squared[known] = np.maximum(second - shrunk[known] ** 2, 0.0)
    return shrunk, squared
