"""How the labels of one column are read, given its controls: the styles of files, and what a reading is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from crlseq.data.combinations import SEPARATORS, STRONG_SEPARATORS, Cuts, Cutter
from crlseq.data.controls import GENES, is_control_name, is_named, is_never, kind_of, number_of

Ints = NDArray[np.int64]

MISSING = "missing"
GUIDE_LABELS, JOINED = "crlseq_perturbation", "+"  # column of obs with what guides were read as, and its separator
STRATEGY_KEY = "genetic_perturbation_strategy"


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
class Contexts:
    """In which context each cell is; see `crlseq.data.contexts`."""

    key: str  # column of obs
    names: tuple[str, ...]  # of contexts that take part
    number: Ints  # (cells,) place in `names`; -1 of cells that take no part
    least: int  # control cells that a context, and a batch in it, needs
    notes: tuple[str, ...]  # what was left out, and why


@dataclass(frozen=True, eq=False)
class Perturbations:
    """Which perturbations every cell carries."""

    key: str  # column of obs
    control_label: str  # what control cells are called
    control_labels: tuple[str, ...]  # their labels in the column, numbered ones without the number
    separator: str | None  # what joins the parts of combinations; None if no label is split
    style: str  # name of one of `STYLES`, or "plain"
    reason: str  # what was chosen and why, as one or two sentences
    names: tuple[str, ...]  # sorted single perturbations, those seen only in combinations included
    targets: tuple[str, ...]  # the gene that each of `names` targets; the name itself unless it is that of a guide
    conditions: tuple[tuple[int, ...], ...]  # indices into `names`: (), the control, then singles, then others by size
    condition_names: tuple[str, ...]  # `control_label`, "A", "A+B" (with `separator`)
    condition: Ints  # (cells,) index into `conditions`; -1 where the cell is dropped
    dropped: dict[str, int]  # cells by a label that names no perturbation; "missing" where there is none
    contexts: Contexts | None = None  # where a perturbation in another context is another one

    def written(self) -> pd.Categorical:
        """Labels (cells,) that are read as these conditions; missing where a cell is dropped."""
        return pd.Categorical(np.array([*self.condition_names, None], dtype=object)[self.condition])

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """Control cells, bool (cells,)."""
        return np.asarray(self.condition == 0)


@dataclass(frozen=True)
class Rules:
    """How labels of one column are read, given its controls; ``guides`` are further names of control guides."""

    key: str
    own: tuple[str, ...]
    given: tuple[str, ...]
    guides: frozenset[str]
    labels: tuple[str, ...]

    def is_control(self, part: str) -> bool:
        """Whether a part of a combination is a control: "A+ctrl" is "A", also where control cells are "control"."""
        return self.is_own_control(part) or (is_control_name(part) and number_of(part) not in self._named)

    def is_own_control(self, part: str) -> bool:
        """Whether cells with this part alone are control cells."""
        return part in self._own or part in self.guides or (part not in self._all and is_named(part, self.given))

    @cached_property
    def _own(self) -> frozenset[str]:
        return frozenset(self.own)

    @cached_property
    def _all(self) -> frozenset[str]:
        return frozenset(self.labels)

    @cached_property
    def _named(self) -> frozenset[str]:
        return frozenset(label for label in self.labels if label != "" and not is_control_name(label))

    @cached_property
    def perturbed(self) -> frozenset[str]:
        """The labels of perturbed cells."""
        return frozenset(label for label in self.labels if not (is_never(label) or self.is_control(label)))

    @property
    def style(self) -> Style:
        """That of the column's name, if a control label is one of it."""
        style = STYLE_OF.get(self.key, PLAIN)
        return style if any(label.casefold() in style.controls for label in self.own) else PLAIN

    def cut(self, separator: str, forced: bool = False, apart: Collection[str] = ()) -> Cuts:
        """The labels but those ``apart``, cut at a separator."""
        cutter = Cutter(self.perturbed.difference(apart), self.is_control, self.is_own_control, is_never)
        return cutter.cut(separator, self._is_strong(separator), forced)

    def _is_strong(self, separator: str) -> bool:
        return separator in STRONG_SEPARATORS or separator == self.style.separator

    def separators(self) -> list[str | None]:
        """Every separator with which the labels can be read (None: no combinations); two or more are ambiguous."""
        sure, guessed, torn = dict[str, bool](), dict[str, bool](), list[str | None]()
        told = set[str]()  # labels that a strong separator cuts
        for separator in sorted(SEPARATORS, key=lambda separator: not self._is_strong(separator)):
            cuts = self.cut(separator, apart=told if not self._is_strong(separator) else ())
            doubtful = bool(cuts.torn or cuts.twofold)
            if cuts.n_sure or cuts.twofold:
                sure[separator] = doubtful
            elif cuts.parts and not self._is_odd(separator, cuts):
                guessed[separator] = doubtful
            elif cuts.n_half:
                torn.append(separator)
            if self._is_strong(separator) and (separator in sure or separator in guessed):
                told |= cuts.parts.keys()
        if found := sure or guessed:
            return [*found, *([None] if len(found) == 1 and any(found.values()) else [])]
        return [*torn, None]

    def _is_odd(self, separator: str, cuts: Cuts) -> bool:
        """Whether a separator is in a single label, and nothing else speaks for it."""
        sure = separator in ("+", " || ", self.style.separator)
        return not sure and len(cuts.parts) == 1 and self._named.isdisjoint(*cuts.parts.values())

    def read(self, codes: Ints, separator: str | None, forced: bool) -> Perturbations:
        """The perturbations of all cells, whose labels have these numbers (-1: none)."""
        counts = np.bincount(codes + 1, minlength=len(self.labels) + 1)
        cuts = self.cut(separator, forced) if separator else Cuts({})
        parts_of: dict[int, list[str]] = {}
        dropped = Counter({MISSING: int(counts[0])})
        for code in np.flatnonzero(counts[1:]).tolist():
            parts = self._parts(self.labels[code], cuts)
            if isinstance(parts, str):
                dropped[parts] += int(counts[code + 1])
            else:
                parts_of[code] = parts
        names = sorted({part for parts in parts_of.values() for part in parts})
        position = {name: i for i, name in enumerate(names)}
        members = {code: tuple(sorted({position[part] for part in parts})) for code, parts in parts_of.items()}
        conditions = sorted({(), *members.values()}, key=lambda condition: (len(condition), condition))
        number = {condition: i for i, condition in enumerate(conditions)}
        condition_of = np.full(len(self.labels) + 1, -1, dtype=np.int64)  # the last is for code -1, missing
        for code, condition in members.items():
            condition_of[code] = number[condition]
        if all(parts in ([], [self.labels[code]]) for code, parts in parts_of.items()):
            separator = None
        joined = [(separator or "").join(names[i] for i in condition) for condition in conditions[1:]]
        cells = self._control_cells(counts)
        return Perturbations(
            key=self.key,
            control_label=next(iter(cells)),
            control_labels=tuple(cells),
            separator=separator,
            style=self.style.name,
            reason=self._reason(cells, separator, names, dropped),
            names=tuple(names),
            targets=tuple(names),
            conditions=tuple(conditions),
            condition_names=(next(iter(cells)), *joined),
            condition=condition_of[codes],
            dropped={label: dropped[label] for label in sorted(dropped) if dropped[label]},
        )

    def _parts(self, label: str, cuts: Cuts) -> list[str] | str:
        """Perturbations in a label, none for control cells; or under which label its cells are dropped."""
        if label in self._own or label in self.guides:
            return []
        if label in cuts.twofold:
            return label
        if label in cuts.parts:
            parts = cuts.parts[label]
            return label if any(map(is_never, parts)) else parts  # half a combination is not known either
        if is_never(label):
            return label or MISSING
        if self.is_control(label):  # another than the given ones
            return kind_of(label) if is_named(label, [kind_of(label)]) else label
        return [label]

    def _control_cells(self, counts: Ints) -> dict[str, int]:
        """Cells by kind of control: in the given order, or the largest first; a single label is its own kind."""
        cells = Counter[str]()
        for label, n in zip(self.labels, counts[1:].tolist(), strict=True):
            if label in self._own and n:
                named = next((name for name in self.given if is_named(label, [name])), kind_of(label))
                cells[named if len(self.own) > 1 or self.given else label] += n
        order = {name: i for i, name in enumerate(self.given)}
        return {kind: cells[kind] for kind in sorted(cells, key=lambda kind: (order.get(kind, 0), -cells[kind], kind))}

    def _reason(self, cells: dict[str, int], separator: str | None, names: list[str], dropped: Counter[str]) -> str:
        style = "" if self.style is PLAIN else f" (as in {self.style.name} files)"
        listed = " and ".join(f"'{kind}' ({n} cells)" for kind, n in cells.items())
        first = next(iter(cells))
        if self.guides:
            mark = f"'{STYLE_OF[self.key].control_column}' is '{first}' in control cells"
        elif len(cells) > 1:
            mark = f"its labels {listed} mark control cells"
        elif first in self._own:
            mark = f"its label '{first}' marks control cells"
        else:
            mark = f"its {len(self.own)} labels like '{self.own[0]}' mark control cells"
        split = "no label is a combination" if separator is None else f"labels are split at '{separator}'"
        notes = [f"Column '{self.key}'{style} holds the perturbations, {mark}, and {split}."]
        notes += [
            f"'{name}' is read as the gene, because other labels are controls." for name in names if name in GENES
        ]
        notes += [
            f"'{label}' ({n} cells) is a control too and is excluded; --control-label can be repeated."
            for label, n in sorted(dropped.items()) if n and is_control_name(label)
        ]  # fmt: skip
        return " ".join(notes)
