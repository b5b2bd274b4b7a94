"""Names of genes: symbols, Ensembl identifiers and aliases of the same genes, and which gene a name means.

A file names its genes in the index of ``var`` and again in columns beside it. A name is looked for in this order, and the
first place that knows it decides: the index; the columns; both without the version of an Ensembl identifier
(``ENSG00000115415.20``); both in another case; lists of aliases within a column. A name in another case or an alias must
mean one gene; one that is written as asked for means all genes that are called so, such as two identifiers of a symbol.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import pandas as pd

from crlseq.errors import few

ENSEMBL = re.compile(r"(?:ENS[A-Z]{0,6}G\d{11}|FBgn\d{7}|WBGene\d{8})(?:\.\d+)?", re.IGNORECASE)
_VERSION = re.compile(r"(?<=\d)\.\d+$")
_BETWEEN_ALIASES = re.compile(r"\s*[|,;/]\s*|\s+")
_SYMBOL = re.compile(r"[A-Za-z][A-Za-z0-9._\-]{0,24}(?:@|\(.{0,12}\))?")
MISSING = frozenset({"", "nan", "none", "na", "<na>"})  # of a name
SYMBOL_COLUMNS = (  # in order of preference; others are known by what stands in them
    "gene_symbol", "gene_symbols", "gene_name", "gene_names", "feature_name", "symbol", "hgnc_symbol", "gene_short_name",
)  # fmt: skip
DISTINCT = 0.5  # share of a column's entries that differ, from which they can be names
INDEX = "the index of var"


class GeneNames:
    """The genes of a screen or a run: `index` (genes,), and other names of them by the column of ``var``."""

    def __init__(self, index: Sequence[str], columns: Mapping[str, Sequence[str]]) -> None:
        self.index, self.columns = tuple(index), {key: tuple(values) for key, values in columns.items()}

    @classmethod
    def of(cls, var: pd.DataFrame) -> GeneNames:
        """Of a table of genes: its index, and columns of texts most of which differ."""
        return cls(tuple(map(str, var.index)), _name_columns(var))

    def only(self, genes: Sequence[str]) -> GeneNames:
        """The same names of these genes alone, in this order; a gene that is not known has one name."""
        at = {name: place for place, name in enumerate(self.index)}
        columns = {key: [own[at[gene]] if gene in at else "" for gene in genes] for key, own in self.columns.items()}
        return GeneNames(genes, columns)

    @cached_property
    def symbols(self) -> np.ndarray:
        """(genes,) what to call each gene: its symbol where the index has identifiers, else its name in the index."""
        names = np.array(self.index, dtype=object)
        key = self.symbol_column
        if key is not None:
            own = np.array(self.columns[key], dtype=object)
            known = np.array([name.casefold() not in MISSING for name in own], dtype=bool)
            names[known] = own[known]
        return names

    @cached_property
    def symbol_column(self) -> str | None:
        """The column with symbols, if the index has others: identifiers, or what a column called by `SYMBOL_COLUMNS` has not."""
        columns = [key for name in SYMBOL_COLUMNS for key in self.columns if _plain(key) == _plain(name)]
        if _are_identifiers(self.index):
            columns += self.columns
        return next((key for key in columns if _are_symbols(self.columns[key]) and not self._repeats(key)), None)

    def _repeats(self, key: str) -> bool:
        """Whether a column has the names of the index, perhaps before repeated ones were numbered."""
        return 2 * sum(a == b for a, b in zip(self.index, self.columns[key], strict=True)) > len(self.index)

    def find(self, name: str) -> tuple[int, ...]:
        """Places of the genes that a name means; none if it is not known, or means several in another spelling."""
        return self._found(name)[0]

    @cached_property
    def known(self) -> frozenset[str]:
        """All names of all genes, as they are written."""
        return frozenset(name for own in (self.index, *self.columns.values()) for name in own)

    def all_of(self, place: int) -> list[str]:
        """Every name of a gene."""
        return [self.index[place], *(own[place] for own in self.columns.values())]

    def in_words(self, names: Iterable[str]) -> str:
        """``5 in the index of var and 1 in column 'gene_name'``: where names were found."""
        where = Counter(place for name in names if (place := self._found(name)[1]))
        return " and ".join(f"{n} in {place}" for place, n in where.most_common())

    def _found(self, name: str) -> tuple[tuple[int, ...], str]:
        for spelled, spaces, exact in self._tables:
            for place, table in spaces:
                found = table.get(spelled(name), ())
                if found and (exact or len(found) == 1):
                    return found, place
        return (), ""

    @cached_property
    def _tables(self) -> list[tuple[Callable[[str], str], list[tuple[str, dict[str, tuple[int, ...]]]], bool]]:
        """Ways to spell a name, the places by name in each space spelled so, and whether a name may mean several genes."""
        spaces = [(INDEX, self.index), *((f"column {key!r}", values) for key, values in self.columns.items())]
        ways: list[tuple[Callable[[str], str], bool]] = [(str, True), (_unversioned, True), (_folded, False)]
        made = [
            (spelled, [(place, _places(enumerate(map(spelled, values)))) for place, values in spaces], exact)
            for spelled, exact in ways
        ]
        aliases = [
            (place, _places((i, _folded(part)) for i, text in enumerate(values) for part in _parts(text)))
            for place, values in spaces[1:]
        ]
        return [*made, (_folded, aliases, False)]


def _places(named: Iterable[tuple[int, str]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for i, name in named:
        if name.casefold() not in MISSING and (name not in found or found[name][-1] != i):
            found.setdefault(name, []).append(i)
    return {name: tuple(places) for name, places in found.items()}


def _parts(text: str) -> list[str]:
    parts = _BETWEEN_ALIASES.split(text)
    return parts if len(parts) > 1 else []


def _unversioned(name: str) -> str:
    return _VERSION.sub("", name) if ENSEMBL.fullmatch(name) else name


def _folded(name: str) -> str:
    return _unversioned(name).casefold()


def _plain(key: str) -> str:
    return key.casefold().replace("_", "").replace(" ", "").replace(".", "")


def _name_columns(var: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    found = {}
    for key in map(str, var.columns):
        column = var[key]
        if not (isinstance(column.dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(column.dtype)):
            continue
        texts = column.astype(object).where(column.notna(), "").map(str).map(str.strip)
        named = texts[~texts.str.casefold().isin(MISSING)]
        if len(named) and named.nunique() >= DISTINCT * len(named) and not np.array_equal(texts, var.index.astype(str)):
            found[key] = tuple(texts)
    return found


def _are_identifiers(names: Sequence[str]) -> bool:
    """Whether most are of Ensembl, Entrez or the like, which nobody reads."""
    return 2 * sum(bool(ENSEMBL.fullmatch(name)) or name.isdecimal() for name in names) > len(names)


def _are_symbols(names: Sequence[str]) -> bool:
    known = [name for name in names if name.casefold() not in MISSING]
    fit = sum(bool(_SYMBOL.fullmatch(name)) and not ENSEMBL.fullmatch(name) for name in known)
    return bool(known) and 2 * fit > len(known) and 2 * len(known) > len(names)


def naming(names: Sequence[str] | np.ndarray) -> str:
    """What names are like: ``Ensembl identifiers (such as ENSG00000115415)``."""
    some = sorted({str(name) for name in names[:200]})
    counts = {
        "Ensembl identifiers": sum(bool(ENSEMBL.fullmatch(name)) for name in some),
        "Entrez identifiers": sum(name.isdecimal() for name in some),
        "symbols in capitals": sum(name.isupper() and not ENSEMBL.fullmatch(name) for name in some),
    }
    kind = max(counts, key=lambda name: counts[name])
    return f"{kind if 2 * counts[kind] > len(some) else 'symbols'} (such as {some[0][:40]})"


def targets_in_words(names: GeneNames, targets: Sequence[str]) -> str:
    """How many of the targeted genes are measured, and under which name; a warning where none is."""
    targets = [*dict.fromkeys(targets)]  # of several guides
    found = [target for target in targets if names.find(target)]
    if not found:
        some, there = few([*map(repr, targets)], 3), naming(names.symbols)
        return (
            f"None of the {len(targets)} perturbed genes ({some}) is measured: genes of this file are {there}. Their own "
            "transcripts cannot be left out of the programs."
        )
    return f"{len(found)} of {len(targets)} perturbed genes are measured ({names.in_words(found)})."
