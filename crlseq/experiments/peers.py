"""Screens of other papers, by the equations that these state: toys for which a method was published.

Each has latents ``u_k = r_k f_k(parents of k) + s_k z_k + a_k`` with ``z_k ~ N(0, 1)``, mixed into features. An intervention
sets the retention r, the noise's deviation s and the shift a of its targets. Most have one perturbation a latent, as many
control cells as perturbed ones of each kind, and no measurement noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import anndata as ad
import numpy as np
import pandas as pd

from crlseq.data.simulate import CONTROL
from crlseq.data.simulated_latents import Floats, Rng, Whole, draw_graph

CELLS = 2500  # of each environment, where a paper has from 2,500 to 250,000
Mixing = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Hit:
    """An intervention on the latents ``targets``: their deviation (p,), shift (p,) and the retention of their equations."""

    targets: Sequence[int]
    deviation: Floats
    shift: Floats
    retention: float = 0.0


@dataclass(frozen=True)
class Equations:
    """``weights`` (p, p), row -> column, noise's ``deviation`` (p,), a causal ``order``, and the function of parents:
    the weighted sum, or with ``quadratic`` forms the root of ``u' Q_k u``.
    """

    weights: Floats
    deviation: Floats
    order: Whole
    quadratic: Sequence[Floats] | None = None

    def latents(self, noise: Floats, retention: Floats) -> Floats:
        """(n, p) of own noises (n, p) and retentions (p,)."""
        found = noise.copy()
        for k in self.order:
            given = found @ self.weights[:, k]
            if self.quadratic is not None:
                given = np.sqrt(np.einsum("ni,ij,nj->n", found, self.quadratic[k], found))
            found[:, k] += retention[k] * given
        return found


def squires(seed: int, soft: bool = False, cells: int = CELLS) -> ad.AnnData:
    """Variance-only interventions: Squires et al. 2023, "Linear causal disentanglement via interventions" (ICML), section 5.

    Five latents, ten features; pairs are joined with probability 0.75 by weights of size 0.25 to 1; noise has a deviation of
    1 / U(2, 4), and under a hard intervention of 1 / U(6, 8). The features are a pseudoinverse of ``H ~ U(-2, 2)``, rows of
    norm 1. With ``soft`` half of the parents' influence is kept.
    """
    rng, p = np.random.default_rng(seed), 5
    equations = _linear(p, 0.75, (0.25, 1.0), 1 / rng.uniform(2, 4, p), rng)
    hits = [_hit(equations, [k], 1 / rng.uniform(6, 8), retention=0.5 * soft) for k in range(p)]
    unmixing = rng.uniform(-2, 2, (p, 10))
    unmixing /= np.linalg.norm(unmixing, axis=1, keepdims=True)
    return _screen(equations, hits, lambda u: u @ np.linalg.pinv(unmixing).T, cells, rng)


def buchholz(
    seed: int,
    n_latents: int = 5,
    degree: float = 2.0,
    n_features: int = 20,
    network: bool = False,
    noise: float = 0.0,
    cells: int = CELLS,
) -> ad.AnnData:
    """Hard interventions that shift: Buchholz et al. 2023, arXiv 2306.02235, section 6.

    Latents have `degree` neighbours on average, by weights of size 0.25 to 1; noise has a variance from 1 to 2, as under
    intervention, which shifts by 1 to 2. The mixing is linear or a network of three hidden layers of 512 units with leaky
    ReLU. ``noise`` is that of measurement, in standard deviations of the features, of which the paper has none.
    """  # fmt: skip
    rng, p = np.random.default_rng(seed), n_latents
    equations = _linear(p, degree / (p - 1), (0.25, 1.0), np.sqrt(rng.uniform(1, 2, p)), rng)
    sizes = rng.uniform(1, 2, p) * rng.choice([-1.0, 1.0], p)
    hits = [_hit(equations, [k], np.sqrt(rng.uniform(1, 2)), sizes[k]) for k in range(p)]
    widths = [p, 512, 512, 512, n_features] if network else [p, n_features]
    return _screen(equations, hits, _layers(widths, rng), cells, rng, noise)


def varici(
    seed: int,
    quadratic: bool = False,
    soft: bool = False,
    many: bool = False,
    pairs: bool = False,
    n_latents: int = 5,
    cells: int = CELLS,
) -> ad.AnnData:
    """Score-based settings: Varıcı et al. 2025, JMLR (arXiv 2402.00849), section 7; with `many`, unknown targets of several
    latents at once, Varıcı et al. 2024, NeurIPS (arXiv 2406.05937).

    Pairs are joined with probability 0.5; linear equations have weights of size 0.5 to 1.5, `quadratic` ones are
    ``sqrt(u' Q u)`` of the parents. Noise has a variance from 0.5 to 1.5, five times that under intervention (`many`: a
    quarter). ``soft`` interventions keep half of the parents' influence. 20 features, linear. With `pairs` each latent has two
    hard interventions, with four times and a quarter of its variance, and features are ``tanh`` of linear ones (GSCALE-I).
    """  # fmt: skip
    rng, p = np.random.default_rng(seed), n_latents
    equations = _linear(p, 0.5, (0.5, 1.5), np.sqrt(rng.uniform(0.5, 1.5, p)), rng)
    if quadratic:
        equations = _quadratic(equations, rng)
    each = [[k] for k in range(p)]
    if many:
        place = {int(k): at for at, k in enumerate(equations.order)}
        each = [[k, *(j for j in range(p) if place[j] < place[k] and rng.random() < 0.5)] for k in range(p)]
    factors = [2.0, 0.5] if pairs else [0.5 if many else np.sqrt(5)]  # of deviations
    hits = [_hit(equations, targets, None, 0.0, 0.5 * soft, factor) for factor in factors for targets in each]
    loadings = rng.standard_normal((p, 20)) / np.sqrt(p)
    mixing: Mixing = (lambda u: np.tanh(u @ loadings)) if pairs else (lambda u: u @ loadings)
    return _screen(equations, hits, mixing, cells, rng)


def cauca(seed: int, cells: int = CELLS) -> ad.AnnData:
    """Causal component analysis: Wendong et al. 2023, NeurIPS (arXiv 2305.17225), section 5: there targets and graph are known.

    Four latents, weights U(-1, 1), noise of variance 1 that interventions shift by 2; as many features, by three rounds of a
    random matrix and ``tanh(x) + 0.1 x``.
    """
    rng, p = np.random.default_rng(seed), 4
    equations = _linear(p, 0.5, (0.0, 1.0), np.ones(p), rng)
    hits = [_hit(equations, [k], 1.0, 2.0) for k in range(p)]
    matrices = [rng.uniform(0, 1, (p, p)) for _ in range(3)]
    for i, matrix in enumerate(matrices):
        while abs(np.linalg.det(matrix)) < 0.1:
            matrix = matrices[i] = rng.uniform(0, 1, (p, p))

    def mixing(u: Floats) -> Floats:
        for matrix in matrices:
            u = u @ matrix
            u = np.tanh(u) + 0.1 * u
        return u

    return _screen(equations, hits, mixing, cells, rng)


def heavy_tails(seed: int, n_latents: int = 10, cells: int = 500) -> ad.AnnData:
    """Independent programs active in few cells: the model of Rohe and Zeng 2023 (JRSS B 85:1037), section 3.

    ``u = b z`` with b of 1 in a fifth of the cells, 50 features, linear, measurement noise of 0.3. Four perturbations a latent
    shift it by 1 to 3. There is no graph: an edge is false.
    """
    rng, p = np.random.default_rng(seed), n_latents
    target = np.tile(np.arange(p), 4)
    environment = np.repeat(np.arange(len(target) + 1), [2000] + [cells] * len(target))
    latents = rng.standard_normal((len(environment), p)) * (rng.random((len(environment), p)) < 0.2)
    shift = rng.uniform(1, 3, len(target)) * rng.choice([-1.0, 1.0], len(target))
    for c, (k, size) in enumerate(zip(target, shift, strict=True)):
        latents[environment == c + 1, k] += size
    features = latents @ rng.standard_normal((p, 50)) + 0.3 * rng.standard_normal((len(latents), 50))
    return as_screen(features.astype(np.float32), environment, latents, np.zeros((p, p)), target)


def toy(seed: int, n_control: int = 10240, cells_per_perturbation: int = 2048) -> ad.AnnData:
    """The toy simulation of Zhang et al. 2023 (arXiv 2307.06250), single perturbations alone.

    A chain of five latents, ``u_k = max(u_{k-1}, 0) + z_k``; a perturbation adds 5 to ``u_k``. Features are the latents and
    five zeros, without noise.
    """
    rng, p, size = np.random.default_rng(seed), 5, 5.0
    environment = np.repeat(np.arange(p + 1), [n_control] + [cells_per_perturbation] * p)
    latents = rng.standard_normal((len(environment), p))
    for k in range(p):
        latents[environment == k + 1, k] += size
        if k:
            latents[:, k] += np.maximum(latents[:, k - 1], 0)
    features = np.hstack([latents, np.zeros_like(latents)]).astype(np.float32)
    return as_screen(features, environment, latents, np.eye(p, k=1), np.arange(p))


def as_screen(
    features: object, environment: np.ndarray, latents: Floats, adjacency: Floats, target: np.ndarray
) -> ad.AnnData:
    """A screen in the format of `crlseq.data.simulate.simulate`: environments (cells,), 0 control, c + 1 the perturbation
    ``t{c}`` of the latent ``target[c]``; true latents (cells, p) and adjacency (p, p), row -> column.
    """
    names = [f"t{c}" for c in range(len(target))]
    labels = pd.Categorical.from_codes(environment, pd.Index([CONTROL, *names]))
    screen = ad.AnnData(features, obs=pd.DataFrame({"perturbation": labels}, index=_named("c", len(environment))))
    screen.var_names = _named("gene", screen.n_vars)
    screen.obsm["true_latents"] = latents
    screen.uns["truth"] = {"adjacency": adjacency, "target": pd.DataFrame({"latent": target}, index=names)}
    return screen


def _named(kind: str, n: int) -> list[str]:
    return [f"{kind}{i}" for i in range(n)]


def _linear(p: int, density: float, size: tuple[float, float], deviation: Floats, rng: Rng) -> Equations:
    weights, order = draw_graph(p, density * (p - 1) / 2, size, rng)
    return Equations(weights, deviation, order)


def _quadratic(equations: Equations, rng: Rng) -> Equations:
    """The same graph, with ``Q = L' L`` of random square L (uniform, smallest singular value at least 0.1) on the parents."""
    p = len(equations.weights)
    forms = []
    for k in range(p):
        parents = np.flatnonzero(equations.weights[:, k])
        root = rng.uniform(-1, 1, (len(parents), len(parents)))
        while len(parents) and np.linalg.svd(root, compute_uv=False)[-1] < 0.1:
            root = rng.uniform(-1, 1, root.shape)
        form = np.zeros((p, p))
        form[np.ix_(parents, parents)] = root.T @ root
        forms.append(form)
    return Equations(equations.weights, equations.deviation, equations.order, forms)


def _hit(
    equations: Equations,
    targets: Sequence[int],
    deviation: float | None,
    shift: float = 0.0,
    retention: float = 0.0,
    factor: float = 1.0,
) -> Hit:
    """An intervention that gives its targets a deviation, or multiplies theirs by a factor."""
    own, moved = equations.deviation.copy(), np.zeros(len(equations.deviation))
    own[list(targets)] = own[list(targets)] * factor if deviation is None else deviation
    moved[list(targets)] = shift
    return Hit(targets, own, moved, retention)


def _layers(widths: Sequence[int], rng: Rng) -> Mixing:
    """Linear layers with weights and, between them, constants U(-1, 1) / sqrt(inputs), and leaky ReLU of slope 0.2."""
    weights = [rng.uniform(-1, 1, (a, b)) / np.sqrt(a) for a, b in pairwise(widths)]
    constants = [rng.uniform(-1, 1, b) / np.sqrt(a) for a, b in pairwise(widths)]

    def mixing(u: Floats) -> Floats:
        u = u @ weights[0]
        for weight, before, after in zip(weights[1:], constants, constants[1:], strict=False):
            u = u + before
            u = np.maximum(u, 0.2 * u) @ weight
            u = u + after if weight is weights[-1] else u
        return u

    return mixing


def _screen(
    equations: Equations, hits: Sequence[Hit], mixing: Mixing, cells: int, rng: Rng, noise: float = 0.0
) -> ad.AnnData:
    """Cells of the controls and of each intervention; its first target counts as its own."""
    p, parts = len(equations.deviation), []
    for hit in (Hit([], equations.deviation, np.zeros(p)), *hits):
        retention = np.ones(p)
        retention[list(hit.targets)] = hit.retention
        parts.append(equations.latents(rng.standard_normal((cells, p)) * hit.deviation + hit.shift, retention))
    latents = np.concatenate(parts)
    features = mixing(latents)
    features = features + noise * features.std(0) * rng.standard_normal(features.shape)
    environment = np.repeat(np.arange(len(parts)), cells)
    target = np.array([hit.targets[0] for hit in hits])
    return as_screen(features.astype(np.float32), environment, latents, equations.weights, target)
