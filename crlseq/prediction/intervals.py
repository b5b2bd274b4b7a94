"""Standard errors of predicted effects.

Intervals of effects are effect ± 1.96 standard deviations over `DRAWS` draws of the cells' noise from its posterior, of
the control cells with replacement, and of the shifts from their standard errors (`shift_errors`), joined with the
posterior standard deviation of what the latents miss. Of a combination that the law of combination governs
(`crlseq.model.combination_law`) they join the errors of its parts, each times its coefficient, and what the law misses. They say how sure the mean is, not how far cells scatter about it,
and they take everything else as known: the graph, the targets, retentions and loadings. What a wrong graph or target does
is not in them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from crlseq.model.combination_law import Group
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.scm import Mechanism
from crlseq.run.run import Run

DRAWS = 100
COVERS = "the cells' noise, the control cells, the shifts and the residuals"
COVERS_NOT = "graph, targets, retentions and loadings are taken as known"


def combination_errors(
    model: DiscrepancyVAE, z: Tensor, perturbations: Tensor, of_parts: Callable[[Group], Tensor]
) -> Tensor | None:
    """(G,) standard errors of the mean effect of conditions (1, M) on cells of noise z (n, p); None if no law governs them.

    ``of_parts`` gives those (G,) of a single perturbation's mean effect. Kinds of cells that a part escaped count by their share.
    """
    groups = model.groups(perturbations[0].tolist())
    if model.law is None or not model.law.governs(groups):
        return None
    effects = dict(zip(groups, model.single_effects(z, groups), strict=True))
    hit_by = {group: float(model.chance(torch.tensor(group)).prod()) for group in groups}
    weight, missed = dict.fromkeys(groups, 0.0), torch.zeros_like(effects[groups[0]])
    for chance, kind, _ in model.mixture(perturbations[0], torch.empty(0)):
        hit = model.groups(kind[0].tolist())
        coefficients = [1.0] * len(hit)
        if len(hit) > 1:
            single = torch.stack([effects[group] for group in hit])
            coefficients = model.law.coefficients(single)[0].tolist()
            missed = missed + (chance * model.law.error(hit, single)) ** 2
            if model.law.is_measured(hit):
                coefficients = [0.0] * len(hit)  # its own cells say what it does
        for group, c in zip(hit, coefficients, strict=True):
            weight[group] += chance * c
    squares = [(weight[group] / hit_by[group] * of_parts(group)) ** 2 for group in groups]
    return (torch.stack(squares).sum(0) + missed).sqrt()


def effect_errors(
    model: DiscrepancyVAE, control: Tensor, perturbations: Tensor, shift_error: np.ndarray, generator: torch.Generator
) -> Tensor:
    """(G,) standard deviations of a mean effect over `DRAWS` draws of noise, control cells and shifts, and of residuals.

    Of control cells (1, n, G) under perturbations (1, M); ``shift_error`` (K,) of the shifts, NaN where there is none.
    """
    mean, variance = model.encoder(control)
    weights = model.target_weights(perturbations)  # (1, M, p)
    kinds = [(chance, model.scm.mechanism(kind, weights), (kind >= 0).to(mean.dtype))
             for chance, kind, _ in model.mixture(perturbations[0], torch.empty(0))]  # fmt: skip
    error = torch.from_numpy(np.nan_to_num(shift_error)).to(mean.dtype)[perturbations]  # (1, M)
    n, draws = control.shape[1], []
    for _ in range(DRAWS):
        z = mean + variance.sqrt() * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        share = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).to(mean.dtype) / n
        moved = error * torch.randn(error.shape, generator=generator, dtype=mean.dtype)
        after = torch.zeros_like(control[0, 0])
        for chance, mechanism, hit in kinds:
            shift = mechanism.shift + (weights * (hit * moved)[..., None]).sum(1)
            u = model.scm(z, Mechanism(mechanism.retention, mechanism.log_scale, shift))
            after += chance * _mean_decoded(model, u, share)
        # With noise abducted, what the latents miss of a cell is in both and cancels.
        before = share @ control[0] if model.log_noise is None else _mean_decoded(model, model.scm(z), share)
        draws.append(after - before)
    return (torch.stack(draws).var(0) + model.missed_error(perturbations)[0] ** 2).sqrt()


def _mean_decoded(model: DiscrepancyVAE, u: Tensor, share: Tensor) -> Tensor:
    """(G,) weighted mean over cells of the decoded latents u (1, n, p); ``share`` (n,) sums to 1."""
    decoder = model.decoder
    if decoder.output_activation == "identity":  # the mean passes through a linear layer: no cell is decoded
        features: Tensor = decoder.output(share @ decoder.features(u[0]))
        return features
    decoded: Tensor = share @ decoder(u[0])
    return decoded


def shift_errors(run: Run, variance: np.ndarray) -> np.ndarray:
    """(K,) standard errors of the shifts in the model's units; NaN for perturbations without cells of their own.

    The shift of hit cells is the mean of the target's noise over the perturbation's cells, divided by its penetrance pi.
    The error of that mean is the bootstrap's, where it kept the target at least twice; elsewhere ``sqrt(v / n_cells)``,

        v = pi noise_scale^2 + (1 - pi) + pi (1 - pi) shift^2 + variance,

    ``variance`` (p,) being the posterior variance of the latents.
    """
    if not len(variance):  # no programs, and nothing shifts
        return np.full(len(run.interventions), np.nan)
    table, share, shift = run.interventions, run.model.penetrance.double().numpy(), run.model.scm.shift
    programs = pd.Index(run.program_names).get_indexer(pd.Index(table["program"]))
    measured = np.where(programs >= 0, variance[programs], variance.mean())
    n_cells = table["n_cells"].to_numpy(dtype=float)
    escaped = (1 - share) * (1 + share * shift.detach().double().numpy() ** 2)
    squares = share * table["noise_scale"].fillna(1.0).to_numpy() ** 2 + escaped + measured
    errors = np.sqrt(np.divide(squares, n_cells, out=np.full(len(table), np.nan), where=n_cells > 0))
    bootstrap = run.facts.bootstrap
    if bootstrap is not None:
        place = pd.Index(table["perturbation"]).get_indexer(pd.Index(bootstrap.perturbations))
        found = np.array(bootstrap.shift_error, dtype=float)  # null in JSON: NaN
        errors[place] = np.where(np.isnan(found), errors[place], found)
    return np.asarray(errors / share)
