"""Public screens by the addresses and checksums of data/datasets.toml: resumed, checked, and placed whole or not at all.

pooch checks the hash of what came and moves it into place; `Resuming` is its downloader. It writes to ``FILE.part``
beside the target and asks for the rest of it (HTTP Range) when it is called again. A file whose checksum is wrong is
deleted, its part as well.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tarfile
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import requests

from crlseq.errors import CrlseqError, InputError, UsageError

ROOT = Path(__file__).resolve().parents[1]
PINS = "checksums.txt"  # of what had no checksum in the table, found at the first download: "SHA-256  FILE" a line
CHUNK = 1 << 16  # what a break costs at most
TIMEOUT = 60.0
ATTEMPTS = 5


@dataclass(frozen=True)
class Dataset:
    """A row of the table; see data/datasets.toml."""

    name: str
    title: str
    url: str
    file: str
    sha256: str
    bytes: int | None = None
    md5: str = ""
    member: str = ""
    fit: str = ""


def read_datasets(path: Path = ROOT / "data" / "datasets.toml") -> dict[str, Dataset]:
    """The table, by name.

    Raises
    ------
    InputError
        If it cannot be read or a checksum is none.
    """
    try:
        with path.open("rb") as handle:
            found = {name: Dataset(name=name, **row) for name, row in tomllib.load(handle).items()}
    except (OSError, TypeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"The table {path} cannot be read: {error}.", "Restore it.") from None
    for row in found.values():
        if row.sha256 and not re.fullmatch("[0-9a-f]{64}", row.sha256):
            raise InputError(f"The SHA-256 of {row.name} in {path} is none.", "Write 64 hexadecimal digits, or ''.")
    return found


class Resuming:
    """A downloader for pooch that goes on from ``part``.

    Parameters
    ----------
    part
        Kept when the connection breaks or the user interrupts.
    attempts, wait
        Tries, and seconds between them (growing), before a broken connection is an error.
    """

    def __init__(self, part: Path, attempts: int = ATTEMPTS, wait: float = 2.0) -> None:
        self.part, self.attempts, self.wait = part, attempts, wait

    def __call__(self, url: str, output_file: Any, pooch: object) -> None:
        """Fetch `url`, then move the whole part to `output_file`, where pooch checks it."""
        for attempt in range(self.attempts):
            try:
                self._fetch(url)
                break
            except requests.HTTPError as error:
                status = 0 if error.response is None else error.response.status_code
                if status < 500 or attempt == self.attempts - 1:
                    raise
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                if attempt == self.attempts - 1:
                    raise
            time.sleep(self.wait * (attempt + 1))
        os.replace(self.part, output_file)

    def _fetch(self, url: str) -> None:
        there = self.part.stat().st_size if self.part.exists() else 0
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={there}-"} if there else {})}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code == 416:  # nothing is left to send: the part is whole, or longer than the file
                size = answer.headers.get("Content-Range", "").rpartition("/")[2]
                if size == str(there):
                    return
                self.part.unlink()
                raise requests.ConnectionError("the part was longer than the file")
            answer.raise_for_status()
            start = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
            goes_on = answer.status_code == 206 and start is not None and int(start[1]) == there
            there = there if goes_on else 0  # a server that knows no ranges sends everything again
            left = answer.headers.get("Content-Length")
            total = None if left is None else there + int(left)
            with self.part.open("ab" if goes_on else "wb") as handle:
                for chunk in answer.iter_content(CHUNK):
                    handle.write(chunk)
                    there += len(chunk)
                    _show(self.part.name.removesuffix(".part"), there, total)
        if total is not None and there != total:
            raise requests.ConnectionError(f"{there} of {total} bytes came")


def _show(name: str, there: int, total: int | None) -> None:
    if sys.stderr.isatty():
        of = "" if total is None else f" of {total / 1e6:,.0f}"
        print(f"\r{name}: {there / 1e6:,.0f}{of} MB", end="\n" if there == total else "", file=sys.stderr, flush=True)


def fetch(dataset: Dataset, folder: Path, attempts: int = ATTEMPTS, wait: float = 2.0) -> Path:
    """The data set's file in `folder`: as it lies there if its checksum is right, or downloaded.

    Raises
    ------
    InputError
        If it cannot be downloaded or written, has another checksum, or lacks the member.
    """
    target = folder / dataset.file
    pins = _read_pins(folder / PINS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not dataset.member:
            known = dataset.sha256 or pins.get(dataset.file)
            _download(dataset, target, known, attempts, wait)
        elif target.exists() and pins.get(dataset.file) == pooch.file_hash(str(target)):
            return target
        else:
            archive = folder / Path(dataset.url.partition("?")[0]).name
            _download(dataset, archive, dataset.sha256 or pins.get(archive.name), attempts, wait)
            _pin(folder / PINS, archive.name, pooch.file_hash(str(archive)))
            _take_out(archive, dataset.member, target)
            known = pins.get(dataset.file)
            if known not in (None, pooch.file_hash(str(target))):
                target.unlink()
                raise InputError(f"{dataset.file} in {archive} is another than before.", f"Look at {folder / PINS}.")
            archive.unlink()
        if not dataset.sha256 or dataset.member:
            _pin(folder / PINS, dataset.file, pooch.file_hash(str(target)))
    except requests.RequestException as error:
        detail = str(error).splitlines()[0][:200]
        raise InputError(
            f"{dataset.url} cannot be downloaded: {detail}.", "Run the same command again: it goes on where it stopped."
        ) from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}.", "Choose another --to.") from None
    return target


def _download(dataset: Dataset, target: Path, known: str | None, attempts: int, wait: float) -> None:
    if target.exists() and known is None:
        return
    downloader = Resuming(target.with_name(target.name + ".part"), attempts, wait)
    try:
        pooch.retrieve(dataset.url, known and f"sha256:{known}", target.name, str(target.parent), downloader=downloader)
    except ValueError as error:  # pooch's word for a wrong hash
        if "hash" not in str(error).lower():
            raise
        raise InputError(
            f"What {dataset.url} gave has not the SHA-256 {known}, and was deleted.",
            f"Try again; if it stays so, the file was changed at its host (its published MD5 was {dataset.md5 or 'none'}).",
        ) from None


def _take_out(archive: Path, member: str, target: Path) -> None:
    """One member of a tar archive, by its base name, into place."""
    beside = target.with_name(target.name + ".tmp")
    try:
        with tarfile.open(archive) as handle:
            found = next((row for row in handle if row.isfile() and Path(row.name).name == member), None)
            source = None if found is None else handle.extractfile(found)
            if source is None:
                raise InputError(f"{archive} holds no {member}.", "The archive was changed at its host.")
            with beside.open("wb") as out:
                shutil.copyfileobj(source, out, CHUNK)
    except tarfile.TarError as error:
        raise InputError(f"{archive} is no tar archive: {error}.", "Delete it, and download it again.") from None
    else:
        beside.replace(target)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _read_pins(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines())
    return {name.strip(): digest for digest, name in lines}


def _pin(path: Path, name: str, digest: str) -> None:
    pins = {**_read_pins(path), name: digest}
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(f"{value}  {key}\n" for key, value in sorted(pins.items())), encoding="utf-8")
    beside.replace(path)


def main(words: Sequence[str] | None = None) -> None:
    """List the data sets, or download those named."""
    parser = argparse.ArgumentParser(prog="scripts/download", description="Public screens, resumed and checked.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets; none: list them")
    parser.add_argument("--to", type=Path, default=ROOT / "data" / "public", metavar="FOLDER", help="[data/public]")
    parser.add_argument("--table", type=Path, default=ROOT / "data" / "datasets.toml", metavar="FILE", help="addresses")
    given = parser.parse_args(words)
    table = read_datasets(given.table)
    if not given.names:
        for row in table.values():
            size = "size unknown" if row.bytes is None else f"{row.bytes / 1e6:,.0f} MB"
            print(
                f"{row.name}\n  {row.title}\n  {size}, SHA-256 {row.sha256 or 'unknown: pinned at the first download'}"
            )
    for name in given.names:
        if name not in table:
            raise UsageError(f"There is no data set {name!r}.", f"There are {', '.join(table)}.")
    for name in given.names:
        path = fetch(table[name], given.to)
        print(path)
        if not table[name].sha256:
            digest = _read_pins(given.to / PINS)[path.name]
            print(f"  no checksum was known; this is {digest}, pinned in {given.to / PINS}", file=sys.stderr)
        print(f"  crlseq fit {path} {table[name].fit} --output RUN", file=sys.stderr)


if __name__ == "__main__":
    pooch.get_logger().setLevel("WARNING")
    try:
        main()
    except CrlseqError as problem:
        print(f"download: {problem.message}\n  {problem.hint}", file=sys.stderr)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        print("Interrupted. The same command continues where it stopped.", file=sys.stderr)
        sys.exit(130)
