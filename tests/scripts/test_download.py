"""Downloads from a server on this machine: whole, resumed after a break, refused by checksum, pinned where none is known."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crlseq.errors import InputError, UsageError
from tests.support import environment

pytest.importorskip("pooch")
from scripts import download

CONTENT = np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``files``; the first ``breaks`` answers stop after ``sent`` bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"screen.h5ad": CONTENT}
        self.breaks, self.sent, self.ranges = 0, 100_000, True
        self.asked: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content = self.server.files.get(self.path.partition("?")[0].lstrip("/"))
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if content is None:
            self.send_error(404)
            return
        start = int(re.findall(r"\d+", wanted)[0]) if wanted and self.server.ranges else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.server.breaks:
            self.server.breaks -= 1
            self.wfile.write(content[start : start + self.server.sent])
            self.wfile.flush()
            self.connection.close()
        else:
            self.wfile.write(content[start:])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the signature of the standard library
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def dataset(server: Server, **changes: Any) -> Any:
    url = f"http://127.0.0.1:{server.server_port}/screen.h5ad?download=1"
    row = {"name": "screen", "title": "", "url": url, "file": "screen.h5ad", "sha256": DIGEST}
    return download.Dataset(**{**row, **changes})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    path = download.fetch(dataset(server), tmp_path / "new")
    assert path.read_bytes() == CONTENT and names(path.parent) == {"screen.h5ad"}
    assert download.fetch(dataset(server), tmp_path / "new") == path
    assert len(server.asked) == 1


def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path) -> None:
    server.breaks = 1
    with pytest.raises(InputError, match="cannot be downloaded"):
        download.fetch(dataset(server), tmp_path, attempts=1)
    assert names(tmp_path) == {"screen.h5ad.part"}
    there = (tmp_path / "screen.h5ad.part").stat().st_size
    assert 0 < there <= 100_000
    path = download.fetch(dataset(server), tmp_path, attempts=1)
    assert path.read_bytes() == CONTENT and names(tmp_path) == {"screen.h5ad"}
    assert server.asked == [None, f"bytes={there}-"]


def test_a_broken_connection_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    assert download.fetch(dataset(server), tmp_path, attempts=3, wait=0.0).read_bytes() == CONTENT
    assert len(server.asked) == 3 and server.asked[-1] is not None


def test_a_part_that_is_whole_or_of_no_use(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "screen.h5ad.part"
    part.write_bytes(CONTENT)
    assert download.fetch(dataset(server), tmp_path).read_bytes() == CONTENT
    (tmp_path / "screen.h5ad").unlink()
    part.write_bytes(CONTENT + b"more")
    assert download.fetch(dataset(server), tmp_path, wait=0.0).read_bytes() == CONTENT
    (tmp_path / "screen.h5ad").unlink()
    part.write_bytes(b"of a server that knows no ranges")
    server.ranges = False
    assert download.fetch(dataset(server), tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has not the SHA-256"):
        download.fetch(dataset(server, sha256="0" * 64), tmp_path)
    assert names(tmp_path) == set()


def test_a_part_of_another_file_is_refused_and_forgotten(server: Server, tmp_path: Path) -> None:
    (tmp_path / "screen.h5ad.part").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match="has not the SHA-256"):
        download.fetch(dataset(server), tmp_path)
    assert download.fetch(dataset(server), tmp_path).read_bytes() == CONTENT


def test_a_damaged_file_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "screen.h5ad").write_bytes(b"damaged")
    assert download.fetch(dataset(server), tmp_path).read_bytes() == CONTENT


def test_without_a_checksum_the_first_download_pins_it(server: Server, tmp_path: Path) -> None:
    unknown = dataset(server, sha256="")
    path = download.fetch(unknown, tmp_path)
    assert (tmp_path / "checksums.txt").read_text() == f"{DIGEST}  screen.h5ad\n"
    path.unlink()
    server.files["screen.h5ad"] = CONTENT[::-1]
    with pytest.raises(InputError, match="has not the SHA-256"):
        download.fetch(unknown, tmp_path)
    assert not path.exists()


def test_a_member_of_an_archive(server: Server, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (("other/readme", b"no"), ("datasets/screen.h5ad", CONTENT)):
            row = tarfile.TarInfo(name)
            row.size = len(content)
            archive.addfile(row, io.BytesIO(content))
    server.files["all.tar"] = buffer.getvalue()
    url = f"http://127.0.0.1:{server.server_port}/all.tar"
    inside = dataset(server, url=url, sha256="", member="screen.h5ad")
    server.breaks = 1
    path = download.fetch(inside, tmp_path, wait=0.0)
    assert path.read_bytes() == CONTENT and names(tmp_path) == {"screen.h5ad", "checksums.txt"}
    n = len(server.asked)
    assert download.fetch(inside, tmp_path) == path and len(server.asked) == n
    with pytest.raises(InputError, match=r"holds no absent\.h5ad"):
        download.fetch(dataset(server, url=url, sha256="", member="absent.h5ad", file="absent.h5ad"), tmp_path)


def test_the_command(server: Server, tmp_path: Path) -> None:
    table = tmp_path / "table.toml"
    row = (
        f'title = "t"\nurl = "http://127.0.0.1:{server.server_port}/{{}}"\nfile = "screen.h5ad"\nsha256 = "{DIGEST}"\n'
    )
    table.write_text("[good]\n" + row.format("screen.h5ad") + "\n[gone]\n" + row.format("gone"))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, download.__file__, "--table", str(table), "--to", str(tmp_path / "to"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)

    done = run("good")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "to" / "screen.h5ad"), done.stderr
    assert "good" in run().stdout
    (tmp_path / "to" / "screen.h5ad").unlink()
    for name, code, said in (("gone", 3, "404"), ("absent", 2, "There is no data set 'absent'")):
        refused = run(name)
        assert refused.returncode == code and said in refused.stderr and "Traceback" not in refused.stderr
        assert len(refused.stderr.splitlines()) == 2


def test_the_table_that_is_shipped() -> None:
    table = download.read_datasets()
    assert {"norman2019-cpa", "norman2019-scperturb", "adamson2016", "replogle2022-k562-essential"} <= set(table)
    for row in table.values():
        assert row.url.startswith("https://") and row.file.endswith(".h5ad") and "--perturbation-key" in row.fit
        assert row.sha256 or row.member  # a plain file without a checksum would need a word in the table
        assert not row.md5 or re.fullmatch("[0-9a-f]{32}", row.md5)
    with pytest.raises(UsageError):
        download.main(["nothing"])
