"""Work on blocks of cells, here or on a cluster of machines (Dask): the same function of the same blocks in the same order,
so that sums over cells do not depend on who made their terms. What a lost worker was at is done again by another one.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from crlseq._version import __version__
from crlseq.errors import CrlseqError, InputError, UsageError, needs_extra
from crlseq.storage.interrupts import INTERRUPTED
from crlseq.threads import in_order, in_parallel, on_threads

Item = TypeVar("Item")
Made = TypeVar("Made")
ANSWER = 5  # seconds within which a scheduler and a first worker answer
AHEAD = 3  # blocks under way for each thread of the workers
MAX_WORKERS = 1024  # processes on this machine


class LostClusterError(CrlseqError):
    """Scheduler or workers are gone; what is needed to go on is on disk."""

    exit_code = INTERRUPTED

    def __init__(self, message: str) -> None:
        super().__init__(
            message, "The same command with --resume continues the unfinished work, with or without --cluster."
        )


class _Cluster:
    """A connected client, and what its workers have of the functions that they were last given."""

    def __init__(self, client: Any) -> None:
        self.client, self.known = client, dict[bytes, Any]()

    def shared(self, content: bytes) -> Any:
        """A function on all workers, as bytes: what fails when they are read fails in a task, and is told."""
        if content not in self.known or self.known[content].status != "finished":
            self.known = {content: self.client.scatter(content, broadcast=True, hash=False)}
        return self.known[content]


_cluster: ContextVar[_Cluster | None] = ContextVar("cluster", default=None)


def on_one_machine() -> bool:
    """Whether `mapped` computes in this process."""
    return _cluster.get() is None


def mapped(function: Callable[[Item], Made], items: Iterable[Item], threads: int = 1) -> Iterator[Made]:
    """``function(item)`` of each item in order: on the cluster, else on so many threads (`crlseq.threads.in_parallel`).

    For a cluster the function is one of a module, or a `functools.partial` of one, and items hold no more than they need.
    """
    cluster = _cluster.get()
    if cluster is None:
        yield from in_parallel(function, items, threads)
        return
    client = cluster.client

    def submit(item: Item) -> Callable[[], Made]:
        future = client.submit(_made, cluster.shared(content), item, pure=False)

        def result() -> Made:
            try:
                made: Made = future.result()
            except CancelledError:  # of a worker that was lost with what no other one had
                if client.status != "running":
                    raise
                made = client.submit(_made, content, item, pure=False).result()
            return made

        return result

    content = pickle.dumps(function)
    with _told():
        yield from in_order(submit, items, AHEAD * max(sum(client.nthreads().values()), 1))


def _made(content: bytes, item: Any) -> Any:
    """On a worker: on one thread, as each of several threads of one machine computes."""
    with on_threads(1):
        return pickle.loads(content)(item)


@contextmanager
def on_cluster(where: str | None) -> Iterator[None]:
    """What is `mapped` within is computed by the workers of a Dask scheduler, or by so many processes of this machine.

    ``where`` is ``tcp://HOST:PORT`` or a number; None changes nothing. UsageError without Dask, or for what is neither;
    InputError if the scheduler or its workers do not answer, or have another version of crlseq.
    """
    if where is None:
        yield
        return
    if not where.isdigit() and "://" not in where:
        message = f"{where!r} is neither the address of a Dask scheduler nor a number of processes."
        raise UsageError(message, "Write --cluster tcp://HOST:8786, or --cluster 4 for four processes here.")
    if where.isdigit() and not 1 <= int(where) <= MAX_WORKERS:
        raise UsageError(f"{where} processes cannot be started.", f"Ask for 1 to {MAX_WORKERS}.")
    try:
        import dask
        import distributed  # noqa: F401
    except ModuleNotFoundError:
        raise needs_extra("--cluster", "distributed", "cluster") from None
    for name in ("distributed", "distributed.client"):  # what there is to say, we say
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with ExitStack() as opened:
        opened.enter_context(dask.config.set({"distributed.comm.timeouts.connect": ANSWER}))
        token = _cluster.set(_Cluster(_client(where, opened)))
        try:
            yield
        finally:
            _cluster.reset(token)


def _client(where: str, opened: ExitStack) -> Any:
    from distributed import Client, LocalCluster

    hint = "Start it with `dask scheduler`, and workers on every machine with `dask worker ADDRESS`, where crlseq is installed."
    address: Any = where
    if where.isdigit():
        address = opened.enter_context(
            LocalCluster(
                n_workers=int(where), threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=":0",
                silence_logs=logging.CRITICAL,
            )
        )  # fmt: skip
    else:
        try:
            with ThreadPoolExecutor(1) as pool:  # a notebook has an event loop in its own thread
                pool.submit(asyncio.run, _greet(where)).result()
        except Exception as error:  # whatever a server of another kind answers makes of Dask's reader
            raise InputError(f"No Dask scheduler answers at {where}.", hint) from error
    client = opened.enter_context(Client(address, timeout=ANSWER, set_as_default=False))
    try:
        client.wait_for_workers(1, timeout=ANSWER)
    except TimeoutError:
        raise InputError(f"The Dask scheduler at {where} has no workers.", hint) from None
    try:
        versions = set(client.run(_version).values())
    except ModuleNotFoundError as error:
        raise InputError(
            f"Workers of {where} lack a package ({error}).", "Install the same crlseq everywhere."
        ) from None
    if versions != {__version__}:
        others = ", ".join(sorted(versions - {__version__}))
        raise InputError(f"Workers of {where} have crlseq {others}, not {__version__}.", "Install the same everywhere.")
    return client


async def _greet(address: str) -> None:
    from distributed.comm import connect

    await (await connect(address, timeout=ANSWER)).close()


def _version() -> str:
    return __version__


@contextmanager
def _told() -> Iterator[None]:
    """A cluster that is lost is an error of ours."""
    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    try:
        yield
    except KilledWorker:
        raise LostClusterError("Worker after worker was lost over the same block of cells.") from None
    except (CancelledError, CommClosedError, TimeoutError) as error:
        raise LostClusterError("The cluster was lost.") from error
