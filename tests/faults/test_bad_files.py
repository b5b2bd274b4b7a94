"""Generated and damaged files: read as they should be or refused in one sentence; the long form is ``scripts/soak``."""

from __future__ import annotations

import mmap
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from crlseq.config import DataConfig
from crlseq.data import hdf5
from crlseq.data.dataset import read_data
from crlseq.data.embeddings import read_embeddings
from crlseq.errors import InputError
from tests.faults.isolated import isolated
from tests.faults.outcomes import Outcome, fitted, read
from tests.faults.screens import Damage, Recipe, bases, categories_beside, damage, damages, make, recipes, write
from tests.support import check_refusal, edited, fit_file, invoke, small_screen, succeeds

SLICE: dict[str, Any] = {
    "deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip
ROUTES = ["file", "file", "file", "memory", "view", "backed", "masked"]


def of_recipe(recipe: Recipe, route: str, folder: Path, fit: bool = False) -> Outcome:
    """What becomes of a generated screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = folder / "screen.h5ad"
        in_file = route in ("file", "backed")
        try:
            made = write(recipe, path) if in_file else make(recipe)
        except (TypeError, ValueError, NotImplementedError) as error:  # scipy or anndata does not take it
            return {"outcome": "not made", "detail": str(error)[:100]}
        if in_file:
            if fit:
                return fitted(path)
            if route == "file":
                return read(path, made)
            return read(ad.read_h5ad(path, backed="r"), made)
        adata = made.adata
        if route == "view":
            adata = adata[np.ones(adata.n_obs, dtype=bool)]
        elif route == "masked" and isinstance(adata.X, np.ndarray) and adata.X.size:
            adata.X = np.ma.masked_array(adata.X, mask=np.arange(adata.X.size).reshape(adata.X.shape) == 1)
            found = read(adata)
            assert found["outcome"] == "refused", found
            return found
        return read(adata, made)


def of_damage(recipe: Damage, files: list[Path], folder: Path, fit: bool = False) -> Outcome:
    """What becomes of a damaged file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = folder / "screen.h5ad"
        damage(recipe, files, path)
        return fitted(path) if fit else read(path)


def no_fault(function: Callable[[], Outcome], what: object) -> None:
    found = isolated(function)
    assert found["outcome"] != "fault", f"{what}\n{found['detail']}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bases(tmp_path_factory.mktemp("bases"))


def test_generated(tmp_path: Path) -> None:
    @settings(max_examples=40, **SLICE)
    @given(recipes(), st.sampled_from(ROUTES))
    def check(recipe: Recipe, route: str) -> None:
        no_fault(lambda: of_recipe(recipe, route, tmp_path), (recipe, route))

    check()


def test_damaged(tmp_path: Path, sound: list[Path]) -> None:
    @settings(max_examples=60, **SLICE)
    @given(damages(len(sound)))
    def check(recipe: Damage) -> None:
        no_fault(lambda: of_damage(recipe, sound, tmp_path), recipe)

    check()


# --- what was found by the long form, and mended


def refused(path: Path, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_data(path, DataConfig(), 0)
    assert invoke("check", path).code == 3


def test_a_link_to_itself_in_the_place_of_the_matrix(screen_file: Path, tmp_path: Path) -> None:
    with edited(screen_file, tmp_path / "odd.h5ad") as handle:
        del handle["X"]
        handle["X"] = h5py.SoftLink("/X")
    refused(tmp_path / "odd.h5ad", "too many links")


@pytest.mark.parametrize("place", ["obs/again", "uns/a/b", "layers/counts"])
@pytest.mark.parametrize("link", ["/", "."])
def test_a_group_within_itself(screen_file: Path, tmp_path: Path, place: str, link: str) -> None:
    """Reading went round until Python's stack was full, for up to half a minute."""
    with edited(screen_file, tmp_path / "odd.h5ad") as handle:
        inside = handle.require_group(place.rpartition("/")[0])
        handle[place] = h5py.SoftLink(link) if link == "/" else inside
    refused(tmp_path / "odd.h5ad", f"{place.rpartition('/')[2]}' that lies within itself")


def test_links_that_lead_nowhere_or_twice_to_one_group_are_left_alone(screen_file: Path, tmp_path: Path) -> None:
    with edited(screen_file, tmp_path / "odd.h5ad") as handle:
        handle["uns/nowhere"] = h5py.SoftLink("/gone")
        handle["uns/round"] = h5py.SoftLink("/uns/round")
        handle["uns/var"] = handle["var"]
        handle["uns/var too"] = h5py.SoftLink("/var")
    expected, found = (read_data(p, DataConfig(), 0) for p in (screen_file, tmp_path / "odd.h5ad"))
    assert found.genes == expected.genes
    np.testing.assert_array_equal(found.condition, expected.condition)


@pytest.mark.parametrize("index", [2**31 - 1, -1, 40])
@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix])
def test_indices_out_of_the_matrix(tmp_path: Path, kind: Any, index: int) -> None:
    """The largest made numpy ask for 16 GiB, and compiled code follows them anywhere."""
    adata = small_screen()
    adata.X = kind(adata.X)
    adata.write_h5ad(tmp_path / "odd.h5ad")
    with h5py.File(tmp_path / "odd.h5ad", "r+") as handle:
        handle["X/indices"][7] = index if kind is sp.csr_matrix or index != 40 else 280
    refused(tmp_path / "odd.h5ad", "the matrix cannot be read")


def out_of_bounds(kind: Any, place: str) -> Any:
    """A matrix of 280 x 40 whose row pointers fall, or whose indices lead out of it, made past scipy's own checks."""
    matrix = kind(small_screen().X)
    if place == "pointers":
        matrix.indptr[5] = matrix.indptr[-1]
    else:
        matrix.indices[7] = 10**8
    return matrix


@pytest.mark.parametrize("place", ["pointers", "indices"])
@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix])
def test_a_matrix_in_memory_that_leads_out_of_it(kind: Any, place: str) -> None:
    adata = small_screen()
    adata.X = out_of_bounds(kind, place)
    with pytest.raises(InputError, match="the matrix cannot be read"):
        read_data(adata, DataConfig(), 0)


@pytest.mark.parametrize("place", ["X", "obsm"])
def test_embeddings_whose_indices_lead_out_of_them(tmp_path: Path, place: str) -> None:
    """Making them dense wrote wherever the indices pointed."""
    table = ad.AnnData(obs=small_screen().var)
    vectors = sp.csr_matrix(np.eye(40, 40, dtype=np.float32))
    if place == "X":
        table = ad.AnnData(vectors, obs=table.obs)
    else:
        table.obsm["vectors"] = vectors
    table.write_h5ad(tmp_path / "vectors.h5ad")
    with h5py.File(tmp_path / "vectors.h5ad", "r+") as handle:
        handle["X/indices" if place == "X" else "obsm/vectors/indices"][7] = 10**8

    def read_them() -> Outcome:
        with pytest.raises(InputError, match="the embeddings cannot be read"):
            read_embeddings(tmp_path / "vectors.h5ad")
        return {"outcome": "refused"}

    no_fault(read_them, place)


@pytest.mark.parametrize("place", ["raw/X", "layers/more"])
def test_folds_of_a_run_with_a_damaged_matrix_beside_x(linear_folder: Path, tmp_path: Path, place: str) -> None:
    """Cutting folds wrote wherever the row pointers said."""
    folder = tmp_path / "RUN"
    shutil.copytree(linear_folder, folder)
    adata = ad.read_h5ad(folder / "crlseq.h5ad")
    adata.raw = adata.copy()
    adata.layers["more"] = adata.X.copy()
    adata.write_h5ad(folder / "crlseq.h5ad")
    with h5py.File(folder / "crlseq.h5ad", "r+") as handle:
        handle[place + "/indptr"][5] = handle[place + "/indptr"][-1]

    def cross_validate() -> Outcome:
        check_refusal(*invoke("evaluate", folder, "--cross-validate", "--folds", 2), 3, "crlseq.h5ad cannot be read")
        return {"outcome": "refused"}

    no_fault(cross_validate, place)


@pytest.mark.parametrize("slot", ["layers", "uns", "obsm"])
def test_a_number_in_the_place_of_a_group(screen_file: Path, tmp_path: Path, slot: str) -> None:
    with edited(screen_file, tmp_path / "odd.h5ad") as handle:
        del handle[slot]
        handle[slot] = 5
    refused(tmp_path / "odd.h5ad", slot)


@pytest.mark.parametrize("slot", ["uns", "obsm"])
def test_a_link_that_leads_nowhere_in_the_place_of_a_group(screen_file: Path, tmp_path: Path, slot: str) -> None:
    """Nothing that a fit reads: its results take the place, instead of failing when everything is done."""
    path = tmp_path / "odd.h5ad"
    with edited(screen_file, path) as handle:
        del handle[slot]
        handle[slot] = h5py.SoftLink("/gone")
    found = read(path)
    assert found["outcome"] == "read", found


def test_bytes_that_are_no_text_in_another_column_are_left_as_they_are(tmp_path: Path) -> None:
    """The table was written anew once, and anndata could not open it any more."""
    small_screen().write_h5ad(tmp_path / "screen.h5ad")
    with h5py.File(tmp_path / "screen.h5ad", "r+") as handle:
        handle["obs/bytes"] = np.array([b"\xff", b"a"] * 140)
        handle["obs/bytes"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        handle["obs"].attrs["column-order"] = np.array([*handle["obs"].attrs["column-order"], "bytes"], dtype=object)
    fit_file(tmp_path / "screen.h5ad")
    obs = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad").obs
    assert obs["bytes"].tolist() == [b"\xff", b"a"] * 140
    assert list(obs)[-2:] == ["bytes", "crlseq_split"]


def test_backed_without_a_matrix(tmp_path: Path) -> None:
    adata = small_screen()
    adata.X = None
    adata.write_h5ad(tmp_path / "screen.h5ad")
    with pytest.raises(InputError, match="the matrix cannot be read"):
        read_data(ad.read_h5ad(tmp_path / "screen.h5ad", backed="r"), DataConfig(), 0)


@pytest.mark.parametrize("name", ["a\udcff", "a\0b"])
def test_names_that_are_no_text(name: str) -> None:
    adata = small_screen()
    try:
        adata.var_names = [name, *adata.var_names[1:]]
    except UnicodeEncodeError:
        pytest.skip("from pandas 3 on no index can hold such a name")
    with pytest.raises(InputError, match="is not valid text"):
        read_data(adata, DataConfig(), 0)


def test_the_h5ad_of_anndata_0_7_is_read(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small_screen().write_h5ad(tmp_path / "screen.h5ad")
        expected = read_data(tmp_path / "screen.h5ad", DataConfig(), 0)
        categories_beside(tmp_path / "screen.h5ad")
        found = read_data(tmp_path / "screen.h5ad", DataConfig(), 0)
    assert found.condition_names == expected.condition_names
    np.testing.assert_array_equal(found.condition, expected.condition)


@pytest.mark.parametrize("index", [0, 1])
def test_a_heap_of_texts_that_never_ends(screen_file: Path, tmp_path: Path, index: int) -> None:
    """HDF5 steps through it by the sizes of its objects: a size of 0 held it for ever, and so did one that overflows."""
    content = bytearray(screen_file.read_bytes())
    start = content.find(b"GCOL\1")
    assert start > 0
    # The first object: its index, and a size that makes the step 0.
    content[start + 16 : start + 18] = index.to_bytes(2, "little")
    content[start + 24 : start + 32] = (2**64 - 16 if index else 0).to_bytes(8, "little")
    (tmp_path / "odd.h5ad").write_bytes(content)

    def read_it() -> Outcome:
        refused(tmp_path / "odd.h5ad", "has a text heap that never ends")
        return {"outcome": "refused"}

    no_fault(read_it, index)


def test_heaps_are_found_wherever_a_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once: within what is searched at a time, across its end, and at the end of the file."""
    monkeypatch.setattr(hdf5, "WINDOW", page := mmap.PAGESIZE)
    places = [8, page - 21, page - 3, 2 * page, 3 * page - 21, 3 * page + 1]
    content = bytearray(3 * page + 40)
    for place in places:
        content[place : place + 16] = hdf5.HEAP + b"\0\0\0" + (16).to_bytes(8, "little")
    (tmp_path / "file").write_bytes(content)
    with (
        (tmp_path / "file").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert [*hdf5._heaps(mapped)] == [(place, place + 16) for place in places]


def test_false_heaps_take_no_longer_than_their_bytes(
    screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """130 kB that look like the beginnings of 4,096 heaps, each of which would hold all of the others."""
    unit = b"\1\0\0\0\0\0\0\0" + (16).to_bytes(8, "little") + b"GCOL\1\0\0\0" + (1 << 62).to_bytes(8, "little")
    with edited(screen_file, tmp_path / "screen.h5ad") as handle:
        handle["uns/blob"] = np.frombuffer(unit * 4096, dtype="u1")
    looked, unpack = 0, hdf5.OBJECT

    class Counting:
        size = unpack.size

        @staticmethod
        def unpack_from(content: Any, place: int) -> tuple[Any, ...]:
            nonlocal looked
            looked += 1
            return unpack.unpack_from(content, place)

    monkeypatch.setattr(hdf5, "OBJECT", Counting)
    succeeds("check", tmp_path / "screen.h5ad")
    assert 0 < looked < 4 * 2 * 4096 * 8  # each place once, whenever the file is opened


def test_names_of_a_million_characters(tmp_path: Path) -> None:
    for kind in ("gene", "cell", "perturbation"):
        adata = small_screen()
        if kind == "gene":
            adata.var_names = ["A" * 10**6, *adata.var_names[1:]]
        elif kind == "cell":
            adata.obs_names = ["A" * 10**6, *adata.obs_names[1:]]
        else:
            adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace("g0", "A" * 10**6)
        with pytest.raises(InputError, match=f"a {kind} name has 1000000 characters: 'AAAAAAAAAAAAAAAAAAAA' and"):
            read_data(adata, DataConfig(), 0)


READERS: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "RUN"],
    "evaluate folds": ["evaluate", "RUN", "--cross-validate"],
    "predict": ["predict", "RUN", "-p", "g0", "--output", "virtual.h5ad"],
    "export": ["export", "RUN", "--format", "h5ad", "--output", "cells.h5ad"],
    "export of labels": ["export", "RUN", "--format", "gears", "--output", "gears.h5ad"],
    "embedding": ["plot", "RUN", "embedding", "--output", "cells.png"],
}


@pytest.mark.parametrize("command", READERS)
def test_a_heap_that_never_ends_within_a_run(
    command: str, linear_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run folder holds is checked as inputs are."""
    shutil.copytree(linear_folder, tmp_path / "RUN")
    content = bytearray((tmp_path / "RUN" / "crlseq.h5ad").read_bytes())
    start = content.find(b"GCOL\1")
    content[start + 16 : start + 18] = bytes(2)
    content[start + 24 : start + 32] = bytes(8)
    (tmp_path / "RUN" / "crlseq.h5ad").write_bytes(content)
    monkeypatch.chdir(tmp_path)

    def ask() -> Outcome:
        check_refusal(*invoke(*READERS[command]), 3, "has a text heap that never ends")
        return {"outcome": "refused"}

    no_fault(ask, command)
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]
