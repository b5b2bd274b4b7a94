"""Label column -> control cells, targets and vocabulary: the styles in the wild, and which one a file uses.

A *reading* is a column, its control label and the separator of its combinations. Detection considers columns with a
known control label. Column names of the table `STYLES` beat any other; where readings of equal standing differ, it
refuses. All work is done on distinct labels, so that millions of cells cost little.
"""

from __future__ import annotations

import difflib
import shlex
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from crlseq.data.matrix import NO_TEXT
from crlseq.errors import InputError, few

Ints = NDArray[np.int64]

# Compared case-insensitively. Guide-level controls ("NTg7", "non-targeting_0001") are left to the user: a guess at
# a prefix would one day take a gene for a control. Wild type is a genotype, not a control guide.
CONTROL_LABELS = frozenset(
    {"control", "ctrl", "unperturbed", "nt", "ntc", "non-targeting", "nontargeting", "non_targeting"}
    | {"neg_ctrl", "negative_control"}
)
# "none", "na" and "<na>" are missing values that were once written as text.
NEVER_PERTURBATIONS = frozenset({"nan", "none", "na", "<na>", "unassigned", "negative", "multiple", "doublet"})

MISSING = "missing"
STRATEGY_KEY = "genetic_perturbation_strategy"
SEPARATORS = (" || ", "+", ",", "_")
# Names hold "," (chemicals) and "_" (guides, loci) as well; these two need evidence, except where a style says so.
STRONG_SEPARATORS = frozenset({" || ", "+"})


@dataclass(frozen=True)
class Style:
    """How one source of files writes labels."""

    name: str
    columns: tuple[str, ...]  # names of its label column
    controls: frozenset[str]  # labels of control cells there, in lower case
    separator: str | None = None  # what joins combinations for certain
    control_column: str | None = None  # has the control label, where the labels of control cells are guides


# In the order in which agreeing columns are preferred.
STYLES = (
    Style("pertpy/scPerturb", ("perturbation",), frozenset({"control", "nt", "non-targeting"})),
    Style("CPA", ("guide_ids",), frozenset({""}), ","),
    Style("GEARS", ("condition",), frozenset({"ctrl"})),
    Style("cell-eval", ("target_gene", "gene"), frozenset({"non-targeting"})),
    Style("CELLxGENE", ("genetic_perturbation_id",), frozenset({"control", "no perturbations"}), " || ", STRATEGY_KEY),
)
STYLE_OF = {column: style for style in STYLES for column in style.columns}
PLAIN = Style("plain", (), frozenset())


@dataclass(frozen=True, eq=False)
class Perturbations:
    """Which perturbations every cell carries."""

    key: str  # column of obs
    control_label: str
    separator: str | None  # what joins the parts of combinations; None if no label is split
    style: str  # name of one of `STYLES`, or "plain"
    reason: str  # what was chosen and why, as one or two sentences
    names: tuple[str, ...]  # sorted single perturbations, those seen only in combinations included
    conditions: tuple[tuple[int, ...], ...]  # indices into `names`: (), the control, then singles, then others by size
    condition_names: tuple[str, ...]  # `control_label`, "A", "A+B" (with `separator`)
    condition: Ints  # (cells,) index into `conditions`; -1 where the cell is dropped
    dropped: dict[str, int]  # cells by a label that names no perturbation; "missing" where there is none

    @property
    def targets(self) -> tuple[str, ...]:
        """Genes by name."""
        return self.names

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """Control cells, bool (cells,)."""
        return np.asarray(self.condition == 0)


def candidates(obs: pd.DataFrame) -> list[Perturbations]:
    """Readings of ``obs`` with two perturbations or more, the best first; a column appears once per reading."""
    return [reading for reading in _readings(obs, _label_columns(obs), None, None) if len(reading.names) > 1]


def read_perturbations(
    obs: pd.DataFrame, key: str | None = None, control_label: str | None = None, separator: str | None = None
) -> Perturbations:
    """Read the perturbations of all cells from a column; what is not given is detected.

    `control_label` is exactly as in the column; `separator` joins the parts of combinations, ``""`` if there are none.
    InputError if there is no such column or control label, nothing can be detected, two readings are possible, or there
    are fewer than two perturbations besides the control.
    """
    if key is not None:
        refuse_missing_column(obs, key, "--perturbation-key")
    readings = _readings(obs, _label_columns(obs) if key is None else [key], control_label, separator)
    usable = [reading for reading in readings if len(reading.names) > 1]
    if not usable:
        raise _nothing_found(obs, key, control_label, readings)
    chosen = usable[0]
    same_column = [reading for reading in usable if reading.key == chosen.key]
    if len(same_column) > 1:
        raise _ambiguous_column(same_column)
    # A known name beats the others whatever they say; equals must agree.
    rivals = [r for r in usable[1:] if (r.key in STYLE_OF) == (chosen.key in STYLE_OF)]
    for rival in rivals:
        if difference := _difference(chosen, rival):
            what = f"Columns '{chosen.key}' and '{rival.key}' both look like perturbation labels, but {difference}."
            raise InputError(what, f"Choose with {_options('--perturbation-key', [chosen.key, rival.key])}.")
    given = {"--perturbation-key": key, "--control-label": control_label, "--separator": separator}
    told = " and ".join(option for option, value in given.items() if value is not None)
    same = " and ".join(f"'{rival.key}'" for rival in rivals)
    notes = (f" The same groups of cells are in {same}." if same else "") + (f" As set by {told}." if told else "")
    return replace(chosen, reason=chosen.reason + notes)


def _readings(
    obs: pd.DataFrame, keys: Sequence[str], control_label: str | None, separator: str | None
) -> list[Perturbations]:
    """Every reading of these columns that has control cells and respects what is given, the best column first."""
    if separator is not None:
        separator = next((known for known in SEPARATORS if known.strip() == separator.strip()), separator)
    readings = []
    for key in keys:
        labels, codes = _labels(obs[key])
        style = STYLE_OF.get(key, PLAIN)
        marked = style.control_column in obs
        strategies, strategy_codes = _labels(obs[style.control_column]) if marked else ([], codes)
        if control_label is not None:
            controls = sorted({control_label.strip()} & {*labels, *strategies})
        else:
            controls = [strategy for strategy in strategies if strategy.casefold() in style.controls]
            known = CONTROL_LABELS | (frozenset() if style.control_column else style.controls)
            controls = controls or [label for label in labels if label.casefold() in known]
        for control in controls:
            used, used_codes, guides = labels, codes, set[str]()
            if control in strategies:
                by_strategy = strategy_codes == strategies.index(control)
                own = [labels[code] for code in np.unique(codes[by_strategy]) if code >= 0]
                joint = style.separator.strip() if style.separator else None
                parts = {part.strip() for label in own for part in (label.split(joint) if joint else [label])}
                guides = {part for part in parts if not _is_never(part)}
                used, used_codes = [*labels, control], np.where(by_strategy, len(labels), codes)
            rules = _Rules(key, control, frozenset(guides), frozenset(used))
            options = rules.separators() if separator is None else [separator or None]
            readings += [rules.read(used, used_codes, option) for option in options]
    order = [*STYLE_OF]
    return sorted(readings, key=lambda r: order.index(r.key) if r.key in STYLE_OF else len(order))


@dataclass(frozen=True)
class _Rules:
    """How labels of one column are read, given its control; ``guides`` are further names of control guides."""

    key: str
    control: str
    guides: frozenset[str]
    labels: frozenset[str]

    def is_control(self, part: str) -> bool:
        """Whether a part of a combination is a control: "A+ctrl" is "A", also where control cells are "control"."""
        spare = part.casefold() in CONTROL_LABELS and part not in self.labels
        return part == self.control or part in self.guides or spare

    def split(self, label: str, separator: str | None) -> list[str]:
        """Parts of a label without the controls; none for control cells."""
        if label == self.control or label in self.guides:
            return []
        if separator is None or label.casefold() in CONTROL_LABELS:  # "non_targeting" beside another control
            return [label]
        mark = separator.strip() or separator
        if mark in self.control:  # "A_neg_ctrl"
            label = label.removeprefix(self.control + mark).removesuffix(mark + self.control)
        parts = (part.strip() for part in label.split(mark))
        return [part for part in parts if not self.is_control(part)]

    def separators(self) -> list[str | None]:
        """Every separator with which the labels can be read (None: no combinations); two or more are ambiguous."""
        strong = STRONG_SEPARATORS | {self.style.separator}
        no_names = NEVER_PERTURBATIONS | CONTROL_LABELS | {""}
        labels = [label for label in self.labels if label != self.control and label.casefold() not in no_names]
        certain, possible = list[str | None](), list[str | None]()
        for separator in SEPARATORS:
            joined = [self.split(label, separator) for label in labels if separator.strip() in label]
            singles = {label for label in labels if separator.strip() not in label}
            read = [all(parts) if separator in strong else singles.issuperset(parts) for parts in joined]
            if any(read) or _recombine(joined):
                (certain if all(read) or not any(read) else possible).append(separator)
        return certain + possible + ([] if certain else [None])

    @property
    def style(self) -> Style:
        style = STYLE_OF.get(self.key, PLAIN)
        return style if self.control.casefold() in style.controls else PLAIN

    def read(self, labels: Sequence[str], codes: Ints, separator: str | None) -> Perturbations:
        counts = np.bincount(codes + 1, minlength=len(labels) + 1)
        parts_of: dict[int, list[str]] = {}
        dropped = Counter({MISSING: int(counts[0])})
        for code in np.flatnonzero(counts[1:]).tolist():
            parts = self.split(labels[code], separator)
            if any(_is_never(part) for part in parts):  # half a combination is not known either
                dropped[labels[code] or MISSING] += int(counts[code + 1])
            else:
                parts_of[code] = parts
        names = sorted({part for parts in parts_of.values() for part in parts})
        position = {name: i for i, name in enumerate(names)}
        members = {code: tuple(sorted({position[part] for part in parts})) for code, parts in parts_of.items()}
        conditions = sorted({(), *members.values()}, key=lambda condition: (len(condition), condition))
        number = {condition: i for i, condition in enumerate(conditions)}
        condition_of = np.full(len(labels) + 1, -1, dtype=np.int64)  # the last is for code -1, missing
        for code, condition in members.items():
            condition_of[code] = number[condition]
        if all(parts in ([], [labels[code]]) for code, parts in parts_of.items()):
            separator = None
        joined = [(separator or "").join(names[i] for i in condition) for condition in conditions[1:]]
        style = "" if self.style is PLAIN else f" (as in {self.style.name} files)"
        column = STYLE_OF.get(self.key, PLAIN).control_column
        mark = f"'{column}' is '{self.control}' in" if self.guides else f"its label '{self.control}' marks"
        split = "no label is a combination" if separator is None else f"labels are split at '{separator}'"
        return Perturbations(
            key=self.key,
            control_label=self.control,
            separator=separator,
            style=self.style.name,
            reason=f"Column '{self.key}'{style} holds the perturbations, {mark} control cells, and {split}.",
            names=tuple(names),
            conditions=tuple(conditions),
            condition_names=(self.control, *joined),
            condition=condition_of[codes],
            dropped={label: dropped[label] for label in sorted(dropped) if dropped[label]},
        )


def _label_columns(obs: pd.DataFrame) -> list[str]:
    """Columns that can hold labels: numbers never contain a control label."""
    return [key for key in obs.columns if not pd.api.types.is_numeric_dtype(obs[key].dtype)]


def _labels(column: pd.Series) -> tuple[list[str], Ints]:
    """Sorted distinct labels that occur, as text, and the index of each cell's label; -1 where it is missing."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes = column.cat.codes.to_numpy()
        values: list[Hashable] = list(column.cat.categories)
    else:
        codes, found = pd.factorize(column)
        values = list(found)
    texts = [_text(value) for value in values]
    labels = sorted({texts[code] for code in np.unique(codes) if code >= 0})  # unused levels do not count
    position = {label: i for i, label in enumerate(labels)}
    code_of = np.array([position.get(text, -1) for text in texts] + [-1], dtype=np.int64)
    return labels, code_of[codes]


def _text(value: Hashable) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, float) and value.is_integer():  # integers with missing values among them are read as floats
        value = int(value)
    return NO_TEXT.sub("\ufffd", str(value)).strip()


def _is_never(part: str) -> bool:
    return part == "" or part.casefold() in NEVER_PERTURBATIONS


def _recombine(joined: Sequence[Sequence[str]]) -> bool:
    """Whether the parts of labels recombine as perturbations do, and not as in "STAT1_g1", "STAT1_g2", "IRF1_g1"."""
    labels_with = Counter(part for parts in joined for part in set(parts))
    first = {parts[0] for parts in joined if len(parts) > 1}
    later = {part for parts in joined for part in parts[1:]}
    words = all(n > 1 and any(c.isalpha() for c in part) for part, n in labels_with.items())
    return words and not first.isdisjoint(later)


def _difference(a: Perturbations, b: Perturbations) -> str:
    """What two readings disagree on; empty if each condition of one has the cells of one condition of the other."""
    if not np.array_equal(a.is_control, b.is_control):
        return "they disagree on which cells are control"
    base = len(b.conditions) + 1
    in_a, in_b = np.divmod(np.unique((a.condition + 1) * base + b.condition + 1), base)
    # -1 for dropped cells, so that these must be the same too
    sizes_a, sizes_b = (np.array([-1, *map(len, reading.conditions)]) for reading in (a, b))
    if len(np.unique(in_a)) < len(in_a) or len(np.unique(in_b)) < len(in_b):
        return "they group the cells differently"
    return "" if np.array_equal(sizes_a[in_a], sizes_b[in_b]) else "they disagree on how many perturbations cells carry"


def _ambiguous_column(readings: Sequence[Perturbations]) -> InputError:
    key = readings[0].key
    controls = {r.control_label: int(r.is_control.sum()) for r in readings}
    if len(controls) > 1:
        listed = " and ".join(f"'{label}' ({n} cells)" for label, n in controls.items())
        hint = f"Choose with {_options('--control-label', list(controls))}."
        return InputError(f"Column '{key}' has more than one control label: {listed}.", hint)
    ways = [f"combinations at '{r.separator}'" if r.separator else "single perturbations" for r in readings]
    hint = f"Choose with {_options('--separator', [r.separator or '' for r in readings])}."
    return InputError(f"Labels of column '{key}' can be read as {' or as '.join(ways)}.", hint)


def _nothing_found(
    obs: pd.DataFrame, key: str | None, control_label: str | None, readings: Sequence[Perturbations]
) -> InputError:
    if readings:
        best = readings[0]
        besides = f"only the perturbation '{best.names[0]}'" if best.names else "no perturbation"
        what = f"Column '{best.key}' has {besides} besides the control '{best.control_label}', and two are needed."
        return InputError(what, "Name a column with more perturbations with --perturbation-key.")
    if key is None:
        known = "a known control label" if control_label is None else f"the label '{control_label}'"
        columns = _some([str(column) for column in obs.columns], "perturbation")
        hint = "Name the column with --perturbation-key and its control with --control-label"
        return InputError(f"No column has {known}.", f"{hint}; columns: {columns}.")
    labels = _labels(obs[key])[0]
    missing = f"none is labelled '{control_label}'"
    if control_label is None:
        missing = "none of its labels is a known control label"
    return InputError(
        f"Column '{key}' has no control cells: {missing}.",
        f"Name the control label with --control-label; labels: {_some(labels, control_label or 'control')}.",
    )


def refuse_missing_column(obs: pd.DataFrame, key: str, option: str) -> None:
    """Refuse a column of cells that an option names and that is not there."""
    if key not in obs:
        columns = _some([str(column) for column in obs.columns], key)
        raise InputError(f"The cells have no column '{key}' for {option}.", f"Columns: {columns}.")


def _some(values: Sequence[str], like: str) -> str:
    """Up to eight values, those first that resemble ``like``."""
    alike = [value for value in values if like.casefold() in value.casefold()]
    ordered = dict.fromkeys([*difflib.get_close_matches(like, values[:20000]), *alike, *values])
    return few([f"'{value}'" for value in ordered]) or "none"


def _options(option: str, values: Sequence[str]) -> str:
    return " or ".join(f"{option} {shlex.quote(value)}" for value in values)
