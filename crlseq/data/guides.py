"""Guides -> perturbations: which gene a guide is of, and which guides a cell carries.

*Genes of guides.* A table (``--guide-map``) says it, or the names do: one style of writing is chosen for all of them,
the one of `GUIDE_STYLES` that fits most, and a name that it does not fit is a gene of its own. Guides whose gene is a
known control label, or the given one, are control guides.

*Guides of cells.* A column names them (several joined by ``|``, ``;`` or ``,``, or by ``--separator``), or they are
counted. Of a cell's counts, guides of one gene are summed; with the largest two sums a >= b of a total N, the cell

- is not assigned if a < ``min_umis``;
- has the first gene if a >= ``min_share`` N;
- has both if b >= ``min_umis`` and a + b >= ``min_share`` N;
- is ambiguous (``multiple``) otherwise.

The defaults, 5 UMIs and a share of 0.8, are those of sceptre's assignment by the largest count (Barry et al. 2024,
Genome Biology 25:124), which takes single guides. What results is a column of labels as in any other screen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from crlseq.config import DataConfig
from crlseq.data.matrix import EXPRESSION, Screen, as_csr, open_store, readable
from crlseq.data.perturbations import (
    CONTROL_LABELS,
    NEVER_PERTURBATIONS,
    Perturbations,
    read_perturbations,
    refuse_missing_column,
)
from crlseq.errors import InputError, UsageError, few

GUIDE_LABELS = "crlseq_perturbation"  # column of obs with what guides were read as
CONTROL = "control"
JOINED, BETWEEN_GUIDES = "+", re.compile(r"\s*[|;,]+\s*")
AMBIGUOUS, UNASSIGNED = "multiple", "unassigned"
MANY, NONE = -2, -1  # in place of a cell's gene: of the two labels above
CONTROL_GUIDES = CONTROL_LABELS | frozenset(
    {"neg", "negctrl", "non-target", "nontarget", "scramble", "scrambled", "safe-targeting", "safe_targeting"}
    | {"no_site", "no-site", "one_non-gene_site", "one_intergenic_site"}
)
# How libraries write a gene and its guide; a prefix such as "sg" is taken off first.
_PREFIX = re.compile(r"^(?:sgRNA|gRNA|sg)[_\-. ](?=.)|^sg(?=[A-Z])")
GUIDE_STYLES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("GENE_+_POSITION", re.compile(r"(.+?)_[+-]_\d+(?:\..*)?")),
    ("GENE_SEQUENCE", re.compile(r"(.+)[_\-.:][ACGT]{17,}")),
    ("GENE_g1", re.compile(r"(.+)[_\-. ](?:sgRNA|gRNA|guide|sg|g|cr)[_\-. ]?\d+", re.IGNORECASE)),
    ("GENEg1", re.compile(r"(.+?)(?:sg|g)\d+")),
    ("GENE_1", re.compile(r"(.+)[_\-.]\d+")),
)
_NUMBERED = re.compile(r"(.{4,}?|.+?(?=[_\-. ]))[_\-. ]?\d+")  # "ctrl3", "NT_3", and not "NT3"


@dataclass(frozen=True, eq=False)
class Guides:
    """What guides say of every cell."""

    labels: pd.Categorical  # (cells,) the control label, "A", "A+B", or why a cell has none
    control_label: str  # of cells with control guides alone
    reason: str  # what was read, and how, in a sentence or two
    record: dict[str, Any]  # the same for run.json: thresholds, the rule, genes by guide, and cells by label
    number: np.ndarray  # (cells,) int64 which guide a cell carries, the most frequent one of several; -1 none


def read_labels(
    screen: Screen, source: str | Path | ad.AnnData, config: DataConfig
) -> tuple[Perturbations, Guides | None]:
    """Perturbations of all cells, from guides if the configuration names any.

    InputError if they cannot be read; UsageError if more than one place was named to read them from.
    """
    places = ("perturbation_key", "guide_key", "guide_counts")
    given = [f"--{name.replace('_', '-')}" for name in places if getattr(config, name) is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} were both given.", "Give only the one that has the perturbations.")
    if config.guide_key is None and config.guide_counts is None:
        if config.guide_map is not None:
            raise UsageError("--guide-map needs guides.", "Name them with --guide-key or --guide-counts.")
        return read_perturbations(screen.obs, config.perturbation_key, config.control_label, config.separator), None
    guides = _from_column(screen, config) if config.guide_key is not None else _from_counts(screen, source, config)
    table = pd.DataFrame({GUIDE_LABELS: guides.labels}, index=screen.obs.index)
    labels = read_perturbations(table, GUIDE_LABELS, guides.control_label, config.separator)
    return replace(labels, reason=guides.reason), guides


def genes_of_guides(
    names: Iterable[str], control_label: str | None = None, table: Mapping[str, str] | None = None
) -> tuple[dict[str, str], str]:
    """Gene of each guide, sorted by guide, and the rule: one of `GUIDE_STYLES`, ``sgGENE`` (a prefix), or ``table``.

    Control guides have the control label (``control`` where none was given): those whose gene or name it is, or, where
    none was given, any of `CONTROL_GUIDES`. InputError if a guide is not in the table of genes by guide, or no style
    fits half of the names.
    """
    guides = sorted(set(names))
    if table is not None:
        missing = [guide for guide in guides if guide not in table]
        if missing:
            what = f"{len(missing)} of {len(guides)} guides are not in the guide map, first {missing[0]!r}."
            raise InputError(what, "Add one line per guide: the guide, a tab, its gene.")
        parsed, rule = {guide: table[guide] for guide in guides}, "table"
    else:
        parsed, rule = _by_style(guides, control_label)
    control = control_label or CONTROL
    return {g: control if _is_control(g, parsed[g], control_label) else parsed[g] for g in guides}, rule


def _by_style(guides: Sequence[str], control_label: str | None) -> tuple[dict[str, str], str]:
    short = {guide: _PREFIX.sub("", guide) for guide in guides}
    fits = {name: {g: m[1] for g in guides if (m := style.fullmatch(short[g]))} for name, style in GUIDE_STYLES}
    fits["sgGENE"] = {g: short[g] for g in guides if short[g] != g}
    rule = max(fits, key=lambda name: len(fits[name]))  # the first of equals
    named = [g for g in guides if not _is_control(g, fits[rule].get(g, short[g]), control_label)]
    if 2 * sum(g in fits[rule] for g in named) < len(named):
        first = next(g for g in named if g not in fits[rule])
        what = f"The names of the {len(guides)} guides do not contain their genes in a known style, such as {first!r}."
        hint = "Give a table of guides and genes with --guide-map; if the names are genes, use --perturbation-key."
        raise InputError(what, hint)
    return {g: fits[rule].get(g, short[g]) for g in guides}, rule


def _is_control(guide: str, gene: str, control_label: str | None) -> bool:
    if control_label is not None:
        return control_label in (guide, gene)
    numbered = _NUMBERED.fullmatch(gene)
    return gene.casefold() in CONTROL_GUIDES or (numbered is not None and numbered[1].casefold() in CONTROL_GUIDES)


def read_guide_map(path: str | Path) -> dict[str, str]:
    """Gene by guide from a table with a guide and its gene a line, tabs or commas between; a header is passed over.

    InputError if it cannot be read, a line has not two fields, or a guide is given two genes.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The guide map {path} cannot be read: {error}.", "Give a text file.") from None
    genes: dict[str, str] = {}
    mark = "\t" if any("\t" in line for line in lines) else ","
    for number, line in enumerate(lines, 1):
        fields = [field.strip().strip('"') for field in line.split(mark)]
        if not line.strip() or line.startswith("#"):
            continue
        if len(fields) < 2 or not all(fields[:2]):
            raise InputError(f"Line {number} of guide map {path} has no guide and gene.", "Write guide, tab, gene.")
        guide, gene = fields[:2]
        if not genes and number == 1 and gene.casefold() in ("gene", "target", "target_gene", "gene_name", "symbol"):
            continue
        if genes.setdefault(guide, gene) != gene:
            raise InputError(f"Line {number} of guide map {path} gives {guide!r} a second gene.", "Give it one gene.")
    if not genes:
        raise InputError(f"The guide map {path} is empty.", "Write one guide, a tab and its gene per line.")
    return genes


def _genes(names: Iterable[str], config: DataConfig) -> tuple[dict[str, str], str]:
    table = None if config.guide_map is None else read_guide_map(config.guide_map)
    genes, rule = genes_of_guides(names, config.control_label, table)
    mark = config.separator or JOINED
    torn = next((gene for gene in genes.values() if mark in gene), None)
    if torn is not None:
        what = f"The gene {torn!r} of a guide contains {mark!r}, which separates the genes of a combination."
        raise InputError(what, "Choose another --separator, or rename the gene in a --guide-map.")
    return genes, rule


def _from_column(screen: Screen, config: DataConfig) -> Guides:
    key = str(config.guide_key)
    refuse_missing_column(screen.obs, key, "--guide-key")
    column = screen.obs[key].astype(object)
    codes, texts = pd.factorize(column.map(lambda value: str(value).strip(), na_action="ignore"))
    parts = [_split(text, config.separator) for text in texts]
    known = [[part for part in own if part.casefold() not in NEVER_PERTURBATIONS] for own in parts]
    genes, rule = _genes((part for own in known for part in own), config)
    control, mark = config.control_label or CONTROL, config.separator or JOINED
    written = []
    for text, own, sure in zip(texts, parts, known, strict=True):
        unsure = [part for part in own if part not in sure] or ([] if own else [text])
        targets = sorted({genes[part] for part in sure} - {control})
        # "unassigned" stays, and is dropped and counted by it.
        written.append(unsure[0] if unsure else mark.join(targets) or control)
    labels = pd.Categorical(np.append(np.array(written, dtype=object), np.nan)[codes])
    return _guides(labels, control, genes, rule, f"Guides are named in column {key!r}", {"column": key}, codes)


def _split(text: str, separator: str | None) -> list[str]:
    if separator == "":
        return [text] if text else []
    pieces = BETWEEN_GUIDES.split(text) if separator is None else text.split(separator.strip() or separator)
    return [piece.strip() for piece in pieces if piece.strip()]


def _from_counts(screen: Screen, source: str | Path | ad.AnnData, config: DataConfig) -> Guides:
    key = str(config.guide_counts)
    counts, names, where = guide_counts(screen, source, key)
    genes, rule = _genes(names, config)
    control, mark = config.control_label or CONTROL, config.separator or JOINED
    targets = [control, *sorted(set(genes.values()) - {control})]
    number = {gene: i for i, gene in enumerate(targets)}
    column = np.array([number[genes[name]] for name in names], dtype=np.int64)
    member = sp.csr_matrix((np.ones(len(names)), (np.arange(len(names)), column)), (len(names), len(number)))
    first, second = assign(sp.csr_matrix(counts @ member), config.guide_min_umis, config.guide_min_share)
    pairs = second != NONE
    if not config.combinations:  # two genes in a cell of a screen with one guide a cell: a doublet
        first = np.where(pairs, MANY, first)
    written = np.array([*targets, AMBIGUOUS, UNASSIGNED], dtype=object)[first]
    for cell in np.flatnonzero(pairs & (first >= 0)):
        both = sorted({int(first[cell]), int(second[cell])} - {0})
        written[cell] = mark.join(targets[i] for i in both) or control
    n_pairs = int(pairs.sum())
    doublets = "(doublets, if each cell was given one guide; --no-combinations excludes them)"
    text = (
        f"Guides are counted in {where} {key!r}. A cell is assigned the gene with at least {config.guide_min_umis} "
        f"UMIs and a share of {config.guide_min_share:g}; {n_pairs} cells have two genes that reach this share together "
        f"{doublets if config.combinations else 'and are excluded'}"
    )
    about = {
        where: key, "min_umis": config.guide_min_umis, "min_share": config.guide_min_share, "cells_with_two": n_pairs
    }  # fmt: skip
    strongest = np.where(counts.getnnz(1) > 0, np.asarray(counts.argmax(1)).ravel(), NONE)
    return _guides(pd.Categorical(written), control, genes, rule, text, about, strongest)


def assign(counts: sp.csr_matrix, min_umis: int, min_share: float) -> tuple[np.ndarray, np.ndarray]:
    """First and second gene (cells,) of each cell by the rule at the head of this file.

    `counts` are (cells, genes) UMIs, guides of a gene summed. The genes are columns of it: the first is `NONE` where a
    cell has too few UMIs and `MANY` where it is ambiguous, the second `NONE` where there is none.
    """
    n, size, start = counts.shape[0], np.diff(counts.indptr), counts.indptr[:-1]
    total = np.asarray(counts.sum(1), dtype=float).ravel()
    order = np.lexsort((counts.indices, -counts.data, np.repeat(np.arange(n), size)))  # equal counts as the columns are
    value, column = np.append(counts.data[order], 0.0), np.append(counts.indices[order], NONE)

    def ranked(rank: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.where(size > rank, start + rank, len(order))
        return value[at], column[at]

    (a, gene_a), (b, gene_b) = ranked(0), ranked(1)
    enough = a >= min_umis
    tolerance = 1e-9 * np.maximum(total, 1.0)  # 0.8 of 15 is 12
    single = enough & (a >= min_share * total - tolerance)
    double = enough & ~single & (b >= min_umis) & (a + b >= min_share * total - tolerance)
    first = np.where(single | double, gene_a, np.where(enough, MANY, NONE))
    return first, np.where(double, gene_b, NONE)


def guide_counts(screen: Screen, source: str | Path | ad.AnnData, key: str) -> tuple[sp.csr_matrix, list[str], str]:
    """Counts (cells, guides), names of guides, and whether they are of ``obsm`` or a ``modality``.

    InputError if there is nothing of that name, guides have no names, or values are no counts.
    """
    if isinstance(source, ad.AnnData):
        if key not in source.obsm:
            raise _no_counts(screen.source, key, list(source.obsm))
        return *_table_of(source.obsm[key], key), "obsm"
    with open_store(Path(source)) as store, readable(screen.source, f"the guide counts {key!r}"):
        there = list(store["obsm"]) if "obsm" in store else []
        if key in there:
            return *_table_of(ad.io.read_elem(store["obsm"][key]), key), "obsm"
        modalities = store.parent if store.name == f"/mod/{EXPRESSION}" else {}
        if key not in modalities or key == EXPRESSION:
            raise _no_counts(screen.source, key, [*there, *(name for name in modalities if name != EXPRESSION)])
        guides = modalities[key]
        cells, names = (ad.io.read_elem(guides[part]).index.astype(str) for part in ("obs", "var"))
        counts = _as_counts(ad.io.read_elem(guides["X"]), key)
    # Cells that the modality lacks have no guide.
    place = cells.get_indexer(screen.obs.index.astype(str))
    padded = sp.csr_matrix(sp.vstack([counts, sp.csr_matrix((1, counts.shape[1]))], format="csr"))
    return sp.csr_matrix(padded[place]), list(names), "modality"


def _no_counts(source: str, key: str, there: list[str]) -> InputError:
    listed = few([*map(repr, sorted(there))]) or "none"
    return InputError(f"{source} has no guide counts {key!r}.", f"Name a table of obsm or an .h5mu modality: {listed}.")


def _table_of(element: Any, key: str) -> tuple[sp.csr_matrix, list[str]]:
    if not isinstance(element, pd.DataFrame):
        what = f"The guide counts obsm[{key!r}] do not name their guides."
        raise InputError(what, "Store them as a DataFrame with guides as columns, or as a modality of a MuData file.")
    return _as_counts(element.to_numpy(), key), [str(name) for name in element.columns]


def _as_counts(values: Any, key: str) -> sp.csr_matrix:
    try:
        counts = as_csr(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"The guide counts {key!r} are not numbers.", "Give UMI counts.") from error
    bad = (~np.isfinite(counts.data)) | (counts.data < 0) | (counts.data != np.rint(counts.data))
    if bad.any():
        what = f"The guide counts {key!r} have the value {counts.data[np.flatnonzero(bad)[0]]:g}, which is not a count."
        raise InputError(what, "Give raw UMI counts.")
    return counts


def _guides(
    labels: pd.Categorical,
    control: str,
    genes: dict[str, str],
    rule: str,
    where: str,
    about: dict[str, Any],
    number: np.ndarray,
) -> Guides:
    """With words: the rule, an example, and how many guides are of how many genes and of the control."""
    perturbing = [guide for guide, gene in genes.items() if gene != control]
    example = next((g for g in perturbing if genes[g] != g), None)
    how = "the guide map" if rule == "table" else f"names like {rule}"
    such = "" if example is None else f" ({example!r} is {genes[example]!r})"
    n_genes = len({genes[guide] for guide in perturbing})
    reason = (
        f"{where}. Genes are read from {how}{such}: {len(perturbing)} guides target {n_genes} genes and "
        f"{len(genes) - len(perturbing)} are controls."
    )
    cells = labels.value_counts()
    unnamed = int((labels.codes < 0).sum())
    record: dict[str, Any] = {
        **about, "rule": rule, "control_label": control, "genes": genes,
        "cells": {str(label): int(n) for label, n in cells.items() if n} | ({"missing": unnamed} if unnamed else {}),
    }  # fmt: skip
    return Guides(labels, control, reason, record, number.astype(np.int64))
