"""How many threads to compute on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_threads(n: int) -> Iterator[None]:
    """Compute on ``n`` threads: small matrices are done twice as fast by one, for which no other has to wake."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
