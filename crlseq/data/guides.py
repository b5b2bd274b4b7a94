"""Guides -> perturbations: which gene a guide is of, and which guides a cell carries.

*Genes of guides.* A table (``--guide-map``, or the file's own: see `crlseq.data.guide_targets`) says it, or the names do
(`crlseq.data.guide_names`). Guides whose gene is a known control, or the given one, are control guides.

*Guides of cells.* A column names them (several joined by ``|``, ``;``, ``,`` or ``+``, or by ``--separator``), or they
are counted. Of a cell's counts, guides of one gene are summed; with the largest two sums a >= b of a total N, the cell

- is not assigned if a < ``min_umis``;
- has the first gene if a >= ``min_share`` N;
- has both if b >= ``min_umis`` and a + b >= ``min_share`` N;
- is ambiguous (``multiple``) otherwise.

The defaults, 5 UMIs and a share of 0.8, are those of sceptre's assignment by the largest count (Barry et al. 2024,
Genome Biology 25:124), which takes single guides. Where that leaves most cells ambiguous, cells were given several guides
each, and a cell has every gene with ``min_umis``, which is sceptre's rule for such screens. What results is a column of
labels as in any other screen.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from crlseq.config import DataConfig
from crlseq.data.combinations import MARKS, Cutter
from crlseq.data.contexts import in_contexts
from crlseq.data.controls import is_control_name, is_never
from crlseq.data.files import is_cell_ranger, open_store, readable
from crlseq.data.guide_names import CONTROL, genes_of_guides, recognised
from crlseq.data.guide_targets import ID_KEY, read_guide_map, targets_in_uns, targets_in_var
from crlseq.data.label_rules import GUIDE_LABELS as GUIDE_LABELS
from crlseq.data.label_rules import JOINED
from crlseq.data.matrix import GUIDES, Screen, as_csr
from crlseq.data.names import GeneNames
from crlseq.data.perturbations import Perturbations, read_perturbations, refuse_missing_column
from crlseq.errors import InputError, UsageError, few

BETWEEN_GUIDES = re.compile(rf"\s*[|;,]+\s*|{MARKS['+']}|{MARKS[' and ']}")
AMBIGUOUS, UNASSIGNED = "multiple", "unassigned"
MANY, NONE = -2, -1  # in place of a cell's gene: of the two labels above


@dataclass(frozen=True, eq=False)
class Guides:
    """What guides say of every cell."""

    labels: pd.Categorical  # (cells,) the control label, "A", "A+B", or why a cell has none
    control_label: str  # of cells with control guides alone
    reason: str  # what was read, and how, in a sentence or two
    record: dict[str, Any]  # the same for run.json: thresholds, the rule, genes by guide, and cells by label
    number: np.ndarray  # (cells,) int64 which guide a cell carries, the most frequent one of several; -1 none
    names: tuple[str, ...]  # of the guides by that number


def read_labels(
    screen: Screen, source: str | Path | ad.AnnData, config: DataConfig
) -> tuple[Perturbations, Guides | None]:
    """Perturbations of all cells: from guides if the configuration names any, or if the only labels are guides.

    InputError if they cannot be read; UsageError if more than one place was named to read them from.
    """
    places = ("perturbation_key", "guide_key", "guide_counts")
    given = [f"--{name.replace('_', '-')}" for name in places if getattr(config, name) is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} were both given.", "Give only the one that has the perturbations.")
    if config.guide_key is not None:
        return _as_labels(_from_column(screen.obs, config), screen.obs, config)
    if config.guide_counts is not None:
        return _as_labels(_from_counts(screen, source, config), screen.obs, config)
    if config.guide_map is not None:
        raise UsageError("--guide-map needs guides.", "Name them with --guide-key or --guide-counts.")
    targets = targets_in_uns(source) if ID_KEY in screen.obs else {}
    try:
        return labels_of(screen.obs, config, GeneNames.of(screen.var).known, targets)
    except InputError as error:
        counted = next((name for name in _counted(screen, source) if GUIDES.search(name)), None)
        if config.perturbation_key is not None or counted is None:
            raise
        hint = f"To assign cells by guide counts: --guide-counts {shlex.quote(counted)}. {error.hint}"
        raise InputError(error.message, hint) from None


def read_conditions(
    screen: Screen, source: str | Path | ad.AnnData, config: DataConfig
) -> tuple[Perturbations, Guides | None]:
    """What `read_labels` gives, perturbations by context where the configuration names a column of contexts."""
    labels, guides = read_labels(screen, source, config)
    return in_contexts(labels, screen.obs, config), guides


def with_guide_labels(
    screen: Screen, source: str | Path | ad.AnnData, config: DataConfig, key: str, control: str
) -> pd.DataFrame:
    """Cells of another file than the fit's, with its column ``key`` if that is what guides or contexts were read as and they are there."""
    if key != GUIDE_LABELS or key in screen.obs:
        return screen.obs
    try:
        labels, guides = read_conditions(screen, source, config)
    except InputError:  # a file of controls alone
        return screen.obs
    if labels.contexts is not None:
        return screen.obs.assign(**{key: labels.written().rename_categories({labels.control_label: control})})
    if guides is None:
        return screen.obs
    return screen.obs.assign(**{key: guides.labels.rename_categories({guides.control_label: control})})


def labels_of(
    obs: pd.DataFrame,
    config: DataConfig,
    measured: frozenset[str] = frozenset(),
    targets: Mapping[str, str] | None = None,
) -> tuple[Perturbations, Guides | None]:
    """Perturbations of all cells from a column of labels; where these are guides, and none was named, of their genes.

    `targets` are the genes of the guides of CELLxGENE's column of them. InputError if they cannot be read.
    """
    controls = config.control_label
    labels = read_perturbations(obs, config.perturbation_key, controls, config.separator, measured)
    if labels.key == ID_KEY and targets:
        genes = {name: targets.get(name, name) for name in labels.names}
        found: tuple[dict[str, str], str] | None = genes, "the table of guides in uns"
    else:
        found = recognised(labels.names, measured)
    if found is None and (likely := recognised(labels.names)):
        note = f" Its labels could be names of guides like {likely[1]}, which --guide-key {labels.key} reads as genes."
        return replace(labels, reason=labels.reason + note), None
    if found is None:
        return labels, None
    genes, rule = found
    if config.perturbation_key is None and len(set(genes.values()) - {CONTROL}) > 1:
        return _as_labels(_from_labels(obs, labels, genes, rule, config), obs, config)
    note = f" Its labels are names of guides like {rule}, and each is a perturbation of its own"
    note += f"; --guide-key {labels.key} reads them as genes." if config.perturbation_key else "."
    return replace(labels, reason=labels.reason + note, targets=tuple(genes[name] for name in labels.names)), None


def _as_labels(guides: Guides, obs: pd.DataFrame, config: DataConfig) -> tuple[Perturbations, Guides]:
    table = pd.DataFrame({GUIDE_LABELS: guides.labels}, index=obs.index)
    controls = [guides.control_label, *(config.control_label or ())]
    labels = read_perturbations(table, GUIDE_LABELS, list(dict.fromkeys(controls)), config.separator or JOINED)
    return replace(labels, reason=guides.reason), guides


def _genes(
    names: Iterable[str], config: DataConfig, targets: Mapping[str, str] | None = None
) -> tuple[dict[str, str], str]:
    """Of guides, by --guide-map, by the file's own ``targets``, or by their names."""
    table = targets if config.guide_map is None else read_guide_map(config.guide_map)
    genes, rule = genes_of_guides(names, config.control_label, table)
    if table is targets and rule == "table":
        rule = "their table in the file"
    _refuse_torn(genes.values(), config)
    return genes, rule


def _refuse_torn(genes: Iterable[str], config: DataConfig) -> None:
    mark = config.separator or JOINED
    torn = next((gene for gene in genes if mark in gene), None)
    if torn is not None:
        what = f"The gene {torn!r} of a guide contains {mark!r}, which separates the genes of a combination."
        raise InputError(what, "Choose another --separator, or rename the gene in a --guide-map.")


def _control(config: DataConfig) -> str:
    return config.control_label[0] if config.control_label else CONTROL


def _from_column(obs: pd.DataFrame, config: DataConfig) -> Guides:
    key = str(config.guide_key)
    refuse_missing_column(obs, key, "--guide-key")
    column = obs[key].astype(object)
    codes, texts = pd.factorize(column.map(lambda value: str(value).strip(), na_action="ignore"))
    parts = [_split(text, config.separator) for text in texts]
    if config.separator is None:
        parts = _split_joined(parts)
    known = [[part for part in own if not is_never(part)] for own in parts]
    genes, rule = _genes((part for own in known for part in own), config)
    control, mark = _control(config), config.separator or JOINED
    written = []
    for text, own, sure in zip(texts, parts, known, strict=True):
        unsure = [part for part in own if part not in sure] or ([] if own else [text])
        targets = sorted({genes[part] for part in sure} - {control})
        # "unassigned" stays, and is dropped and counted by it.
        written.append(unsure[0] if unsure else mark.join(targets) or control)
    labels = pd.Categorical(np.append(np.array(written, dtype=object), np.nan)[codes])
    return _guides(labels, control, genes, rule, f"Guides are named in column {key!r}", {"column": key}, codes, texts)


def _split(text: str, separator: str | None) -> list[str]:
    if separator == "":
        return [text] if text else []
    pieces = BETWEEN_GUIDES.split(text) if separator is None else text.split(separator.strip() or separator)
    return [piece.strip() for piece in pieces if piece.strip()]


def _split_joined(parts: list[list[str]]) -> list[list[str]]:
    """Guides joined by "_" too, where both are guides of other cells."""
    guides = {guide for own in parts for guide in own if not is_never(guide) and not is_control_name(guide)}
    cuts = Cutter(guides, is_control_name, is_control_name, is_never).cut("_", strong=False)
    sure = cuts.parts if cuts.n_sure else {}
    return [[part for guide in own for part in sure.get(guide, [guide])] for own in parts]


def _from_labels(
    obs: pd.DataFrame, labels: Perturbations, genes: Mapping[str, str], rule: str, config: DataConfig
) -> Guides:
    """Of labels that turned out to be guides."""
    _refuse_torn(genes.values(), config)
    control, key, mark = labels.control_label, labels.key, config.separator or JOINED
    codes, texts = pd.factorize(obs[key].astype(object).map(lambda value: str(value).strip(), na_action="ignore"))
    read = np.array([
        mark.join(sorted({genes[labels.names[i]] for i in condition} - {CONTROL})) or control
        for condition in labels.conditions
    ], dtype=object)  # fmt: skip
    # What is dropped is dropped again by its label.
    why = [text if is_never(text) or is_control_name(text) else UNASSIGNED for text in texts]
    left = np.append(np.array(why, dtype=object), np.nan)[codes]
    written = np.where(labels.condition < 0, left, read[labels.condition])
    own = {code for code in np.unique(codes[labels.condition == 0]).tolist() if code >= 0}
    pieces = ((code in own, piece) for code, text in enumerate(texts) for piece in _split(text, config.separator))
    table = {piece: control for is_control, piece in pieces if is_control or is_control_name(piece)}
    table |= {name: control if gene == CONTROL else gene for name, gene in genes.items()}
    where = f"Labels in column {key!r} are names of guides and are read as genes; --perturbation-key {shlex.quote(str(key))} keeps them apart"
    return _guides(
        pd.Categorical(written), control, dict(sorted(table.items())), rule, where, {"column": key}, codes, texts
    )


def _from_counts(screen: Screen, source: str | Path | ad.AnnData, config: DataConfig) -> Guides:
    key = str(config.guide_counts)
    counts, names, where = guide_counts(screen, source, key)
    genes, rule = _genes(names, config, targets_in_var(source, key) if where == "modality" else None)
    control, mark = _control(config), config.separator or JOINED
    targets = [control, *sorted(set(genes.values()) - {control})]
    number = {gene: i for i, gene in enumerate(targets)}
    column = np.array([number[genes[name]] for name in names], dtype=np.int64)
    member = sp.csr_matrix((np.ones(len(names)), (np.arange(len(names)), column)), (len(names), len(number)))
    sums = sp.csr_matrix(counts @ member)
    first, second = assign(sums, config.guide_min_umis, config.guide_min_share)
    carried = sp.csr_matrix(sums >= config.guide_min_umis)
    several = _several(carried, first, second)
    pairs = (second != NONE) & (not several)
    if not config.combinations:  # two genes in a cell of a screen with one guide a cell: a doublet
        first = np.where(pairs, MANY, first)
    written = np.array([*targets, AMBIGUOUS, UNASSIGNED], dtype=object)[first]
    for cell in np.flatnonzero((first != NONE) if several else pairs & (first >= 0)):
        own = (
            carried.indices[carried.indptr[cell] : carried.indptr[cell + 1]] if several else [first[cell], second[cell]]
        )
        written[cell] = mark.join(targets[i] for i in sorted({*map(int, own)} - {0})) or control
    about: dict[str, Any] = {where: key, "min_umis": config.guide_min_umis, "min_share": config.guide_min_share}
    about["cells_with_two"] = int(pairs.sum())
    text = f"Guides are counted in {where} {key!r}. "
    if several:
        text += f"Most cells have several, so a cell carries every gene with at least {config.guide_min_umis} UMIs"
    else:
        doublets = "(doublets, if each cell was given one guide; --no-combinations excludes them)"
        text += (
            f"A cell is assigned the gene with at least {config.guide_min_umis} UMIs and a share of "
            f"{config.guide_min_share:g}; {pairs.sum()} cells have two genes that reach this share together "
            f"{doublets if config.combinations else 'and are excluded'}"
        )
    strongest = np.where(counts.getnnz(1) > 0, np.asarray(counts.argmax(1)).ravel(), NONE)
    return _guides(pd.Categorical(written), control, genes, rule, text, about, strongest, names)


def _several(carried: sp.csr_matrix, first: np.ndarray, second: np.ndarray) -> bool:
    """Whether cells were given several guides each: most with guides have two genes or more, and are ambiguous."""
    some = first != NONE
    per_cell = np.diff(carried.indptr)[some]
    return bool(some.any() and np.median(per_cell) >= 2 and ((first == MANY) | (second != NONE))[some].mean() > 0.5)


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
    """Counts (cells, guides), names of guides, and whether they are ``features`` of the matrix, of ``obsm`` or a ``modality``.

    InputError if there is nothing of that name, guides have no names, or values are no counts.
    """
    features, there = screen.of_type(key), _counted(screen, source)
    if features is not None:
        return _as_counts(features[0], key), features[1], "features"
    if key not in there:
        listed = few([*map(repr, there)]) or "none"
        what = f"{screen.source} has no guide counts {key!r}."
        raise InputError(what, f"Name a type of feature, a table of obsm or an .h5mu modality: {listed}.")
    if isinstance(source, ad.AnnData):
        return *_table_of(source.obsm[key], key), "obsm"
    with open_store(Path(source)) as store, readable(screen.source, f"the guide counts {key!r}"):
        if "obsm" in store and key in store["obsm"]:
            return *_table_of(ad.io.read_elem(store["obsm"][key]), key), "obsm"
        guides = store.parent[key]
        cells, names = (ad.io.read_elem(guides[part]).index.astype(str) for part in ("obs", "var"))
        counts = _as_counts(ad.io.read_elem(guides["X"]), key)
    # Cells that the modality lacks have no guide.
    place = cells.get_indexer(screen.obs.index.astype(str))
    padded = sp.csr_matrix(sp.vstack([counts, sp.csr_matrix((1, counts.shape[1]))], format="csr"))
    return sp.csr_matrix(padded[place]), list(names), "modality"


def _counted(screen: Screen, source: str | Path | ad.AnnData) -> list[str]:
    """What may hold guide counts: types of feature beside genes, tables of obsm, and modalities."""
    if isinstance(source, ad.AnnData):
        return sorted([*screen.other_types, *source.obsm])
    if is_cell_ranger(Path(source)):
        return screen.other_types
    with open_store(Path(source)) as store, readable(screen.source, "the list of obsm"):
        place, _, expression = str(store.name).rpartition("/")
        modalities = [name for name in store.parent if name != expression] if place == "/mod" else []
        return sorted([*screen.other_types, *store.get("obsm", ()), *modalities])


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
    labels: Any,
    control: str,
    genes: dict[str, str],
    rule: str,
    where: str,
    about: dict[str, Any],
    number: np.ndarray,
    names: Iterable[str],
) -> Guides:
    """With words: the rule, an example, and how many guides are of how many genes and of the control."""
    perturbing = [guide for guide, gene in genes.items() if gene != control and not is_control_name(gene)]
    how = "the guide map" if rule == "table" else rule if rule.startswith("the") else f"names like {rule}"
    example = next((guide for guide in perturbing if genes[guide] != guide), None)
    such = "" if example is None else f" ({example!r} is {genes[example]!r})"
    n_genes = len({genes[guide] for guide in perturbing})
    n_controls = len(genes) - len(perturbing)
    reason = (
        f"{where}. Genes are read from {how}{such}: {len(perturbing)} guides target {n_genes} genes and "
        f"{n_controls} {'is a control' if n_controls == 1 else 'are controls'}."
    )
    cells = labels.value_counts()
    unnamed = int((labels.codes < 0).sum())
    record: dict[str, Any] = {
        **about, "rule": rule, "control_label": control, "genes": genes,
        "cells": {str(label): int(n) for label, n in cells.items() if n} | ({"missing": unnamed} if unnamed else {}),
    }  # fmt: skip
    return Guides(labels, control, reason, record, number.astype(np.int64), tuple(map(str, names)))
