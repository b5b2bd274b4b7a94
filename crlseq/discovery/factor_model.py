"""Negative-binomial factor model of counts: loadings by expectation and maximisation, their number from the data.

    x_ig ~ NB(mean exp(s_i + b_g + v_i l_g), variance mean + alpha_g mean^2),    v_i ~ N(0, I), s_i free

(GLM-PCA, Townes et al. 2019, Genome Biology 20, with a distribution of the components). A round takes a scoring step of
every cell, whose posterior is N(v_i, C_i) (Laplace), and a scoring step of every gene on the expected log-likelihood,

    gradient  sum_i r_ig v_i - w_ig C_i l_g,    information  sum_i w_ig (v_i v_i' + C_i)    (r scores, w weights);

then components return to unit variance (parameter-expanded EM, Liu, Rubin & Wu 1998, Biometrika 85). The rounds end when
the steps of loadings are small beside their standard errors. A component that noise alone could have made is dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from crlseq.threads import counted, in_parallel

Floats = NDArray[np.float64]
Information = Callable[[Tensor], Tensor]
CHUNK = 1024
EARLY_CELLS, EARLY_ROUNDS = 2_500, 3  # the first rounds need few cells
DISPERSION_ROUNDS = 3  # after which dispersions stay, once steady: more would change them by a hundredth
MAX_ROUNDS = 40
SPARE = 4  # components of noise that are kept: without any, noise is taken for a program's
EDGE_MARGIN = 1.05  # counts are not quite normal; a component at the edge itself would settle slowly
SETTLED = 0.1  # root mean square of the loadings' steps, in standard errors
STEADY = 0.5  # likewise: from here on components are dropped; before, some still grow
TOLERANCE = 1e-3  # of a cell's step, in deviations of a component
STALE = 0.1  # likewise: a step after which a cell's information is computed anew
INFORMATION_RANK = 64  # of what cells' informations differ by; the rest is left out of the first steps
ROUGH_STEPS = 4  # so many
RIDGE_GENES = 1e-5  # per cell
MAX_ETA = 9.0
MAX_STEP = 3.0  # of a cell, in deviations of a component
LEAST_LOG_MEAN = -30.0  # of a gene: below, one over its mean may overflow
MIN_DISPERSION, MAX_DISPERSION = 1e-3, 3.0


@dataclass(frozen=True)
class FactorModel:
    """Loadings (q, genes) of components of unit variance, log means (genes,) and dispersions (genes,)."""

    loadings: Tensor
    intercept: Tensor
    alpha: Tensor

    def working(self, x: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Working weights and scores (n, genes) of the log mean of counts."""
        mean = (s + self.intercept).add_(v @ self.loadings).clamp_(-12, MAX_ETA).exp_()
        scale = (self.alpha * mean).add_(1).reciprocal_()
        score = (x - mean).mul_(scale)
        return mean.mul_(scale), score

    def log_size(self, x: Tensor) -> Tensor:
        """Log of a cell's total over that of a cell without components (n, 1)."""
        return (x.sum(1, keepdim=True).clamp_min(1) / self.intercept.exp().sum()).log()

    def residuals(self, x: Tensor) -> Tensor:
        """Clipped relative residuals (n, genes) from a cell of the same size without components."""
        rate = self.intercept.exp()
        weight = (rate / (1 + self.alpha * rate)).sqrt()
        z = (self.log_size(x) + self.intercept).exp_()
        return torch.div(x, z, out=z).sub_(1).mul_(weight).clamp_(-6, 6)

    def regression(self, x: Tensor, v: Tensor) -> Tensor:
        """(genes, q) from residuals to components, with a ridge of what noise of unit variance would add."""
        z = self.residuals(x)
        solved: Tensor = torch.linalg.solve(z.T @ z + len(z) * torch.eye(z.shape[1], device=z.device), z.T @ v)
        return solved

    def information(self, weight: Tensor) -> Tensor:
        """Information (q, q) about components, the cell's size profiled out, for working weights (genes,)."""
        loadings = self.loadings.double()
        centred = loadings - ((loadings @ weight) / weight.sum())[:, None]
        return (centred * weight) @ centred.T


def fit_factors(x: Tensor, axes: Floats, alpha: float, least: int, threads: int) -> tuple[FactorModel, Tensor]:
    """The model and components (n, q) of counts (n, genes), from axes (genes, most) of their residuals.

    Those components stay that noise alone would hardly make, `least` of them at least, and `SPARE` more.
    """
    few = x[:: max(1, len(x) // EARLY_CELLS)].contiguous()
    model, v, s = _start(few, axes, alpha)
    for i in range(EARLY_ROUNDS):
        model, v, s, _, _ = _round(few, v, s, model, threads, i > 0)
    if len(few) < len(x):
        guess = model.regression(few, v)
        v, s = torch.cat([model.residuals(x[rows]) @ guess for rows in chunks_of(len(x))]), model.log_size(x)
    real, steady, estimated = v.shape[1], False, 0
    for _ in counted(range(MAX_ROUNDS), MAX_ROUNDS):
        model, v, s, moved, signal = _round(x, v, s, model, threads, estimated < DISPERSION_ROUNDS)
        estimated += steady
        step = float(moved[:real].square().mean()) ** 0.5
        steady = steady or step < STEADY
        real = max(int((signal > noise_edge(*x.shape)).sum()), 1)
        kept = min(max(real, least) + SPARE, len(signal))
        if steady and kept < len(signal):
            model, v = FactorModel(model.loadings[:kept], model.intercept, model.alpha), v[:, :kept].contiguous()
        elif estimated >= DISPERSION_ROUNDS and step < SETTLED:
            break
    return model, v


def noise_edge(n: int, genes: int) -> float:
    """Largest information of a component that is noise, fitted to n cells: (1 + sqrt(genes / n))^2 - 1, and a little more.

    Measurement noise has variance 1 in units of information, so that the eigenvalues of the cells' spread end there
    (Marchenko & Pastur 1967).
    """
    return float(EDGE_MARGIN * ((1 + (genes / n) ** 0.5) ** 2 - 1))


def _start(x: Tensor, axes: Floats, alpha: float) -> tuple[FactorModel, Tensor, Tensor]:
    """Model, components and log sizes by projection of the residuals on their principal axes (genes, q)."""
    size = x.sum(1, keepdim=True) / x.sum(1).median()
    b = (x / size).mean(0).clamp_min(0.1 / len(x)).log()
    weight = (b.exp() / (1 + alpha * b.exp())).sqrt()
    z = ((x / size / b.exp() - 1) * weight).clamp(-6, 6)
    directions = torch.from_numpy(axes.copy()).to(x)
    v = (z - z.mean(0)) @ directions
    deviation = v.std(0).clamp_min(1e-6)
    loadings = (directions * deviation / weight[:, None]).T.contiguous()
    return FactorModel(loadings, b, torch.full_like(b, alpha)), v / deviation, size.log()


@dataclass
class _Sums:
    """What a round needs of some cells, packed upper triangles for pairs of design columns (components, 1)."""

    information: Tensor  # (genes, pairs) sum of w (v v' + C)
    uncertain: Tensor  # (genes, pairs) sum of w C
    gradient: Tensor  # (genes, q + 1) sum of r v
    weight: Tensor  # (genes,)
    spread: Tensor  # (q, q) sum of v v' + C
    total: Tensor  # (q,) sum of v
    dispersion: Tensor  # (3, genes) sums of r^2 + w^2 Var(log mean), of mean / (1 + alpha mean)^2, and of w^2

    def add(self, other: "_Sums") -> None:
        for name, value in vars(other).items():
            getattr(self, name).add_(value)


def _round(
    x: Tensor, v: Tensor, s: Tensor, model: FactorModel, threads: int, dispersions: bool
) -> tuple[FactorModel, Tensor, Tensor, Tensor, Tensor]:
    """One round: model, components, log sizes, steps of loadings (q,) in standard errors, and components' information.

    Components come back on the principal axes of their information, the largest first.
    """

    def part(rows: slice) -> tuple[Tensor, Tensor, _Sums]:
        own, own_size, factor = score(x[rows], v[rows], s[rows], model, 1)
        return own, own_size, _sums(x[rows], own, own_size, torch.cholesky_inverse(factor), model, dispersions)

    n, q = v.shape
    chunks, sums = list(chunks_of(n)), None
    after, sizes = torch.empty_like(v), torch.empty_like(s)
    for rows, (own, own_size, added) in zip(chunks, in_parallel(part, chunks, threads), strict=True):
        after[rows], sizes[rows] = own, own_size
        if sums is None:
            sums = _Sums(*(value.double() for value in vars(added).values()))
        else:
            sums.add(added)
    assert sums is not None
    design = _design(model.loadings).double()
    gradient = sums.gradient - torch.einsum("gij,jg->gi", _unpacked(sums.uncertain, q + 1), design)
    eye = torch.eye(q + 1, dtype=torch.float64, device=x.device)
    h = _unpacked(sums.information, q + 1) + RIDGE_GENES * n * eye
    step = torch.linalg.solve(h, gradient)
    moved = (step * gradient)[:, :q].mean(0).clamp_min(0).sqrt()
    step = step.clamp(-1, 1)
    mean = sums.total / n
    root = torch.linalg.cholesky(sums.spread / n - torch.outer(mean, mean) + 1e-9 * eye[:q, :q])
    loadings, b = model.loadings.double() + step[:, :q].T, model.intercept.double() + step[:, q]
    b, loadings = b + mean @ loadings, root.T @ loadings
    signal, turn = torch.linalg.eigh(FactorModel(loadings, b, model.alpha).information(sums.weight / n))
    alpha = model.alpha
    if dispersions:  # what noise components explain, a share of each gene's variance, is not biology
        noise = float(signal[signal < noise_edge(*x.shape)].sum()) / x.shape[1]
        alpha = _shrunk(sums.dispersion * sums.dispersion.new_tensor([[1 + noise], [1], [1]]), b)
    turn = turn.flip(1)
    back = torch.linalg.solve_triangular(root.T, turn, upper=True)
    model = FactorModel((turn.T @ loadings).float(), b.float(), alpha.float())
    return model, (after - mean.float()) @ back.float(), sizes, moved, signal.flip(0)


def _sums(x: Tensor, v: Tensor, s: Tensor, covariance: Tensor, model: FactorModel, dispersions: bool) -> _Sums:
    """Sums over cells with posterior covariances (n, q + 1, q + 1) of components and log size."""
    q = v.shape[1]
    one, other = torch.triu_indices(q + 1, q + 1, device=x.device)
    w, r = model.working(x, v, s)
    design = torch.cat([v, v.new_ones(len(v), 1)], 1)
    packed = covariance[:, one, other]
    # Sizes are free: their uncertainty is no part of what the loadings explain, but of the residuals' variance it is.
    of_components = packed * ((one < q) & (other < q))
    uncertain = w.T @ of_components
    squares = w.new_zeros(3, x.shape[1])
    if dispersions:
        columns = _design(model.loadings)
        variance = packed @ (columns[one] * columns[other] * torch.where(one == other, 1.0, 2.0)[:, None])
        share = 1 - model.alpha * w  # 1 / (1 + alpha mean)
        squares = torch.stack([(r**2 + w**2 * variance).sum(0), (w * share).sum(0), (w**2).sum(0)])
    return _Sums(
        w.T @ (design[:, one] * design[:, other]) + uncertain, uncertain, r.T @ design, w.sum(0),
        v.T @ v + covariance[:, :q, :q].sum(0), v.sum(0), squares,
    )  # fmt: skip


def _shrunk(sums: Tensor, intercept: Tensor) -> Tensor:
    """Dispersions (genes,) by pseudo-likelihood (Davidian & Carroll 1987), drawn to a trend a + b / mean as far as their
    errors ask for it.

    With V the variance of a count: Var (x - mean)^2 = V^2 (2 + 6 alpha) + V.
    """
    squares, counting, power = (row.clamp_min(1e-12).numpy() for row in sums.cpu())
    each = (squares - counting) / power
    common = float(np.clip((squares - counting).sum() / power.sum(), MIN_DISPERSION, MAX_DISPERSION))
    error = ((2 + 6 * common) * power + counting) / power**2
    weight = 1 / (error + common**2)
    columns = np.stack([np.ones(len(each)), np.exp(-intercept.clamp_min(LEAST_LOG_MEAN).cpu().numpy())], 1)
    trend = columns @ nnls(columns * np.sqrt(weight)[:, None], each * np.sqrt(weight))[0]
    spread = max(float((weight * ((each - trend) ** 2 - error)).sum() / weight.sum()), 1e-4 * common**2)
    drawn = np.clip((each * spread + trend * error) / (spread + error), MIN_DISPERSION, MAX_DISPERSION)
    return torch.from_numpy(drawn).to(sums)


def score(
    x: Tensor,
    v: Tensor,
    s: Tensor,
    model: FactorModel,
    steps: int,
    prior: float = 1.0,
    rough: Information | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fisher scoring of cells: components (n, q), log sizes (n, 1), Cholesky factors (n, q + 1, q + 1) of information.

    ``prior`` is the components' precision. The end is exact whatever the information on the way was: that is what costs,
    so that it is renewed after large steps alone, and the first steps may do with a `rough` one.
    """
    q = v.shape[1]
    design, exact = _design(model.loadings), _information(model.loadings)
    penalty = torch.cat([x.new_full((q,), prior), x.new_zeros(1)])
    state = torch.cat([v, s], 1)
    factor = x.new_empty(len(x), q + 1, q + 1)
    active, stale = torch.arange(len(x), device=x.device), x.new_ones(len(x), dtype=torch.bool)
    for i in range(steps):
        own = x if len(active) == len(x) else x[active]
        w, r = model.working(own, state[active, :q], state[active, q:])
        renewed = active[stale]
        if len(renewed):
            roughly = rough is not None and i < ROUGH_STEPS
            root, failed = _root((rough if roughly else exact)(w[stale]), penalty)  # type: ignore[misc]
            if roughly and bool(failed.any()):
                root[failed > 0] = _root(exact(w[stale][failed > 0]), penalty)[0]
            factor[renewed] = root
        gradient = r @ design.T - state[active] * penalty
        step = torch.cholesky_solve(gradient[..., None], factor[active])[..., 0].clamp(-MAX_STEP, MAX_STEP)
        state[active] += step
        moved = step[:, :q].abs().amax(1)
        going = moved >= TOLERANCE
        active, stale = active[going], moved[going] > STALE
        if not len(active):
            break
    return state[:, :q], state[:, q:], factor


def _design(loadings: Tensor) -> Tensor:
    """Loadings with a row of ones for a cell's size (q + 1, genes)."""
    return torch.cat([loadings, loadings.new_ones(1, loadings.shape[1])])


def _information(loadings: Tensor) -> Information:
    """Working weights (n, genes) to the upper triangles (n, (q + 1)(q + 2) / 2) of cells' information matrices."""
    design = _design(loadings)
    one, other = torch.triu_indices(len(design), len(design), device=design.device)
    products = (design[one] * design[other]).T.contiguous()
    return lambda w: w @ products


def low_rank_information(loadings: Tensor, weights: Tensor) -> Information:
    """`_information` for a fraction of its cost: principal components of the information matrices of some cells, with
    working weights (n, genes), in the metric of their mean, so that an error counts by what it makes of a step.
    """
    design = _design(loadings)
    one, other = torch.triu_indices(len(design), len(design), device=design.device)
    twice = torch.where(one == other, 1.0, 2.0**0.5)  # of a matrix's norm an entry off the diagonal counts twice
    mean = (design * weights.mean(0)) @ design.T + torch.diag(
        torch.cat([loadings.new_ones(len(loadings)), loadings.new_zeros(1)])
    )
    root = torch.linalg.cholesky(mean)
    white = torch.linalg.solve_triangular(root, design, upper=False)
    products = (white[one] * white[other]).T * twice
    seen = weights @ products
    center = seen.mean(0)
    axes = torch.linalg.eigh((seen - center).T @ (seen - center))[1][:, -INFORMATION_RANK:]
    rows = torch.cat([center[None], axes.T])  # back from white triangles
    back = (root @ _unpacked(rows / twice, len(design)) @ root.T)[:, one, other]
    project, offset = products @ axes, center @ axes
    return partial(_low_rank, project, -offset, back)


def _low_rank(project: Tensor, offset: Tensor, back: Tensor, w: Tensor) -> Tensor:
    return torch.addmm(back[0], torch.addmm(offset, w, project), back[1:])


def _root(upper: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of information matrices with the prior's precision, and which of them have none."""
    h = _unpacked(upper, len(penalty)) + torch.diag(penalty + 1e-6)
    h.diagonal(dim1=1, dim2=2).mul_(1 + 1e-5)  # float32: what a step aims at does not depend on it
    root, failed = torch.linalg.cholesky_ex(h)
    return root, failed


def _unpacked(upper: Tensor, n: int) -> Tensor:
    """(..., n (n + 1) / 2) upper triangles to symmetric (..., n, n)."""
    rows, columns = torch.triu_indices(n, n, device=upper.device)
    place = torch.empty(n, n, dtype=torch.int64, device=upper.device)
    place[rows, columns] = place[columns, rows] = torch.arange(len(rows), device=upper.device)
    return upper.index_select(-1, place.flatten()).view(*upper.shape[:-1], n, n)


def chunks_of(n: int) -> Iterator[slice]:
    """Slices of at most `CHUNK` of n cells."""
    return (slice(i, min(n, i + CHUNK)) for i in range(0, n, CHUNK))
