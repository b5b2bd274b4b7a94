"""A DiscrepancyVAE that starts as the linear model: exact, not trained towards it.

A leaky ReLU of slope c satisfies relu(v) - relu(-v) = (1 + c) v, so that 2 p hidden units carry a linear map. The
encoder regresses the latents that the likelihood found on expression, the decoder expression on the latents, and the
structural model holds the graph, targets and interventions that were found. Without a training step this is the
linear method; training adds what is not linear. Latents that are no linear function of expression are learned before, by the
other hidden units (`crlseq.training.curved_start`). An encoder that reads gene sets cannot be exact: see `start_from_sets`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from crlseq.data import splits
from crlseq.data.dataset import ROWS, PerturbSeqData
from crlseq.data.projection import Projection
from crlseq.discovery.result import Discovery
from crlseq.discovery.thresholds import DESCRIBED
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.networks import Encoder, GeneSetLayer
from crlseq.model.scm import LOG_SCALE_BOUND, NEGATIVE_SLOPE, LatentSCM
from crlseq.model.sparse_decoder import SparseDecoder
from crlseq.training.curved_start import curve
from crlseq.training.sparse_start import Loadings, control_deviation, least_noise, mixture_prior, sparse_loadings

RIDGE = 1e-6  # of the regressions, relative
WORSE = 2.0  # variance of latents by sparse loadings, over that of the discovery's, up to which they are taken
MIN_VARIANCE = 1e-2  # of an anchor: latents have unit noise, and none is read off a cell without error
MAX_READ = 5_000  # cells of which the read-out is estimated
CENTER = 4.0  # standard deviations above the kink of the leaky ReLU: activities start linear in the genes
PENALTIES = np.logspace(-4, 2, 13)  # by cell


@dataclass(frozen=True)
class WarmStart:
    """What a fit starts from.

    ``tested`` (K,) bool: perturbations whose effect was tested. Those among them without a target act on no latent;
    targets of the others, which occur only in combinations, are learned.
    """

    discovery: Discovery
    tested: np.ndarray
    projection: Projection


@dataclass(frozen=True)
class Anchor:
    """What the network shall not forget of cells: noise z (cells, p) that was found, the variance (p,) it is known with, and
    the probability ``hit`` (cells,) of each to have been hit, NaN where it cannot be told.
    """

    z: np.ndarray
    variance: np.ndarray
    hit: np.ndarray


@torch.no_grad()
def warm_start(model: DiscrepancyVAE, data: PerturbSeqData, start: WarmStart) -> Anchor:
    """Write a discovery into `model`; graph and given targets are then fixed."""
    discovery, projection = start.discovery, start.projection
    _start_scm(model, discovery, start.tested)
    k = np.full(len(data.split), -1)
    k[discovery.index] = np.arange(len(discovery.index))
    train = np.flatnonzero((data.split == splits.TRAIN) & (k >= 0))
    if isinstance(model.decoder, SparseDecoder):
        found, discovery = _sparsify(model, discovery, data, k, train)
        _start_sparse(model.decoder, model.scm, found)
    of_cells = model.scm.abduct(torch.from_numpy(discovery.latents).to(model.scm.graph.dtype)).double()
    u, z = discovery.latents[k[train]], of_cells[k[train]].numpy()
    p, measured = z.shape[1], np.maximum(discovery.noise, MIN_VARIANCE)
    known = measured
    if isinstance(model.encoder.hidden, GeneSetLayer):
        known = np.maximum(measured, start_from_sets(model.encoder, data, train, z))
    else:
        slope, offset = regress(projection.scores, z, train)
        axes = projection.axes @ slope  # (G, p): z = (x - center) @ axes + offset
        _write(model.encoder.hidden.weight, np.concatenate([axes.T, -axes.T]))
        constant = offset - projection.center @ axes
        _write(model.encoder.hidden.bias, np.concatenate([constant, -constant]))
        _linear_output(model.encoder.mean, np.eye(p), np.zeros(p))
        curve(model.encoder, projection, discovery.index, of_cells, data.split[discovery.index] == splits.VALIDATION)
    nn.init.zeros_(model.encoder.variance.weight)
    _write(model.encoder.variance.bias, np.log(np.expm1(np.minimum(known, 1.0))))

    if isinstance(model.decoder, SparseDecoder):
        noise = found.noise.numpy()
    else:
        loadings, center, noise = _decode(u, data, train)
        _write(model.decoder.hidden.weight, np.concatenate([np.eye(p), -np.eye(p)]))
        _write(model.decoder.hidden.bias, np.zeros(2 * p))
        _linear_output(model.decoder.output, loadings.T, center)
    if model.log_noise is not None:
        _write(model.log_noise, np.log(np.maximum(noise, least_noise(noise))))
    noises = np.zeros((len(data.split), p), dtype=np.float32)
    noises[discovery.index] = of_cells.numpy()
    hit = np.full(len(data.split), np.nan) if discovery.hit is None else discovery.hit
    return Anchor(noises, measured, hit)


def _start_scm(model: DiscrepancyVAE, discovery: Discovery, tested: np.ndarray) -> None:
    scm, encoder = model.scm, model.intervention_encoder
    _write(scm.graph, discovery.adjacency)
    _write(scm.intercept, discovery.intercept)
    scm.graph.requires_grad_(False)
    if scm.mechanisms is not None and discovery.mechanisms is not None:
        scm.mechanisms.load_state_dict(discovery.mechanisms)
        scm.mechanisms.requires_grad_(False)
    found = discovery.target >= 0
    given = np.zeros((len(found), len(discovery.adjacency)))
    given[found, discovery.target[found]] = 1.0
    encoder.given.copy_(torch.from_numpy(given))
    encoder.is_given.copy_(torch.from_numpy(found | tested))
    model.penetrance.copy_(torch.from_numpy(np.nan_to_num(discovery.penetrance[0], nan=1.0)))
    _write(scm.shift, np.where(found, discovery.shift, scm.shift.double().numpy()))
    _write(scm.log_scale, LOG_SCALE_BOUND * np.arctanh(discovery.log_scale / LOG_SCALE_BOUND))
    if scm.kind.retention is None:
        kept = np.clip(discovery.retention, 1e-3, 1 - 1e-3)
        _write(scm.retention_logit, np.where(found, np.log(kept / (1 - kept)), scm.retention_logit.double().numpy()))


def _sparsify(
    model: DiscrepancyVAE, discovery: Discovery, data: PerturbSeqData, place: np.ndarray, train: np.ndarray
) -> tuple[Loadings, Discovery]:
    """Sparse loadings, and the discovery with the latents that all genes give through them.

    Where the structural model does not describe the latents, or they are not linear in expression, these stay as they are.
    ``place`` (cells,) are rows of the discovery's latents, ``train`` the cells that it was fitted to.
    """
    table, u = torch.from_numpy(data.perturbation_table()), discovery.latents[place[train]]
    loading, _, noise = _decode(u, data, train)
    if discovery.equations != "linear" or discovery.straightened or not discovery.misfit <= DESCRIBED:
        # Straightened latents are posterior means; the others are estimates, whose moments hold their error.
        variance = discovery.noise if discovery.straightened else np.zeros(u.shape[1])
        return sparse_loadings(model.scm, data, train, u, variance, None, (loading, noise)), discovery
    # What perturbations without a given target do is not known yet.
    known = np.append(model.intervention_encoder.is_given.numpy(), True)[table].all(1)[data.condition[train]]
    prior = mixture_prior(model, table)
    found = sparse_loadings(model.scm, data, train[known], u[known], discovery.noise, prior, (loading, noise))
    axes, variance = found.readout()
    # All genes hold as much as their components, unless a program has hardly a gene of its own.
    if not ((variance > 0) & (variance <= WORSE * np.maximum(discovery.noise, MIN_VARIANCE))).all():
        return found, discovery
    latents = np.empty_like(discovery.latents)
    for rows, x in data.blocks(discovery.index):
        latents[rows] = x @ axes
    return found, replace(discovery, latents=latents - found.center.numpy() @ axes, noise=variance)


def _start_sparse(decoder: SparseDecoder, scm: LatentSCM, found: Loadings) -> None:
    """Every shape a line through pairs of units, as steep as the program's standard deviation over control cells."""
    p = len(found.loading)
    one, scale = np.ones(p), control_deviation(scm).numpy()
    _write(decoder.hidden.weight, np.concatenate([one, -one]))
    _write(decoder.hidden.bias, np.zeros(2 * p))
    nn.init.zeros_(decoder.output.shape)
    line = np.concatenate([one, -one]) / np.tile(scale, 2) / (1 + NEGATIVE_SLOPE)
    decoder.output.shape[:, : 2 * p] = torch.from_numpy(line)
    _write(decoder.output.mask, found.loading.T.numpy() * scale)
    _write(decoder.output.bias, found.center.numpy())
    decoder.output.share.copy_(found.share)


def _decode(u: np.ndarray, data: PerturbSeqData, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loadings (p, G), center (G,) and residual variances (G,) of expression on latents (n, p), by least squares."""
    mean_x, square = data.moments(cells)
    mean_u, centred = u.mean(0), u - u.mean(0)
    gram = centred.T @ centred
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    loadings = np.linalg.solve(gram + ridge, _cross(data, cells, centred).T)
    explained = np.einsum("kg,kl,lg->g", loadings, gram / len(u), loadings)
    return loadings, mean_x - mean_u @ loadings, square - mean_x**2 - explained


def _cross(data: PerturbSeqData, cells: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """(G, p) products of expression with latents (n, p) that sum to 0, so that expression need not be centred."""
    cross = np.zeros((data.n_genes, centred.shape[1]))
    for rows, x in data.blocks(cells):
        cross += x.T @ centred[rows]
    return cross


def regress(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope (q, p) and offset (p,) of y (n, p) on rows of x (cells, q), which are taken some at a time."""
    mean_x, mean_y = x[rows].mean(0, dtype=np.float64), y.mean(0)
    gram, cross = np.zeros((x.shape[1], x.shape[1])), np.zeros((x.shape[1], y.shape[1]))
    for i in range(0, len(rows), ROWS):
        centred = x[rows[i : i + ROWS]] - mean_x
        gram += centred.T @ centred
        cross += centred.T @ (y[i : i + ROWS] - mean_y)
    ridge = (RIDGE * np.trace(gram) / len(gram) + 1e-12) * np.eye(len(gram))
    slope = np.linalg.solve(gram + ridge, cross)
    return slope, mean_y - mean_x @ slope


def _linear_output(layer: nn.Linear, weight: np.ndarray, bias: np.ndarray) -> None:
    """Weights (out, p) on the pairs of hidden units (v, -v); the other units start at 0."""
    p, share = weight.shape[1], weight / (1 + NEGATIVE_SLOPE)
    nn.init.zeros_(layer.weight)
    _write(layer.weight[:, : 2 * p], np.concatenate([share, -share], 1))
    _write(layer.bias, bias)


def _write(parameter: Tensor, value: np.ndarray) -> None:
    """Set the first rows of a parameter."""
    parameter[: len(value)].copy_(torch.from_numpy(np.asarray(value, dtype=float)))


@torch.no_grad()
def start_from_sets(encoder: Encoder, data: PerturbSeqData, cells: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Write activities of gene sets and a read-out into `encoder`, from training cells (n,) and their noise z (n, p).

    The activity of a set is the combination of its genes that goes along most with the latents that the likelihood found:
    with standardised genes x_s of the set and latents z, the direction w of unit length that maximises |Cov(w x_s, z)|
    over all latents together, the first step of partial least squares (Wold 1975). Latents are then regressed on the
    activities of all sets at once,

        z_k = sum_s B_sk h_s + b_k,     |B_k|^2 penalised, the penalty chosen by generalised cross-validation,

    for sets overlap, and there may be more of them than a screen can tell apart. Returns the variance (p,) of z that they
    leave unexplained.
    """
    layer = encoder.hidden
    assert isinstance(layer, GeneSetLayer)
    members = layer.members.cpu().numpy()
    some = np.linspace(0, len(cells) - 1, min(MAX_READ, len(cells))).astype(int)
    cells, z = cells[some], z[some]
    weight = _directions(members, data, cells, z)
    raw = np.empty((len(cells), len(members)))
    for rows, x in data.blocks(cells):
        raw[rows] = x @ weight.T
    mean, deviation = raw.mean(0), raw.std(0)
    scale = 1 / np.where(deviation > 1e-12, deviation, 1.0)
    raw = (raw - mean) * scale + CENTER
    h = np.where(raw > 0, raw, NEGATIVE_SLOPE * raw)
    ridge = RidgeCV(PENALTIES * len(h), alpha_per_target=True).fit(h - CENTER, z)
    slope = ridge.coef_.reshape(z.shape[1], -1)
    layer.free.copy_(torch.from_numpy(weight * scale[:, None]))
    layer.bias.copy_(torch.from_numpy(CENTER - mean * scale))
    encoder.mean.weight.copy_(torch.from_numpy(slope))
    encoder.mean.bias.copy_(torch.from_numpy(np.atleast_1d(ridge.intercept_) - CENTER * slope.sum(1)))
    unexplained: np.ndarray = (z - ridge.predict(h - CENTER).reshape(z.shape)).var(0)
    return unexplained


def _directions(members: np.ndarray, data: PerturbSeqData, cells: np.ndarray, z: np.ndarray) -> np.ndarray:
    """(S, G) weights of genes in the activity of each set, 0 outside of it."""
    mean, square = data.moments(cells)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    inverse = np.where(deviation > 1e-6, 1 / np.where(deviation > 1e-6, deviation, 1.0), 0.0)
    cross = _cross(data, cells, z - z.mean(0)) * (inverse[:, None] / len(cells))
    weight = np.zeros(members.shape)
    for own, row in zip(members, weight, strict=True):
        left = np.linalg.svd(cross[own], full_matrices=False)[0][:, 0]
        row[own] = left * inverse[own] * (1.0 if (left * np.abs(left)).sum() >= 0 else -1.0)
    return weight
