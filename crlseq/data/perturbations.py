"""Label column -> control cells, targets and vocabulary: the styles in the wild, and which one a file uses.

A *reading* is a column, its control labels and the separator of its combinations. Detection considers columns with
known control labels (`crlseq.data.controls`). Column names of the table `STYLES` beat any other; where readings of equal
standing differ, it refuses. All work is done on distinct labels, so that millions of cells cost little.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from crlseq.data.combinations import known_separator, mark_of
from crlseq.data.controls import find_controls, is_control_name, is_named, is_never, kind_of, number_of
from crlseq.data.guide_names import recognised
from crlseq.data.label_rules import GUIDE_LABELS, JOINED, PLAIN, STYLE_OF, Ints, Rules
from crlseq.data.label_rules import Perturbations as Perturbations
from crlseq.data.matrix import NO_TEXT, refuse_long
from crlseq.errors import InputError, few, nearest

_SAMPLES = re.compile(r"(?:^|[^a-z])(?:sample|batch|replicate|donor|lane|well|plate|orig\.ident)", re.IGNORECASE)


def candidates(obs: pd.DataFrame) -> list[Perturbations]:
    """Readings of ``obs`` with two perturbations or more, the best first; a column appears once per reading."""
    return [reading for reading, _ in _readings(obs, _label_columns(obs), None, None) if len(reading.names) > 1]


def read_perturbations(
    obs: pd.DataFrame,
    key: str | None = None,
    control_label: str | Sequence[str] | None = None,
    separator: str | None = None,
    measured: frozenset[str] = frozenset(),
) -> Perturbations:
    """Read the perturbations of all cells from a column; what is not given is detected.

    `control_label` are labels as in the column, numbered ones with or without the number; `separator` joins the parts of
    combinations, ``""`` if there are none. Where a column of guides and one of their genes agree, the genes are read;
    `measured` genes help to tell them apart.
    InputError if there is no such column or control label, nothing can be detected, two readings are possible, or there
    are fewer than two perturbations besides the control.
    """
    if key is not None:
        refuse_missing_column(obs, key, "--perturbation-key")
    given = [control_label] if isinstance(control_label, str) else control_label
    controls = None if not given else tuple(label.strip() for label in given)
    readings = _readings(obs, _label_columns(obs) if key is None else [key], controls, separator)
    usable = [reading for reading, _ in readings if len(reading.names) > 1]
    if not usable:
        raise _nothing_found(obs, key, controls, [reading for reading, _ in readings])
    usable, guides = _without_guides(usable, measured)
    chosen = usable[0]
    refuse_long(chosen.names, f"'{chosen.key}': a perturbation")
    same_column = [reading for reading in usable if reading.key == chosen.key]
    if len(same_column) > 1:
        _refuse_two_readings(same_column, obs)
    # A known name beats the others whatever they say, and "control" beats "control_1"; equals must agree.
    standing = {reading.key: rank for reading, rank in readings}
    rivals = [r for r in usable if r.key != chosen.key and standing[r.key] == standing[chosen.key]]
    for rival in rivals:
        if difference := _difference(chosen, rival):
            what = f"Columns '{chosen.key}' and '{rival.key}' both look like perturbation labels, but {difference}."
            raise InputError(what, f"Choose with {_options('--perturbation-key', [chosen.key, rival.key])}.")
    options = {"--perturbation-key": key, "--control-label": controls, "--separator": separator}
    told = " and ".join(option for option, value in options.items() if value is not None)
    same = " and ".join(f"'{rival.key}'" for rival in rivals)
    notes = (f" The same groups of cells are in {same}." if same else "") + (f" As set by {told}." if told else "")
    notes += f" Their guides are in {' and '.join(map(repr, guides))}." if guides else ""
    absent = [name for name in controls or () if name not in chosen.control_labels]
    notes += f" No cell is labelled {_or(absent)}." if absent else ""
    return replace(chosen, reason=chosen.reason + notes)


def _without_guides(readings: list[Perturbations], measured: frozenset[str]) -> tuple[list[Perturbations], list[str]]:
    """Readings without columns of guides that another column has the genes of; and these columns."""
    if len({reading.key for reading in readings}) < 2:
        return readings, []
    of_guides = [reading for reading in readings if recognised(reading.names, measured)]
    of_genes = [reading for reading in readings if reading not in of_guides]
    told = list(dict.fromkeys(g.key for g in of_guides if any(_refines(g, h) for h in of_genes)))
    return [reading for reading in readings if reading.key not in told], told


def _refines(fine: Perturbations, coarse: Perturbations) -> bool:
    """Whether cells of one condition are of one condition in the other too, controls of both being the same."""
    known = (fine.condition >= 0) & (coarse.condition >= 0)
    pairs = np.unique(np.stack([fine.condition[known], coarse.condition[known]]), axis=1)
    fewer = len(coarse.names) < len(fine.names)
    return fewer and len(np.unique(pairs[0])) == pairs.shape[1] and np.array_equal(pairs[0] == 0, pairs[1] == 0)


def _readings(
    obs: pd.DataFrame, keys: Sequence[str], given: Sequence[str] | None, separator: str | None
) -> list[tuple[Perturbations, int]]:
    """Every reading of these columns that has control cells and respects what is given, and the standing of its column.

    The best come first: 0 where the column's name is known, 1 where a label without a number is of control cells, 2 where
    all have one, and 3 in columns of samples.
    """
    readings = []
    for key in keys:
        own_separator = JOINED if key == GUIDE_LABELS else None
        forced = own_separator if separator is None else known_separator(separator)
        labels, codes = _labels(obs[key])
        style = STYLE_OF.get(key, PLAIN)
        marked = style.control_column in obs
        strategies, strategy_codes = _labels(obs[style.control_column]) if marked else ([], codes)
        if given is not None:
            by_strategy = [strategy for strategy in strategies if strategy in given]
            own = _given_controls(labels, given)
        else:
            # Cells that no guide was found in are controls only where there are no others.
            by_strategy = [strategy for strategy in strategies if strategy.casefold() in style.controls][:1]
            own = [] if by_strategy else find_controls(labels)
            own = own or [label for label in labels if style.control_column is None and label in style.controls]
        guides = set[str]()
        if by_strategy:
            cells = np.isin(strategy_codes, [strategies.index(strategy) for strategy in by_strategy])
            seen = [labels[code] for code in np.unique(codes[cells]) if code >= 0]
            pieces = {part for label in seen for part in mark_of(style.separator or "|").split(label)}
            guides = {piece for piece in pieces if not is_never(piece)}
            codes = np.where(cells, len(labels), codes)
            labels = [*labels, by_strategy[0]]
            own = [*own, by_strategy[0]]
        if own:
            rules = Rules(key, tuple(own), tuple(given or ()), frozenset(guides), tuple(labels))
            options = rules.separators() if forced is None else [forced or None]
            plain = any(label == kind_of(label) for label in own)
            standing = 0 if key in STYLE_OF else 3 if _SAMPLES.search(str(key)) else 1 if plain else 2
            doubtful = forced is not None or len(options) > 1
            readings += [(rules.read(codes, option, doubtful), standing) for option in options]
    order = {key: i for i, key in enumerate(STYLE_OF)}
    return sorted(readings, key=lambda pair: (pair[1], order.get(pair[0].key, 0)))


def _given_controls(labels: Sequence[str], given: Sequence[str]) -> list[str]:
    """Labels that were named; also numbered ones, unless they could be other genes: "A1" where "A" was named and is there."""
    there, stems = {*labels} - {""}, [name for name in given if name not in labels]
    return [
        label for label in labels
        if label in given or is_named(label, stems)
        or (is_named(label, given) and is_control_name(label) and number_of(label) not in there)
    ]  # fmt: skip


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


def _refuse_two_readings(readings: Sequence[Perturbations], obs: pd.DataFrame) -> None:
    """Refuse a column whose labels are read in two ways that differ."""
    key = readings[0].key
    carried = [
        [
            *(" and ".join(repr(r.names[i]) for i in condition) or "control" for condition in r.conditions),
            "nothing known",
        ]
        for r in readings
    ]
    read = np.stack([np.array(own, dtype=object)[r.condition] for own, r in zip(carried, readings, strict=True)])
    differing = np.flatnonzero((read != read[0]).any(0))
    if not len(differing):
        return
    labels, codes = _labels(obs[key])
    code = codes[differing].min()
    cell = differing[codes[differing] == code][0]
    ways = [f"combinations at '{r.separator}'" if r.separator else "single perturbations" for r in readings]
    what = f"Labels of column '{key}' can be read as {' or as '.join(ways)}"
    example = f"{labels[code]!r} is {' or '.join(read[:, cell])}"
    raise InputError(
        f"{what}: {example}.", f"Choose with {_options('--separator', [r.separator or '' for r in readings])}."
    )


def _nothing_found(
    obs: pd.DataFrame, key: str | None, controls: Sequence[str] | None, readings: Sequence[Perturbations]
) -> InputError:
    if readings:
        best = readings[0]
        besides = f"only the perturbation '{best.names[0]}'" if best.names else "no perturbation"
        what = f"Column '{best.key}' has {besides} besides the control '{best.control_label}', and two are needed."
        return InputError(what, "Name a column with more perturbations with --perturbation-key.")
    if key is None:
        known = "a known control label" if controls is None else f"the label {_or(controls)}"
        columns = _some([str(column) for column in obs.columns], "perturbation")
        hint = "Name the column with --perturbation-key and its control with --control-label"
        return InputError(f"No column has {known}.", f"{hint}; columns: {columns}.")
    labels = _labels(obs[key])[0]
    missing = "none of its labels is a known control label" if controls is None else f"none is labelled {_or(controls)}"
    return InputError(
        f"Column '{key}' has no control cells: {missing}.",
        f"Name the control label with --control-label; labels: {_some(labels, controls[0] if controls else 'control')}.",
    )


def refuse_missing_column(obs: pd.DataFrame, key: str, option: str) -> None:
    """Refuse a column of cells that an option names and that is not there."""
    if key not in obs:
        columns = _some([str(column) for column in obs.columns], key)
        raise InputError(f"The cells have no column '{key}' for {option}.", f"Columns: {columns}.")


def _some(values: Sequence[str], like: str) -> str:
    """Up to eight values, those first that resemble ``like``."""
    alike = [value for value in values if like.casefold() in value.casefold()]
    ordered = dict.fromkeys([*nearest(like, values[:20000]), *alike, *values])
    return few([f"'{value}'" for value in ordered]) or "none"


def _or(labels: Sequence[str]) -> str:
    return " or ".join(f"'{label}'" for label in labels)


def _options(option: str, values: Sequence[str]) -> str:
    return " or ".join(f"{option} {shlex.quote(value)}" for value in values)
