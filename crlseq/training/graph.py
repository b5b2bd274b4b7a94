"""Steps of one shape as a CUDA graph: a step's launches, hundreds of them, become one.

A shape is computed as usual the first time it comes, which also loads what CUDA loads late; the second time its launches are
written down, and from then on its tensors are copied to where those launches read, and all are made at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from crlseq.training.streams import tensors_of

Terms = dict[str, Tensor]

# Whether steps on CUDA are computed by graphs. Not until a GPU has shown that they are right and faster, which
# `scripts/benchmark_gpu.py` asks of one.
ON = False


class StepGraphs:
    """Graphs of steps by shape, until `forget` is called since something that is no tensor has changed.

    Where CUDA refuses, `note` gets a sentence, and every step is computed as usual from there on.
    """

    def __init__(self) -> None:
        self.note: Callable[[str], None] = lambda text: None
        self.refused = False
        self._pool: Any = None
        self._seen: set[Any] = set()
        self._graphs: dict[Any, tuple[Any, Callable[[], Terms]]] = {}

    def forget(self) -> None:
        """Write down anew from here on."""
        self._seen, self._graphs = set(), {}

    def run(self, inputs: Any, act: Callable[[Any], Terms]) -> Terms:
        """``act(inputs)``, by a graph where there is one; what it gives is overwritten by the next step."""
        key = _shape(inputs)
        if self.refused or key not in self._seen:
            self._seen.add(key)
            return act(inputs)
        if key not in self._graphs:
            static = _like(inputs)
            try:
                self._graphs[key] = static, self._captured(lambda: act(static))
            except RuntimeError as error:
                self.refused = True
                self.forget()
                said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
                self.note(f"Steps are computed without CUDA graphs: CUDA says {said!r}.")
                return act(inputs)
        static, replay = self._graphs[key]
        torch._foreach_copy_([*tensors_of(static)], [*tensors_of(inputs)])
        return replay()

    def _captured(self, act: Callable[[], Terms]) -> Callable[[], Terms]:
        if self._pool is None:  # one for all graphs, of which one is computed at a time; it outlives them
            self._pool = torch.cuda.MemPool()
        return captured(act, self._pool.id)


def captured(act: Callable[[], Terms], pool: Any) -> Callable[[], Terms]:
    """A graph of what ``act()`` launches, which is not done yet; another thread may go on preparing steps meanwhile."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            found = act()
        except BaseException:
            with suppress(RuntimeError):  # a capture that failed cannot be ended
                graph.capture_end()
            raise
        graph.capture_end()

    def replay() -> Terms:
        graph.replay()
        return found

    return replay


def _shape(of: Any) -> Any:
    """What makes two steps one graph: the shapes of tensors, and all that is no tensor."""
    if isinstance(of, Tensor):
        return tuple(of.shape)
    if is_dataclass(of):
        return tuple(_shape(getattr(of, field.name)) for field in fields(of))
    return tuple(map(_shape, of)) if isinstance(of, tuple | list) else of


def _like(of: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(of, Tensor):
        return of.clone()
    if is_dataclass(of) and not isinstance(of, type):
        return type(of)(**{field.name: _like(getattr(of, field.name)) for field in fields(of)})
    return type(of)(map(_like, of)) if isinstance(of, tuple | list) else of
