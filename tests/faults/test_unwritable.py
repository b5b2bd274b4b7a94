"""Places that cannot be written, for every command that writes: one sentence, exit code 3, and nothing half-written."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import anndata as ad
import pytest

from crlseq.storage import interrupts
from crlseq.storage.hdf5 import Target
from tests.support import ROOT, Answer, check_refusal, environment, in_a_fork

LINEAR: list[object] = ["--method", "linear", "--n-latents", 3, "--bootstrap", 0]
SIMULATED = ["--n-latents", 3, "--n-genes", 20, "--cells-per-perturbation", 5, "--n-control", 20]


def writing(screen: Path, run: Path, out: Path) -> list[list[Any]]:
    """A call of every command that writes, with what it writes below `out`."""
    return [
        ["fit", screen, "--output", out / "OTHER", *LINEAR],
        ["prepare", screen, "--output", out / "STORE"],
        ["predict", run, "-p", "g0", "--output", out / "virtual.h5ad"],
        *(["export", run, "--format", name, "--output", out / name] for name in ("h5ad", "csv", "graphml")),
        ["report", run, "--output", out / "page.html"],
        ["evaluate", run, "--output", out / "found.csv"],
        ["plot", run, "dag", "--output", out / "dag.png"],
        ["simulate", *SIMULATED, "--output", out / "simulated.h5ad"],
        [
            "benchmark",
            *["--scenario", "linear-gaussian", "--seeds", "0", "--method", "linear"],
            "--output",
            out / "BENCHMARK",
        ],
    ]


def check_cannot_be_written(answer: Answer, words: list[Any]) -> None:
    assert "Traceback" not in answer.err, f"{words}\n{answer.err}"
    said = "\n".join(answer.err.splitlines()[-2:])  # before them come stages and notes
    check_refusal(answer.code, answer.out, said, 3, "cannot be written")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if os.access(path, os.R_OK)
    }


def without_rights() -> None:
    """Have the permissions of files hold for root too: as the owner of all files here, who may not pass over them."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of capability.h, this thread
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise PermissionError
    for at in range(3):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: effective, permitted, inheritable
        sets[at] &= ~0b110
    if libc.capset(header, sets):
        raise PermissionError


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "mounted"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_without_permission(screen_file: Path, linear_folder: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0 and not hasattr(ctypes.CDLL(None), "capset"):
        pytest.skip("root may write everywhere")
    place = tmp_path / "guarded"
    (place / "closed").mkdir(parents=True)
    shutil.copy(screen_file, place / "screen.h5ad")
    shutil.copytree(linear_folder, place / "RUN")
    screen, run = place / "screen.h5ad", place / "RUN"
    guards = {run: 0o555, place / "closed": 0o000, place: 0o555}
    before = contents(place)
    try:
        for path, mode in guards.items():
            path.chmod(mode)
        closed = place / "closed" / "x.h5ad"
        for words in [
            *writing(screen, run, place),
            ["report", run],
            ["fit", screen, "--output", run, "--force", *LINEAR],
            ["fit", screen, "--output", place / "closed" / "RUN", *LINEAR],
            ["predict", run, "-p", "g0", "--output", closed],
        ]:
            check_cannot_be_written(in_a_fork(without_rights, *words), words)
        screen.chmod(0o000)
        never = ["--output", tmp_path / "NEVER"]
        for words in [
            *(["fit", source, *never, "--quiet"] for source in (closed, screen)),
            *(["prepare", source, *never] for source in (closed, screen)),
            *(["check", source] for source in (closed, screen)),
            ["inspect", "programs", place / "closed" / "RUN"],
        ]:
            check_refusal(*in_a_fork(without_rights, *words), 3, "Check its permissions")
    finally:
        for path in (place, *guards):
            path.chmod(0o755)
        screen.chmod(0o644)
    assert contents(place) == before
    assert [path.name for path in tmp_path.iterdir()] == ["guarded"]


def test_on_a_read_only_file_system(screen_file: Path, linear_folder: Path, mounted: Path) -> None:
    screen, run = mounted / "screen.h5ad", mounted / "RUN"
    shutil.copy(screen_file, screen)
    shutil.copytree(linear_folder, run)
    before = contents(mounted)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    for words in [*writing(screen, run, mounted), ["report", run]]:
        check_cannot_be_written(in_a_fork(lambda: None, *words), words)
    assert contents(mounted) == before


# What is left when a disk fills up is an unfinished run or store, or a benchmark, that goes on where there is room.
UNFINISHED = ("OTHER.partial", "STORE.partial", "BENCHMARK")


@pytest.mark.parametrize("room", [0, 24 << 10])
def test_on_a_full_disk(screen_file: Path, linear_folder: Path, mounted: Path, room: int) -> None:
    """Without any room, and with room for the beginning of what is to be written."""
    filler = mounted / "filler"
    for words in writing(screen_file, linear_folder, mounted):
        if room and words[0] == "benchmark":  # a long way to where it matters
            continue
        disk = os.statvfs(mounted)
        filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - room))
        answer = in_a_fork(lambda: None, *words)
        left = {path.name for path in mounted.iterdir()} - {filler.name, *UNFINISHED}
        if room == 0 or answer.code != 0 or not left:  # else it was small enough
            check_cannot_be_written(answer, words)
            assert left == set(), words
        for path in mounted.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


GROWN = {
    "predict": ["predict", "{run}", "-p", "g0", "--output", "{out}/virtual.h5ad"],
    "simulate": ["simulate", "--n-genes", "300", "--output", "{out}/simulated.h5ad"],
    **{
        name: ["export", "{run}", "--format", name, "--output", f"{{out}}/x.{name}"]
        for name in ("h5ad", "gears", *(["h5mu"] if find_spec("mudata") else []))
    },
}
# What is imported once serves many commands, each of which is a process that ends as Python ends.
ENDING = """
import json, os, resource, sys
import anndata, networkx, torch
from crlseq.cli.app import main
for size, words, told in json.loads(sys.argv[1]):
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    else:
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        sys.argv = ["crlseq", *words]
        sys.exit(main())
"""


def test_files_that_may_not_grow(linear_folder: Path, tmp_path: Path) -> None:
    """As a quota has it, in the middle of a file or, of one, near its start; HDF5 must not crash when Python ends either."""
    out = tmp_path / "out"
    out.mkdir()
    calls = [
        (size, [word.format(run=linear_folder, out=out) for word in words], str(tmp_path / f"{size} {name}"))
        for size, name in [(8192, "h5ad"), *((60_000, name) for name in GROWN)]
        for words in [GROWN[name]]
    ]
    done = subprocess.run(
        [sys.executable, "-c", ENDING, json.dumps(calls)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(done.stdout.split()) == len(calls)
    for code, (_, words, told) in zip(done.stdout.split(), calls, strict=True):
        check_cannot_be_written(Answer(int(code), "", Path(told).read_text()), words)
    assert list(out.iterdir()) == []


SESSION = """
import resource, signal, sys
import crlseq
from crlseq.storage.hdf5 import write_h5ad
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cells = crlseq.simulate(n_genes=300, cells_per_perturbation=20)
for size in range(1000, 400_000, 9_973):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
    try:
        write_h5ad(cells, Path(sys.argv[1]), "gzip")
    except OSError as error:
        print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
write_h5ad(cells, Path(sys.argv[1]), "gzip")
"""


def test_a_session_survives_a_full_disk(tmp_path: Path) -> None:
    """In Python, where a crash would take all of a user's variables with it; wherever in the file the room ends."""
    path = tmp_path / "x.h5ad"
    done = subprocess.run(
        [sys.executable, "-c", SESSION, path], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.split() == [str(errno.EFBIG)] * 41
    assert ad.read_h5ad(path).shape == (2800, 300)


def test_an_interrupt_in_the_middle_of_hdf5_comes_again(tmp_path: Path) -> None:
    """HDF5 takes an exception for a failed disk and crashes when Python ends."""
    target = Target(tmp_path / "x", "w+")

    def ends(number: int) -> bool:
        try:
            interrupts._handle(number, frame)
        except KeyboardInterrupt:
            return True
        return False

    with target, interrupts.watched(""):
        frame = sys._getframe()
        assert ends(signal.SIGINT)
        frames: list[FrameType] = []

        def seek(self: Target, offset: int, whence: int = 0) -> int:
            frames.append(sys._getframe(1))
            return offset

        with mock.patch.object(Target, "seek", seek):
            target.write(b"x")
        frame = frames[0]
        assert frame.f_code is Target.write.__code__ and not ends(signal.SIGINT)
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_there_is_one_way_to_write_hdf5() -> None:
    """anndata, mudata and h5py are given a `Target`, or memory; what else opens a file for writing would crash."""
    found = []
    for path in sorted((ROOT / "crlseq").rglob("*.py")):
        for call in re.findall(
            r"h5py\.File\([^)]*\)|adata\.write\w*\(|virtual\.write\w*\(|mudata\.write\w*\([^)]*", path.read_text()
        ):
            if not re.search(r'\(target|driver="core"|, "r"\)|TYPE', call):
                found.append(f"{path.name}: {call}")
    assert found == []
