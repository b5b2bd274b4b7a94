"""Trainer: fits a DiscrepancyVAE to a screen, keeps the weights that validate best, can be resumed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crlseq.config import Config, ModelConfig
from crlseq.data import splits
from crlseq.data.batches import BatchIndex, ControlPartners, epoch_batches
from crlseq.data.dataset import PerturbSeqData
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import median_bandwidth
from crlseq.model.networks import GeneSetLayer
from crlseq.storage.checkpoint import Checkpoints, build
from crlseq.threads import ahead, counted, in_parallel
from crlseq.training.device import computed_on, resolve_device
from crlseq.training.distributed import ALONE, Ranks
from crlseq.training.learner import Learner
from crlseq.training.memory_split import SplitSteps
from crlseq.training.objective import Objective
from crlseq.training.residuals import measure_errors, measure_missed
from crlseq.training.schedules import resolve_epochs, resolve_step, schedule
from crlseq.training.sparse_start import least_noise
from crlseq.training.warm_start import Anchor, WarmStart, warm_start

CHECKPOINT_SECONDS = 5.0  # a checkpoint at most so often; when it is written changes no result
BANDWIDTH_CELLS = 1000
VALIDATION_BATCH, VALIDATION_CONDITIONS = 64, 16  # cells of a condition, and conditions, scored at once


@dataclass(frozen=True)
class Fit:
    """A fitted model: the kept weights, the losses of every epoch, and how it ended.

    Of an ensemble it is the one that validated best, of ``seed``; ``others`` are those of the other seeds, and
    ``seed_losses`` the lowest validation loss of each seed, None where no cells validated. ``parts_of_steps`` is in how many
    parts steps were computed at the end (more than one: memory had run out), ``notes`` what had to be done again. Models are
    on the CPU; ``device`` is where they were trained.
    """

    model: DiscrepancyVAE
    architecture: dict[str, Any]
    history: list[dict[str, float]]
    best_epoch: int
    bandwidth: float
    stopped_early: bool
    seed: int
    others: tuple[DiscrepancyVAE, ...] = ()
    parts_of_steps: int = 1
    notes: tuple[str, ...] = ()
    seed_losses: tuple[float | None, ...] = ()
    device: str = "cpu"


def architecture_of(
    config: ModelConfig,
    n_genes: int,
    n_latents: int,
    n_perturbations: int,
    start: WarmStart | None = None,
    n_gene_sets: int = 0,
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
        "n_gene_sets": n_gene_sets,
        "leak": config.gene_set_leak,
        "decoder": config.decoder,
    }


def fit_model(
    data: PerturbSeqData,
    config: Config,
    n_latents: int,
    checkpoint: Path | None = None,
    identity: str = "",
    on_epoch: Callable[[dict[str, float], int], None] = lambda record, n_epochs: None,
    start: WarmStart | None = None,
    gene_sets: np.ndarray | None = None,
    ranks: Ranks = ALONE,
    on_retry: Callable[[str], None] = lambda text: None,
) -> Fit:
    """Minimise the weighted loss terms by Adam; early stopping and the kept weights go by validation.

    With several `ranks` each calls this with the same data and configuration; number of latents, start and checkpoint
    are the first rank's, and what the latents miss is measured there alone.

    Checkpoints are written for an ``identity`` (input and configuration), and gone on from if one is there. ``on_epoch``
    gets each epoch's record and the number of epochs. Without a ``start`` weights are random, and targets and graph are
    learned by gradient; without ``gene_sets`` (S, G) bool the encoder reads all genes. ``on_retry`` gets a sentence when
    an epoch is repeated, from the weights before it and with a quarter of the learning rate from there on, since a loss
    was not finite (at most `MAX_SLOWER` times in a fit); and when steps are computed in more parts, since memory ran out.

    Without programs (0 latents) nothing is trained: in that model every cell stays as it is.

    ConvergenceError if a loss is still not finite; InputError if the checkpoint is damaged or belongs to another fit, or
    memory does not suffice for one perturbation. A fit that was left to choose (``auto``) a CUDA device whose memory does
    not suffice continues on the CPU.
    """
    if not n_latents:
        return _without_programs(data, config)
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        on_retry(text)

    def fit_on(device: torch.device) -> Fit:
        return _fit_on(
            device,
            data,
            config,
            n_latents,
            checkpoint,
            identity,
            on_epoch,
            start,
            gene_sets,
            ranks.on(device),
            on_retry,
        )

    asked = config.training.device
    may_move = asked == "auto" and ranks.size == 1
    fitted = computed_on(resolve_device(asked, ranks), fit_on, may_move, note, "the fit")
    return replace(fitted, notes=(*notes, *fitted.notes))


def _fit_on(
    device: torch.device,
    data: PerturbSeqData,
    config: Config,
    n_latents: int,
    checkpoint: Path | None,
    identity: str,
    on_epoch: Callable[[dict[str, float], int], None],
    start: WarmStart | None,
    gene_sets: np.ndarray | None,
    ranks: Ranks,
    on_retry: Callable[[str], None],
) -> Fit:
    """`fit_model` on a device."""
    training, first_rank = config.training, ranks.rank == 0
    n_sets = 0 if gene_sets is None else len(gene_sets)
    architecture = ranks.from_first(
        architecture_of(config.model, data.n_genes, n_latents, len(data.perturbation_names), start, n_sets)
    )
    bandwidth = ranks.from_first(_bandwidth(config.model, data, training.seed))
    learners = _learners(device, data, config, architecture, bandwidth, start, gene_sets, ranks)
    epochs = _Epochs(learners, on_epoch, on_retry)
    with Checkpoints(checkpoint if first_rank else None, identity) as checkpoints:
        saved = ranks.from_first(checkpoints.last())
        if saved is not None:
            epochs.resume(saved)
        epochs.run(checkpoints)
    for learner in learners:
        learner.keep_best()
        learner.model.cpu()  # what follows is of many small steps
    best = min(learners, key=lambda learner: learner.best_loss)
    if first_rank and best.model.log_noise is not None:
        measure_missed(best.model, data, training.seed)
    return Fit(
        best.model, architecture, best.history, best.best_epoch, bandwidth,
        stopped_early=len(best.history) < epochs.n,
        seed=training.seed + learners.index(best),
        others=tuple(learner.model for learner in learners if learner is not best),
        parts_of_steps=epochs.steps.n,
        notes=tuple(epochs.notes),
        seed_losses=tuple(
            learner.history[learner.best_epoch].get("validation_total") for learner in learners if learner.history
        ),
        device=str(device),
    )  # fmt: skip


def _without_programs(data: PerturbSeqData, config: Config) -> Fit:
    """A model that reads and does nothing: all of a cell is what noise carries along."""
    architecture = architecture_of(config.model, data.n_genes, 0, len(data.perturbation_names))
    architecture |= {"n_hidden": 1, "noise": "gaussian", "decoder": "dense", "output_activation": "identity"}
    state = {name: torch.zeros_like(value) for name, value in DiscrepancyVAE(**architecture).state_dict().items()}
    state |= {name: torch.ones_like(state[name]) for name in ("penetrance", "temperature")}
    model = build(state, architecture).to(getattr(torch, config.training.dtype))
    measure_errors(model, data)
    return Fit(model, architecture, [], -1, 0.0, stopped_early=False, seed=config.training.seed)


class _Epochs:
    """The `n` epochs of a fit: what each asks of the screen, and what is done where one fails or the fit was stopped."""

    def __init__(
        self, learners: list[Learner], on_epoch: Callable[[dict[str, float], int], None], on_note: Callable[[str], None]
    ) -> None:
        self.learners, self.on_epoch, self.on_note = learners, on_epoch, on_note
        config, ranks, data = learners[0].config, learners[0].ranks, learners[0].objective.source.data
        self.config, self.shuffled = config, data.shuffled
        self.notes: list[str] = []
        self.steps = SplitSteps(learners[0].objective, ranks, self.note)
        for learner in learners:
            learner.graphs.note = self.note
        self.train_cells = data.cells_by_condition(splits.TRAIN)
        self.n = resolve_epochs(config.training, self.train_cells) if config.model.trains else 0
        self.first = 0
        self.in_step = resolve_step(config.training, self.train_cells)
        self.partners = ControlPartners(data.control_pool(splits.TRAIN), data.comparison)
        self.validation = _validation_batches(data, config.training.seed)
        # Several models share what a step asks of the screen, and the threads: each is computed on one.
        alone = len(learners) == 1 or ranks.size > 1 or self.steps.objective.device.type != "cpu"
        self.threads = 1 if alone else torch.get_num_threads()

    def note(self, text: str) -> None:
        """Report, and remember, what was done again or otherwise."""
        self.notes.append(text)
        self.on_note(text)

    def state(self, epoch: int) -> dict[str, Any]:
        """What is needed to go on behind `epoch`."""
        states = [learner.state() for learner in self.learners]
        return {"epoch": epoch, "learners": states, "parts": self.steps.n, "notes": self.notes}

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.first, self.steps.n = saved["epoch"] + 1, saved["parts"]
        self.notes += saved["notes"]
        self._load(saved)
        for record in self.learners[0].history:
            self.on_epoch(record, self.n)

    def run(self, checkpoints: Checkpoints) -> None:
        """All epochs that are left, until no learner's validation loss gets better."""
        if self.first < self.n:
            checkpoints.take(self.state(self.first - 1), write=False)
        written, epoch = time.monotonic(), self.first
        while epoch < self.n:
            # Asked before an epoch and not after it, so that a fit resumed behind its last epoch stops as well.
            active = [learner for learner in self.learners if not learner.exhausted(epoch - 1, self.n)]
            if not active:
                break
            self._learn(epoch, active)
            exploded = [learner for learner in active if not learner.end(epoch, self.n)]
            for learner in exploded:
                learner.slow_down(epoch)
            if exploded:
                self._load(copy.deepcopy(checkpoints.state))  # a copy: the state must outlast another attempt
                again = "it is repeated with a quarter of the learning rate"
                self.note(f"The loss is not finite in epoch {epoch + 1}; {again}.")
                continue
            self.on_epoch(active[0].history[-1], self.n)
            last = epoch + 1 == self.n or all(learner.exhausted(epoch, self.n) for learner in self.learners)
            due = last or epoch == self.first or time.monotonic() - written > CHECKPOINT_SECONDS
            checkpoints.take(self.state(epoch), write=due)
            written = time.monotonic() if due else written
            epoch += 1

    def _learn(self, epoch: int, active: list[Learner]) -> None:
        """Train on every cell once, then validate."""
        # Seeded by epoch, not carried along: a resumed run draws what an uninterrupted one would.
        training = self.config.training
        rng = np.random.default_rng([training.seed, 1, epoch])
        noise = int(rng.integers(2**62))
        for i, learner in enumerate(self.learners):
            learner.begin(epoch, self.n, schedule(epoch, self.n, self.config.model, training), noise + i)
        batches = epoch_batches(self.train_cells, self.partners, training.batch_size, self.in_step, rng, self.shuffled)
        steps = ahead(partial(self.steps.prepare, learned=True), batches)
        for step in counted(steps, self.n * len(batches), epoch * len(batches)):
            self._each(methodcaller("learn", step, len(batches)), active)
        n_judged = sum(len(batch.condition) for batch in self.validation)
        for step in self.steps.prepared_once(self.validation):
            self._each(methodcaller("validate", step, len(step.batch.condition) / n_judged), active)

    def _each(self, act: Callable[[Learner], None], active: list[Learner]) -> None:
        list(in_parallel(act, active, self.threads))

    def _load(self, state: dict[str, Any]) -> None:
        for learner, saved in zip(self.learners, state["learners"], strict=True):
            learner.load(saved)


def _learners(
    device: torch.device,
    data: PerturbSeqData,
    config: Config,
    architecture: dict[str, Any],
    bandwidth: float,
    start: WarmStart | None,
    gene_sets: np.ndarray | None,
    ranks: Ranks,
) -> list[Learner]:
    """Models of consecutive seeds, which share their objective's view of the screen."""
    training, found = config.training, []
    dtype, objective = getattr(torch, training.dtype), None
    for i in range(training.ensemble):
        torch.manual_seed(training.seed + i)
        # Built in float32 on the CPU whatever the device, so that one seed starts everywhere from one model.
        model = DiscrepancyVAE(**architecture).to(dtype)
        _start_noise(model, data)
        if gene_sets is not None and isinstance(model.encoder.hidden, GeneSetLayer):
            model.encoder.hidden.assign(torch.from_numpy(gene_sets))
        anchor = None if start is None else warm_start(model, data, start)
        if ranks.size > 1:
            anchor = _start_from_first(model, anchor, ranks)
        model.to(device)
        if objective is None:
            objective = Objective(model, data, config.model, bandwidth, anchor)
        found.append(Learner(objective.of(model), config, ranks))
    return found


def _start_from_first(model: DiscrepancyVAE, anchor: Anchor | None, ranks: Ranks) -> Anchor | None:
    """Give every rank the weights, the choice of what is fixed, and the anchor that the first one starts from."""
    ranks.spread(model.state_dict().values())
    learned = ranks.from_first([parameter.requires_grad for parameter in model.parameters()])
    for parameter, is_learned in zip(model.parameters(), learned, strict=True):
        parameter.requires_grad_(is_learned)
    parts = None if anchor is None else [torch.from_numpy(part) for part in (anchor.z, anchor.variance, anchor.hit)]
    parts = ranks.from_first(parts)
    return None if parts is None else Anchor(*(part.numpy() for part in parts))


def _validation_batches(data: PerturbSeqData, seed: int) -> list[BatchIndex]:
    """The same pairs of cells in every epoch; none if no condition has validation cells."""
    cells = data.cells_by_condition(splits.VALIDATION)
    controls = data.control_pool(splits.VALIDATION if len(cells[0]) else splits.TRAIN)
    partners, rng = ControlPartners(controls, data.comparison), np.random.default_rng([seed, 3])
    return epoch_batches(cells, partners, VALIDATION_BATCH, VALIDATION_CONDITIONS, rng, data.shuffled)


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
        with torch.no_grad():
            model.log_noise.copy_(variance.clamp_min(least_noise(variance)).log())
