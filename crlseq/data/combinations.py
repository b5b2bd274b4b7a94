"""Labels of combinations: at which text a column joins perturbations, and the parts of every label.

Evidence for a separator are labels whose parts are labels themselves, or controls: "A_B" beside "A" and "B", "A+ctrl".
Names may hold the separator, as loci do: "chr1.50_top_chr8.44_top" is two labels, not four parts. Where no label is
cut like that, some separators still speak for themselves ("SET+CBL"), unless a part could be no name ("(+)-JQ1").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# In the order in which they are tried. Not between "_": the strand of a guide. Not before a blank alone: a charge.
_MARKS = {
    " || ": r"\s*\|\|\s*",
    "+": r"\s+\+\s+|(?<![_\s])\+(?![_\s])",
    "|": r"\s*(?<!\|)\|(?!\|)\s*",
    ";": r"\s*;\s*",
    ",": r"\s*,\s*",
    " and ": r"\s+and\s+",
    " & ": r"\s+&\s+",
    "/": r"\s*/\s*",
    "_": r"_+",
}
SEPARATORS = tuple(_MARKS)
# Names hold the others as well, as in chemicals, guides and loci.
STRONG_SEPARATORS = frozenset({" || ", "+", "|", ";"})
_OPENING, _CLOSING = "([{<", ")]}>"


def known_separator(separator: str) -> str:
    """The separator as detection writes it."""
    return next((known for known in SEPARATORS if known.strip() == separator.strip()), separator)


def mark_of(separator: str) -> re.Pattern[str]:
    """What a label is cut at."""
    text = re.escape(separator.strip() or separator)
    return re.compile(_MARKS.get(separator, rf"\s*{text}\s*" if separator.strip() else text))


@dataclass
class Cuts:
    """The labels of a column, cut at one separator."""

    parts: dict[str, list[str]]  # of the labels that are combinations, controls left out
    n_sure: int = 0  # of them, those whose parts are labels or controls
    torn: list[str] = field(default_factory=list)  # labels with the separator that could be combinations, or names
    twofold: list[str] = field(default_factory=list)  # labels with more than one reading


class Cutter:
    """Cuts the labels of one column.

    ``known`` are its labels without those of control cells; ``is_control`` and ``is_own_control`` say whether a part is
    a control, and one that cells of this column have; ``is_never`` whether it is the word for an unknown one.
    """

    def __init__(
        self,
        known: Iterable[str],
        is_control: Callable[[str], bool],
        is_own_control: Callable[[str], bool],
        is_never: Callable[[str], bool],
    ) -> None:
        self.known = sorted(set(known))
        self.is_control, self.is_own_control, self.is_never = is_control, is_own_control, is_never

    def cut(self, separator: str, strong: bool, forced: bool = False) -> Cuts:
        """At `separator`; if it is `strong`, also into parts that are no labels; if `forced`, whatever speaks against it."""
        mark = mark_of(separator)
        joined = {label: found for label in self.known if len(found := _spans(label, mark)) > 1}
        if not joined:
            return Cuts({})
        names = {*self.known, *self._beside_controls(joined, strong)}
        ways = self._ways({name: _spans(name, mark) for name in names}, strong)
        cuts = Cuts({label: list(next(iter(ways[label]))) for label in joined if len(ways[label]) == 1})
        cuts.n_sure = len(cuts.parts)
        cuts.twofold = [label for label in joined if len(ways[label]) > 1]
        used = {part for parts in cuts.parts.values() for part in parts}
        # Where names hold the separator, a combination has it at least as often as two of them.
        least = min((len(_spans(name, mark)) for name in used), default=1)
        pieces_of = {label: [label[a:b] for a, b in spans] for label, spans in joined.items()}
        for label, pieces in pieces_of.items():
            if ways[label] or label in used or (cuts.n_sure and len(pieces) < 2 * least):
                continue
            possible = all(map(could_be_name, pieces))
            if possible and (strong or forced):
                cuts.parts[label] = [piece for piece in pieces if not self.is_control(piece)]
            elif possible if cuts.n_sure else strong or self._half_known(pieces, names):
                cuts.torn.append(label)
        if not (strong or cuts.parts or cuts.twofold) and _recombine(list(pieces_of.values())):
            return Cuts(pieces_of)
        return cuts

    def _beside_controls(self, joined: dict[str, list[tuple[int, int]]], strong: bool) -> set[str]:
        """Names that occur with a control alone: A of "A+ctrl" and of "ctrl+A"."""
        is_control = self.is_control if strong else self.is_own_control
        found = set[str]()
        for label, spans in joined.items():
            if strong and len(spans) > 2:
                continue
            for (_, end), (start, _) in pairwise(spans):
                for name, other in ((label[:end], label[start:]), (label[start:], label[:end])):
                    if could_be_name(name) and is_control(other) and not self.is_control(name):
                        found.add(name)
        return found

    def _ways(self, spans: dict[str, list[tuple[int, int]]], strong: bool) -> dict[str, set[tuple[str, ...]]]:
        """How each name is made of others that are made of none: no way, one, or two of more."""
        atoms, ways = set[str](), dict[str, set[tuple[str, ...]]]()
        for name in sorted(spans, key=lambda name: (len(spans[name]), name)):
            ways[name] = self._made_of(name, spans[name], atoms)
            several = len(spans[name]) > 1 and all(could_be_name(name[a:b]) for a, b in spans[name])
            if not ways[name] and not (strong and several):
                atoms.add(name)
        return ways

    def _made_of(self, name: str, spans: Sequence[tuple[int, int]], atoms: set[str]) -> set[tuple[str, ...]]:
        n = len(spans)
        before: list[set[tuple[str, ...]]] = [{()}, *(set() for _ in range(n))]
        for end in range(1, n + 1):
            for start in range(end):
                if not before[start] or (start == 0 and end == n):
                    continue
                part = name[spans[start][0] : spans[end - 1][1]]
                if part in atoms or self.is_never(part):
                    own: tuple[str, ...] = (part,)
                elif self.is_control(part):
                    own = ()
                else:
                    continue
                before[end] |= {tuple(sorted({*way, *own})) for way in before[start]}
            before[end] = set(sorted(before[end])[:2])
        return before[n]

    def _half_known(self, pieces: Sequence[str], names: set[str]) -> bool:
        """Whether some parts are labels and the others could be: "A_C" beside "A", but not "A_2"."""
        told = [piece in names or self.is_control(piece) for piece in pieces]
        return any(told) and all(known or _is_word(piece) for known, piece in zip(told, pieces, strict=True))


def cut_label(label: str, separator: str, names: Iterable[str], is_control: Callable[[str], bool]) -> list[str]:
    """Parts of one label without controls: some of these `names` if it is made of them, else what is between separators."""
    pieces = [piece.strip() for piece in mark_of(separator).split(label)]
    if len(pieces) == 1:
        return pieces
    cuts = Cutter([*names, label], is_control, is_control, lambda part: False).cut(separator, strong=False)
    if label in cuts.parts and cuts.n_sure:
        return cuts.parts[label]
    return [piece for piece in pieces if not is_control(piece)]


def _recombine(pieces: Sequence[Sequence[str]]) -> bool:
    """Whether the parts of labels recombine as in "A_B", "B_C", "C_A", and not as in "STAT1_g1", "STAT1_g2", "IRF1_g1"."""
    labels_with = Counter(part for parts in pieces for part in set(parts))
    first, later = {parts[0] for parts in pieces}, {parts[-1] for parts in pieces}
    words = all(n > 1 and any(c.isalpha() for c in part) for part, n in labels_with.items())
    return words and all(len(set(parts)) == len(parts) == 2 for parts in pieces) and not first.isdisjoint(later)


def _spans(label: str, mark: re.Pattern[str]) -> list[tuple[int, int]]:
    """Where the stretches between the marks lie; empty ones too."""
    edges = [0, *(edge for found in mark.finditer(label) for edge in found.span()), len(label)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def could_be_name(part: str) -> bool:
    """Whether a part could stand alone: it starts with a letter or digit and closes the brackets that it opens."""
    if not part or not part[0].isalnum():
        return False
    depth = 0
    for c in part:
        depth += (c in _OPENING) - (c in _CLOSING)
        if depth < 0:
            return False
    return depth == 0


def _is_word(part: str) -> bool:
    """A name with letters that is not the number of a guide or the like."""
    return could_be_name(part) and part[0].isalpha() and not re.fullmatch(r"(?:g|sg|guide|v|p|rep|t)?\d+", part, re.I)
