"""What an interrupted discovery has found is kept: a fit goes on behind its last finished stage, to the same bytes."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crlseq
from crlseq.discovery import discover as steps
from crlseq.discovery import misfit
from crlseq.discovery.likelihood import LinearModel
from crlseq.discovery.methods import straighten
from crlseq.discovery.moments import Moments
from crlseq.discovery.n_latents import LatentChoice
from crlseq.errors import InputError
from crlseq.storage.checkpoint import save_checkpoint
from crlseq.storage.stage_cache import CLASSES, StageCache, cached_on_disk, packed, unpacked
from tests.cli.test_repeat import results
from tests.support import at_stage, files_of, interrupt

FIT: dict[str, Any] = {"epochs": 1, "bootstrap": 2, "equations": "linear"}
BEFORE = ("effects", "negative-controls")
# What each stage of a discovery calls, and where.
CALLS = {
    "components": (steps, "whitened_components"), "number": (steps, "number_of_programs"),
    "likelihood": (steps, "fit_likelihood"), "kinds": (steps, "compare_on"),
    "straightened": (straighten, "straightened"), "ordering": (steps, "ordered"), "bootstrap": (steps, "bootstrap"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _straightened() -> Iterator[None]:
    """Every fit straightens, in few steps, and takes what comes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(misfit, "DESCRIBED", -math.inf)
        patch.setattr(straighten, "curved", lambda *args: True)
        patch.setattr(straighten, "FREE", tuple(replace(free, steps=20) for free in straighten.FREE))
        patch.setattr(straighten, "CAUSAL", replace(straighten.CAUSAL, steps=20))
        patch.setattr(
            straighten,
            "straightened",
            lambda task, cells, dense, linear: straighten.train_once(
                task, cells, dense.targets[0], dense.model.p, math.inf, task.seed
            ),
        )
        yield


@pytest.fixture(scope="module")
def whole(screen_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a fit that nobody interrupted."""
    path = crlseq.fit(screen_file, tmp_path_factory.mktemp("whole") / "RUN", **FIT).path
    assert path is not None
    return path


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with the stages that are computed."""
    made: list[str] = []

    def counting(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            made.append(stage)
            return function(*arguments, **options)

        return call

    for stage, (module, name) in CALLS.items():
        monkeypatch.setattr(module, name, counting(stage, getattr(module, name)))
    return made


def interrupted(screen_file: Path, folder: Path, stage: str) -> set[str]:
    """The stages that are on disk after a fit that was interrupted at the beginning of one."""
    with pytest.raises(KeyboardInterrupt):
        crlseq.fit(screen_file, folder, progress=at_stage(stage, interrupt), **FIT)
    left = folder.with_name(f"{folder.name}.partial").glob("stage-*.pt")
    return {path.stem.removeprefix("stage-") for path in left}


@pytest.mark.parametrize(
    ("stage", "done"),
    [
        ("fitting the likelihood", {*BEFORE, "components", "number"}),
        ("bootstrapping", {*BEFORE, "components", "number", "likelihood", "kinds", "straightened", "ordering"}),
        ("reading off", {*BEFORE, *CALLS}),
    ],
)
def test_goes_on_behind_the_last_stage(
    screen_file: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, done: set[str]
) -> None:
    assert interrupted(screen_file, tmp_path / "RUN", stage) == done
    made = counted(monkeypatch)
    run = crlseq.fit(screen_file, tmp_path / "RUN", resume=True, **FIT)
    assert set(made) == {*CALLS} - done
    assert results(tmp_path / "RUN") == results(whole)
    assert run.info["discovery"] == crlseq.load(whole).info["discovery"]
    assert run.info["discovery"]["straightened"]
    assert {path.name for path in (tmp_path / "RUN").iterdir()} == files_of(tmp_path / "RUN")


class Planted:
    """Runs as it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('planted')",)


def test_damaged_foreign_and_planted_results_are_computed_again(
    screen_file: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(screen_file, tmp_path / "RUN", "bootstrapping")
    at = {stage: tmp_path / "RUN.partial" / f"stage-{stage}.pt" for stage in CALLS}
    content = at["components"].read_bytes()
    at["components"].write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    at["number"].unlink()
    save_checkpoint(at["number"], {"format": 2, "identity": "of another fit", "result": 1})
    at["likelihood"].write_bytes(at["likelihood"].read_bytes()[:-1])
    at["kinds"].write_bytes(pickle.dumps(Planted()))
    at["ordering"].write_bytes(b"")
    at["straightened"].unlink()
    save_checkpoint(at["straightened"], {"format": 2, "identity": "x", "result": Planted()})
    (tmp_path / "RUN.partial" / "stage-of-another-version.pt").write_bytes(b"?")
    made = counted(monkeypatch)
    crlseq.fit(screen_file, tmp_path / "RUN", resume=True, **FIT)
    assert set(made) == {*CALLS}
    assert results(tmp_path / "RUN") == results(whole)
    assert {path.name for path in (tmp_path / "RUN").iterdir()} == files_of(tmp_path / "RUN")


def test_other_cells_in_memory_are_another_fit(tmp_path: Path, screen: Any) -> None:
    """A file is told by its digest; cells in memory by their values and labels."""
    screen = screen.copy()
    options = {**FIT, "method": "linear"}
    with pytest.raises(KeyboardInterrupt):
        crlseq.fit(screen, tmp_path / "RUN", progress=at_stage("reading off", interrupt), **options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "RUN.partial").iterdir()}
    screen.X[0, 0] += 1
    with pytest.raises(InputError, match="the input has other content"):
        crlseq.fit(screen, tmp_path / "RUN", resume=True, **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "RUN.partial").iterdir()} == before
    screen.X[0, 0] -= 1
    crlseq.fit(screen, tmp_path / "RUN", resume=True, **options)
    assert crlseq.fit(screen, tmp_path / "RUN", resume=True, **options).path == tmp_path / "RUN"
    screen.X[0, 0] += 1
    with pytest.raises(InputError, match=r"finished.*the input has other content"):
        crlseq.fit(screen, tmp_path / "RUN", resume=True, **options)


# --- what is packed


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, "one")
    matrix = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    value = (
        1,
        "α",
        None,
        True,
        [0.1, math.inf],
        {3: matrix, "x": np.arange(3)},
        LatentChoice(2, [{"p": 1.0}], "as seen"),
    )
    found = [cache.get("number", lambda: value), cache.get("number", lambda: ())]
    assert found[0] is value
    *plain, table, choice = found[1]
    assert plain == [*value[:5]] and type(found[1]) is tuple and choice == value[-1]
    assert torch.equal(table[3], matrix) and table[3].stride() == matrix.stride()
    np.testing.assert_array_equal(table["x"], np.arange(3))
    assert table["x"].dtype == np.arange(3).dtype
    assert StageCache(tmp_path, "another").get("number", lambda: 7) == 7
    cache.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_result_of_an_older_version_is_computed_again(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, "one")
    cache.get("more numbers", lambda: 1)
    (path,) = tmp_path.iterdir()
    assert path.name == "stage-more-numbers.pt"
    path.unlink()
    save_checkpoint(path, {"identity": "one", "found": 2})  # as written before the format had a number
    assert cache.get("more numbers", lambda: 3) == 3 == cache.get("more numbers", lambda: 4)


def test_a_model_is_made_again_from_its_arguments() -> None:
    moments = Moments(torch.zeros(3, 2), torch.eye(2).expand(3, -1, -1), torch.tensor([4.0, 4.0, 4.0]))
    again = unpacked(packed(LinearModel(moments, 1, "soft", 0.3, fit_noise=False)))
    assert (again.p, again.kind, again.floor, again.fit_noise) == (1, "soft", 0.3, False)
    assert torch.equal(again.moments.covariances, moments.covariances)


def test_only_registered_classes_are_packed() -> None:
    @dataclass(frozen=True)
    class Odd:
        x: int

    with pytest.raises(TypeError, match="Odd cannot"):
        packed([Odd(1)])
    cached_on_disk()(Odd)
    assert unpacked(packed([Odd(1)])) == [Odd(1)]
    del CLASSES["Odd"]
    with pytest.raises(TypeError, match="Path cannot"):
        packed([Path("x")])
    for odd in ({"kind": "Path", "value": {}}, {"kind": "LatentChoice", "value": {}}, {"value": 3}):
        with pytest.raises((KeyError, TypeError)):
            unpacked(odd)


def test_without_a_folder_nothing_is_kept() -> None:
    cache = StageCache()
    assert cache.get("number", lambda: 3) == 3 and cache.get("number", lambda: 4) == 4
    cache.clear()
