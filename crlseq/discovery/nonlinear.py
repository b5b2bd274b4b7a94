"""Nonlinear (ReLU) structural equations by maximum likelihood on cells.

    u = (v - o) B,    z_k = u_k - b_k - sum_j G[j, k] relu(u_j) - a_c (k the target of c),    z_k ~ N(0, 1)
    -log p(v) = |z|^2 / 2 - log|det B|    per cell, without constants (G a DAG: the equations add no determinant)

over p square components ``v`` of cells under shifts. With linear equations shifts identify no graph; with nonlinear
ones they identify ancestry (Zhang et al. 2023), and the sparsest graph of best likelihood is read off here.

Given ``B`` and ``o`` every equation is a linear regression of ``u_k`` on the ``relu(u_j)``, a mean of its own for
each environment that hits ``k`` and one for all others. It is solved exactly from one Gram matrix per equation, so
that L-BFGS moves ``B`` and ``o`` alone (variable projection: the gradient is that of the likelihood at the solved
regressions). The graph grows from the empty one by the edge that gains most, and every edge may turn or go.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from crlseq.discovery.edges import MIN_EFFECT, reachable
from crlseq.discovery.moments import DTYPE, environment_moments
from crlseq.discovery.propose import propose_targets
from crlseq.storage.stage_cache import cached_on_disk

REGRESSION_RIDGE = 1e-6  # on G, per cell: a component may never be open
TRIED = 3  # best absent edges by score that are refitted, with either sign of the parent
TRIAL_STEPS, STEPS = 15, 60
DEGENERATE = 1e-8  # smallest over largest eigenvalue of the covariance within environments
MAX_CELLS = 8000
SEARCH_ROUNDS = 3  # of growing, turning and pruning: one or two where the equations hold


@cached_on_disk()
@dataclass(frozen=True)
class NonlinearSolution:
    """Fitted equations."""

    B: Tensor  # (p, p)
    offset: Tensor  # (p,)
    intercept: Tensor  # (p,)
    adjacency: Tensor  # (p, p); a DAG
    targets: Tensor  # (K,)
    shift: Tensor  # (K,)
    nll: float  # per cell of the cells fitted

    def latents(self, values: Tensor) -> Tensor:
        """``u`` (N, p) of components (N, p); unit: standard deviations of the latent's own noise."""
        return (values - self.offset) @ self.B

    def residuals(self, values: Tensor, environment: Tensor) -> Tensor:
        """``z`` (N, p) of cells of the same environments: standard normal if the equations hold."""
        u = self.latents(values)
        shift = _hit(self.targets, len(self.B))
        shift[1:] *= self.shift[:, None]
        return u - self.intercept - torch.relu(u) @ self.adjacency - shift[environment]

    def per_cell(self, values: Tensor, environment: Tensor) -> Tensor:
        """Negative log-likelihood (N,) of cells of the same environments, without constants."""
        z = self.residuals(values, environment)
        return torch.sub(0.5 * (z**2).sum(1), torch.linalg.slogdet(self.B)[1])


@dataclass(frozen=True)
class _Cells:
    """Starting latents (N, p), environment (N,), counts (C,) of the cells fitted."""

    u: Tensor
    environment: Tensor
    counts: Tensor


@dataclass(frozen=True)
class _State:
    """Point of the search: ``u = (start - o) A``, edges allowed (p, p), targets (K,), profile nll per cell."""

    A: Tensor
    o: Tensor
    mask: Tensor
    targets: Tensor
    nll: float = math.inf


@dataclass(frozen=True)
class _Regressions:
    """The equations solved at given latents ``u`` (N, p): ``f`` = relu(u), ``G``, means (C, p), noise variance (p,)."""

    u: Tensor
    f: Tensor
    G: Tensor
    mean: Tensor
    variance: Tensor
    residual: Tensor


def _hit(targets: Tensor, p: int) -> Tensor:
    return pad(one_hot(targets, p).to(DTYPE), (0, 0, 1, 0))


def _sums(x: Tensor, cells: _Cells) -> Tensor:
    return torch.zeros(len(cells.counts), x.shape[1], dtype=DTYPE).index_add_(0, cells.environment, x)


def _rest(sums: Tensor, cells: _Cells, hit: Tensor) -> Tensor:
    """Mean (p,) for each equation of its column of sums (C, p), over the environments that do not hit it."""
    return ((1 - hit) * sums).sum(0) / ((1 - hit).T @ cells.counts).clamp_min(1)


def _restricted(gram: Tensor, mask: Tensor, n: int) -> Tensor:
    """Gram matrices (p, p, p) of each equation's parents alone: others have a unit diagonal."""
    on = mask.T  # (k, j)
    return gram * on[:, :, None] * on[:, None] + torch.diag_embed(1 - on + REGRESSION_RIDGE * n * on)


def _grams(x: Tensor, cells: _Cells, hit: Tensor) -> Tensor:
    """Gram matrix (p, m, m) of x (N, m) for each equation, its means (own of each hit environment, one else) taken out."""
    sums, n = _sums(x, cells), cells.counts
    rest = (1 - hit).T @ sums
    own = torch.einsum("ck,ci,cj->kij", hit / n[:, None], sums, sums)
    others = ((1 - hit).T @ n).clamp_min(1)[:, None, None]
    return x.T @ x - own - rest[:, :, None] * rest[:, None] / others


def _solve(cells: _Cells, state: _State) -> _Regressions:
    n, p = cells.u.shape
    u = (cells.u - state.o) @ state.A
    f = torch.relu(u)
    hit = _hit(state.targets, p)
    gram = _grams(torch.cat([f, u], 1), cells, hit)
    on, k = state.mask.T, torch.arange(p)
    right = gram[k, :p, p + k] * on
    G = torch.linalg.solve(_restricted(gram[:, :p, :p], state.mask, n), right) * on
    variance = ((gram[k, p + k, p + k] - (G * right).sum(1)) / n).clamp_min(1e-300)
    residual = u - f @ G.T
    sums = _sums(residual, cells)
    mean = torch.where(hit > 0, sums / cells.counts[:, None], _rest(sums, cells, hit))
    return _Regressions(u, f, G.T, mean, variance, residual - mean[cells.environment])


def _profile(cells: _Cells, state: _State) -> tuple[float, Tensor, Tensor]:
    """Profile nll per cell (noise scales solved too), and its gradient in A and o."""
    r = _solve(cells, state)
    n, p = cells.u.shape
    sign, logdet = torch.linalg.slogdet(state.A)
    nll = float(0.5 * r.variance.log().sum() + 0.5 * p - logdet)
    if sign == 0 or not math.isfinite(nll):
        return math.inf, torch.zeros_like(state.A), torch.zeros_like(state.o)
    weighted = r.residual / r.variance / n
    slope = weighted - (r.u > 0) * (weighted @ r.G.T)
    by_a = (cells.u - state.o).T @ slope - torch.linalg.inv(state.A).T
    return nll, by_a, -state.A @ slope.sum(0)


def _refit(cells: _Cells, state: _State, steps: int) -> _State:
    """L-BFGS on A and o, then scaled so that every noise variance is 1."""
    a, o = state.A.clone().contiguous(), state.o.clone()
    optimizer = torch.optim.LBFGS(
        [a, o], max_iter=steps, max_eval=2 * steps, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=1e-6, tolerance_change=1e-8,
    )  # fmt: skip

    def closure() -> float:
        value, a.grad, o.grad = _profile(cells, replace(state, A=a, o=o))
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    moved = replace(state, A=a / _solve(cells, replace(state, A=a, o=o)).variance.sqrt(), o=o)
    nll = _profile(cells, moved)[0]
    return replace(moved, nll=nll) if math.isfinite(nll) else replace(state, nll=math.inf)


def _retarget(cells: _Cells, state: _State) -> _State:
    """Each perturbation's target: where its cells' residual mean is largest; no latent loses its last perturbation."""
    r = _solve(cells, state)
    p = cells.u.shape[1]
    sums = _sums(r.u - r.f @ r.G, cells)
    centre = _rest(sums, cells, _hit(state.targets, p))
    targets = ((sums / cells.counts[:, None] - centre) / r.variance.sqrt())[1:].abs().argmax(1)
    if bool((torch.bincount(targets, minlength=p) == 0).any()) or torch.equal(targets, state.targets):
        return state
    return replace(state, targets=targets)


def _flipped(cells: _Cells, state: _State, j: int) -> _State:
    """Latent ``j`` with the other sign: ``G relu(u) = G u + G relu(-u)``, the linear part going into the mixing."""
    a = state.A.clone()
    a -= a[:, j : j + 1] * _solve(cells, state).G[j]
    a[:, j] *= -1
    return replace(state, A=a)


def _scores(cells: _Cells, state: _State) -> Tensor:
    """Twice the log-likelihood (p, p) that an absent edge would gain with the mixing free to follow; -inf if cyclic."""
    r = _solve(cells, state)
    n, p = cells.u.shape
    gram = _grams(torch.cat([r.f, r.u, r.residual], 1), cells, _hit(state.targets, p))
    back = reachable(state.mask).T | torch.eye(p, dtype=torch.bool)  # k at or upstream of j
    gain = torch.full((p, p), -torch.inf, dtype=DTYPE)
    for k in range(p):
        known = torch.cat([torch.nonzero(state.mask[:, k])[:, 0], p + torch.nonzero(~back[:, k])[:, 0]])
        new = torch.nonzero(~back[:, k] & (state.mask[:, k] == 0))[:, 0]
        if not len(new):
            continue
        columns = torch.cat([new, torch.tensor([2 * p + k])])
        inside = gram[k][known][:, known] + 1e-6 * n * torch.eye(len(known), dtype=DTYPE)
        cross = gram[k][known][:, columns]
        left = gram[k][columns][:, columns] - cross.T @ torch.linalg.solve(inside, cross)
        share = left[:-1, -1] ** 2 / (left.diagonal()[:-1] * left[-1, -1]).clamp_min(1e-12)
        gain[new, k] = -n * torch.log1p(-share.clamp(0, 1 - 1e-9))
    return gain


def _with(state: _State, j: int, k: int, on: float) -> _State:
    mask = state.mask.clone()
    mask[j, k] = on
    return replace(state, mask=mask)


def _grow(cells: _Cells, state: _State, threshold: float) -> _State | None:
    """The best absent edge, refitted with either sign of its parent; None if none is worth the threshold."""
    gain = _scores(cells, state)
    trials = []
    for e in gain.flatten().argsort(descending=True)[:TRIED].tolist():
        j, k = divmod(e, len(gain))
        if gain[j, k] < threshold:
            break
        for start in (state, _flipped(cells, state, j)):
            trials.append(_refit(cells, _with(start, j, k, 1), TRIAL_STEPS))
    if not trials:
        return None
    best = _refit(cells, min(trials, key=lambda trial: trial.nll), STEPS)
    return best if 2 * len(cells.u) * (state.nll - best.nll) > threshold else None


def _turn(cells: _Cells, state: _State) -> _State:
    """Signs of parents and directions of edges: each change is kept if the refitted likelihood is better."""
    least = 1.0 / len(cells.u)  # one unit of log-likelihood
    for j in range(len(state.mask)):
        if bool(state.mask[j].any()):
            trial = _refit(cells, _flipped(cells, state, j), TRIAL_STEPS)
            if trial.nll < state.nll - least:
                state = trial
    for j, k in torch.nonzero(state.mask).tolist():
        without = _with(state, j, k, 0)
        if bool(reachable(without.mask)[j, k]):
            continue
        for start in (without, _flipped(cells, without, k)):
            trial = _refit(cells, _with(start, k, j, 1), 2 * TRIAL_STEPS)
            if trial.nll < state.nll - least:
                state = trial
                break
    return state


def _wald(cells: _Cells, state: _State) -> Tensor:
    """Wald statistics (p, p) of the edges at fixed mixing; inf where there is none."""
    r = _solve(cells, state)
    p = len(state.mask)
    square = _restricted(_grams(r.f, cells, _hit(state.targets, p)), state.mask, len(cells.u))
    error = torch.linalg.inv(square).diagonal(dim1=1, dim2=2).T * r.variance
    return torch.where(state.mask > 0, r.G**2 / error, torch.inf)


def _prune(cells: _Cells, state: _State, threshold: float) -> _State:
    """Edges whose loss costs less than the threshold, or that are small, go, weakest first, each with a refit."""
    while bool(state.mask.any()):
        wald = _wald(cells, state)
        small = (_solve(cells, state).G.abs() < MIN_EFFECT) & (state.mask > 0)
        order = torch.where(small, wald.clamp_max(1e6) - 1e6, wald).flatten().argsort()[:TRIED].tolist()
        for e in order:
            j, k = divmod(e, len(wald))
            if state.mask[j, k] == 0:
                continue
            trial = _refit(cells, _with(state, j, k, 0), 2 * TRIAL_STEPS)
            cost = 2 * len(cells.u) * (trial.nll - state.nll)
            if small[j, k] or cost < threshold:
                state = trial
                break
        else:
            break
    return state


def _start(values: Tensor, environment: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mixing (p, p), offset (p,) and targets (K,) of the linear equations: in whitened components the lines of the
    mean shifts are orthogonal; the nearest orthogonal matrix is never ill-conditioned.
    """
    if not bool(torch.isfinite(values).all()):
        raise ValueError("components must be finite numbers.")
    moments = environment_moments(values, environment)
    p = values.shape[1]
    scale, axes = torch.linalg.eigh(moments.pooled())
    if scale[0] <= DEGENERATE * scale[-1]:
        raise ValueError("components are constant or collinear within environments.")
    targets = propose_targets(moments, p, 1, torch.Generator().manual_seed(seed))[0]
    whiten = axes / scale.sqrt()
    delta = (moments.means[1:] - moments.means[0]) @ whiten * moments.counts[1:, None].sqrt()
    one = _hit(targets, p)[1:]
    lines = torch.linalg.eigh(torch.einsum("ka,kp,kb->pab", delta, one, delta))[1][..., -1]
    left, _, right = torch.linalg.svd(lines)
    mixing = whiten @ (left @ right).T
    sign = torch.sign(((delta @ (left @ right).T) * one).sum(0))
    return mixing * torch.where(sign == 0, 1.0, sign), moments.means[0], targets


def _sample(environment: Tensor, seed: int) -> Tensor:
    """Indices of at most about `MAX_CELLS` cells, the same share of every environment, two at least."""
    order = torch.randperm(len(environment), generator=torch.Generator().manual_seed(seed))
    if len(environment) <= MAX_CELLS:
        return order
    share = MAX_CELLS / len(environment)
    kept = []
    for c in range(int(environment.max()) + 1):
        cells = order[environment[order] == c]
        kept.append(cells[: max(2, round(share * len(cells)))])
    return torch.cat(kept)


def fit_nonlinear(values: Tensor, environment: Tensor, seed: int = 0, relu: bool = True) -> NonlinearSolution:
    """Maximum likelihood of the equations, the graph chosen by BIC (``relu=False``: no edges, linear equations).

    ``values`` (N, p) are components, ``environment`` (N,) 0 for control. A `ValueError` if values are not finite or
    collinear within environments, an environment has fewer than two cells, or perturbations are fewer than components.
    """
    kept = _sample(environment, seed)
    values, environment = values.to(DTYPE)[kept], environment[kept]
    mixing, offset, targets = _start(values, environment, seed)
    cells = _Cells((values - offset) @ mixing, environment, torch.bincount(environment).to(DTYPE))
    p = values.shape[1]
    threshold = math.log(len(values))
    state = _State(torch.eye(p, dtype=DTYPE), torch.zeros(p, dtype=DTYPE), torch.zeros(p, p, dtype=DTYPE), targets)
    state = _refit(cells, state, STEPS)
    for _ in range(3):
        state = _refit(cells, _retarget(cells, state), STEPS)
    best = state
    for _ in range(SEARCH_ROUNDS if relu else 0):
        while state.mask.sum() < 2 * p and (grown := _grow(cells, state, threshold)) is not None:
            state = grown
            if (moved := _retarget(cells, state)) is not state:
                state = _refit(cells, moved, STEPS)
        state = _turn(cells, state)
        state = _refit(cells, _prune(cells, state, threshold), STEPS)
        bic = 2 * len(values) * (best.nll - state.nll) - threshold * float(state.mask.sum() - best.mask.sum())
        if bic < 1:
            break
        best = state
    r = _solve(cells, best)
    scale = r.variance.sqrt()
    B = mixing @ best.A / scale
    mean = r.mean / scale
    intercept = torch.stack([mean[(_hit(best.targets, p)[:, i] == 0), i][0] for i in range(p)])
    shift = mean[torch.arange(len(targets)) + 1, best.targets] - intercept[best.targets]
    G = r.G * scale[:, None] / scale * best.mask
    nll = best.nll - float(torch.linalg.slogdet(mixing)[1])
    origin = offset + best.o @ torch.linalg.inv(mixing)
    return NonlinearSolution(B, origin, intercept, G, best.targets, shift, nll)
