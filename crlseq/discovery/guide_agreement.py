"""Which guides of a gene do nothing, by what its other guides do.

Cells are taken as scores on principal components, less those of the controls of their batches, whitened by the controls'
covariance, in the directions in which perturbations differ from controls by more than noise (singular values of their
standardised mean effects, K perturbations x q components, above sqrt(K) + sqrt(q): Marchenko and Pastur 1967). With the mean a_i of
guide i along its gene's mean effect, and v_i its squared error,

    a_i ~ pi N(0, v_i) + (1 - pi) N(b e^(s t), v_i),    t ~ N(0, 1),

the effect b of the gene being uniform from 0 to twice the largest a_i, s = 0.15 how far the strengths of guides that work differ,
and pi the share of dead guides, by expectation maximisation from `PRIOR` guides of which one in twenty is dead. A guide is dead in
all contexts or in none, so that what each says of it is multiplied.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit, logsumexp
from scipy.stats import norm

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.errors import few

FDR, MIN_CELLS = 0.05, 5
DEAD, PRIOR, STEPS = 0.05, 20, 20  # share of dead guides before any is seen, how many guides that counts as, and of EM
SPREAD = 0.15  # s: a guide of half the strength is nearly five of these below the others
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(9)  # of t
TINY = 1e-15  # least probability of a guide to be dead or not, in one context
GRID = 100  # effects b at which the likelihood is summed

Floats = NDArray[np.float64]


class _Gene(NamedTuple):
    """Guides of a gene (n,): their numbers, cells, means ``a`` and squared errors ``v``."""

    name: str
    guides: list[str]
    cells: list[int]
    a: Floats
    v: Floats


def guide_agreement(data: PerturbSeqData, scores: np.ndarray) -> pd.DataFrame:
    """``guide, perturbation, n_cells, strength, strength_se, fdr, weak``: a row for every guide of a perturbation with two or more.

    By scores (cells, q) of training cells with one perturbation. ``strength`` is a guide's effect over that of its gene, 1 of a guide
    that does what the others do. ``fdr`` is the expected share of working guides among those that are at least as likely dead, and
    ``weak`` those of at most 5 %. Without guides the table is empty. With contexts a guide has a row for each, of the same ``fdr``.
    """
    genes = _genes(data, scores)
    table = pd.DataFrame({
        "guide": [guide for gene in genes for guide in gene.guides],
        "perturbation": [gene.name for gene in genes for _ in gene.guides],
        "n_cells": np.array([n for gene in genes for n in gene.cells], dtype=np.int64),
    })  # fmt: skip
    dead, effect = probabilities([(gene.a, gene.v) for gene in genes])
    a, v = (np.concatenate([np.zeros(0), *(getattr(gene, name) for gene in genes)]) for name in ("a", "v"))
    guide = np.arange(len(dead))
    if data.context_names:
        guide = pd.factorize(table["guide"])[0]
        dead = _in_all_contexts(dead, guide)
    fdr = np.empty(len(dead))
    order = np.argsort(-dead, kind="stable")
    fdr[order] = np.cumsum(1 - dead[order]) / np.arange(1, len(dead) + 1)
    fdr = fdr[guide]
    return table.assign(strength=a / effect, strength_se=np.sqrt(v) / effect, fdr=fdr, weak=fdr <= FDR)


def _in_all_contexts(dead: Floats, guide: NDArray[np.int64]) -> Floats:
    """Probability (guides,) that each is dead, by that of its rows (n,), of which ``guide`` (n,) is the number: odds beyond
    those of any guide are multiplied.
    """
    any_guide = logit((PRIOR * DEAD + dead.sum()) / (PRIOR + len(dead)))
    said = logit(np.clip(dead, TINY, 1 - TINY)) - any_guide
    joint: Floats = expit(np.bincount(guide, weights=said) + any_guide)
    return joint


def probabilities(genes: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """(guides,) that each is dead, and the expected effect b of its gene; ``genes`` are means and squared errors of guides."""
    share, dead, effect = DEAD, np.zeros(0), np.zeros(0)
    for _ in range(STEPS if genes else 0):
        parts = [_gene(a, v, share) for a, v in genes]
        dead = np.concatenate([part[0] for part in parts])
        effect = np.concatenate([np.full(len(part[0]), part[1]) for part in parts])
        share = (PRIOR * DEAD + dead.sum()) / (PRIOR + len(dead))
    return dead, effect


def _gene(a: Floats, v: Floats, share: float) -> tuple[Floats, float]:
    """The probability (n,) that each guide of a gene is dead, and the gene's expected effect."""
    b = np.linspace(0, 2 * max(float(np.abs(a).max()), float(np.sqrt(v.max()))), GRID)[:, None]
    strengths = norm.logpdf(a, b[..., None] * np.exp(SPREAD * NODES)[:, None], np.sqrt(v))  # (b, t, guides)
    works = np.log1p(-share) + logsumexp(strengths, axis=1, b=(WEIGHTS / WEIGHTS.sum())[:, None])
    dead = np.log(share) + norm.logpdf(a, 0, np.sqrt(v))
    both = np.logaddexp(dead, works)
    by_effect = both.sum(1)
    weight = np.exp(by_effect - logsumexp(by_effect))
    return weight @ np.exp(dead - both), float(weight @ b[:, 0])


def _genes(data: PerturbSeqData, scores: np.ndarray) -> list[_Gene]:
    """What there is to compare, by perturbation."""
    found = []
    if data.guides is not None:
        cells = data.cells_by_condition(splits.TRAIN)
        y = _whitened(data, scores, cells[0])
        y = y @ _directions([y[own] for own in cells[1:] if len(own) >= MIN_CELLS], len(cells[0]))
        for own, parts in zip(cells[1:], data.conditions[1:], strict=True):
            number = data.guides.number[own]
            guides, counts = np.unique(number[number >= 0], return_counts=True)
            guides, counts = guides[counts >= MIN_CELLS], counts[counts >= MIN_CELLS]
            if len(parts) != 1 or len(guides) < 2:
                continue
            mean = y[own].mean(0)
            length = max(float(np.linalg.norm(mean)), 1e-300)
            along = y[own] @ (mean / length)
            groups = [along[number == guide] for guide in guides]
            a, v = (np.array([value(group) for group in groups]) for value in (np.mean, np.var))
            # The direction is drawn to the noise of all guides alike, across its own.
            a = a - max(float(y[own].var(0).sum() - along.var()), 0.0) / (len(own) * length)
            names = [data.guides.names[guide] for guide in guides]
            v = v / (counts - 1) + 1 / len(cells[0])
            found.append(_Gene(data.perturbation_names[parts[0]], names, counts.tolist(), a, v))
    return found


def _whitened(data: PerturbSeqData, scores: np.ndarray, control: np.ndarray) -> Floats:
    """Scores with mean 0 over the controls of each batch, of all where these are fewer than two, and covariance 1 over all."""
    y = scores.astype(np.float64)
    center = y[control].mean(0)
    for b in np.unique(data.batch):
        own = control[data.batch[control] == b]
        y[data.batch == b] -= y[own].mean(0) if len(own) > 1 else center
    variance, axes = np.linalg.eigh(np.cov(y[control].T).reshape(y.shape[1], -1))
    kept = variance > 1e-9 * variance.max()
    return np.asarray(y @ (axes[:, kept] / np.sqrt(variance[kept])))


def _directions(groups: list[Floats], n_control: int) -> Floats:
    """(q, r) orthonormal directions in which groups of cells differ from controls; one at least."""
    effects = np.array([group.mean(0) / np.sqrt(1 / len(group) + 1 / n_control) for group in groups])
    _, sizes, axes = np.linalg.svd(effects, full_matrices=False)
    return np.asarray(axes[: max(1, int((sizes > sum(np.sqrt(effects.shape))).sum()))].T)


def without_guides(data: PerturbSeqData, names: Collection[str]) -> PerturbSeqData:
    """The screen without the cells of these guides."""
    if data.guides is None or not names:
        return data
    numbers = [i for i, name in enumerate(data.guides.names) if name in names]
    dropped = np.isin(data.guides.number, numbers) & (data.condition > 0)
    return replace(
        data, condition=np.where(dropped, -1, data.condition), split=np.where(dropped, splits.UNUSED, data.split)
    )


def weak_guides(table: pd.DataFrame) -> list[str]:
    """Names of the weak guides of a table by `guide_agreement`."""
    return [str(name) for name in table["guide"][table["weak"]].unique()]


def guides_in_words(table: pd.DataFrame, dropped: bool) -> str:
    """A sentence about guides that do nothing; empty where there are none."""
    if not (weak := weak_guides(table)):
        return ""
    told = f"{len(weak)} of {table['guide'].nunique()} guides do nothing, though other guides of their gene have an effect: {few(weak)}."
    return f"{told} Their cells are left out." if dropped else f"{told} --drop-outlier-guides leaves them out."
