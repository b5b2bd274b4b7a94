"""What a shell, a container or a batch system does to a command: streams, paths, limits, working folders."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import crlseq
from crlseq.storage import files
from crlseq.training.memory import out_of_memory
from tests.support import check_refusal, command, environment, invoke, succeeds

LINEAR: list[object] = ["--method", "linear", "--n-latents", 2, "--bootstrap", 0]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


def ran(*words: object, **how: Any) -> subprocess.CompletedProcess[str]:
    pipes = {} if "stderr" in how else {"stderr": subprocess.PIPE}
    return subprocess.run(command(*words), text=True, timeout=300, env=environment(), **pipes, **how)


# --- streams


@needs_full
def test_progress_on_a_full_disk_is_dropped(screen_file: Path, tmp_path: Path) -> None:
    with FULL.open("w") as full:
        assert ran("fit", screen_file, "-o", tmp_path / "RUN", *LINEAR, stderr=full).returncode == 0
    assert crlseq.load(tmp_path / "RUN").program_names == ["P0", "P1"]


def test_progress_that_nobody_reads_any_more_is_dropped(screen_file: Path, tmp_path: Path) -> None:
    reads, writes = os.pipe()
    with subprocess.Popen(
        command("fit", screen_file, "-o", tmp_path / "RUN", *LINEAR), stderr=writes, stdout=writes, env=environment()
    ) as process:
        os.close(writes)
        assert os.read(reads, 1)
        os.close(reads)
    assert process.returncode == 0
    assert crlseq.load(tmp_path / "RUN").program_names == ["P0", "P1"]


@needs_full
@pytest.mark.parametrize(
    "words",
    [["programs"], ["programs", "--json"], ["summary"], ["dag"], ["--help"]],
    ids=" ".join,
)
def test_results_that_cannot_be_written_are_an_error(linear_folder: Path, words: list[str]) -> None:
    words = ["inspect", words[0], str(linear_folder), *words[1:]] if words != ["--help"] else words
    with FULL.open("w") as full:
        answer = ran(*words, stdout=full)
    check_refusal(answer.returncode, "", answer.stderr, 3, "standard output: No space left on device")


def test_a_closed_standard_output_is_an_error(linear_folder: Path) -> None:
    answer = ran("inspect", "programs", linear_folder, preexec_fn=lambda: os.close(1))
    check_refusal(answer.returncode, "", answer.stderr, 3, "standard output: Bad file descriptor")


def test_without_any_stream_no_file_gets_what_is_printed(screen_file: Path, tmp_path: Path) -> None:
    """The first files that are opened would get the numbers of the closed streams."""
    words = ("fit", screen_file, "-o", tmp_path / "RUN", *LINEAR)
    done = subprocess.run(
        command(*words), env=environment(), timeout=300, preexec_fn=lambda: [os.close(i) for i in range(3)]
    )
    assert done.returncode == 0
    assert crlseq.load(tmp_path / "RUN").latents(screen_file).shape == (740, 2)


def test_a_reader_that_has_seen_enough(linear_folder: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    for words in (["programs"], ["programs", "--json"], ["summary"]):
        answer = ran("inspect", words[0], linear_folder, *words[1:], stdout=writes)
        assert answer.returncode == 0 and "crlseq:" not in answer.stderr, answer.stderr
    os.close(writes)


# --- paths


def test_a_tilde_is_expanded_once_at_the_command_line(
    screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--output=~/RUN`` comes with its tilde; a folder that is called ``~`` can be named as ``./~``."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    shutil.copy(screen_file, home / "screen.h5ad")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    succeeds("fit", "~/screen.h5ad", "--output=~/RUN", *LINEAR)
    for words in (
        ("inspect", "programs", "~/RUN"),
        ("inspect", "~/RUN"),
        ("predict", "~/RUN", "-p", "g0", "--from=~/screen.h5ad", "--output=~/virtual.h5ad"),
        ("export", "~/RUN", "--format", "csv", "--output=~/tables"),
        ("report", "~/RUN"),
    ):
        succeeds(*words)
    assert {path.name for path in home.iterdir()} == {"screen.h5ad", "RUN", "virtual.h5ad", "tables"}
    assert list(here.iterdir()) == []
    shutil.rmtree(home / "RUN")
    run = crlseq.fit(screen_file, "~/RUN", method="linear", n_latents=2, bootstrap=0)  # Python takes paths as they are
    assert run.programs.equals(crlseq.load("~/RUN").programs) and (here / "~" / "RUN").is_dir()
    assert not (home / "RUN").exists()


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_places_without_a_name(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    check_refusal(*invoke("inspect", "programs", place), 3, "is not a run folder")


def test_a_working_folder_that_was_removed(
    linear_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    check_refusal(*invoke("inspect", "programs", linear_folder), 3, "working folder was removed")


# --- inputs that never end


def test_pipes_and_devices_as_input(linear_folder: Path, screen_file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    out = ("-o", tmp_path / "OUT")
    for source in (tmp_path / "pipe", "/dev/zero"):
        for words in (
            ["check", source],
            ["fit", source, *out],
            ["prepare", source, *out],
            ["predict", linear_folder, "-p", "g0", "--from", source, *out],
            ["evaluate", linear_folder, "--data", source],
            ["evaluate", source, "--data", screen_file],
            ["fit", screen_file, *out, "--embeddings", source],
        ):
            answer = invoke(*words)
            assert answer.code == 3 and "fault" not in answer.err, (words, answer.err)
    shutil.copytree(linear_folder, tmp_path / "RUN")
    (tmp_path / "RUN" / "programs.csv").unlink()
    os.mkfifo(tmp_path / "RUN" / "programs.csv")
    check_refusal(*invoke("inspect", "programs", tmp_path / "RUN"), 3, "is a pipe, not a file")


LISTS = (["--config"], ["--gene-sets"], ["--genes"], ["--guide-key", "perturbation", "--guide-map"])


@pytest.mark.parametrize("option", LISTS, ids=lambda words: words[-1])
def test_lists_and_configurations_that_never_end(
    screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    os.mkfifo(tmp_path / "pipe")
    for source, says in ((tmp_path / "pipe", "nothing was written to this pipe"), ("/dev/zero", "it is a device")):
        answer = invoke("fit", screen_file, "-o", tmp_path / "RUN", *option, source)
        assert answer.code == 3 and says in answer.err, answer.err


def test_a_list_from_a_pipe_is_read(screen_file: Path, tmp_path: Path) -> None:
    """As shells make them of ``<(...)``; the writer is slow."""
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        with (tmp_path / "pipe").open("w") as pipe:
            time.sleep(0.3)
            pipe.write("seed = 5\n".replace("seed", "[training]\nseed"))

    writer = threading.Thread(target=write)
    writer.start()
    answer = invoke("fit", screen_file, "-o", tmp_path / "RUN", *LINEAR, "--config", tmp_path / "pipe")
    writer.join()
    assert answer.code == 0, answer.err
    assert crlseq.load(tmp_path / "RUN").facts.seed == 5


# --- limits


@pytest.mark.parametrize(("mib", "words"), [(300, ["check"]), (600, ["fit"]), (1000, ["fit"])])
def test_limits_of_memory_in_which_nothing_can_be_loaded(
    screen_file: Path, tmp_path: Path, mib: int, words: list[str]
) -> None:
    output = ["-o", tmp_path / "RUN"] if words == ["fit"] else []
    answer = ran(
        *words, screen_file, *output, stdout=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20)),
    )  # fmt: skip
    check_refusal(answer.returncode, answer.stdout, answer.stderr, 3, f"limited to {mib} MiB", "ulimit -v")


def test_a_library_that_cannot_be_loaded_for_want_of_memory() -> None:
    assert out_of_memory(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert out_of_memory(ImportError("libx.so: cannot allocate memory in static TLS block"))
    assert not out_of_memory(ImportError("No module named 'torch'"))


def test_python_without_docstrings() -> None:
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "crlseq", "--version"], capture_output=True, text=True, env=environment()
    )
    check_refusal(done.returncode, done.stdout, done.stderr, 2, "python -OO")


# --- threads


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread")
@pytest.mark.parametrize(("asked", "expected"), [(None, {1}), ("2", {2})])
def test_numpy_computes_on_one_thread_unless_it_is_told_otherwise(asked: str | None, expected: set[int]) -> None:
    """Threads of OpenBLAS spin: where cores are taken, a linear fit takes twice the time."""
    what = (
        "import sys; sys.argv = ['crlseq', '--version']\n"
        "from crlseq.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "import numpy, threadpoolctl\n"
        "print({each['num_threads'] for each in threadpoolctl.threadpool_info() if each['internal_api'] == 'openblas'})"
    )
    env = environment(OMP_NUM_THREADS="2", **({} if asked is None else {"OPENBLAS_NUM_THREADS": asked}))
    if asked is None:
        env.pop("OPENBLAS_NUM_THREADS", None)
    done = subprocess.run([sys.executable, "-c", what], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines()[-1] == str(expected)
