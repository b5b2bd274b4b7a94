"""A stream of its own for what is prepared ahead: copies and kernels of the next step run while this one computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """Makes things on a second stream of a device; on the CPU, where there are no streams, at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def made(self, make: Callable[[], Any]) -> tuple[Any, torch.cuda.Event | None]:
        """What ``make()`` gives, and the event after which it is there; see `take`."""
        if self.device.type == "cpu":
            return make(), None
        with torch.cuda.stream(self._stream):
            found, there = make(), torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record()
        return found, there


def take(made: Any, there: torch.cuda.Event | None) -> None:
    """Have this thread's stream wait until what was `made` aside is there, and keep its memory until the stream is done."""
    if there is None:
        return
    stream = torch.cuda.current_stream()
    stream.wait_event(there)
    for tensor in tensors_of(made):
        tensor.record_stream(stream)


def tensors_of(of: Any) -> Iterator[Tensor]:
    """All tensors in a tree of dataclasses, tuples and lists."""
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, tuple | list):
        for part in of:
            yield from tensors_of(part)
    elif is_dataclass(of):
        for field in fields(of):
            yield from tensors_of(getattr(of, field.name))
