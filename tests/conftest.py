"""Fixtures of the whole suite: one thread, small screens, one finished run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Before torch and numpy load their pools: results are compared to the bit, and workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import anndata as ad
import pytest
from hypothesis import settings

import crlseq
from crlseq.run.run import Run
from tests.support import clear_screen, succeeds

# No test cuts the power: what is written need not reach the disk, for which every fit waits thirty times.
os.fsync = lambda handle: None

# How long an example takes says nothing on a machine that others use as well.
settings.register_profile("crlseq", deadline=None)
settings.load_profile("crlseq")


def pytest_configure(config: pytest.Config) -> None:
    """Tests see the devices of CUDA only where they are asked for (-m cuda): on all others `auto` is the CPU."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread in every test, whatever ran before: numba, which scanpy starts, sets the number that torch uses."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def screen() -> ad.AnnData:
    """`tests.support.clear_screen`; copy it before changing it."""
    return clear_screen()


@pytest.fixture(scope="session")
def screen_file(screen: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The screen as an h5ad file."""
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    screen.copy().write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def run_folder(screen_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the screen with the default method, finished through the command line; read it only."""
    folder = tmp_path_factory.mktemp("finished") / "RUN"
    succeeds("fit", screen_file, "--output", folder, "--epochs", 3, "--hold-out-cells", 0.2, "--n-latents", 3)
    return folder


@pytest.fixture
def copied_run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(run_folder, tmp_path / "RUN"))


@pytest.fixture(scope="session")
def linear_folder(screen_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the screen by the likelihood alone, without a bootstrap and without an epoch; read it only."""
    folder = tmp_path_factory.mktemp("linear") / "RUN"
    succeeds("fit", screen_file, "--output", folder, "--method", "linear", "--n-latents", 3, "--bootstrap", 0)
    return folder


@pytest.fixture(scope="session")
def finished(run_folder: Path) -> Run:
    """The finished run, loaded."""
    return crlseq.load(run_folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where inputs lie; the output would be beside it."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    return inputs


@pytest.fixture
def write(folder: Path) -> Callable[[ad.AnnData], Path]:
    def writer(adata: ad.AnnData) -> Path:
        adata.write_h5ad(folder / "screen.h5ad")
        return folder / "screen.h5ad"

    return writer
