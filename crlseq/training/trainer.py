"""Trainer: fits a DiscrepancyVAE to a screen, keeps the weights that validate best, can be resumed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crlseq.config import Config, ModelConfig, TrainingConfig
from crlseq.data import splits
from crlseq.data.batches import BatchIndex, ControlPartners, epoch_batches
from crlseq.data.dataset import PerturbSeqData
from crlseq.errors import ConvergenceError, InputError
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import median_bandwidth, weighted_total
from crlseq.training.checkpoint import Keeper, load_checkpoint
from crlseq.training.distributed import ALONE, Ranks
from crlseq.training.objective import Objective
from crlseq.training.residuals import measure_missed
from crlseq.training.schedules import final_weights, schedule, settled
from crlseq.training.threads import ahead
from crlseq.training.warm_start import Anchor, WarmStart, warm_start

CHECKPOINT_SECONDS = 5.0  # a checkpoint at most so often; when it is written changes no result
SLOWER, MAX_SLOWER = 0.25, 5  # of the learning rate where a loss is not finite, and how often
EXPLODED = 1e12
BANDWIDTH_CELLS = 1000
VALIDATION_BATCH, VALIDATION_CONDITIONS = 64, 16  # cells of a condition, and conditions, scored at once

MIN_IN_STEP, MAX_IN_STEP, ENOUGH_STEPS = 8, 64, 20  # perturbations in a step, and steps an epoch keeps
MIN_EPOCHS, MIN_STEPS = 100, 2000  # a small screen makes few steps an epoch and needs as many as a large one

History = list[dict[str, float]]


@dataclass(frozen=True)
class Fit:
    """A fitted model: the kept weights, the losses of every epoch, and how it ended."""

    model: DiscrepancyVAE
    architecture: dict[str, Any]
    history: History
    best_epoch: int
    bandwidth: float
    stopped_early: bool


def resolve_device(asked: str) -> torch.device:
    """The device to compute on; ``auto`` is CUDA when there is one.

    Raises
    ------
    InputError
        If CUDA is asked for and absent.
    """
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device cuda was asked for, but torch finds no CUDA device.", "Use --device cpu or auto.")
    return torch.device("cuda")


def architecture_of(
    config: ModelConfig, n_genes: int, n_latents: int, n_perturbations: int, start: WarmStart | None = None
) -> dict[str, Any]:
    """Arguments of `DiscrepancyVAE` for a configuration; what it leaves open comes from the start."""
    intervention: str = "soft" if config.intervention == "auto" else config.intervention
    equations: str = "linear" if config.equations == "auto" else config.equations
    if start is not None:
        intervention, equations = start.discovery.kind, start.discovery.equations
    return {
        "n_genes": n_genes,
        "n_latents": n_latents,
        "n_perturbations": n_perturbations,
        "n_hidden": config.n_hidden if start is None else max(config.n_hidden, 2 * n_latents),
        "intervention": intervention,
        "equations": equations,
        "causal": config.causal_layer,
        "output_activation": config.output_activation,
        "noise": config.noise,
    }


def resolve_step(training: TrainingConfig, cells_by_condition: list[np.ndarray]) -> int:
    """The number of perturbations in a step: as asked, or 8, or as many more as leave `ENOUGH_STEPS` an epoch.

    What a step costs whatever its cells (products of weights with weights, the optimiser) is shared by all of them.
    """
    if training.perturbations_per_step is not None:
        return training.perturbations_per_step
    return int(np.clip(_pieces(training, cells_by_condition) // ENOUGH_STEPS, MIN_IN_STEP, MAX_IN_STEP))


def resolve_epochs(training: TrainingConfig, cells_by_condition: list[np.ndarray]) -> int:
    """The number of epochs asked for; by default 100, or as many as make 2,000 steps."""
    if training.epochs is not None:
        return training.epochs
    steps = -(-max(_pieces(training, cells_by_condition), 1) // resolve_step(training, cells_by_condition))
    return max(MIN_EPOCHS, -(-MIN_STEPS // steps))


def _pieces(training: TrainingConfig, cells_by_condition: list[np.ndarray]) -> int:
    return sum(-(-len(cells) // training.batch_size) for cells in cells_by_condition[1:])


def fit_model(
    data: PerturbSeqData,
    config: Config,
    n_latents: int,
    checkpoint: Path | None = None,
    identity: str = "",
    on_epoch: Callable[[dict[str, float], int], None] = lambda record, n_epochs: None,
    start: WarmStart | None = None,
    ranks: Ranks = ALONE,
    on_retry: Callable[[str], None] = lambda text: None,
) -> Fit:
    """Minimise the weighted loss terms by Adam; early stopping and the kept weights go by validation.

    With several `ranks` each calls this with the same data and configuration; number of latents, start and checkpoint
    are the first rank's, and what the latents miss is measured there alone.

    Parameters
    ----------
    checkpoint
        Where to write checkpoints, and to go on from if one is there; None for neither.
    identity
        What a checkpoint must have been written for (input and configuration).
    on_epoch
        Called with each epoch's record (``epoch``, the terms, ``validation_*`` terms, ``temperature``) and the
        number of epochs.
    start
        Latents, targets and graph to start from; None starts from random weights and learns them by gradient.

    on_retry
        Told in words when an epoch is done again, since a loss was not finite: from the weights before it, with a
        quarter of the learning rate from there on, at most `MAX_SLOWER` times in a fit.

    Raises
    ------
    ConvergenceError
        If a loss is still not finite.
    InputError
        If the checkpoint is damaged or belongs to another fit.
    """
    training, first_rank = config.training, ranks.rank == 0
    device = resolve_device(training.device)
    dtype = getattr(torch, training.dtype)
    torch.manual_seed(training.seed)
    architecture = ranks.from_first(
        architecture_of(config.model, data.n_genes, n_latents, len(data.perturbation_names), start)
    )
    # Built in float32 on the CPU whatever the device, so that one seed starts everywhere from one model.
    model = DiscrepancyVAE(**architecture).to(dtype)
    bandwidth = ranks.from_first(_bandwidth(config.model, data, training.seed))
    _start_noise(model, data)
    anchor = None if start is None else warm_start(model, data, start)
    if ranks.size > 1:
        anchor = _start_from_first(model, anchor, ranks)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate, fused=True)
    objective = Objective(model, data, config.model, bandwidth, anchor)

    train_cells = data.cells_by_condition(splits.TRAIN)
    n_epochs = 0 if config.model.method == "linear" else resolve_epochs(training, train_cells)
    in_step = resolve_step(training, train_cells)
    partners = ControlPartners(data.control_pool(splits.TRAIN), data.batch)
    validation = _validation_batches(data, training.seed)
    history: History = []
    first, best_epoch, best_loss = 0, -1, math.inf
    best_state = copy.deepcopy(model.state_dict())
    slower = 0  # how often the learning rate was lowered
    saved = None
    if first_rank and checkpoint is not None and checkpoint.exists():
        saved = load_checkpoint(checkpoint)
        if saved.get("identity") != identity:
            raise InputError(
                "The unfinished run was started with another input or other options.",
                "Repeat its options to resume it, or start over with --force.",
            )
    saved = ranks.from_first(saved)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history, first = saved["history"], saved["epoch"] + 1
        best_epoch, best_loss, best_state = saved["best_epoch"], saved["best_loss"], saved["best_state"]
        slower = saved["slower"]
        for record in history:
            on_epoch(record, n_epochs)

    stopped_early, epoch = False, first
    with Keeper(checkpoint if first_rank else None) as keeper:

        def keep(epoch: int, write: bool) -> None:
            keeper.keep({
                "identity": identity, "epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "history": history, "best_epoch": best_epoch, "best_loss": best_loss, "best_state": best_state, "slower": slower,
            }, write)  # fmt: skip

        keep(first - 1, write=False)
        written = time.monotonic()
        while epoch < n_epochs:
            # Asked before an epoch and not after it, so that a fit resumed behind its last epoch stops as well.
            if stopped_early := _exhausted(epoch - 1, best_epoch, n_epochs, training):
                break
            weights = schedule(epoch, n_epochs, config.model, training)
            model.temperature.fill_(weights.temperature)
            for group in optimizer.param_groups:
                group["lr"] = weights.learning_rate * SLOWER**slower
            # Seeded by epoch, not carried along: a resumed run draws what an uninterrupted one would.
            rng = np.random.default_rng([training.seed, 1, epoch])
            generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
            batches = epoch_batches(train_cells, partners, training.batch_size, in_step, rng, data.shuffled)
            sums: dict[str, Tensor] = {}
            for step in ahead(lambda b: objective.prepare(b, ranks.own(b.mask)), batches):
                terms = objective(step, generator)
                total = weighted_total(terms, weights.of_terms(objective.anchored))
                optimizer.zero_grad(set_to_none=True)
                total.backward()  # type: ignore[no-untyped-call]
                ranks.add_up([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
                if training.gradient_norm is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_norm)
                optimizer.step()
                for name, value in {**terms, "total": total}.items():  # added up on the device: no step waits
                    sums[name] = sums.get(name, 0.0) + value.detach().double() / len(batches)
            ranks.add_up(list(sums.values()))
            record = {"epoch": float(epoch), **{name: value.item() for name, value in sums.items()}}
            record |= _validate(objective, validation, config.model, training.seed, ranks)
            record["temperature"] = weights.temperature
            if not all(math.isfinite(value) and abs(value) < EXPLODED for value in record.values()):
                if slower == MAX_SLOWER:
                    raise ConvergenceError(
                        f"The loss is not finite in epoch {epoch + 1}, with a learning rate {SLOWER**-slower:.0f} times smaller "
                        "as well.",
                        "Lower the learning rate, or look for extreme values in the file.",
                    )
                # Back to the last whole epoch, whose copy the next attempt must not change.
                slower += 1
                good = copy.deepcopy(keeper.state)
                model.load_state_dict(good["model"])
                optimizer.load_state_dict(good["optimizer"])
                on_retry(f"the loss is not finite in epoch {epoch + 1}: again with a quarter of the learning rate")
                continue
            history.append(record)
            on_epoch(record, n_epochs)
            # Without validation cells the last weights are kept: a training loss may not choose.
            judged = record.get("validation_total", -float(epoch))
            if settled(epoch, n_epochs, training) and judged < best_loss:
                best_epoch, best_loss, best_state = epoch, judged, copy.deepcopy(model.state_dict())
            last = epoch + 1 == n_epochs or _exhausted(epoch, best_epoch, n_epochs, training)
            due = last or epoch == first or time.monotonic() - written > CHECKPOINT_SECONDS
            keep(epoch, write=due)
            written = time.monotonic() if due else written
            epoch += 1
    if best_epoch < 0:
        best_epoch, best_state = len(history) - 1, model.state_dict()
    model.load_state_dict(best_state)
    model.eval()
    if first_rank and model.log_noise is not None:
        measure_missed(model, data, training.seed)
    return Fit(model, architecture, history, best_epoch, bandwidth, stopped_early)


def _start_from_first(model: DiscrepancyVAE, anchor: Anchor | None, ranks: Ranks) -> Anchor | None:
    """Give every rank the weights, the choice of what is fixed, and the anchor that the first one starts from."""
    ranks.spread(model.state_dict().values())
    learned = ranks.from_first([parameter.requires_grad for parameter in model.parameters()])
    for parameter, is_learned in zip(model.parameters(), learned, strict=True):
        parameter.requires_grad_(is_learned)
    parts = None if anchor is None else (torch.from_numpy(anchor.z), torch.from_numpy(anchor.variance))
    parts = ranks.from_first(parts)
    return None if parts is None else Anchor(parts[0].numpy(), parts[1].numpy())


def _exhausted(epoch: int, best_epoch: int, n_epochs: int, training: TrainingConfig) -> bool:
    """Whether the patience had run out after `epoch`."""
    return training.patience is not None and 0 <= best_epoch <= epoch - training.patience * n_epochs


def _validation_batches(data: PerturbSeqData, seed: int) -> list[BatchIndex]:
    """The same pairs of cells in every epoch; none if no condition has validation cells."""
    cells = data.cells_by_condition(splits.VALIDATION)
    controls = data.control_pool(splits.VALIDATION if len(cells[0]) else splits.TRAIN)
    partners, rng = ControlPartners(controls, data.batch), np.random.default_rng([seed, 3])
    return epoch_batches(cells, partners, VALIDATION_BATCH, VALIDATION_CONDITIONS, rng, data.shuffled)


@torch.no_grad()
def _validate(
    objective: Objective, batches: list[BatchIndex], config: ModelConfig, seed: int, ranks: Ranks
) -> dict[str, float]:
    """Mean terms over validation batches, weighted as at the end of training so that epochs compare."""
    if not batches:
        return {}
    generator = torch.Generator(objective.device).manual_seed(seed)
    found = [objective(step, generator) for step in ahead(lambda b: objective.prepare(b, ranks.own(b.mask)), batches)]
    sizes = np.array([len(batch.condition) for batch in batches]) / sum(len(batch.condition) for batch in batches)
    means = torch.tensor(
        [sum(size * terms[name].item() for size, terms in zip(sizes, found, strict=True)) for name in found[0]],
        dtype=torch.float64,
    )
    ranks.add_up([means])
    record = {f"validation_{name}": value for name, value in zip(found[0], means.tolist(), strict=True)}
    final = final_weights(config, objective.anchored)
    record["validation_total"] = sum(weight * record[f"validation_{name}"] for name, weight in final.items() if weight)
    return record


def _bandwidth(config: ModelConfig, data: PerturbSeqData, seed: int) -> float:
    if config.mmd_bandwidth != "median":
        return float(config.mmd_bandwidth)
    cells = np.flatnonzero(data.split == splits.TRAIN)
    rng = np.random.default_rng([seed, 4])
    chosen = np.sort(rng.choice(cells, min(BANDWIDTH_CELLS, len(cells)), replace=False))
    return median_bandwidth(torch.from_numpy(data.dense(chosen)).double())


def _start_noise(model: DiscrepancyVAE, data: PerturbSeqData) -> None:
    """Noise starts at the variance of each gene over control cells: what is left when latents explain nothing."""
    if model.log_noise is not None:
        cells = data.cells(0, splits.TRAIN)[:BANDWIDTH_CELLS]
        variance = torch.from_numpy(data.dense(cells)).double().var(0, correction=0)
        # A gene that is constant in control cells would have a noise of zero and a likelihood without bound.
        floor = max(float(variance.mean()) * 1e-2, 1e-8)
        with torch.no_grad():
            model.log_noise.copy_(variance.clamp_min(floor).log())
