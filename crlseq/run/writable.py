"""Can anndata write it? Told before cells in memory are fitted, since the run has a copy of them. Files are copied as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import anndata as ad
import h5py
import pandas as pd

from crlseq.errors import InputError, few, in_a_line

ARRAYS = ("obsm", "varm", "obsp", "varp", "layers")


def refuse_unwritable(adata: ad.AnnData) -> None:
    """Refuse, by `InputError`, cells in memory that anndata would not write as an h5ad file.

    Everything but the matrices is written to memory, by anndata itself.
    """
    with ad.settings.override(allow_write_nullable_strings=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with h5py.File("scratch", "w", driver="core", backing_store=False) as scratch:
            faults = [fault for name, value in _slots(adata).items() for fault in _faults(scratch, name, value)]
    if not faults:
        return
    where, value, reason = faults[0]
    more = f" (and {few([name for name, _, _ in faults[1:]], 4)})" if len(faults) > 1 else ""
    raise InputError(f"anndata cannot write {where} ({_types(value)}): {reason}{more}.", _remedy(where, value))


def _slots(adata: ad.AnnData) -> dict[str, Any]:
    """Everything that is written besides matrices, by how it is called in Python, after what anndata does before."""
    slots: dict[str, Any] = {"adata.obs": _with_categories(adata.obs), "adata.var": _with_categories(adata.var)}
    slots |= {f"adata.{name}": _without_values(dict(getattr(adata, name))) for name in ARRAYS}
    if adata.raw is not None:
        slots |= {
            "adata.raw.var": _with_categories(adata.raw.var),
            "adata.raw.varm": _without_values(dict(adata.raw.varm)),
        }
    return slots | {"adata.uns": dict(adata.uns)}


def _with_categories(table: pd.DataFrame) -> pd.DataFrame:
    """The table as anndata writes it: texts that recur are categories, names are texts."""
    table = table.copy()
    table.index = table.index.astype(str)
    ad.AnnData.strings_to_categoricals(ad.AnnData(obs=pd.DataFrame(index=table.index)), table)
    return table


def _without_values(value: Any) -> Any:
    """Arrays of numbers without rows, since it is their kind alone that may not be written."""
    if isinstance(value, Mapping):
        return {key: _without_values(own) for key, own in value.items()}
    kind, rows = getattr(getattr(value, "dtype", None), "kind", "O"), getattr(value, "shape", ())
    return value[:0] if kind in "biufc" and rows else value


def _faults(scratch: h5py.File, where: str, value: Any) -> Iterator[tuple[str, Any, str]]:
    """The smallest parts that cannot be written, each with its value and why."""
    reason, found = _written(scratch, value), False
    if not reason:
        return
    if isinstance(value, pd.DataFrame):
        for k, name in enumerate(value.columns):
            if why := _written(scratch, value.iloc[:, [k]]):
                found = True
                yield f"{where}[{name!r}]", value.iloc[:, k], why
    elif isinstance(value, Mapping) and not all(isinstance(name, str) for name in value):
        reason = "its keys are not all text"
    elif isinstance(value, Mapping):
        for name, own in value.items():
            if why := _written(scratch, {name: own}):
                found = True
                yield from [*_faults(scratch, f"{where}[{name!r}]", own)] or [(f"{where}[{name!r}]", own, why)]
    if not found:
        yield where, value, reason


def _written(scratch: h5py.File, value: Any) -> str:
    """Why anndata does not write a value, empty if it does."""
    try:
        ad.io.write_elem(scratch, "x", value)
    except Exception as error:  # anndata and h5py raise what they please
        return in_a_line(error)
    finally:
        if "x" in scratch:
            del scratch["x"]
    return ""


def _remedy(where: str, value: Any) -> str:
    """What to do about a part, as code."""
    if isinstance(value, Mapping):
        return f"Change them: {where} = {{str(key): value for key, value in {where}.items()}}"
    if isinstance(value, pd.Series) and not where.startswith("adata.raw"):
        with h5py.File("scratch", "w", driver="core", backing_store=False) as scratch:
            if not _written(scratch, value.astype(str).to_frame()):
                return f"Make it text: {where} = {where}.astype(str), or remove it: del {where}"
    return f"Remove it: del {where}"


def _types(value: Any) -> str:
    """Of what type the values of a column are, or the part itself."""
    if not isinstance(value, pd.Series):
        return type(value).__name__
    values = value.cat.categories if isinstance(value.dtype, pd.CategoricalDtype) else value
    return ", ".join(sorted({type(one).__name__ for one in values})) if values.dtype == object else str(values.dtype)
