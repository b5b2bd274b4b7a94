"""Learner: one model in training, with its optimiser, its losses so far and the weights that validated best."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crlseq.config import Config
from crlseq.data import splits
from crlseq.errors import ConvergenceError
from crlseq.model.losses import weighted_total
from crlseq.model.sparse_decoder import SparseDecoder
from crlseq.model.spike_slab import SpikeSlab
from crlseq.training import graph
from crlseq.training.distributed import Ranks
from crlseq.training.memory import out_of_memory
from crlseq.training.memory_split import SplitStep
from crlseq.training.objective import Draws, Objective, Step
from crlseq.training.schedules import Weights, final_weights, settled

SLOWER, MAX_SLOWER = 0.25, 5  # of the learning rate where a loss is not finite, and how often
EXPLODED = 1e12
MAX_CELLS = 10_000  # that masks are fitted to
TIMES = 20  # in a fit
DRAWS = 2000  # of control latents, whose variance is the unit of a program


class Sparsity:
    """Masks of a sparse decoder in training: a generalised EM.

    Encoder, structural model, shapes, and the masks that are not 0 learn by gradient. Now and then the masks are set to
    their mode under the spike-and-slab lasso, given the posterior of some cells: exactly, by coordinate ascent, so that
    masks become 0 and come back by the same rule, and no step of an optimiser decides which genes a program has.
    """

    def __init__(self, objective: Objective) -> None:
        model = objective.model
        assert isinstance(model.decoder, SparseDecoder) and model.log_noise is not None
        self.model, self.decoder, self.log_noise = model, model.decoder, model.log_noise
        self.source = objective.source
        cells = np.flatnonzero(self.source.data.split == splits.TRAIN)
        self.cells = cells[np.linspace(0, len(cells) - 1, min(MAX_CELLS, len(cells))).astype(int)]
        self.full = SpikeSlab.of(len(self.cells))
        z = torch.randn(DRAWS, len(model.scm.graph), generator=torch.Generator().manual_seed(0))
        self.z = z.to(model.scm.graph)  # the same at all times: masks move with the model alone
        self.support = torch.empty(0)

    @torch.no_grad()
    def begin(self, epoch: int, n_epochs: int, sparsity: float) -> None:
        """Start an epoch: shapes of unit variance; in some epochs the masks' mode, of a spike annealed to `sparsity`."""
        self.decoder.standardise(self.model.scm(self.z))
        if epoch % max(1, n_epochs // TIMES):
            return
        # M-step, for latents drawn from the posterior of the cells.
        rows, encoder = self.source.rows(self.cells), self.model.encoder
        mean, variance = encoder.posterior(rows.times(encoder.hidden.weight.T) + encoder.hidden.bias)
        eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)).to(mean)
        h = self.decoder.features(self.model.scm(mean + variance.sqrt() * eps))
        mean_x = rows.moments(torch.ones(len(self.cells), device=mean.device))[0].to(mean) / len(self.cells)
        cross = rows.transposed_times(h - h.mean(0))  # features that sum to 0: expression need not
        self.decoder.fit_masks(self.full.annealed(sparsity), self.log_noise.exp(), h, mean_x, cross)

    @torch.no_grad()
    def mark(self) -> None:
        """Remember which masks are 0."""
        self.support = (self.decoder.output.mask != 0).to(self.decoder.output.mask)

    @torch.no_grad()
    def hold(self) -> None:
        """After a step of gradient descent: masks that were 0 stay so."""
        self.decoder.output.mask.mul_(self.support)


class Learner:
    """Trains a model on steps that others may train on as well.

    ``history`` has a record per epoch: ``epoch``, the terms, ``validation_*`` terms, ``temperature``; ``best_epoch`` is the
    settled one with the lowest validation loss (-1: none yet), ``best_loss`` that loss, ``best_state`` its weights.
    """

    def __init__(self, objective: Objective, config: Config, ranks: Ranks) -> None:
        self.model, self.objective, self.config, self.ranks = objective.model, objective, config, ranks
        self.history: list[dict[str, float]] = []
        self.best_epoch, self.best_loss = -1, math.inf
        self.best_state = copy.deepcopy(self.model.state_dict())
        self.graphs = graph.StepGraphs()
        self.slower = 0  # how often the learning rate was lowered
        self.sparsity = Sparsity(objective) if isinstance(self.model.decoder, SparseDecoder) else None

    @cached_property
    def optimizer(self) -> torch.optim.Adam:
        """Made when it is needed, which a fit without epochs never does."""
        rate, in_graphs = self.config.training.learning_rate, graph.ON and self.objective.device.type == "cuda"
        return torch.optim.Adam([view for _, view in self.views], lr=rate, fused=True, capturable=in_graphs)

    @cached_property
    def views(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters, and the same memory as rows that lie one behind the other: of any other order Adam copies the gradient
        twice a step, which takes longer than the step.
        """
        return [(own, own if own.is_contiguous() else own.detach().T) for own in self.model.parameters()]

    def begin(self, epoch: int, n_epochs: int, weights: Weights, noise: int) -> None:
        """Start an epoch whose training noise has the seed `noise`."""
        self.weights, device = weights, self.objective.device
        self.graphs.forget()  # which hold the weights of terms, the learning rate, and which masks are 0
        self.model.temperature.fill_(weights.temperature)
        for group in self.optimizer.param_groups:
            group["lr"] = weights.learning_rate * SLOWER**self.slower
        if self.sparsity is not None:  # a fit that starts sparse stays so
            self.sparsity.begin(epoch, n_epochs, 1.0 if self.objective.anchored else weights.sparsity)
            if self.ranks.size > 1:  # machines round differently, and a mask is 0 or not
                self.ranks.spread(self.model.decoder.state_dict().values())
            self.sparsity.mark()
        self.noise = torch.Generator(device).manual_seed(noise)
        # The same in every epoch and of every model, so that validation losses compare.
        self.validation_noise = torch.Generator(device).manual_seed(self.config.training.seed)
        self.terms: dict[str, Tensor] = {}
        self.validation_terms: dict[str, Tensor] = {}

    def learn(self, step: SplitStep, n_steps: int) -> None:
        """One of the epoch's steps of gradient descent."""
        drawn = self.noise.get_state()

        def descend(part: Step) -> dict[str, Tensor]:
            self.noise.set_state(drawn)  # the noise is drawn for the whole batch
            return self._gradients(self.objective(part, self.noise))

        terms = self._by_graph(step, n_steps)
        if terms is None:
            terms = self._descended(step.terms(self.model.zero_grad, descend), n_steps)
        for name, value in terms.items():  # added up on the device: no step waits for a number
            self.terms[name] = self.terms.get(name, 0.0) + value

    def _by_graph(self, step: SplitStep, n_steps: int) -> dict[str, Tensor] | None:
        """The step by a CUDA graph; None where there are none, and where memory runs out, before anything was changed."""
        if (whole := step.padded()) is None:
            return None
        try:
            # Noise is drawn outside: a graph would draw the same every time.
            draws = self.objective.draws(whole, self.noise)
            c, b = draws[0][0].shape[:2]  # of what is drawn a graph knows nothing
            inputs = replace(whole, whole=(c, b)), draws
            return self.graphs.run(inputs, lambda inputs: self._by_shape(inputs, n_steps))
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None

    def _by_shape(self, inputs: tuple[Step, Draws], n_steps: int) -> dict[str, Tensor]:
        self.model.zero_grad()
        return self._descended(self._gradients(self.objective.terms(*inputs)), n_steps)

    def _gradients(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the gradients of terms, and gives their values and their total."""
        total = weighted_total(terms, self.weights.terms)
        total.backward()  # type: ignore[no-untyped-call]
        return {name: value.detach() for name, value in {**terms, "total": total}.items()}

    def _descended(self, terms: dict[str, Tensor], n_steps: int) -> dict[str, Tensor]:
        """A step of the optimiser; the share that terms of a step have in the means of an epoch, in float64."""
        parameters = list(self.model.parameters())
        self.ranks.add_up([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.config.training.gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.training.gradient_norm)
        for own, view in self.views:
            if view is not own:
                view.grad = None if own.grad is None else own.grad.T
        self.optimizer.step()
        if self.sparsity is not None:
            self.sparsity.hold()
        return {name: value.double() / n_steps for name, value in terms.items()}

    @torch.no_grad()
    def validate(self, step: SplitStep, share: float) -> None:
        """Terms of validation cells, which are this share of all."""
        drawn = self.validation_noise.get_state()

        def judge(part: Step) -> dict[str, Tensor]:
            self.validation_noise.set_state(drawn)
            return self.objective(part, self.validation_noise)

        for name, term in step.terms(lambda: None, judge).items():
            self.validation_terms[name] = self.validation_terms.get(name, 0.0) + share * term.double()

    def end(self, epoch: int, n_epochs: int) -> bool:
        """Record an epoch, and keep its weights if they validate best; False, and neither, if a loss is not finite."""
        record = {"epoch": float(epoch), **self._summed(self.terms)}
        if self.validation_terms:
            # In float32, as in all versions: which epoch is kept goes by these numbers.
            found = self._summed({name: value.float().double() for name, value in self.validation_terms.items()})
            record |= {f"validation_{name}": value for name, value in found.items()}
            # Weighted as at the end of training, so that epochs compare.
            final = final_weights(self.config.model)
            record["validation_total"] = sum(final[name] * value for name, value in found.items() if final[name])
        record["temperature"] = self.weights.temperature
        if not all(math.isfinite(value) and abs(value) < EXPLODED for value in record.values()):
            return False
        self.history.append(record)
        # Without validation cells the last weights are kept: a training loss may not choose.
        judged = record.get("validation_total", -float(epoch))
        if settled(epoch, n_epochs, self.config.training) and judged < self.best_loss:
            self.best_epoch, self.best_loss = epoch, judged
            self.best_state = copy.deepcopy(self.model.state_dict())
        return True

    def slow_down(self, epoch: int) -> None:
        """A quarter of the learning rate from here on; ConvergenceError if that was done `MAX_SLOWER` times."""
        if self.slower == MAX_SLOWER:
            raise ConvergenceError(
                f"The loss is not finite in epoch {epoch + 1}, even with a learning rate {SLOWER**-MAX_SLOWER:.0f} times smaller.",
                "Lower the learning rate, or look for extreme values in the file.",
            )
        self.slower += 1

    def _summed(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Sums over ranks."""
        if not terms:
            return {}
        values = list(terms.values())
        self.ranks.add_up(values)
        # One wait for the device, not one each.
        return dict(zip(terms, torch.stack(values).cpu().tolist(), strict=True))

    def exhausted(self, epoch: int, n_epochs: int) -> bool:
        """Whether the patience had run out after `epoch`."""
        patience = self.config.training.patience
        return patience is not None and 0 <= self.best_epoch <= epoch - patience * n_epochs

    def keep_best(self) -> None:
        """Take the weights that validated best; the last ones if none did."""
        if self.best_epoch < 0:
            self.best_epoch, self.best_state = len(self.history) - 1, self.model.state_dict()
        self.model.load_state_dict(self.best_state)
        self.model.eval()

    def state(self) -> dict[str, Any]:
        """Everything that is needed to go on."""
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "history": self.history,
            "best_epoch": self.best_epoch, "best_loss": self.best_loss, "best_state": self.best_state,
            "slower": self.slower,
        }  # fmt: skip

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from `state`; the learning rate stays as low as it is."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.history, self.best_state = saved["history"], saved["best_state"]
        self.best_epoch, self.best_loss = saved["best_epoch"], saved["best_loss"]
        self.slower = max(self.slower, saved["slower"])
