"""Several processes that train one model, started by ``torchrun``: each computes a part of every step.

Every rank draws the whole step, its cells and its noise, as a single process would from the same seed, and computes the
pieces that are dealt to it. The cells of one perturbation stay whole on one rank, since the MMD is no sum over cells.
Weighted by their rank's share, the terms of the loss and their gradients add up to those of one process
(`crlseq.training.objective`). What only the first rank finds out (latents and graph to start from, a checkpoint) is sent
to the others as bytes that are read as checkpoints are: tensors and primitives, nothing executable.

A rank that fails writes so to the store that ``torchrun`` keeps; the first to fail prints why, and the others end with its
exit code. A rank that is lost without a word closes its connections, which ends the collective operations of the others
at once; between CUDA devices (NCCL) the signal ends them that torchrun then sends. A machine that is lost ends them after
`STEP_TIMEOUT`.
"""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from crlseq.errors import CrlseqError
from crlseq.storage.interrupts import INTERRUPTED

# torch is imported where there are ranks: a wrong option is refused without waiting for it.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup, Work
    from torch.distributed.distributed_c10d import Store

STEP_TIMEOUT = timedelta(minutes=10)  # for what all ranks do at the same time
WAIT_TIMEOUT = timedelta(days=2)  # for what the first rank does alone: discovery, analysis
POLL = 1e-4  # seconds between two looks at a sum of devices
# As torchrun sets it, NCCL would end the process itself once a rank is lost, without a word of ours.
ASYNC_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
NCCL_ALGORITHMS = "^NVLS"  # all but the one that adds in another order every time

T = TypeVar("T")


class LostRankError(CrlseqError):
    """Another process of the job is gone; what is needed to go on is on disk."""

    exit_code = INTERRUPTED

    def __init__(self, message: str) -> None:
        hint = "An unfinished fit goes on with the same command and --resume, on any number of ranks."
        super().__init__(message, hint)


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model, and which of them this is; `ALONE` is a single one, for which nothing is sent."""

    rank: int = 0
    size: int = 1
    local: int = 0  # its place among the processes of its machine
    on_machine: int = 1  # how many those are
    # "waiting", whose operations wait for what the first rank does alone, and "devices", in which CUDA devices exchange tensors
    groups: dict[str, ProcessGroup] = field(default_factory=dict)

    def on(self, device: torch.device) -> Ranks:
        """These ranks, which compute on devices like this one; all call it."""
        if self.size == 1 or device.type == "cpu":
            return self
        import torch.distributed as dist

        os.environ[ASYNC_ERRORS] = "0"
        os.environ.setdefault("NCCL_ALGO", NCCL_ALGORITHMS)
        self.groups["devices"] = dist.new_group(backend="nccl", timeout=STEP_TIMEOUT)
        return self

    def own(self, mask: np.ndarray) -> np.ndarray | None:
        """Pieces of a step, (C, B) cells that are there, which this rank computes; None for all of them."""
        return None if self.size == 1 else deal(mask.sum(1), self.size)[self.rank]

    def from_first(self, value: T) -> T:
        """The first rank's value, of tensors and primitives, on every rank; the others wait for it."""
        if self.size == 1:
            return value
        import torch

        buffer = io.BytesIO()
        if self.rank == 0:
            torch.save(value, buffer)
        length = torch.tensor([buffer.getbuffer().nbytes])
        self.spread([length])
        if self.rank == 0:
            self.spread([torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)])
            return value
        content = torch.zeros(int(length), dtype=torch.uint8)
        self.spread([content])
        found: T = torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True)
        return found

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the first rank's tensors, in place."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            with _lost_rank_reported():
                group = self.groups["devices" if tensor.is_cuda else "waiting"]
                if tensor.is_cuda:
                    _await(dist.broadcast(tensor, 0, group=group, async_op=True), group)
                else:
                    dist.broadcast(tensor, 0, group=group)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over ranks: laid end to end, in one operation."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _lost_rank_reported():
            if flat.is_cuda:
                group = self.groups["devices"]
                _await(dist.all_reduce(flat, group=group, async_op=True), group)
            else:
                dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = Ranks()


def deal(sizes: np.ndarray, n_ranks: int) -> list[np.ndarray]:
    """Pieces of so many cells to ranks: the largest left goes to the rank with the fewest cells; in order on each."""
    import numpy as np

    load = np.zeros(n_ranks, dtype=int)
    hands: list[list[int]] = [[] for _ in range(n_ranks)]
    for piece in np.argsort(-sizes, kind="stable"):
        rank = int(load.argmin())
        load[rank] += sizes[piece]
        hands[rank].append(int(piece))
    return [np.array(sorted(hand), dtype=int) for hand in hands]


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of the job that ``torchrun`` started; `ALONE` without it. For commands: it may end the process.

    The error of the rank that fails first is raised there; the others end silently with the same exit code.
    LostRankError if another rank is gone without a word, or the job is stopped.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://", timeout=STEP_TIMEOUT)))
    attempt = f"crlseq-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # torchrun keeps its store over restarts
    words = PrefixStore(attempt, store)
    own = PrefixStore("group", words)
    dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
    groups: dict[str, ProcessGroup] = {}
    try:
        local, on_machine = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        groups["waiting"] = dist.new_group(timeout=WAIT_TIMEOUT)
        yield (ranks := Ranks(rank, size, local, on_machine, groups))
        ranks.from_first(None)  # what the first rank still writes may fail as well
    except (Exception, KeyboardInterrupt) as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once the first of the ranks has ended
        code = _exit_code_of_first(error, words, rank)
        if code is not None:
            raise SystemExit(code) from None
        if isinstance(error, KeyboardInterrupt):
            raise LostRankError("Another rank was lost, or the job was stopped.") from None
        raise
    finally:
        dist.destroy_process_group()
        groups.clear()  # which ends their threads: one that still frees tensors when Python ends aborts the process


def _exit_code_of_first(error: BaseException, words: Store, rank: int) -> int | None:
    """The exit code of the rank that failed first and reports why; None if it is this one."""
    code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    try:
        first = json.loads(words.compare_set("failed", "", json.dumps({"rank": rank, "exit_code": code})))
    except RuntimeError:  # the store is gone with the process that kept it
        return None
    return None if first["rank"] == rank else int(first["exit_code"])


def _await(work: Work, group: ProcessGroup) -> None:
    """Wait for devices in Python: a wait inside NCCL hears no signal, such as torchrun's once a rank is lost."""
    end = time.monotonic() + STEP_TIMEOUT.total_seconds()
    try:
        while not work.is_completed():
            if time.monotonic() > end:
                raise LostRankError("Another rank was lost.")
            time.sleep(POLL)
        work.wait()  # which raises what the operation did
    except BaseException:
        # Else what is under way would keep the process from ending; torch 2.6 and later have it.
        if hasattr(group, "abort"):
            group.abort()
        raise


@contextmanager
def _lost_rank_reported() -> Iterator[None]:
    """Backends report a lost peer as a RuntimeError of their own wording."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError("Another rank was lost.") from error
