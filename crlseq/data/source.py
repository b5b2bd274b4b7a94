"""What tells one input from another: digests of its bytes, and what changes when a file is written to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import anndata as ad
import numpy as np

from crlseq.data.dataset import PerturbSeqData
from crlseq.data.store import files_of, read_manifest, verify
from crlseq.errors import InputError
from crlseq.storage.files import refuse_special

State = list[tuple[str, int, int, int, int]]


def state_of(source: str | Path | ad.AnnData) -> State:
    """What differs if a file was written to or replaced; nothing for an AnnData in memory."""
    if isinstance(source, ad.AnnData):
        return []
    path = Path(source)
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        about = [(str(file), file.stat()) for file in files if file.exists()]
    except OSError as error:  # a folder on the way may not be searched
        raise InputError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from None
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in about]


def content_of(data: PerturbSeqData) -> str:
    """Digest of cells in memory, as they are fitted."""
    x = data.x
    parts = [x] if isinstance(x, np.ndarray) else [getattr(x, name) for name in ("data", "indices", "indptr")]
    digest = hashlib.sha256(
        "\n".join([*data.genes, *data.condition_names, *data.cell_names]).encode(errors="surrogatepass")
    )
    for part in (*parts, data.condition, data.split, data.batch, *(column.values for column in data.covariates)):
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def digest_of(source: str | Path | ad.AnnData) -> str:
    """Digest of the input's bytes; of all files of a zarr store by path; empty for an AnnData in memory.

    InputError if a file cannot be read, or a prepared store is not what was written.
    """
    if isinstance(source, ad.AnnData):
        return ""
    path = Path(source)
    if read_manifest(path) is not None:
        return verify(path)
    refuse_special(path)
    digest = hashlib.sha256()
    for file in files_of(path):
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        try:
            with file.open("rb") as handle:
                hashlib.file_digest(handle, lambda: digest)
        except FileNotFoundError:
            raise InputError(f"There is no file {path}.", "Check the path.") from None
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}.", "Check its permissions.") from None
    return digest.hexdigest()


def refuse_changed(source: str | Path | ad.AnnData, state: State, digest: str) -> None:
    """Refuse a source that is no longer what it was when it had this `state_of` and `digest_of`."""
    if state_of(source) != state and digest_of(source) != digest:
        what = f"{source} was changed while it was fitted."
        raise InputError(what, "Fit again while nothing writes to the file.")
