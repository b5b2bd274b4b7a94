"""How many latents: directions in which perturbations move the cells, opposite ways of one latent counted once.

With cells whitened by their covariance within environments, the shifts of different latents of a linear model are at
right angles (``T W S^-1 W' T' = I`` for ``S = W' T' T W``), so that all mean shifts lie on p orthogonal lines. Where
a network mixes the latents a line bends: on either side of the controls the shifts stay a narrow bundle (a ray), but
the two rays of one latent no longer point in opposite directions, and the rank of the mean shifts counts them twice.
So: (1) bundle the perturbations with an effect into rays; (2) join two rays into one latent when they exclude each
other, since a latent cannot be on both sides of the controls at once; (3) count, at most the rank; (4) add the lines of perturbations that
change variances alone (`crlseq.discovery.propose.leading_changes`). No model is fitted.
"""

import math
from dataclasses import dataclass

import torch
from scipy.special import chdtri
from torch import Tensor
from torch.nn.functional import normalize

from crlseq.discovery.moments import DTYPE, Crossed, Moments, environment_moments
from crlseq.discovery.propose import leading_changes, propose_targets
from crlseq.storage.stage_cache import cached_on_disk
from crlseq.threads import counted

TRACY_WIDOM_99 = 2.02  # 99th percentile of the Tracy-Widom law for real data
SAME_RAY = math.sqrt(0.5)  # cosine of 45 degrees: nearer to the ray than to what is orthogonal to it
# Exclusion score of two rays: over simulated network mixings 1 % of unrelated rays lie below, 97 % of related ones.
ONE_LATENT = -0.5
THIRD_MOMENT, LOG_VARIANCE = 0.5, 0.1  # weights in the exclusion score, against the cosine's 1
MAX_DEVIATION = 5.0  # standard deviations, in third moments
FALSE_EFFECTS = 0.01  # chance that any perturbation without effect is taken for one with an effect
CLEAR_CHANGE = 5.0  # standard errors, beyond the largest one by chance, of a variance
SAME_CHANGE = 0.7  # cosine of changes of the covariance: of two targets it is below 0.55 in simulations
MAX_RAYS = 200
MAX_CURVE_PERTURBATIONS = 300  # the strongest; the curve is for the eye
BEYOND = 4  # how far the curve goes past the number chosen
MAX_CURVE = 16  # points; with more, every number near the one chosen and a few of the others


@cached_on_disk()
@dataclass(frozen=True)
class LatentChoice:
    """The number of latents, why, and the ``curve`` of ``n_latents``, ``held_out``, ``standard_error``.

    ``held_out`` is the squared mean shift of held-out cells that straight lines fitted to the others predict, mean over
    perturbations, in squared standard errors; ``standard_error`` is of its difference from the number chosen. It rises
    past the true number where lines bend.
    """

    n_latents: int
    curve: list[dict[str, float]]
    reason: str


@dataclass(frozen=True)
class _Shifts:
    """Mean shifts from control in standard errors (K, q); in their r leading directions also cells."""

    shifts: Tensor
    leading: Tensor  # (K, r)
    cells: Tensor  # (N, r)
    residuals: Tensor  # (N, r), from the mean of the environment
    environment: Tensor
    effect: Tensor  # (K,) bool, beyond sampling noise
    rank: int


def choose_n_latents(values: Tensor, environment: Tensor, seed: int = 0, context: Tensor | None = None) -> LatentChoice:
    """Number of latents that the perturbations act on.

    ``values`` (N, q) are components in which measurement noise is about even, q above the number expected;
    ``environment`` (N,) is 0 for control, else one perturbation; those with fewer than two cells are left out. The seed
    is that of the halves that the curve is computed on. Where there are several, ``context`` (N,) of each cell.
    """
    if context is not None:
        context = _usable(context, environment)[0]
    values, environment = _usable(values.to(DTYPE), environment)
    if not bool((environment == 0).any()) or not bool((environment > 0).any()):
        return LatentChoice(1, [], "There are too few cells to distinguish more than one program.")
    found = _shifts(values, environment)
    if found is None:
        return LatentChoice(1, [], "The perturbations do not shift the mean beyond sampling noise.")
    rays, members = _bundle(found)
    by_variance = _by_variance(values, environment, found.effect & (found.rank > 0), context)
    if found.rank == 0 or len(rays) == 0:
        if by_variance:
            return LatentChoice(by_variance, [], f"No mean shifts; variances change along {_directions(by_variance)}.")
        which = "The perturbations do not shift" if found.rank == 0 else "No single perturbation shifts"
        return LatentChoice(1, [], f"{which} the mean beyond sampling noise.")
    joined = _opposite(rays, members, found)
    n = max(1, min(len(rays) - joined, found.rank))
    pairs = "none of them" if not joined else f"{joined} pair{'s' * (joined > 1)} of them"
    # How many perturbations that is by is not said: more have an effect, too small to tell a direction by.
    reason = (
        f"clear effects span {_directions(len(rays))}, {pairs} opposite ends of one program{' each' * (joined > 1)};"
        f" the mean shifts have rank {found.rank}."
    )
    if by_variance:
        reason = f"{reason[:-1]}; variances alone change along {_directions(by_variance)} more."
    return LatentChoice(n + by_variance, _curve(values, environment, n, found, seed), reason)


def _directions(n: int) -> str:
    return f"{n} direction{'s' * (n > 1)}"


def _by_variance(values: Tensor, environment: Tensor, effect: Tensor, context: Tensor | None) -> int:
    """Number of programs of perturbations that change variances and no mean: those whose change of the covariance is along
    none of the mean shifts and like none of the others' (cosine of the matrices, sampling noise taken off).
    """
    if bool(effect.all()):
        return 0
    crossed = None
    if context is not None:
        first = [int(context[environment == c][0]) for c in range(1, int(environment.max()) + 1)]
        own = torch.tensor(first, dtype=torch.int64)
        crossed = Crossed(torch.arange(len(own)), own, int(context.max()) + 1)
        environment = crossed.numbered(environment, context)
    moments = environment_moments(values, environment, crossed=crossed)
    leading, q = leading_changes(moments), values.shape[1]
    clear = ~effect & ~leading.of_means & (leading.lengths > CLEAR_CHANGE)
    by_length = leading.lengths.argsort(descending=True)
    some = by_length[clear[by_length]][:MAX_RAYS]
    along = (leading.directions[some, 0] @ leading.directions[effect, 0].T).abs() > SAME_RAY
    some = some[~along.any(1)]
    change = leading.covariances[some].flatten(1)
    control = moments.control[some]
    noise = torch.diag(1 / moments.counts[moments.n_controls :][some])
    noise += (control == control[:, None]) / moments.counts[control]
    product = change @ change.T - q * (q + 1) * noise
    size = product.diagonal().clamp_min(1e-12).sqrt()
    alike = (product / size[:, None] / size).abs() > SAME_CHANGE
    return sum(not bool(alike[c, :c].any()) for c in range(len(some)))


def _usable(values: Tensor, environment: Tensor) -> tuple[Tensor, Tensor]:
    """Cells of environments with at least two, numbered anew without gaps; control stays 0."""
    kept = torch.bincount(environment) >= 2
    number = torch.cumsum(kept[1:], 0)
    number = torch.cat([number.new_zeros(1), number])
    cells = kept[environment]
    return values[cells], number[environment[cells]]


def _means(values: Tensor, environment: Tensor) -> tuple[Tensor, Tensor]:
    """Means (C, q) and counts (C,)."""
    counts = torch.bincount(environment).to(DTYPE)
    total = torch.zeros(len(counts), values.shape[1], dtype=DTYPE).index_add_(0, environment, values)
    return total / counts[:, None], counts


def _whitening(residuals: Tensor, n_environments: int) -> Tensor:
    """(q, q') map to unit covariance within environments; constant directions are left out."""
    covariance = residuals.T @ residuals / max(1, len(residuals) - n_environments)
    value, vector = torch.linalg.eigh(covariance)
    kept = value > max(float(value.max()) * 1e-10, 1e-300)
    return torch.div(vector[:, kept], value[kept].sqrt())


def _shifts(values: Tensor, environment: Tensor) -> _Shifts | None:
    """Whitened mean shifts and their rank: singular values beyond the Tracy-Widom edge (Johnstone 2001)."""
    means, counts = _means(values, environment)
    residuals = values - means[environment]
    white = _whitening(residuals, len(counts))
    if white.shape[1] == 0:
        return None
    means = means @ white
    overall = counts @ means / counts.sum()
    _, singular, axes = torch.linalg.svd(counts.sqrt()[:, None] * (means - overall), full_matrices=False)
    a, b = math.sqrt(len(counts) - 1), math.sqrt(white.shape[1])
    edge = (a + b) ** 2 + TRACY_WIDOM_99 * (a + b) * (1 / a + 1 / b) ** (1 / 3)
    rank = min(int((singular**2 > edge).sum()), len(counts) - 1)
    axes = axes[: max(rank, 1)].T
    error = (1 / counts[1:] + 1 / counts[0]).sqrt()
    shifts = (means[1:] - means[0]) / error[:, None]
    leading = shifts @ axes
    k, q, r = len(shifts), shifts.shape[1], axes.shape[1]
    effect = (shifts**2).sum(1) > float(chdtri(q, FALSE_EFFECTS / k))
    effect |= (leading**2).sum(1) > float(chdtri(r, 0.1 * FALSE_EFFECTS / k))  # stricter: chosen on the same shifts
    return _Shifts(shifts, leading, values @ white @ axes, residuals @ white @ axes, environment, effect, rank)


def _bundle(found: _Shifts) -> tuple[Tensor, Tensor]:
    """Unit rays (m, r) and the ray of every perturbation (K,), -1 for those without an effect or between rays.

    Strongest first, one joins the ray within 45 degrees (less noise) or, off every line through a ray by more than
    noise, starts one; then rays and members are settled in turn.
    """
    d, r, effect = found.leading, found.leading.shape[1], found.effect
    k, power = len(d), (d**2).sum(1)
    size = power.clamp_min(1e-12).sqrt()
    reach = SAME_RAY * (1 - r / power.clamp_min(1e-12)).clamp_min(0.05).sqrt()  # noise widens the angle
    off = float(chdtri(r - 1, FALSE_EFFECTS / k)) if r > 1 else math.inf
    sums = d.new_zeros(0, r)
    for i in power.argsort(descending=True).tolist():
        if not effect[i]:
            continue
        if len(sums):
            cosine = normalize(sums) @ d[i] / size[i]
            best = int(cosine.argmax())
            if cosine[best] > reach[i]:
                sums[best] += d[i]
                continue
            if power[i] * (1 - (cosine**2).max()) < off or len(sums) == MAX_RAYS:
                continue
        sums = torch.cat([sums, d[i : i + 1]])

    def members_of(rays: Tensor) -> Tensor:
        nearest = (d @ rays.T / size[:, None]).max(1)
        return torch.where(effect & (nearest.values > reach), nearest.indices, -1)

    settled = False
    while len(sums) and not settled:
        members = members_of(normalize(sums))
        sums = torch.zeros_like(sums).index_add_(0, members.clamp_min(0), d * (members >= 0)[:, None])
        sums = sums[torch.bincount(members[members >= 0], minlength=len(sums)) > 0]
        cosine = normalize(sums) @ normalize(sums).T - 2 * torch.eye(len(sums), dtype=DTYPE)
        settled = len(sums) < 2 or bool(cosine.max() < SAME_RAY)
        if not settled:
            a, b = divmod(int(cosine.argmax()), len(sums))
            sums[a] += sums[b]
            sums = sums[torch.arange(len(sums)) != b]
    rays = normalize(sums)
    return rays, members_of(rays) if len(rays) else torch.full((k,), -1)


def _opposite(rays: Tensor, members: Tensor, found: _Shifts) -> int:
    """Number of pairs of rays that are the two ways of one latent; the clearest are joined first."""
    score = _exclusion(rays, members, found)
    score += torch.diag(torch.full((len(rays),), math.inf, dtype=DTYPE))
    joined = 0
    while float(score.min()) < ONE_LATENT:
        pair = list(divmod(int(score.argmin()), len(score)))
        score[pair] = score[:, pair] = math.inf
        joined += 1
    return joined


def _exclusion(rays: Tensor, members: Tensor, found: _Shifts) -> Tensor:
    """How far two rays exclude each other (m, m); -1 for opposite ends of a straight line, 0 for unrelated rays.

    Sum of their cosine; third moments ``E x^2 y + E x y^2`` of all cells along them; and log variances along one, in
    cells that moved along the other, against controls, where smaller (a bent line runs across the other ray).
    """
    along = found.cells @ rays.T  # (N, m)
    along = along - along.mean(0)
    along = (along / along.std(0).clamp_min(1e-12)).clamp(-MAX_DEVIATION, MAX_DEVIATION)
    third = (along**2).T @ along / len(along)

    square = (found.residuals @ rays.T) ** 2
    ray = torch.cat([members.new_full((1,), len(rays)), members])[found.environment]  # of a cell; m for controls
    n, known = len(rays) + 1, ray >= 0
    total = torch.zeros(n, len(rays), dtype=DTYPE).index_add_(0, ray[known], square[known])
    variance = (total / torch.bincount(ray[known], minlength=n).clamp_min(1)[:, None]).clamp_min(1e-12)
    ratio = (variance[:-1] / variance[-1]).log()
    return rays @ rays.T + THIRD_MOMENT * (third + third.T) + LOG_VARIANCE * (ratio + ratio.T).clamp(-4, 0)


def _curve(values: Tensor, environment: Tensor, chosen: int, found: _Shifts, seed: int) -> list[dict[str, float]]:
    """Held-out score of k-lines fitted to half of every environment's cells; [] without enough cells."""
    generator = torch.Generator().manual_seed(seed)
    strong = (found.shifts**2).sum(1).argsort(descending=True)[:MAX_CURVE_PERTURBATIONS]
    kept = torch.cat([strong.new_zeros(1), strong + 1])
    number = torch.full((int(environment.max()) + 1,), -1)
    number[kept] = torch.arange(len(kept))
    cells = torch.nonzero(number[environment] >= 0)[:, 0]
    cells = cells[torch.randperm(len(cells), generator=generator)]
    cells = cells[number[environment[cells]].argsort(stable=True)]
    label = number[environment[cells]]
    counts = torch.bincount(label)
    first = torch.cumsum(counts, 0) - counts
    half = (torch.arange(len(cells)) - first[label]) % 2 == 0
    train, test = values[cells[half]], values[cells[~half]]
    means, n = _means(train, label[half])
    white = _whitening(train - means[label[half]], len(n))
    if white.shape[1] == 0:
        return []
    held, m = _means(test, label[~half])
    shifts = (means[1:] - means[0]) @ white / (1 / n[1:] + 1 / n[0]).sqrt()[:, None]
    axes = torch.linalg.svd(shifts, full_matrices=False)[2][: found.rank + BEYOND].T
    goal = (held[1:] - held[0]) @ white @ axes / (1 / m[1:] + 1 / m[0]).sqrt()[:, None]
    shifts = shifts @ axes
    moved = torch.cat([means[:1] * 0 @ white, (means[1:] - means[0]) @ white]) @ axes
    moments = Moments(moved, torch.eye(axes.shape[1], dtype=DTYPE).expand(len(n), -1, -1), n)
    most = min(chosen + BEYOND, len(n) - 1, axes.shape[1])
    coarse = {max(1, round(chosen * i / 8)) for i in range(8)} | set(range(min(chosen, most) - 2, most + 1))
    gains: dict[int, Tensor] = {}
    numbers = list(range(1, most + 1)) if most <= MAX_CURVE else sorted(coarse)
    for p in counted(numbers, len(numbers)):
        labels = propose_targets(moments, p, 1, generator, tries=32)[0]
        predicted = torch.zeros_like(shifts)
        for j in range(p):
            own = shifts[labels == j]
            if len(own):
                line = torch.linalg.svd(own, full_matrices=False)[2][:1]
                predicted[labels == j] = own @ line.T @ line
        gains[p] = 2 * (goal * predicted).sum(1) - (predicted**2).sum(1)  # |goal|^2 - |goal - predicted|^2
    reference = gains.get(chosen, gains[max(gains)])
    errors = [float((gain - reference).std(correction=0)) / math.sqrt(len(gain)) for gain in gains.values()]
    points = zip(gains, gains.values(), errors, strict=True)
    return [{"n_latents": p, "held_out": float(gain.mean()), "standard_error": error} for p, gain, error in points]
