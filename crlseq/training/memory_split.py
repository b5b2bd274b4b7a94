"""Steps that are computed in parts once memory has run out.

The terms of a part are its share of the step's (`crlseq.training.objective`), so that the gradients of the parts add up
to those of the step: the same batch, the same noise and the same optimisation, to rounding, in less memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from crlseq.data.batches import BatchIndex
from crlseq.threads import ahead
from crlseq.training import graph
from crlseq.training.distributed import Ranks, deal
from crlseq.training.memory import ShortOfMemoryError, out_of_memory
from crlseq.training.objective import Objective, Step
from crlseq.training.streams import SideStream, take

Terms = dict[str, Tensor]

KEPT = 0.1  # of a device's free memory


class SplitSteps:
    """Steps in `n` parts each: one, and twice as many whenever memory runs out, of which `note` gets a sentence."""

    def __init__(self, objective: Objective, ranks: Ranks, note: Callable[[str], None]) -> None:
        self.objective, self.ranks, self.note = objective, ranks, note
        self.n = 1
        self.padded = graph.ON and objective.device.type == "cuda" and ranks.size == 1
        self._aside = SideStream(objective.device)
        self._kept: list[SplitStep] | None = None
        self._lock = threading.Lock()  # models of an ensemble are trained at the same time

    def prepare(self, batch: BatchIndex, learned: bool = False) -> SplitStep:
        """What a batch asks of the screen: at once where it is computed whole, else part by part as it is used. What is
        `learned` from comes in few shapes where steps are graphs.
        """
        whole = there = None
        if self.n == 1:
            try:
                own = self.ranks.own(batch.mask)
                padded = self.padded and learned and own is None
                whole, there = self._aside.made(lambda: self.objective.prepare(batch, own, padded))
            except Exception as error:
                if not out_of_memory(error):
                    raise
            if whole is None:
                self.divide(1, batch)
        return SplitStep(self, batch, whole, there)

    def prepared_once(self, batches: list[BatchIndex]) -> Iterator[SplitStep]:
        """Steps of the same batches every time: on CUDA they are kept where that takes at most `KEPT` of the free memory."""
        if self._kept is not None and self.n == 1:
            return iter(self._kept)
        self._kept, device = None, self.objective.device
        if device.type == "cpu" or self.n > 1:
            return ahead(self.prepare, batches)
        cells = sum(2 * batch.mask.size for batch in batches)
        size = cells * self.objective.source.data.n_genes * self.objective.dtype.itemsize
        if size > KEPT * torch.cuda.mem_get_info(device)[0]:
            return ahead(self.prepare, batches)
        steps = list(ahead(self.prepare, batches))
        self._kept = steps if self.n == 1 else None
        return iter(steps)

    def conditions(self, batch: BatchIndex, n: int) -> list[np.ndarray | None]:
        """Those of each part, among those that this rank computes; None for all."""
        own = self.ranks.own(batch.mask)
        if n == 1:
            return [own]
        own = np.arange(len(batch.mask)) if own is None else own
        return [own[part] for part in deal(batch.mask[own].sum(1), min(n, max(len(own), 1)))]

    def divide(self, n: int, batch: BatchIndex) -> None:
        """Twice as many parts as the `n` that memory did not suffice for, unless another thread has done so.

        ShortOfMemoryError if a part is a single condition already.
        """
        with self._lock:
            self._kept = None
            if self.objective.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.n > n:
                return
            own = self.ranks.own(batch.mask)
            if n >= len(batch.mask if own is None else own):
                hint = "Lower --batch-size or --n-top-genes and fit again, or use --resume on a larger machine."
                raise ShortOfMemoryError("There is not enough memory for a step of one perturbation.", hint)
            self.n = 2 * n
            now = f"from now on each is computed in {self.n} parts, with the same result up to rounding"
            self.note(f"There is not enough memory for a step; {now}.")


class SplitStep:
    """One step, whole or in parts; several models may compute its terms."""

    def __init__(
        self, steps: SplitSteps, batch: BatchIndex, whole: Step | None, there: torch.cuda.Event | None
    ) -> None:
        self.steps, self.batch, self.whole, self.there = steps, batch, whole, there

    def padded(self) -> Step | None:
        """The step, where it is computed whole and has a shape that comes again."""
        if self.whole is None or self.steps.n > 1 or not self.steps.padded:
            return None
        take(self.whole, self.there)
        return self.whole

    def terms(self, begin: Callable[[], None], of: Callable[[Step], Terms]) -> Terms:
        """The sums over parts of what ``of(part)`` gives; where memory runs out from ``begin()`` on, in smaller parts."""
        while True:
            n = self.steps.n
            try:
                begin()
                return _sum(of(part) for part in self._parts(n))
            except Exception as error:  # which holds what was computed until the block ends
                if not out_of_memory(error):
                    raise
            begin()
            self.whole = None
            self.steps.divide(n, self.batch)

    def _parts(self, n: int) -> Iterator[Step]:
        if n == 1 and self.whole is not None:
            take(self.whole, self.there)
            yield self.whole
        else:
            for own in self.steps.conditions(self.batch, n):
                yield self.steps.objective.prepare(self.batch, own)


def _sum(found: Iterator[Terms]) -> Terms:
    total = next(found)
    for terms in found:
        total = {name: total[name] + value for name, value in terms.items()}
    return total
