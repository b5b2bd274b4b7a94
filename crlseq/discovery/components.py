"""Whitened components of cells, in which a program's effect is a straight line.

Counts: a negative-binomial factor model with a free intercept per cell (GLM-PCA, Townes et al. 2019, Genome Biology 20),

    x_ig ~ NB(mean exp(s_i + b_g + v_i l_g), variance mean + alpha mean^2),

by alternating Fisher scoring for the cells (v_i, s_i) and the genes (l_g, b_g). With ``s_i`` estimated a log-linear
mixing stays exactly linear; dividing by totals adds the log-sum-exp of all programs, which is not. Components are
whitened by the mean information of a cell, so that measurement noise is about 1 in every direction, and rotated to
principal axes. Other values: principal components.
"""

from collections.abc import Callable, Iterator
from functools import partial
from threading import Lock

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.threads import in_parallel, on_threads

Floats = NDArray[np.float64]
Scores = NDArray[np.float32]  # of all cells: what is held of a screen of any size
Information = Callable[[Tensor], Tensor]
CHUNK = 1024
ROUNDS = 4  # alternations between cells and genes
MAX_STEPS = 20  # scoring steps of a cell once the genes are known; it takes about 6
TOLERANCE = 1e-3  # of a component's own deviation
STALE = 0.1  # likewise: a step after which a cell's information is computed anew
INFORMATION_RANK = 64  # of what cells' informations differ by; the rest is left out of the first steps
ROUGH_STEPS = 4  # so many
MAX_LOADING_CELLS = 10_000  # loadings are estimated on at most so many cells
MAX_GENES = 1_000  # and on the genes that vary most beyond counting noise: the cost grows with genes and not with news
RIDGE_GENES = 1e-5  # per cell
MAX_ETA = 9.0
ENOUGH_CONTROLS = 20  # in a batch, to centre it on its own


def whitened_components(data: PerturbSeqData, n_components: int, seed: int) -> Scores:
    """(cells, q) components of every cell, centred on the control cells of its batch, overall deviation 1.

    Estimated on training cells alone; q is `n_components` or what genes and cells allow. Cells that take no part are 0.
    Perturbed genes are left out: that a knock-out lowers its own transcript would give it a direction of its own.
    """
    genes = np.flatnonzero(~np.isin(data.genes, data.perturbation_names))
    if len(genes) < 2:
        genes = np.arange(data.n_genes)
    used = np.flatnonzero(data.split != splits.UNUSED)
    trained = np.flatnonzero(data.split == splits.TRAIN)
    q = min(n_components, len(genes) - (data.totals is not None), len(trained) - 1)  # counts lose one to the size
    if len(trained) > MAX_LOADING_CELLS:
        rng = np.random.default_rng([seed, 7])
        trained = np.sort(rng.choice(trained, MAX_LOADING_CELLS, replace=False))
    scores = np.zeros((len(data.split), q), dtype=np.float32)
    if data.totals is not None:
        scores[used] = count_components(lambda index: data.counts(index)[:, genes], trained, used, q)
    else:
        center, axes = _principal_axes(data.dense(trained)[:, genes].astype(np.float64), q)
        for rows in _chunks(len(used)):
            scores[used[rows]] = (data.dense(used[rows])[:, genes] - center) @ axes
    _centre_on_controls(scores, data, used)
    scores /= max(_deviation(scores, np.flatnonzero(data.split == splits.TRAIN)), 1e-12)
    return scores


def _centre_on_controls(scores: Scores, data: PerturbSeqData, used: np.ndarray) -> None:
    controls = data.cells(0, splits.TRAIN)
    overall = scores[controls].mean(0, dtype=np.float64)
    for b in np.unique(data.batch[used]):
        own = controls[data.batch[controls] == b]
        cells = used[data.batch[used] == b]
        center = scores[own].mean(0, dtype=np.float64) if len(own) >= ENOUGH_CONTROLS else overall
        for rows in _chunks(len(cells)):
            scores[cells[rows]] -= center


def _deviation(scores: Scores, cells: np.ndarray) -> float:
    """Standard deviation about the cells' mean, over all components together."""
    squares, sums = 0.0, np.zeros(scores.shape[1])
    for rows in _chunks(len(cells)):
        part = scores[cells[rows]].astype(np.float64)
        squares += float((part**2).sum())
        sums += part.sum(0)
    return float(np.sqrt(max(squares - float((sums**2).sum()) / len(cells), 0.0) / (len(cells) * scores.shape[1])))


def count_components(
    counts: Callable[[np.ndarray], sp.csr_matrix], fitted: np.ndarray, cells: np.ndarray, n_components: int
) -> Scores:
    """(len(cells), n_components) whitened components of counts, loadings estimated on the cells `fitted`.

    ``counts`` gives those (cells, genes) of indices. Cost: cells x genes (at most `MAX_GENES`) x n_components^2.
    """
    x, genes, axes = _select(counts(fitted), n_components)
    alpha = dispersion(x)
    dense = torch.from_numpy(x.toarray()).float()
    threads = torch.get_num_threads()
    with on_threads(1):  # chunks share the threads, and no sum depends on how many there are
        found, intercept, prior, v = _fit_loadings(dense, axes, alpha, threads)
        z = _residuals(dense, intercept, alpha)  # regressed on with a ridge of what noise of unit variance would add
        guess = torch.linalg.solve(z.T @ z + len(z) * torch.eye(z.shape[1]), z.T @ v)
        some = slice(CHUNK)
        weights = _working(dense[some], _log_size(dense[some], intercept) + intercept + v[some] @ found, alpha)[0]
        rough = _low_rank_information(found, weights, prior)
    q = len(found)
    scores = np.empty((len(cells), q), dtype=np.float32)
    information, sums, products = np.zeros(x.shape[1]), np.zeros(q), np.zeros((q, q))
    one_reader = Lock()

    def score(rows: slice) -> tuple[Tensor, Tensor]:
        with one_reader:
            own = counts(cells[rows])
        part = torch.from_numpy(own[:, genes].astype(np.float32).toarray())
        # Any start leads to the same end, for the likelihood is concave; this one halves the way.
        start = _residuals(part, intercept, alpha) @ guess
        v, s = _score(part, start, _log_size(part, intercept), found, intercept, prior, alpha, MAX_STEPS, rough)
        return v, _working(part, s + intercept + v @ found, alpha)[0].double().sum(0)

    chunks = list(_chunks(len(cells)))
    for rows, (v, weight) in zip(chunks, in_parallel(score, chunks, threads), strict=True):
        scores[rows] = v.numpy()
        sums += v.double().sum(0).numpy()
        products += (v.double().T @ v.double()).numpy()
        information += weight.numpy() / len(cells)
    loadings = found.double().numpy()
    # Whitening: v L with L L' the mean information of a cell about v, its intercept profiled out.
    centred = loadings - (loadings @ information)[:, None] / information.sum()
    precision = (centred * information) @ centred.T
    root = np.linalg.cholesky(precision + (1e-9 * np.trace(precision) / q + 1e-12) * np.eye(q))
    spread = root.T @ (products - np.outer(sums, sums) / len(cells)) @ root
    turned = root @ np.linalg.eigh(spread)[1][:, ::-1]
    for rows in _chunks(len(cells)):
        scores[rows] = scores[rows].astype(np.float64) @ turned
    return scores


def dispersion(counts: Floats | sp.csr_matrix) -> float:
    """Common NB dispersion by moments: the lower quartile over genes, since biology only adds variance."""
    size, rate = _relative(sp.csr_matrix(counts, dtype=np.float64))
    mean, variance = _moments_by_gene(rate, np.zeros(rate.shape[1]))
    used = mean > 0.1
    if not used.any():
        return 0.1
    each = (variance[used] - mean[used] * (1 / size).mean()) / mean[used] ** 2
    return float(np.clip(np.quantile(each, 0.25), 1e-3, 2))


def _relative(counts: sp.csr_matrix) -> tuple[Floats, sp.csr_matrix]:
    """Sizes (cells,) of median 1, and counts divided by them."""
    totals = np.asarray(counts.sum(1)).ravel()
    size = totals / np.median(totals)
    rate = counts.copy()
    rate.data /= np.repeat(size, np.diff(rate.indptr))
    return size, rate


def _moments_by_gene(x: sp.csr_matrix, zeros: Floats) -> tuple[Floats, Floats]:
    """Mean and variance (genes,) of values of which those stored nowhere are `zeros` (genes,)."""
    n, g = x.shape
    apart = x.data - zeros[x.indices]
    first, second = (np.bincount(x.indices, apart**power, minlength=g) / n for power in (1, 2))
    return zeros + first, second - first**2


def _select(counts: sp.csr_matrix, n_components: int) -> tuple[sp.csr_matrix, np.ndarray, Floats]:
    """Counts of the genes that vary most, those genes, and principal axes of their residuals."""
    detected = np.flatnonzero(counts.getnnz(0) > 0)
    x = sp.csr_matrix(counts[:, detected], dtype=np.float64)
    x = x[x.getnnz(1) > 0]  # a cell without any of these genes has no size, and says nothing about loadings
    _, rate = _relative(x)
    mean = np.asarray(rate.mean(0)).ravel()
    weight = _residual_weight(mean, dispersion(x))
    residual, zeros = rate, np.clip(-weight, -6, 6)
    residual.data = np.clip((rate.data / mean[rate.indices] - 1) * weight[rate.indices], -6, 6)
    kept = np.sort(np.argsort(-_moments_by_gene(residual, zeros)[1], kind="stable")[:MAX_GENES])
    residual.data -= zeros[residual.indices]
    axes = _principal_axes(residual[:, kept].toarray() + zeros[kept], min(n_components, len(kept)))[1]
    x = x[:, kept]
    return x[x.getnnz(1) > 0], detected[kept], axes


def _residual_weight(rate: Floats, alpha: float) -> Floats:
    """1 / sd of a relative residual of an average cell."""
    return np.asarray(np.sqrt(rate / (1 + alpha * rate)))


def _log_size(x: Tensor, intercept: Tensor) -> Tensor:
    """Log of a cell's total over that of a cell without components (n, 1)."""
    return (x.sum(1, keepdim=True).clamp_min(1) / intercept.exp().sum()).log()


def _residuals(x: Tensor, intercept: Tensor, alpha: float) -> Tensor:
    """Clipped relative residuals (n, genes) from a cell of the same size without components."""
    rate = intercept.exp()
    weight = (rate / (1 + alpha * rate)).sqrt()
    return ((x / (_log_size(x, intercept) + intercept).exp() - 1) * weight).clamp_(-6, 6)


def _fit_loadings(x: Tensor, axes: Floats, alpha: float, threads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loadings (q, genes), intercepts (genes,), prior precisions (q,) and components (n, q) by alternating scoring."""
    n, g = x.shape
    size = x.sum(1, keepdim=True) / x.sum(1).median()
    s, b = size.log(), (x / size).mean(0).log()
    weight = torch.from_numpy(_residual_weight(b.double().exp().numpy(), alpha)).float()
    z = ((x / size / b.exp() - 1) * weight).clamp(-6, 6)
    start = torch.from_numpy(axes.copy()).float()
    v, loadings = (z - z.mean(0)) @ start, (start / weight[:, None]).T.contiguous()
    for i in range(ROUNDS):
        prior = 1 / (v**2).mean(0).clamp_min(1e-3)
        steps = partial(_score, loadings=loadings, b=b, prior=prior, alpha=alpha, steps=2 if i == 0 else 1)
        chunks = list(_chunks(n))
        moved = in_parallel(lambda rows: steps(x[rows], v[rows], s[rows]), chunks, threads)  # noqa: B023
        for rows, new in zip(chunks, moved, strict=True):
            v[rows], s[rows] = new
        mean = v.mean(0)
        b, v = b + mean @ loadings, v - mean
        q = len(loadings)
        pairs = torch.triu_indices(q + 1, q + 1)
        packed = torch.zeros(g, pairs.shape[1], dtype=torch.float64)
        gradient = torch.zeros(g, q + 1, dtype=torch.float64)
        for rows in _chunks(n):
            w, score = _working(x[rows], s[rows] + b + v[rows] @ loadings, alpha)
            design = torch.cat([v[rows], torch.ones(len(w), 1)], 1)
            packed += w.T @ (design[:, pairs[0]] * design[:, pairs[1]])
            gradient += score.T @ design
        h = _unpacked(packed, q + 1) + RIDGE_GENES * n * torch.eye(q + 1, dtype=torch.float64)
        step = torch.linalg.solve(h, gradient).clamp(-1, 1).float()
        loadings, b = loadings + step[:, :q].T, b + step[:, q]
    return loadings, b, 1 / (v**2).mean(0).clamp_min(1e-3), v


def _score(
    x: Tensor,
    v: Tensor,
    s: Tensor,
    loadings: Tensor,
    b: Tensor,
    prior: Tensor,
    alpha: float,
    steps: int,
    rough: Information | None = None,
) -> tuple[Tensor, Tensor]:
    """Fisher scoring of cells: components (n, q) and intercepts (n, 1), exact whatever the information on the way was:
    that is what costs, so that it is renewed after large steps alone, and the first steps may do with a `rough` one.
    """
    q, g = loadings.shape
    design, exact = torch.cat([loadings, torch.ones(1, g)]), _information(loadings)
    penalty = torch.cat([prior, prior.new_zeros(1)])
    limit = 3 / float(prior.min()) ** 0.5
    state = torch.cat([v, s], 1)
    factor = x.new_empty(len(x), q + 1, q + 1)
    active, stale = torch.arange(len(x)), torch.ones(len(x), dtype=torch.bool)
    for i in range(steps):
        own = x if len(active) == len(x) else x[active]
        w, score = _working(own, state[active] @ design + b, alpha)
        renewed = active[stale]
        if len(renewed):
            roughly = rough is not None and i < ROUGH_STEPS
            root, failed = _root((rough if roughly else exact)(w[stale]), penalty)  # type: ignore[misc]
            if roughly and bool(failed.any()):
                root[failed > 0] = _root(exact(w[stale][failed > 0]), penalty)[0]
            factor[renewed] = root
        gradient = score @ design.T - state[active] * penalty
        step = torch.cholesky_solve(gradient[..., None], factor[active])[..., 0].clamp(-limit, limit)
        state[active] += step
        moved = (step[:, :q].abs() * prior.sqrt()).amax(1)
        going = moved >= TOLERANCE
        active, stale = active[going], moved[going] > STALE
        if not len(active):
            break
    return state[:, :q], state[:, q:]


def _information(loadings: Tensor) -> Information:
    """Working weights (n, genes) to the upper triangles (n, (q + 1)(q + 2) / 2) of cells' information matrices."""
    design = torch.cat([loadings, torch.ones(1, loadings.shape[1])])  # (q + 1, genes)
    one, other = torch.triu_indices(len(design), len(design))
    products = (design[one] * design[other]).T.contiguous()
    return lambda w: w @ products


def _low_rank_information(loadings: Tensor, weights: Tensor, prior: Tensor) -> Information:
    """`_information` for a fraction of its cost: principal components of the information matrices of some cells, with
    working weights (n, genes), in the metric of their mean, so that an error counts by what it makes of a step.
    """
    design = torch.cat([loadings, torch.ones(1, loadings.shape[1])])
    one, other = torch.triu_indices(len(design), len(design))
    twice = torch.where(one == other, 1.0, 2.0**0.5)  # of a matrix's norm an entry off the diagonal counts twice
    mean = (design * weights.mean(0)) @ design.T + torch.diag(torch.cat([prior, prior.new_zeros(1)]))
    root = torch.linalg.cholesky(mean)
    white = torch.linalg.solve_triangular(root, design, upper=False)
    products = (white[one] * white[other]).T * twice
    seen = weights @ products
    center = seen.mean(0)
    axes = torch.linalg.eigh((seen - center).T @ (seen - center))[1][:, -INFORMATION_RANK:]
    rows = torch.cat([center[None], axes.T])  # back from white triangles
    back = (root @ _unpacked(rows / twice, len(design)) @ root.T)[:, one, other]
    project, offset = products @ axes, center @ axes
    return lambda w: torch.addmm(back[0], torch.addmm(-offset, w, project), back[1:])


def _root(upper: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of information matrices with the prior's precision, and which of them have none."""
    h = _unpacked(upper, len(penalty)) + torch.diag(penalty + 1e-6)
    h.diagonal(dim1=1, dim2=2).mul_(1 + 1e-5)  # float32: what a step aims at does not depend on it
    root, failed = torch.linalg.cholesky_ex(h)
    return root, failed


def _unpacked(upper: Tensor, n: int) -> Tensor:
    """(..., n (n + 1) / 2) upper triangles to symmetric (..., n, n)."""
    rows, columns = torch.triu_indices(n, n)
    place = torch.empty(n, n, dtype=torch.int64)
    place[rows, columns] = place[columns, rows] = torch.arange(len(rows))
    return upper.index_select(-1, place.flatten()).view(*upper.shape[:-1], n, n)


def _working(x: Tensor, eta: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Working weights and scores of negative-binomial counts with log mean `eta`."""
    mean = eta.clamp(-12, MAX_ETA).exp_()
    scale = 1 / (1 + alpha * mean)
    return mean * scale, (x - mean) * scale


def _principal_axes(values: Floats, n_components: int) -> tuple[Floats, Floats]:
    """Mean (features,) and first principal axes (features, n_components)."""
    center = values.mean(0)
    centred = values - center
    n = centred.shape[1]
    axes = scipy.linalg.eigh(centred.T @ centred, subset_by_index=(max(0, n - n_components), n - 1))[1]
    return center, axes[:, ::-1]


def _chunks(n: int) -> Iterator[slice]:
    return (slice(i, min(n, i + CHUNK)) for i in range(0, n, CHUNK))
