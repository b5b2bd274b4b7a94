"""How many threads to compute on, what is made ahead in one of them, and how far a long computation is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain, islice
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Made = TypeVar("Made")
Report = Callable[[int, int], None]  # called with how much is done, and of how much
_report: ContextVar[Report | None] = ContextVar("report", default=None)


@contextmanager
def on_threads(n: int) -> Iterator[None]:
    """Compute on ``n`` threads: small matrices are done twice as fast by one, for which no other has to wake."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """OpenBLAS on one thread, unless ``OPENBLAS_NUM_THREADS`` says otherwise: its threads spin where cores are taken.

    What numpy computes here is small, or divided among threads. Commands say so before numpy loads; a notebook cannot.
    """
    if "OPENBLAS_NUM_THREADS" in os.environ:
        yield
        return
    with ThreadpoolController().select(internal_api="openblas").limit(limits=1):
        yield


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """``make(item)`` of each item in order, the next one in a thread of its own while this one is used.

    That thread takes one of those torch may use, and leaves the rest to the caller; where there is one, nothing is
    made ahead. What `make` raises is raised where its result would have come.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.set_num_threads, 1).result()  # each thread has a number of its own
        with on_threads(threads - 1):
            following = None
            for item in items:
                current, following = following, pool.submit(make, item)
                if current is not None:
                    yield current.result()
            if following is not None:
                yield following.result()


def in_parallel(make: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
    """``make(item)`` of each item in order, as many at the same time as there are threads, each on one of its own.

    A single item is made by the caller, on as many threads as it has.
    """
    items = iter(items)
    first = [*islice(items, 2)]
    items = chain(first, items)
    if threads == 1 or len(first) == 1:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool, on_threads(1):
        yield from in_order(lambda item: pool.submit(make, item).result, items, 2 * threads)


def in_order(submit: Callable[[Item], Callable[[], Made]], items: Iterable[Item], ahead: int) -> Iterator[Made]:
    """What is made of the items, in their order: ``submit`` begins one, and what it returns waits for the end.

    At most `ahead` more are begun than were asked for, so that no more items and results than that are held.
    """
    waiting = deque[Callable[[], Made]]()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


@contextmanager
def reporting(report: Report) -> Iterator[None]:
    """Loops over `counted` items within, in this thread, report to `report`."""
    before = _report.get()
    _report.set(report)
    try:
        yield
    finally:
        _report.set(before)


def counted(items: Iterable[Item], total: int, start: int = 0) -> Iterator[Item]:
    """The items, each of which is reported as done when the next one is asked for: ``start + 1`` of `total` and so on.

    Loops within this one report nothing: how far it is, it says itself.
    """
    report = _report.get()
    if report is None:
        yield from items
        return

    def silent(done: int, total: int) -> None:
        pass

    _report.set(silent)
    try:
        for i, item in enumerate(items, start + 1):
            yield item
            report(i, total)
    finally:
        if _report.get() is silent:  # else this one was left, and whoever listened is gone
            _report.set(report)
