"""Examples in docstrings of the public interface: each is run, in a folder with a screen and a run of it."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

import crlseq
from crlseq.config import make_config

mpl.use("Agg")
import matplotlib.pyplot as plt

PUBLIC = {
    "crlseq": crlseq,
    **{f"crlseq.{name}": getattr(crlseq, name) for name in crlseq.__all__ if callable(getattr(crlseq, name))},
    **{f"crlseq.pl.{name}": getattr(crlseq.pl, name) for name in crlseq.pl.__all__},
    "crlseq.Run.annotate": crlseq.Run.annotate,
    "crlseq.Run.predict": crlseq.Run.predict,
    "crlseq.config.make_config": make_config,
}
# A run is made by fit and load; five fits are no example that runs in seconds.
WITHOUT = {"crlseq.Run", "crlseq.cross_validate"}


@pytest.fixture
def beside(run_folder: Path, screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder holds ``screen.h5ad`` and ``RUN``."""
    shutil.copytree(run_folder, tmp_path / "RUN")
    shutil.copyfile(screen_file, tmp_path / "screen.h5ad")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - WITHOUT))
@pytest.mark.usefixtures("beside")
def test_examples(name: str) -> None:
    if name == "crlseq.enrich":
        pytest.importorskip("gseapy")
    (found,) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={})
    assert found.examples and "+SKIP" not in (found.docstring or "")
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    failed = runner.run(found, out=told.append).failed
    plt.close("all")
    assert not failed, "".join(told)


def test_what_has_no_example_is_public() -> None:
    assert PUBLIC.keys() >= WITHOUT


def test_a_wrong_example_would_be_seen() -> None:
    def wrong() -> Any:
        """>>> 1 + 1
        3
        """

    (found,) = doctest.DocTestFinder(recurse=False).find(wrong, "wrong", globs={})
    assert doctest.DocTestRunner().run(found, out=lambda text: None).failed == 1
