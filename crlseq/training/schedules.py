"""Schedules: weights of the loss terms, temperature and learning rate by epoch; how many epochs, and how large steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crlseq.config import ModelConfig, TrainingConfig

WARM_UP = 0.1  # share of the epochs over which terms come in ("scaled")
SHARPEN = 0.2  # share of the epochs after which targets are as sharp as they get ("scaled")
COOL = 0.5  # share of the epochs after which the learning rate falls ("scaled")
MIN_IN_STEP, MAX_IN_STEP, ENOUGH_STEPS = 8, 64, 20  # perturbations in a step, and steps per epoch to keep
MIN_EPOCHS, MIN_STEPS = 100, 2000  # a small screen makes few steps per epoch and needs as many as a large one
FINAL_RATE = 0.02  # learning rate at the last epoch, as a share of the first


@dataclass(frozen=True)
class Weights:
    """What one epoch minimises: sum of weight times term, ``terms`` by name; and how."""

    terms: dict[str, float]
    temperature: float
    learning_rate: float
    sparsity: float  # of the way from a slab to the spike of a sparse decoder, in logarithms of the rate


def final_weights(model: ModelConfig) -> dict[str, float]:
    """Weights of the terms at the end of every schedule; a fit without a warm start has no anchor."""
    return {
        "mmd": model.mmd_weight, "reconstruction": 1.0, "kl": model.kl_weight, "graph": model.graph_weight, "anchor": 1.0,
    }  # fmt: skip


def schedule(epoch: int, n_epochs: int, model: ModelConfig, training: TrainingConfig) -> Weights:
    """Weights in `epoch` = 0, 1, ... of `n_epochs`.

    ``published``: MMD 0 for 5 epochs, then linear up to half time; KL 0 for 10 epochs, then linear to the
    end; temperature 1 for 5 epochs, then linear to the end; constant learning rate (Zhang et al. 2023).

    ``scaled``: MMD and KL grow linearly over the first tenth, temperature and sparsity over the first fifth; the
    learning rate is constant for half of the time and then falls linearly. From the first fifth on the
    objective is settled, whatever the number of epochs, and validation losses of epochs compare.
    """
    n = n_epochs
    if training.schedule == "published":
        mmd = _ramp(epoch, 5, n // 2 - 1)
        kl, heat, rate = _ramp(epoch, 10, n - 1), _ramp(epoch, 5, n - 1), 1.0
    else:
        mmd = kl = _ramp(epoch + 1, 0, WARM_UP * n)
        heat = _ramp(epoch, 0, SHARPEN * n)
        rate = 1 - (1 - FINAL_RATE) * _ramp(epoch, COOL * n, n)
    return Weights(
        terms=final_weights(model) | {"mmd": model.mmd_weight * mmd, "kl": model.kl_weight * kl},
        temperature=1 + (model.max_temperature - 1) * heat,
        learning_rate=training.learning_rate * rate,
        sparsity=1.0 if training.schedule == "published" else heat,
    )


def settled(epoch: int, n_epochs: int, training: TrainingConfig) -> bool:
    """Whether the objective no longer changes, so that validation losses of epochs compare."""
    return training.schedule == "published" or epoch >= SHARPEN * n_epochs


def _ramp(epoch: float, start: float, end: float) -> float:
    if end <= start:
        return float(epoch >= start)
    return float(np.clip((epoch - start) / (end - start), 0, 1))


def resolve_step(training: TrainingConfig, cells_by_condition: list[np.ndarray]) -> int:
    """The number of perturbations in a step: as asked, or 8, or as many more as leave `ENOUGH_STEPS` per epoch.

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
