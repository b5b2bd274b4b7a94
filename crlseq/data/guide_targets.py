"""The genes that guides target, where a file or a table says so: a guide map, CELLxGENE's ``uns``, or ``var`` of a modality."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from crlseq.data.controls import is_control_name
from crlseq.data.files import is_cell_ranger, open_store, readable
from crlseq.data.guide_names import CONTROL
from crlseq.errors import InputError
from crlseq.storage.files import read_text

TARGETS = "genetic_perturbations"  # of uns, by genetic_perturbation_id, as CELLxGENE has them
ID_KEY = "genetic_perturbation_id"
TARGET_COLUMNS = (
    "intended_target_name", "target_gene", "gene_target", "guide_target", "target", "gene", "gene_name", "gene_symbol",
    "target_gene_name", "target_name", "perturbation",
)  # fmt: skip


def read_guide_map(path: str | Path) -> dict[str, str]:
    """Gene by guide, as `read_pairs`."""
    return read_pairs(path, "guide map", "guide", "gene", ("gene", "target", "target_gene", "gene_name", "symbol"))


def read_pairs(path: str | Path, table: str, key: str, value: str, heads: Container[str]) -> dict[str, str]:
    """Values by key from a ``table`` with a key and its value a line, tabs or commas between, in its order. A first line is
    a header, and passed over, if its second field is one of ``heads``.

    InputError if it cannot be read, a line has not two fields, or a key is given two values.
    """
    try:
        lines = read_text(Path(path)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"The {table} {path} cannot be read: {why}.", "Give a text file.") from None
    found: dict[str, str] = {}
    mark = "\t" if any("\t" in line for line in lines) else ","
    for number, line in enumerate(lines, 1):
        fields = [field.strip().strip('"') for field in line.split(mark)]
        if not line.strip() or line.startswith("#"):
            continue
        if len(fields) < 2 or not all(fields[:2]):
            raise InputError(
                f"Line {number} of {table} {path} has no {key} and {value}.", f"Write {key}, tab, {value}."
            )
        if not found and number == 1 and fields[1].casefold() in heads:
            continue
        if found.setdefault(fields[0], fields[1]) != fields[1]:
            raise InputError(
                f"Line {number} of {table} {path} gives {fields[0]!r} a second {value}.", f"Give it one {value}."
            )
    if not found:
        raise InputError(f"The {table} {path} is empty.", f"Write one {key}, a tab and its {value} per line.")
    return found


def read_targets(path: str | Path) -> dict[str, str]:
    """Program of each perturbation, as `read_pairs`, in the order of the table: upstream programs come first."""
    return read_pairs(path, "table of targets", "perturbation", "program", ("program",))


def targets_in_uns(source: str | Path | ad.AnnData) -> dict[str, str]:
    """Target of each guide in CELLxGENE's table of them; empty where there is none."""
    if isinstance(source, ad.AnnData):
        entries: Any = source.uns.get(TARGETS, {})
    elif is_cell_ranger(Path(source)):
        return {}
    else:
        with open_store(Path(source)) as store, readable(str(source), f"uns[{TARGETS!r}]"):
            entries = ad.io.read_elem(store[f"uns/{TARGETS}"]) if f"uns/{TARGETS}" in store else {}
    if not isinstance(entries, Mapping):
        return {}
    return {str(guide): _target_of(str(guide), entry) for guide, entry in entries.items()}


def _target_of(guide: str, entry: Any) -> str:
    """Of an entry with its ``role`` and ``target_features`` (symbols by Ensembl identifier); the guide's name without any."""
    if not isinstance(entry, Mapping):
        return str(entry)
    if str(entry.get("role", "")).casefold() == "control":
        return CONTROL
    named = next((entry[key] for key in ("target_features", "derived_features", *TARGET_COLUMNS) if key in entry), ())
    symbols = [str(name) for name in (named.values() if isinstance(named, Mapping) else np.atleast_1d(named))]
    # A guide may overlap a second gene.
    return next((name for name in symbols if guide.startswith(name)), symbols[0] if symbols else guide)


def targets_in_var(source: str | Path | ad.AnnData, key: str) -> dict[str, str] | None:
    """Target of each guide, if the table of guides of a modality has a column of them."""
    with open_store(Path(str(source))) as store, readable(str(source), f"the table of guides of {key!r}"):
        table = ad.io.read_elem(store.parent[key]["var"])
    columns = {str(name).casefold(): name for name in table.columns}
    found = next((columns[name] for name in TARGET_COLUMNS if name in columns), None)
    if found is None:
        return None
    targets = table[found].astype(object)
    control = np.zeros(len(table), dtype=bool)
    if "targeting" in columns:  # a truth value, or the word
        control |= table[columns["targeting"]].astype(str).str.casefold().isin(("false", "0", "no")).to_numpy()
    for name in ("type", "guide_type", "targeting"):
        if name in columns:
            control |= table[columns[name]].astype(str).map(is_control_name).to_numpy(dtype=bool)
    return {
        str(guide): CONTROL if is_control else str(guide) if pd.isna(target) else str(target)
        for guide, target, is_control in zip(table.index, targets, control, strict=True)
    }
