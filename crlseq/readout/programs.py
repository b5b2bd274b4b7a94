"""What a fitted model says in users' units: gene programs, interventions, and the DAG.

A program is what one standard deviation of a latent does to every gene, directly and through the DAG.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from crlseq.config import ModelConfig
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.mean_effects import cells_alone
from crlseq.discovery.result import Discovery
from crlseq.discovery.verdict import judge_gradient, judge_nothing
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.sparse_decoder import SparseDecoder
from crlseq.run.columns import AGREEMENT, HIT
from crlseq.run.schema import Identification
from crlseq.run.tables import program_names

JACOBIAN_CELLS, SCALE_DRAWS = 500, 100_000
ROWS = 1024  # cells encoded at once
DECLARED_WEIGHT = 0.1  # one standard deviation of the source moves the target by at least a tenth of its own


@dataclass(frozen=True)
class Programs:
    """Latents in the units users see: their standard deviation over control cells, mostly positive loadings."""

    loading: np.ndarray  # (p, G) change of expression by one standard deviation of the latent, all others held
    total_effect: np.ndarray  # (p, G) the same for a shift of the latent that runs through the DAG to its descendants
    scale: np.ndarray  # (p,) signed: a raw latent is ``center + scale * latent``
    center: np.ndarray  # (p,) mean of the raw latent over control cells


@torch.no_grad()
def encode(model: DiscrepancyVAE, data: PerturbSeqData, index: np.ndarray | None = None) -> np.ndarray:
    """(cells, p) float64 raw latents (posterior means), of all cells or those of `index`."""
    index = np.arange(data.x.shape[0]) if index is None else index
    weight = model.encoder.hidden.weight
    parts = [
        model.latents(torch.from_numpy(data.dense(index[i : i + ROWS])).to(weight.device, weight.dtype)).cpu().double()
        for i in range(0, len(index), ROWS)
    ]
    return torch.cat(parts).numpy()


@torch.no_grad()
def posterior_variance(model: DiscrepancyVAE, data: PerturbSeqData) -> np.ndarray:
    """(p,) mean posterior variance of the noise of control cells."""
    controls = data.cells(0, splits.TRAIN, splits.VALIDATION)
    some = controls[np.linspace(0, len(controls) - 1, min(JACOBIAN_CELLS, len(controls))).astype(int)]
    weight = model.encoder.hidden.weight
    variance: Tensor = model.encoder(torch.from_numpy(data.dense(some)).to(weight.device, weight.dtype))[1]
    return np.asarray(variance.mean(0).cpu().double().numpy())


@torch.no_grad()
def find_programs(model: DiscrepancyVAE, data: PerturbSeqData, known_targets: bool = True) -> Programs:
    """Programs in their own standard deviation and with the loadings that their perturbations show.

    The unit is the latent's standard deviation in control cells by its equations, u = SCM(z) with z ~ N(0, 1): measurement
    noise is no part of it. With targets known, the total effect T of a program is the least-squares fit of a T to the effects
    of hit cells of its perturbations, weighed by their cells, a being their shifts; those that target a gene say nothing of it,
    and it is NaN where none is left. Programs without a perturbation, and all where targets or a sparse decoder were learned
    by gradient, have the mean Jacobian of the decoder over control cells.
    """
    controls = data.cells(0, splits.TRAIN, splits.VALIDATION)
    raw = encode(model, data, controls)
    if not raw.shape[1]:
        return Programs(*np.zeros((2, 0, data.n_genes)), *np.zeros((2, 0)))
    weight = model.encoder.hidden.weight
    some = controls[np.linspace(0, len(controls) - 1, min(JACOBIAN_CELLS, len(controls))).astype(int)]
    u = torch.from_numpy(encode(model, data, some)).to(weight.device, weight.dtype)
    z = model.scm.abduct(u).detach()
    total = mean_jacobian(lambda noise: model.decoder.mean(model.scm(noise)), z)
    by_effects = known_targets and model.log_noise is not None and not isinstance(model.decoder, SparseDecoder)
    if by_effects:
        scale = _equation_scale(model)
        total = _with_effects(model, data, z, total)
        # Through whose equation: direct effects are what is left without those of the programs downstream.
        direct = total - model.scm.adjacency.detach().cpu().double().numpy() @ np.nan_to_num(total)
    else:
        # A latent that no control cell moves has no unit of its own: it keeps the raw one.
        deviation = raw.std(0)
        scale = np.where(deviation > 1e-12, deviation, 1.0)
        direct = mean_jacobian(model.decoder.mean, u)
    # Sign: the greater part of the squared loadings is positive.
    sign = np.where(np.nansum(direct * np.abs(direct), 1) < 0, -1.0, 1.0)
    scale = scale * sign
    return Programs(direct * scale[:, None], total * scale[:, None], scale, raw.mean(0))


def _equation_scale(model: DiscrepancyVAE) -> np.ndarray:
    """(p,) standard deviation of latents whose noise is standard normal."""
    p = len(model.scm.graph)
    if model.scm.equations == "linear":  # z (I - A)^-1
        inverse = np.linalg.inv(np.eye(p) - model.scm.adjacency.detach().cpu().double().numpy())
        return np.asarray(np.sqrt((inverse**2).sum(0)))
    drawn = torch.randn((SCALE_DRAWS, p), generator=torch.Generator().manual_seed(0)).to(model.scm.graph)
    return np.asarray(model.scm(drawn).std(0).cpu().double().numpy())


def _with_effects(model: DiscrepancyVAE, data: PerturbSeqData, z: Tensor, total: np.ndarray) -> np.ndarray:
    """(p, G) total effects of a shift of each raw latent by 1, of programs with perturbations by what these do."""
    product, square = np.zeros_like(total), np.zeros_like(total)
    targeted = np.zeros(len(total), dtype=bool)
    for k, own in cells_alone(data, data.cells_by_condition(splits.TRAIN)).items():
        alone = torch.tensor([[k]], device=z.device)
        weights = model.target_weights(alone)
        target = int(weights[0, 0].argmax())
        shift = float(model.scm.mechanism(alone, weights).shift[0, target])
        if not shift:
            continue
        tells = np.ones(data.n_genes)
        tells[list(data.own_genes[k])] = 0
        product[target] += len(own) * shift * tells * model.mean_effect(z, [k]).cpu().double().numpy()
        square[target] += len(own) * shift**2 * tells
        targeted[target] = True
    found = np.divide(product, square, out=np.full_like(total, np.nan), where=square > 0)
    return np.where(targeted[:, None], found, total)


def mean_jacobian(mean: Callable[[Tensor], Tensor], points: Tensor) -> np.ndarray:
    """Derivative (p, G) of the `mean` (G,) of what is made of `points` (n, p), by a shift of all of them.

    One vector-Jacobian product, which is linear in its vector, differentiated by that vector: `torch.func` computes the same,
    but loads a compiler for it, which takes longer.
    """
    with torch.enable_grad():
        shift = points.new_zeros(points.shape[1], requires_grad=True)
        found = mean(points + shift)
        vector = torch.zeros_like(found, requires_grad=True)
        (products,) = torch.autograd.grad(found @ vector, shift, create_graph=True)  # (p,)
        rows = [torch.autograd.grad(product, vector, retain_graph=True)[0] for product in products]
    return torch.stack(rows).cpu().double().numpy()


@dataclass(frozen=True)
class Interventions:
    """One row per single perturbation."""

    weight: np.ndarray  # (K, p) points of the simplex
    target: np.ndarray  # (K,) the program of the largest weight, -1 without a claim: all else is NaN then
    shift: np.ndarray  # (K,) what that program is moved by, in its standard deviations
    retention: np.ndarray  # (K,) share of its parents' contribution that it keeps
    noise_scale: np.ndarray  # (K,) factor on its own noise


@torch.no_grad()
def find_interventions(model: DiscrepancyVAE, programs: Programs, claims: np.ndarray | None = None) -> Interventions:
    """Read the interventions off the fitted model, each perturbation alone; ``claims`` (K,) bool, None for all.

    Without programs there are none: every weight is NaN.
    """
    n = len(model.scm.shift)
    if not len(programs.scale):
        return Interventions(np.full((n, 1), np.nan), np.full(n, -1), *np.full((3, n), np.nan))
    alone = torch.arange(n, device=model.scm.shift.device)[:, None]  # (K, 1)
    weights = model.target_weights(alone)
    mechanism = model.scm.mechanism(alone, weights)
    weight = weights[:, 0].cpu().double().numpy()
    rows, target = np.arange(n), weight.argmax(1)
    claimed = (weight.max(1) > 0) & (True if claims is None else claims)

    def of_target(values: torch.Tensor) -> np.ndarray:
        return np.where(claimed, values.cpu().double().numpy()[rows, target], np.nan)

    return Interventions(
        weight=np.where(claimed.reshape(-1, 1), weight, np.nan),
        target=np.where(claimed, target, -1),
        shift=of_target(mechanism.shift) / programs.scale[target],
        retention=of_target(mechanism.retention),
        noise_scale=of_target(mechanism.log_scale.exp()),
    )


def intervention_table(
    perturbations: Sequence[str],
    found: Interventions,
    support: np.ndarray,
    later: Mapping[str, np.ndarray],
    tests: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    """One row per single perturbation; ``support`` (K,), ``later`` the columns `HIT` and `AGREEMENT`, (K,) each."""
    names = np.asarray([*program_names(found.weight.shape[1]), ""], dtype=object)  # the last: -1, no claim
    return pd.DataFrame({
        "perturbation": np.asarray(perturbations, dtype=object), "program": names[found.target],
        "weight": found.weight[np.arange(len(found.target)), found.target], "shift": found.shift,
        "retention": found.retention, "n_cells": tests["n_cells"], "p_value": tests["p_value"], "fdr": tests["fdr"],
        "energy_distance": tests["energy"], "noise_scale": found.noise_scale, "support": support,
        **{name: later[name] for name in (*HIT, *AGREEMENT)},
    })  # fmt: skip


@dataclass(frozen=True)
class Dag:
    """The graph in users' units."""

    # (p, p), row -> column: change of the target, in its standard deviations, for one of the source
    weights: np.ndarray
    declared: np.ndarray  # (p, p) bool: the edges that are reported
    identification: Identification


def find_dag(model: DiscrepancyVAE, programs: Programs, config: ModelConfig, discovery: Discovery | None = None) -> Dag:
    """Edges that a discovery found are declared; of a graph that was to be learned by gradient those of
    `DECLARED_WEIGHT`, and none where a likelihood found nothing to go by.
    """
    adjacency = model.scm.adjacency.detach().cpu().double().numpy()
    weights = adjacency * programs.scale[:, None] / programs.scale[None, :]
    if not len(weights):
        verdict, declared = judge_nothing(), weights != 0
    elif discovery is None:
        asked = config.method == "gradient" or not config.causal_layer
        verdict, declared = judge_gradient(config), (np.abs(weights) >= DECLARED_WEIGHT) & asked
    else:
        verdict, declared = discovery.verdict, (discovery.adjacency != 0) & discovery.verdict.grants_graph
    ordering = None if discovery is None else discovery.ordering
    warnings = () if ordering is None else ordering.warnings
    return Dag(weights, declared, Identification(verdict=verdict.answer, reason=verdict.reason, warnings=warnings))
