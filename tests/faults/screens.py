"""Screens as nobody should write them, and files that were damaged: hypothesis strategies, and what must become of each.

A strategy draws a recipe (kinds, and a seed for the numbers), so that a failure is told in a line and made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from hypothesis import strategies as st

NAMES = ["g1", "STAT1", "A/B", "Δγ", "=1+1", "x y", "nan", "0", "it's", "NKX2-1", "\x1b[31m", "HLA-A"]
CONTROLS = ["control", "ctrl", "NT", "non-targeting"]

# --- matrices


def counts(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.poisson(rng.gamma(1.0, 2.0, shape[1]), shape).astype(float)


VALUES: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "counts": counts,
    "log": lambda rng, shape: np.log1p(counts(rng, shape) / 1.5),
    "scaled": lambda rng, shape: rng.standard_normal(shape),
    "sparse counts": lambda rng, shape: counts(rng, shape) * (rng.random(shape) < 0.1),
    "zero": lambda rng, shape: np.zeros(shape),
    "ones": lambda rng, shape: np.ones(shape),
    "one NaN": lambda rng, shape: _with(counts(rng, shape), rng, np.nan),
    "one infinite": lambda rng, shape: _with(counts(rng, shape), rng, -np.inf),
    "one negative": lambda rng, shape: _with(counts(rng, shape), rng, -1.0),
    "one huge": lambda rng, shape: _with(counts(rng, shape), rng, 1e30),
    "huge counts": lambda rng, shape: counts(rng, shape) * 1e7,
    "tiny": lambda rng, shape: rng.random(shape) * 1e-300,
    "binary": lambda rng, shape: (rng.random(shape) < 0.5).astype(float),
    "constant": lambda rng, shape: np.full(shape, 3.25),
}
DTYPES = ["f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u4", "u8", ">f4", ">f8", ">i4", "bool"]
FORMATS = ["dense", "fortran", "csr", "csc", "unsorted", "duplicates", "explicit zeros", "int64 indices", "gzip"]


def _with(x: np.ndarray, rng: np.random.Generator, value: float) -> np.ndarray:
    if x.size:
        x.flat[int(rng.integers(x.size))] = value
    return x


def matrix(x: np.ndarray, kind: str, rng: np.random.Generator) -> Any:
    """The same numbers in another format."""
    if kind in ("dense", "gzip"):
        return x
    if kind == "fortran":
        return np.asfortranarray(x)
    if kind == "csc":
        return sp.csc_matrix(x)
    sparse = sp.csr_matrix(x)
    if kind == "explicit zeros":
        ones = np.ones_like(x)
        sparse = sp.csr_matrix(ones)
        sparse.data = x.ravel().astype(x.dtype)
    if kind == "duplicates" and x.dtype.kind == "f" and np.isfinite(x).all():
        halves = sp.csr_matrix(sparse / 2)
        sparse = sp.csr_matrix(
            (np.repeat(halves.data, 2), np.repeat(halves.indices, 2), halves.indptr * 2), shape=x.shape
        )
    if kind == "unsorted":
        for row in range(len(x)):
            part = slice(sparse.indptr[row], sparse.indptr[row + 1])
            order = rng.permutation(sparse.indptr[row + 1] - sparse.indptr[row])
            sparse.indices[part], sparse.data[part] = sparse.indices[part][order], sparse.data[part][order]
        sparse.has_sorted_indices = False
    if kind == "int64 indices":
        sparse.indices, sparse.indptr = sparse.indices.astype(np.int64), sparse.indptr.astype(np.int64)
    return sparse


# --- labels

Column = pd.Series | np.ndarray | pd.Categorical


def mixed(labels: list[str]) -> Column:
    return pd.Series([int(label) if label.isdigit() else label for label in labels], dtype=object)


LABELS: dict[str, Callable[[list[str]], Column]] = {
    "strings": lambda labels: np.array(labels, dtype=object),
    "fixed width": lambda labels: np.array(labels, dtype=str),
    "categorical": pd.Categorical,
    "ordered": lambda labels: pd.Categorical(labels, sorted({*labels, "unused", "zz"}, reverse=True), ordered=True),
    "nullable": lambda labels: pd.Series(labels, dtype="string").mask(np.arange(len(labels)) % 7 == 3),
    "with missing": lambda labels: pd.Categorical([None if i % 11 == 5 else x for i, x in enumerate(labels)]),
    "bytes": lambda labels: np.array([label.encode() for label in labels], dtype=object),
    "mixed": mixed,
    "integers": lambda labels: pd.Series(pd.factorize(np.array(labels, dtype=object))[0]),
    "nullable integers": lambda labels: pd.Series(pd.factorize(np.array(labels, dtype=object))[0], dtype="Int64"),
    "booleans": lambda labels: np.array([label in CONTROLS for label in labels]),
    "floats": lambda labels: np.linspace(0, 1, len(labels)),
}


@dataclass(frozen=True)
class Recipe:
    """How a screen is made."""

    seed: int
    n_cells: int
    n_genes: int
    values: str
    dtype: str
    format: str
    labels: str
    control: str
    n_perturbations: int
    separator: str
    column: str
    extras: tuple[str, ...]


EXTRAS = ["raw", "layer", "uns", "obsm", "batch", "dates", "mixed column", "bytes column", "all missing column",
          "same cell names", "same gene names", "odd gene names", "numbers as names", "second column", "empty rows",
          "no X"]  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of which about half can be read."""
    # Mostly plain, so that what is odd is looked at and not hidden by something odder.
    plain = draw(st.integers(0, 3)) > 0
    values = draw(st.sampled_from(["counts", "counts", "log", "scaled"] if plain else list(VALUES)))
    few = st.sampled_from([0, 1, 2, 5, 30]) if not plain else st.nothing()
    return Recipe(
        seed=draw(st.integers(0, 2**16)),
        n_cells=draw(few | st.integers(90, 200)),
        n_genes=draw((st.sampled_from([1, 2, 3]) if not plain else st.nothing()) | st.integers(8, 30)),
        values=values,
        dtype=draw(st.sampled_from(["f4", "f8"] if plain and values != "counts" else DTYPES)),
        format=draw(st.sampled_from(FORMATS)),
        labels=draw(st.sampled_from(list(LABELS)[:8] if plain else list(LABELS))),
        control=draw(st.sampled_from(CONTROLS if plain else [*CONTROLS, "", "wild type"])),
        n_perturbations=draw(st.integers(2, 5) if plain else st.integers(0, 8)),
        separator=draw(st.sampled_from(["", "+", "_", ",", " || "])),
        column=draw(st.sampled_from(["perturbation", "condition", "guide_ids", "treatment", "weird/name"])),
        extras=tuple(draw(st.lists(st.sampled_from(EXTRAS), max_size=2 if plain else 4, unique=True))),
    )


@dataclass(frozen=True)
class Made:
    """A screen, its column of labels, these as text (None: missing), and its numbers as float64."""

    adata: ad.AnnData
    column: str
    labels: list[str | None]
    x: np.ndarray


def make(recipe: Recipe) -> Made:
    """The screen of a recipe."""
    rng = np.random.default_rng(recipe.seed)
    n, g = recipe.n_cells, recipe.n_genes
    names = [*rng.permutation(NAMES)[: recipe.n_perturbations]]
    if recipe.separator and len(names) > 2:
        names.append(recipe.separator.join(names[:2]))
    pool = [recipe.control, *names]
    texts = [str(pool[i]) for i in np.sort(rng.integers(len(pool), size=n))]
    x = VALUES[recipe.values](rng, (n, g))
    if "empty rows" in recipe.extras:
        x[: n // 3] = 0
    with np.errstate(all="ignore"):
        x = np.nan_to_num(x, nan=0, posinf=0, neginf=0) if np.dtype(recipe.dtype).kind in "iub" else x
        x = x.astype(recipe.dtype)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n)])
    obs[recipe.column] = _column(LABELS[recipe.labels](texts), obs.index)
    var = pd.DataFrame(index=[f"gene{i}" for i in range(g)])
    adata = ad.AnnData(matrix(x, recipe.format, rng), obs, var)
    for extra in sorted(recipe.extras, key="no X".__eq__):  # last, since raw is a copy
        _add(adata, extra, rng)
    column = obs[recipe.column]
    labels = [None if pd.isna(v) else v.decode() if isinstance(v, bytes) else str(v) for v in column]
    return Made(adata, recipe.column, labels, np.asarray(x, dtype=float))


def _column(values: Column, index: pd.Index) -> Any:
    return values.set_axis(index) if isinstance(values, pd.Series) else values


def _add(adata: ad.AnnData, extra: str, rng: np.random.Generator) -> None:
    n, g = adata.shape
    if extra == "raw":
        adata.raw = adata.copy()
    elif extra == "layer":
        adata.layers["counts"] = rng.poisson(1.0, (n, g)).astype(np.int32)
    elif extra == "uns":
        adata.uns = {"a": {"b": {"c": np.arange(3)}}, "text": "x" * 100, "table": pd.DataFrame({"q": [1, 2]})}
    elif extra == "obsm":
        adata.obsm["X_pca"] = rng.standard_normal((n, 3))
        adata.obsm["table"] = pd.DataFrame({"u": np.arange(n)}, index=adata.obs_names)
    elif extra == "batch":
        adata.obs["batch"] = pd.Categorical(rng.choice(["b1", "b2"], n))
    elif extra == "dates":
        adata.obs["day"] = pd.date_range("2020-01-01", periods=n).astype(str)
    elif extra == "mixed column":
        adata.obs["mixed"] = pd.Series([i if i % 2 else f"s{i}" for i in range(n)], dtype=object, index=adata.obs_names)
    elif extra == "bytes column":
        adata.obs["bytes"] = [b"\xff" if i % 2 else b"a" for i in range(n)]
    elif extra == "all missing column":
        adata.obs["nothing"] = np.full(n, np.nan)
    elif extra == "same cell names" and n > 1:
        adata.obs_names = ["cell0", "cell0", *adata.obs_names[2:]]
    elif extra == "same gene names" and g > 1:
        adata.var_names = ["gene0", "gene0", *adata.var_names[2:]]
    elif extra == "odd gene names":
        adata.var_names = [("", "a/b", "Δ", "=1", "\x1b[2J", "nan")[i] if i < 6 else f"gene{i}" for i in range(g)]
    elif extra == "numbers as names":
        adata.obs_names = [str(i) for i in range(n)]
    elif extra == "second column":
        adata.obs["gene"] = pd.Categorical(rng.choice(["non-targeting", "a", "b"], n))
    elif extra == "no X":
        adata.X = None


def write(recipe: Recipe, path: Path) -> Made:
    """Write the screen as anndata does; what anndata refuses to write is put in with h5py."""
    made = make(recipe)
    adata = made.adata.copy()
    late: dict[str, np.ndarray] = {}
    for name in list(adata.obs):
        column = adata.obs[name]
        if column.dtype == object and any(isinstance(value, bytes | int) for value in column):
            late[name] = np.array([v if isinstance(v, bytes) else str(v).encode() for v in column], dtype="S")
            adata.obs[name] = np.zeros(len(column))
    if "/" in recipe.column:
        adata.obs = adata.obs.rename(columns={recipe.column: recipe.column.replace("/", "_")})
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path, compression="gzip" if recipe.format == "gzip" else None)
    with h5py.File(path, "r+") as handle:
        for name, values in late.items():
            key = name.replace("/", "_")
            attributes = {"encoding-type": "array", "encoding-version": "0.2.0"}
            del handle["obs"][key]
            handle["obs"].create_dataset(key, data=values).attrs.update(attributes)
    return made


# --- damage


def older(path: Path) -> None:
    """The h5ad of anndata 0.6: tables as compound arrays, levels in uns, and a sparse matrix by ``h5sparse``."""
    with h5py.File(path, "r+") as handle:
        for key in ("obs", "var"):
            table = ad.io.read_elem(handle[key])
            names = np.array([str(name).encode() for name in table.index])
            columns = [("index", names.dtype if len(names) else "S1")]
            values: dict[str, np.ndarray] = {"index": names}
            for name, column in table.items():
                if isinstance(column.dtype, pd.CategoricalDtype):
                    levels = np.array([str(level) for level in column.cat.categories], dtype=object)
                    if f"uns/{name}_categories" in handle:
                        del handle[f"uns/{name}_categories"]
                    handle.create_dataset(f"uns/{name}_categories", data=levels, dtype=h5py.string_dtype())
                    values[str(name)] = column.cat.codes.to_numpy()
                elif column.dtype.kind in "iufb":
                    values[str(name)] = column.to_numpy()
                else:
                    values[str(name)] = np.array([str(v).encode() for v in column], dtype="S")
            columns = [(name, value.dtype if value.dtype != "S" else "S1") for name, value in values.items()]
            records = np.zeros(len(table), dtype=columns)
            for name, value in values.items():
                records[name] = value
            del handle[key]
            handle[key] = records
        if isinstance(handle.get("X"), h5py.Group):
            x = handle["X"]
            kind = x.attrs["encoding-type"].removesuffix("_matrix")
            shape = x.attrs["shape"]
            for name in list(x.attrs):
                del x.attrs[name]
            x.attrs.update({"h5sparse_format": kind, "h5sparse_shape": shape})
        for name in list(handle.attrs):
            del handle.attrs[name]


def categories_beside(path: Path) -> None:
    """The h5ad of anndata 0.7: levels of categories in a group beside the codes, which point to them."""
    with h5py.File(path, "r+") as handle:
        for key in ("obs", "var"):
            handle[key].attrs["encoding-version"] = "0.1.0"
            for name in list(handle[key]):
                if isinstance(handle[key][name], h5py.Group) and "codes" in handle[key][name]:
                    old = handle[key][name]
                    levels, codes, ordered = old["categories"][:], old["codes"][:], bool(old.attrs["ordered"])
                    del handle[key][name]
                    place = handle.require_group(f"{key}/__categories")
                    place[name] = levels
                    place[name].attrs["ordered"] = ordered
                    handle[key][name] = codes
                    handle[key][name].attrs["categories"] = place[name].ref
        for name in list(handle.attrs):
            del handle.attrs[name]


def _every(handle: h5py.File) -> list[str]:
    found: list[str] = []
    handle.visit(found.append)
    return sorted(found)


def _flip(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    # Half of the flips go where the structure is.
    for _ in range(int(rng.integers(1, 30))):
        limit = len(content) if rng.random() < 0.5 else min(4096, len(content))
        content[int(rng.integers(limit))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def _cut(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.integers(len(content)))])


def _blank(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    start, length = int(rng.integers(len(content))), int(rng.integers(1, 5000))
    content[start : start + length] = rng.bytes(len(content[start : start + length])) if rng.random() < 0.5 else bytes(
        len(content[start : start + length])
    )  # fmt: skip
    path.write_bytes(content)


def _shift(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    at = int(rng.integers(len(content)))
    path.write_bytes(content[:at] + (rng.bytes(7) + content[at:] if rng.random() < 0.5 else content[at + 7 :]))


def _delete(path: Path, rng: np.random.Generator) -> None:
    with h5py.File(path, "r+") as handle:
        del handle[str(rng.choice(_every(handle)))]


def _replace(path: Path, rng: np.random.Generator) -> None:
    others: list[Any] = [
        np.zeros(0), np.array(5), "text", np.arange(7), np.zeros((2, 2, 2)), np.array([b"a", b"b"]), b"\xff\xfe",
        np.zeros(3, dtype=[("a", "i4"), ("b", "S3")]), np.array([1 + 2j]), np.full(740, -5), np.full((740, 40), np.nan),
        h5py.Empty("f4"), np.arange(740)[::-1], np.full(741, 2**40),
    ]  # fmt: skip
    with h5py.File(path, "r+") as handle:
        key = str(rng.choice(_every(handle)))
        attributes = dict(handle[key].attrs)
        del handle[key]
        handle[key] = others[int(rng.integers(len(others)))]
        if rng.random() < 0.5:
            handle[key].attrs.update(attributes)


def _relabel(path: Path, rng: np.random.Generator) -> None:
    kinds = ["array", "csr_matrix", "csc_matrix", "dataframe", "categorical", "string-array", "nullable-integer",
             "string", "numeric-scalar", "dict", "rec-array", "awkward-array", "raw", "nonsense", ""]  # fmt: skip
    with h5py.File(path, "r+") as handle:
        key = str(rng.choice([*_every(handle), "/"]))
        attributes = handle[key].attrs
        name = str(rng.choice([*attributes, "encoding-type", "shape", "column-order", "_index", "ordered"]))
        choices: list[Any] = [str(rng.choice(kinds)), np.array([3, 4]), np.array([2**40, 2**40]), -1, True,
                              np.array(["a", "perturbation"], dtype=object), "0.9.9", h5py.Empty("S10")]  # fmt: skip
        if rng.random() < 0.2 and name in attributes:
            del attributes[name]
        else:
            attributes[name] = choices[int(rng.integers(len(choices)))]


def _dangle(path: Path, rng: np.random.Generator) -> None:
    with h5py.File(path, "r+") as handle:
        key = str(rng.choice(_every(handle)))
        del handle[key]
        kind = int(rng.integers(4))
        if kind == 0:
            handle[key] = h5py.SoftLink("/nowhere")
        elif kind == 1:
            handle[key] = h5py.SoftLink("/" + key)
        elif kind == 2:
            handle[key] = handle["/"]
        else:
            handle["gone"] = np.arange(3)
            reference = handle["gone"].ref
            del handle["gone"]
            handle[key] = np.arange(740)
            handle[key].attrs["categories"] = reference


def _numbers(path: Path, rng: np.random.Generator) -> None:
    """Numbers that are valid and wrong: codes, indices, pointers."""
    with h5py.File(path, "r+") as handle:
        arrays = [key for key in _every(handle) if isinstance(handle[key], h5py.Dataset) and handle[key].dtype.kind in "iuf"
                  and handle[key].ndim == 1 and handle[key].size]  # fmt: skip
        if not arrays:
            return
        array = handle[str(rng.choice(arrays))]
        value = [-1, 0, 127, 2**31 - 1, -(2**31), 10**6][int(rng.integers(6))]
        if array.dtype.kind in "iu":
            info = np.iinfo(array.dtype)
            value = min(max(value, info.min), info.max)
        array[int(rng.integers(array.size))] = value


DAMAGES = [_flip, _cut, _blank, _shift, _delete, _replace, _relabel, _dangle, _numbers]


@dataclass(frozen=True)
class Damage:
    """What is done to a copy of a sound file."""

    base: int
    older: str
    kind: int
    seed: int


def damages(n_bases: int) -> st.SearchStrategy[Damage]:
    """Ways to damage one of `n_bases` files."""
    return st.builds(
        Damage, st.integers(0, n_bases - 1), st.sampled_from(["", "", "", "0.7", "0.7", "0.6"]),
        st.integers(0, len(DAMAGES) - 1), st.integers(0, 2**32 - 1),
    )  # fmt: skip


def bases(folder: Path) -> list[Path]:
    """Sound files of several formats."""
    kinds = [
        ("csr", "categorical"),
        ("gzip", "strings"),
        ("csc", "nullable"),
        ("dense", "fixed width"),
        ("csr", "ordered"),
    ]
    paths = []
    for i, (kind, labels) in enumerate(kinds):
        extras = ("raw", "layer", "uns", "obsm", "batch")
        path = folder / f"base{i}.h5ad"
        write(Recipe(i, 90, 20, "counts", "f4", kind, labels, "control", 4, "+", "perturbation", extras), path)
        paths.append(path)
    return paths


def damage(recipe: Damage, files: list[Path], path: Path) -> None:
    """A damaged copy at `path`."""
    shutil.copy(files[recipe.base], path)
    if recipe.older:
        {"0.6": older, "0.7": categories_beside}[recipe.older](path)
    # What h5py does not let be written leaves a sound file, which is a case as well.
    with suppress(KeyError, ValueError, TypeError, OSError, RuntimeError):
        DAMAGES[recipe.kind](path, np.random.default_rng(recipe.seed))
