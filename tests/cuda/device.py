"""A CUDA device that is not there: tensors that say ``cuda:0``, hold real values on the CPU, and refuse what CUDA refuses.

Inside ``with fake_cuda() as record:`` torch finds CUDA devices, and a fit with ``device="cuda"`` runs on the first of them,
on a machine without a GPU and on torch for CPUs. Every operation on a tensor of the device goes through `_run`, which
raises `DeviceError` where CUDA would (devices or generators mixed, no kernel, rules of kernels that CPUs do not have) and
where CUDA would add up floats by atomics, thus in another order every time. `Record` counts launches, copies between
host and device, and waits of the host. Kernels of CUDA do not run: races, rounding, memory and speed stay unseen.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.cuda.rules import CROSSING, DeviceError, aten, count, refuse

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
INNER = torch.device("lazy", 0)  # for torch's C++: autograd asks for streams of CUDA, which torch for CPUs has not
GIB = 1 << 30

_THREAD = threading.local()


class Stream:
    """Operations of one stream are done in their order, those of two in any: what one reads of another it has to wait for.

    `clock` is how many operations it was given, `done` how many the host knows to be done, and `seen` how many of other
    streams are done before its next one.
    """

    def __init__(self, device: Any = None) -> None:
        self.clock, self.done, self.seen = 0, 0, dict[Stream, int]()
        RECORD.streams.append(self)

    def wait_event(self, event: Event) -> None:
        assert event.of is not None
        stream, clock = event.of
        self.seen[stream] = max(self.seen.get(stream, 0), clock)


class Event:
    """A place in the order of a stream."""

    of: tuple[Stream, int] | None = None

    def record(self) -> None:
        self.of = current_stream(), current_stream().clock


def current_stream(device: Any = None) -> Stream:
    """This thread's; all threads start on the first."""
    if not RECORD.streams:
        Stream()
    return getattr(_THREAD, "stream", None) or RECORD.streams[0]


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    before, _THREAD.stream = getattr(_THREAD, "stream", None), stream
    try:
        yield
    finally:
        _THREAD.stream = before


def synchronize(device: Any = None) -> None:
    """All that was asked for is done: whichever stream may read it."""
    RECORD.add(RECORD.waits, "synchronize")
    for stream in RECORD.streams:
        stream.done = stream.clock


def _check_order(reads: list[Any], writes: list[Any]) -> None:
    """DeviceError where a stream reads what another may not have written yet, or may give back too early."""
    stream = current_stream()
    addresses = {x.elem.untyped_storage().data_ptr() for x in reads if x.numel()}
    for block in (RECORD.blocks[each] for each in addresses if each in RECORD.blocks):
        if block.writer is not stream and max(block.writer.done, stream.seen.get(block.writer, 0)) < block.written:
            raise DeviceError("a stream reads what another may not have written yet")
        if block.owner is not stream and stream not in block.users and block.owner.done < block.made:
            raise DeviceError("memory may be given back while another stream reads it")
    stream.clock += 1
    for address in {x.untyped_storage().data_ptr() for x in writes if x.numel()}:
        if address not in addresses or address not in RECORD.blocks:
            RECORD.blocks[address] = Block(stream, stream.clock, stream, stream.clock)
        RECORD.blocks[address].writer, RECORD.blocks[address].written = stream, stream.clock


@dataclass
class Tape:
    """Operations that a graph is written down from, with their numbers and shapes, and the memory that they read."""

    done: list[Any] = field(default_factory=list)
    made: set[int] = field(default_factory=set)
    outside: set[int] = field(default_factory=set)

    def add(self, func: Any, args: Any, kwargs: Any, reads: list[Any], writes: list[Any]) -> None:
        """One operation."""
        flat = tree_flatten((args, kwargs))[0]
        self.done.append((str(func), [tuple(x.shape) if isinstance(x, torch.Tensor) else str(x) for x in flat]))
        self.outside |= {x.elem.untyped_storage().data_ptr() for x in reads if x.numel()} - self.made
        self.made |= {x.untyped_storage().data_ptr() for x in writes if x.numel()} - self.outside


def captured(act: Callable[[], Any], pool: Any) -> Callable[[], Any]:
    """A graph: it does the operations again, with the numbers and the memory of the first time, or raises DeviceError."""
    first, found = None, dict[str, Any]()

    def replay() -> Any:
        nonlocal first
        RECORD.tape, before, launches = Tape(), RECORD.totals(), RECORD.launches.copy()
        try:
            again, tape = act(), RECORD.tape
        finally:
            RECORD.tape = None
        if RECORD.totals()[1:] != before[1:]:
            raise DeviceError("operation not permitted when stream is capturing")
        RECORD.launches = launches + Counter({"graph": 1})
        if first is not None and (tape.done, tape.outside) != (first.done, first.outside):
            raise DeviceError("what a graph was written down from has changed")
        first = first or tape
        for name, value in again.items():
            found.setdefault(name, value).elem.copy_(value.elem)
        return found

    return replay


@dataclass
class Block:
    """Memory: the stream that it is of and since when, the last that wrote to it, and those it was lent to."""

    owner: Stream
    made: int
    writer: Stream
    written: int
    users: set[Stream] = field(default_factory=set)


@dataclass
class Record:
    """What happened on the device; places are lines of the product, where they are asked for."""

    launches: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)  # "up" and "down"
    waits: Counter[str] = field(default_factory=Counter)
    at: Counter[tuple[str, str]] = field(default_factory=Counter)  # (what, file:line)
    with_places: bool = False
    blocks: dict[int, Block] = field(default_factory=dict)  # by address
    streams: list[Stream] = field(default_factory=list)
    tape: Tape | None = None
    lock: Any = field(default_factory=threading.Lock)

    def add(self, counter: Counter[str], what: str, n: int = 1) -> None:
        """Count something, and where."""
        if not n:
            return
        counter[what] += n
        if self.with_places:
            lines = (frame for frame in reversed(traceback.extract_stack()) if "/crlseq/" in frame.filename)
            place = next((f"{each.filename.split('/crlseq/')[-1]}:{each.lineno}" for each in lines), "torch")
            self.at[what, place] += n

    def totals(self) -> tuple[int, int, int]:
        """Launches, copies and waits so far."""
        return self.launches.total(), self.copies.total(), self.waits.total()


RECORD = Record()


class CudaTensor(torch.Tensor):
    """Says ``cuda:0``; its values are `elem`, on the CPU."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> CudaTensor:
        shape, stride, offset = elem.size(), elem.stride(), elem.storage_offset()
        made = torch.Tensor._make_wrapper_subclass(cls, shape, stride, offset, dtype=elem.dtype, device=INNER)
        made.elem = elem.detach()
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def record_stream(self, stream: Any) -> None:
        with RECORD.lock:
            RECORD.blocks[self.elem.untyped_storage().data_ptr()].users.add(stream)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"CudaTensor({self.elem})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = CudaTensor(torch.empty_strided(self.size(), self.stride(), dtype=self.dtype).copy_(self.elem))
        _check_order([self], [copied.elem])
        memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:  # as ``map_location="cpu"`` reads it back
        return self.elem.__reduce_ex__(protocol)


class Mode(TorchDispatchMode):
    """Inside it this thread's factories and copies reach the device as well, which have no tensor of it among arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __enter__(self) -> Mode:
        self.outermost = not getattr(_THREAD, "inside", False)
        if self.outermost:
            _THREAD.inside = True
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is then a copy
            super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.outermost:
            super().__exit__(*error)
            torch._C._set_only_lift_cpu_tensors(False)
            _THREAD.inside = False


_OF: dict[int, torch.device] = {}  # devices of generators by address: torch hands on another object


class _Generator(torch.Generator):
    """Generators of both devices, which draw the same: that of the CPU."""

    def __new__(cls, device: Any = CPU) -> _Generator:
        made = super().__new__(cls)
        _OF[made._cdata] = torch.device(device)
        return made

    def __init__(self, device: Any = CPU) -> None:
        super().__init__()

    def __del__(self) -> None:  # another generator may come to lie at its address
        _OF.pop(self._cdata, None)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _OF[self._cdata]


REAL_GENERATOR = _Generator.__base__


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: what CUDA would refuse is refused; else it is done on the CPU, and counted."""
    flat = tree_flatten((args, kwargs))[0]
    ours = [x for x in flat if isinstance(x, CudaTensor)]
    theirs = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor)]
    generators = {_OF.get(x._cdata, CPU).type for x in flat if isinstance(x, REAL_GENERATOR)}
    asked = kwargs.get("device")
    to_cuda = asked is not None and torch.device(asked).type in ("cuda", "lazy")
    if not ours and not to_cuda:
        if "cuda" in generators:
            raise DeviceError(f"{func}: Expected a 'cpu' device type for generator but found 'cuda'")
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    if func is aten._to_copy.default and ours and to_cuda and kwargs.get("dtype") in (None, ours[0].dtype):
        return CudaTensor(ours[0].elem)  # is there already
    if "cpu" in generators:
        raise DeviceError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
    if func not in CROSSING and func.namespace == "aten":
        refuse(RECORD, func, name, args, ours, theirs)
    on_cuda = isinstance(args[0], CudaTensor) if func is aten.copy_.default else to_cuda or asked is None
    inner_args, inner_kwargs = tree_map_only(CudaTensor, lambda x: x.elem, (args, kwargs))
    if asked is not None:
        inner_kwargs["device"] = CPU
    inner_kwargs.pop("pin_memory", None)
    found = func(*inner_args, **inner_kwargs)
    with RECORD.lock:
        count(RECORD, func, name, args, kwargs, ours, theirs, on_cuda, found)
        writes = [x for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor)] if on_cuda else []
        _check_order(ours, writes)
        if RECORD.tape is not None:
            RECORD.tape.add(func, args, kwargs, ours, writes)
    if func is aten.copy_.default:
        return args[0]
    if not on_cuda:
        return found
    same = {id(x.elem): x for x in ours}
    return tree_map_only(torch.Tensor, lambda x: same[id(x)] if id(x) in same else CudaTensor(x), found)


def _pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    copied = tensor.clone()
    copied.pinned = True  # type: ignore[attr-defined]
    return copied


def _in_mode(inner: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with Mode():
            return inner(*args, **kwargs)

    return inside


@contextmanager
def fake_cuda(memory: int = 100 * GIB, devices: int = 1, places: bool = False) -> Iterator[Record]:
    """Devices of so much free `memory`; `places` has the record name lines of the product, which is slow."""
    global RECORD
    from crlseq import threads
    from crlseq.pipeline import fit
    from crlseq.training import cell_source, device, graph, memory_split, trainer

    make_ahead = threads.ahead
    before, RECORD = RECORD, Record(with_places=places)
    of_cuda = {
        "is_available": lambda: True, "init": lambda: None, "_lazy_init": lambda: None,
        "device_count": lambda: devices, "current_device": lambda: 0, "set_device": lambda device: None,
        "empty_cache": lambda: None, "mem_get_info": lambda device=None: (memory, 140 * GIB),
        "MemPool": mock.MagicMock, "Stream": Stream, "Event": Event, "stream": on_stream, "current_stream": current_stream, "synchronize": synchronize,
        "get_device_name": lambda device=None: "NVIDIA H100", "get_device_capability": lambda device=None: (9, 0),
    }  # fmt: skip
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for name, value in of_cuda.items():
            put(torch.cuda, name, value)
        put(torch, "Generator", _Generator)
        put(graph, "captured", captured)
        put(cell_source, "ROWS", 128)  # small screens are sent in several blocks as well
        put(torch.Tensor, "pin_memory", _pinned)
        for module in (trainer, memory_split):
            put(module, "ahead", lambda make, items: make_ahead(_in_mode(make), items))
        for module in (trainer, fit):
            put(module, "fit_model", _in_mode(module.fit_model))
        put(device, "_error_of", _in_mode(device._error_of))
        for module in (torch.utils._foreach_utils, torch.nn.utils.clip_grad):
            put(module, "_has_foreach_support", lambda tensors, device: True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters of another type are made anew
        try:
            yield RECORD
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
            RECORD = before
