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
from itertools import accumulate, pairwise

# In the order in which they are tried. Not between "_": the strand of a guide. Not before a blank or "/" alone: a charge.
MARKS = {
    " || ": r"\s*\|\|\s*",
    "+": r"\s+\+\s+|(?<!\s)(?:(?<!_)\+|\+(?!_))(?![\s/])",
    "|": r"\s*(?<!\|)\|(?!\|)\s*",
    ";": r"\s*;\s*",
    ",": r"\s*,\s*",
    " and ": r"\s+and\s+",
    " & ": r"\s+&\s+",
    "/": r"\s*/\s*",
    "_": r"_+",
}
SEPARATORS = tuple(MARKS)
# Names hold the others as well, as in chemicals, guides and loci.
STRONG_SEPARATORS = frozenset({" || ", "+", "|", ";"})
_OPENING, _CLOSING = "([{<", ")]}>"
_BRACKET = re.compile(r"[\[\](){}<>]")


def known_separator(separator: str) -> str:
    """The separator as detection writes it."""
    return next((known for known in SEPARATORS if known.strip() == separator.strip()), separator)


def mark_of(separator: str) -> re.Pattern[str]:
    """What a label is cut at."""
    text = re.escape(separator.strip() or separator)
    return re.compile(MARKS.get(separator, rf"\s*{text}\s*" if separator.strip() else text))


@dataclass
class Cuts:
    """The labels of a column, cut at one separator."""

    parts: dict[str, list[str]]  # of the labels that are combinations, controls left out
    n_sure: int = 0  # of them, those whose parts are labels or controls
    torn: list[str] = field(default_factory=list)  # labels with the separator that could be combinations, or names
    n_half: int = 0  # of them, those with another label in them
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
        pieces_of = {label: [label[a:b] for a, b in spans] for label, spans in joined.items()}
        if not (strong or cuts.parts or cuts.twofold) and _recombine(list(pieces_of.values())):
            return Cuts(pieces_of)
        # Where names hold the separator, a label that has it as often is a name, and a combination at least twice as often.
        sizes = {len(_spans(name, mark)) for name in used}
        loose = {piece for label, own in pieces_of.items() if not (ways[label] or label in used) for piece in own}
        could_be = _is_word if separator == "_" and not cuts.n_sure else could_be_name
        split = dict[str, list[str]]()
        for label, pieces in pieces_of.items():
            if ways[label]:
                continue
            possible = all(map(could_be_name, pieces))
            half = [] if strong and possible else self._half_told(label, joined[label], names, could_be)
            if not half and not (strong and possible):
                named = len(pieces) in sizes and len(pieces) < 2 * min(sizes)
                if named or (label in used and loose.isdisjoint(pieces)):
                    continue
            if possible and (strong or forced):
                whole = half if half and max(sizes, default=1) > 1 else pieces
                split[label] = [piece for piece in whole if not self.is_control(piece)]
            elif half or (possible and cuts.n_sure) or (strong and not cuts.n_sure):
                cuts.torn.append(label)
                cuts.n_half += bool(half)
        cuts.parts = {label: [p for part in own for p in split.get(part, [part])] for label, own in cuts.parts.items()}
        cuts.parts |= split
        return cuts

    def _half_told(
        self, label: str, spans: Sequence[tuple[int, int]], names: set[str], could_be: Callable[[str], bool]
    ) -> list[str]:
        """The parts of a label, one of which is another label, and the rest could be: "A_C" beside "A", not "A_2"; or none."""
        n = len(spans)
        for i in range(n):
            for j in range(i, n if i else n - 1):
                part = label[spans[i][0] : spans[j][1]]
                if part in names or ((i == 0 or j == n - 1) and self.is_control(part)):
                    before = [label[: spans[i - 1][1]]] if i else []
                    after = [label[spans[j + 1][0] :]] if j + 1 < n else []
                    if all(rest in names or could_be(rest) for rest in [*before, *after]):
                        return [*before, part, *after]
        return []

    def _beside_controls(self, joined: dict[str, list[tuple[int, int]]], strong: bool) -> set[str]:
        """Names that occur with a control alone: A of "A+ctrl" and of "ctrl+A"."""
        is_control = self.is_control if strong else self.is_own_control
        found = set[str]()
        for label, spans in joined.items():
            if strong and len(spans) > 2:
                continue
            halves = [(label[:end], label[start:]) for (_, end), (start, _) in pairwise(spans)]
            # The longest control: "NT_1" of "NT_1_A".
            first = next((name for other, name in reversed(halves) if is_control(other)), "")
            last = next((name for name, other in halves if is_control(other)), "")
            found.update(name for name in (first, last) if could_be_name(name) and not self.is_control(name))
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


def cut_label(label: str, separator: str, names: Iterable[str], is_control: Callable[[str], bool]) -> list[str]:
    """Parts of one label without controls: some of these `names` if it is made of them, else what is between separators."""
    pieces = [piece.strip() for piece in mark_of(separator).split(label)]
    parts = [piece for piece in pieces if not is_control(piece)]
    if len(pieces) == 1 or set(parts) <= set(names):
        return parts
    cuts = Cutter([*names, label], is_control, is_control, lambda part: False).cut(separator, strong=False)
    return cuts.parts[label] if label in cuts.parts and cuts.n_sure else parts


def _recombine(pieces: Sequence[Sequence[str]]) -> bool:
    """Whether the parts of labels recombine as in "A_B", "B_C", "C_A", and not as in "STAT1_g1", "STAT1_g2", "IRF1_g1"."""
    labels_with = Counter(part for parts in pieces for part in set(parts))
    first, later = {parts[0] for parts in pieces}, {parts[-1] for parts in pieces}
    words = all(n > 1 and any(c.isalpha() for c in part) for part, n in labels_with.items())
    return words and all(len(set(parts)) == len(parts) == 2 for parts in pieces) and not first.isdisjoint(later)


def _spans(label: str, mark: re.Pattern[str]) -> list[tuple[int, int]]:
    """Where the stretches between the marks lie; empty ones too. Marks within brackets are parts of a name."""
    marks = [found.span() for found in mark.finditer(label)]
    if marks and _BRACKET.search(label) and (depth := _depths(label)):
        marks = [span for span in marks if depth[span[0]] == 0]
    edges = [0, *(edge for span in marks for edge in span), len(label)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _depths(label: str) -> list[int]:
    """In how many brackets each character is; nothing where they do not close."""
    depth = [0, *accumulate((c in _OPENING) - (c in _CLOSING) for c in label)]
    return [] if min(depth) < 0 or depth[-1] else depth


def could_be_name(part: str) -> bool:
    """Whether a part could stand alone: it starts with a letter, a digit or a bracket, and its brackets close."""
    starts = part != "" and (part[0].isalnum() or part[0] in _OPENING)
    return starts and (_BRACKET.search(part) is None or bool(_depths(part)))


def _is_word(part: str) -> bool:
    """A name with letters that is not the number of a guide or the like."""
    letters = any(c.isalpha() for c in part)
    return letters and could_be_name(part) and not re.fullmatch(r"(?:g|sg|guide|v|p|rep|t)\d+", part, re.IGNORECASE)
