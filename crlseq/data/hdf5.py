"""What a stranger's file may hold and a reader must not follow: other files, circles, endless heaps, false sizes."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import zarr

from crlseq.errors import InputError

HEAP = b"GCOL\1"  # signature and version
WINDOW = 1 << 26  # bytes that are searched at a time; a multiple of a page
HEAP_SIZE, OBJECT = struct.Struct("<8xQ"), struct.Struct("<H6xQ")  # index and size of an object
EXPANSION, SMALL = 1100, 1 << 26  # deflate's limit is 1,032; and bytes that do no harm
DAMAGED = "It is damaged; copy or download it again."


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The file, to be read; InputError if it cannot be opened, takes data from elsewhere, has a group within itself, or a
    heap that never ends.
    """
    try:
        handle = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error}.", "It may be cut short; copy it again.") from None
    with handle:
        if handle.id.get_create_plist().get_sizes() == (8, 8):  # as everybody writes them
            _refuse_endless_heaps(path, _state_of(path))
        _refuse_odd_links(handle, path)
        yield handle


def refuse_claims(element: Any, path: Path) -> None:
    """Refuse a file or store that says it holds over `EXPANSION` times its size, before room is made for it."""
    arrays: list[Any] = [element] if hasattr(element, "nbytes") else []
    if isinstance(element, h5py.Group):
        element.visititems(lambda name, item: arrays.append(item) if isinstance(item, h5py.Dataset) else None)
    elif isinstance(element, zarr.Group):
        arrays += [item for _, item in element.members(max_depth=None) if isinstance(item, zarr.Array)]
    size = sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size
    claimed = sum(int(array.nbytes) for array in arrays)
    if claimed > EXPANSION * size + SMALL:
        raise InputError(f"{path} has {size} bytes and claims to hold {claimed}.", DAMAGED)


def refuse_values_for_groups(screen: Any, path: Path) -> None:
    """Refuse a file with a value in the place of a group that results are added to, long after this."""
    for slot in ("obsm", "varm", "uns"):
        there = screen.get(slot, {})
        if isinstance(there, h5py.Dataset) and there.dtype.names is None:
            raise InputError(f"{path} has a value where the group {slot} belongs.", "It is damaged; write it again.")


def _state_of(path: Path) -> tuple[int, ...]:
    """What differs once a file was replaced or written to."""
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


@lru_cache(maxsize=8)
def _refuse_endless_heaps(path: Path, state: tuple[int, ...]) -> None:
    """Once for each `state` of a file, for the whole of it is searched: a fit opens its screen several times.

    HDF5 steps through a global heap, which holds texts, by the sizes of its objects: by 0 it goes on for ever.

    An object takes its header (16 bytes) and its size in multiples of 8; free space, index 0, its size alone
    (HDF5 File Format Specification, III.E).
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for heaps in _overlapping(_heaps(content)):
            seen = set[int]()
            # From the one that ends last on: where another one has been before, it was on its way to no earlier end.
            for start, end in sorted(heaps, key=lambda heap: -heap[1]):
                place = start + HEAP_SIZE.size
                while place + OBJECT.size <= end and place not in seen:
                    if len(heaps) > 1:
                        seen.add(place)
                    index, length = OBJECT.unpack_from(content, place)
                    step = (OBJECT.size + (length + 7) // 8 * 8 if index else length) % 2**64
                    if step == 0:
                        raise InputError(f"{path} has a text heap that never ends.", DAMAGED)
                    place += step


def _heaps(content: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Start and end of what has the signature of a heap, by start; what was read of the file is not kept in memory."""
    for begin in range(0, len(content), WINDOW):
        end = begin + WINDOW + len(HEAP) - 1
        start = content.find(HEAP, begin, end)
        while start >= 0:
            if start + HEAP_SIZE.size <= len(content):
                yield start, min(start + HEAP_SIZE.unpack_from(content, start)[0], len(content))
            start = content.find(HEAP, start + 1, end)
        content.madvise(mmap.MADV_DONTNEED, begin, min(WINDOW, len(content) - begin))


def _overlapping(heaps: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Heaps that overlap, together. Whole files have none; in a strange one each place is looked at once."""
    group, reach = list[tuple[int, int]](), 0
    for start, end in heaps:
        if group and start >= reach:
            yield group
            group, reach = [], 0
        group.append((start, end))
        reach = max(reach, end)
    if group:
        yield group


def _refuse_odd_links(handle: h5py.File, path: Path) -> None:
    """HDF5 can take data from any file that the user may read, and readers go round in a group within itself.

    Soft links are followed once it is known that none can lead to another file.
    """
    around, seen, soft = set[int](), set[int](), list[str]()  # addresses of the groups that we are in, and of all

    def look(name: str, item: Any, follow: bool) -> None:
        if isinstance(item, h5py.Dataset):
            # A virtual one may take its values from others of the same file, and these from it: HDF5 then crashes.
            _refuse_outside(bool(item.external or item.is_virtual), path, name)
        if not isinstance(item, h5py.Group):
            return
        address = h5py.h5o.get_info(item.id).addr
        if address in around:
            raise InputError(f"{path} has a group {name!r} that lies within itself.", "Write it again with anndata.")
        if address in seen:
            return
        seen.add(address)
        around.add(address)
        for child in item:
            link, place = item.get(child, getlink=True), f"{name}/{child}".lstrip("/")
            _refuse_outside(isinstance(link, h5py.ExternalLink), path, name)
            if isinstance(link, h5py.HardLink):
                look(place, item[child], follow)
                continue
            soft.append(place)
            with suppress(KeyError, OSError, RuntimeError):  # it may lead nowhere
                if follow:
                    look(place, item[child], follow)
        around.remove(address)

    look("/", handle, follow=False)
    if soft:
        seen.clear()
        look("/", handle, follow=True)


def _refuse_outside(elsewhere: bool, path: Path, name: str) -> None:
    if elsewhere:
        raise InputError(f"{path} reads {name!r} from another file or array.", "Write it again with anndata.")
