"""Which labels are of control cells, and which name no perturbation at all: the one list of both.

A label is read word by word: it is a control where every word of it is known and one says that nothing was hit, as in
"NegCtrl02", "sgNT-1", "non-targeting control 12" or "ONE_NON-GENE_SITE_5", so that no gene ("NTN1", "NT5E", "SAFB")
becomes one. "NT3" and "CTRL" are genes too: other labels of the column decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_MARK = r"[-_ .]"
PREFIX = re.compile(rf"^(?:sgRNA|gRNA|sg){_MARK}(?=.)|^sg(?=[A-Z])")  # of the name of a guide
GUIDE_WORD = r"(?:sgRNA|gRNA|[Gg]uide|sg|g|cr)"  # before its number
# Longer words first: the first that fits is taken.
_WORD = re.compile(
    rf"non?{_MARK}?(?:target(?:ing|ed|s)?|perturbed)|un(?:targeted|perturbed)|safe{_MARK}?(?:target(?:ing|ed)?|harbou?r)?"
    rf"|scrambled?|random|neg(?:ative)?{_MARK}?(?:controls?|ctrls?|ctl)|neg|controls?|ctrls?|ctl|ntc|nt(?!\d)"
    rf"|no{_MARK}?site|(?:one{_MARK}?)?(?:non{_MARK}?gen(?:e|ic)|intergenic){_MARK}?site|intergenic",
    re.IGNORECASE,
)
_MORE = re.compile(
    rf"{_MARK}+|#|\d+|[ACGT]{{17,}}|(?i:controls?|guides?|sgrnas?|grnas?|sites?|sequences?|for|human|mouse)"
    rf"|{GUIDE_WORD}(?={_MARK}?\d)|(?<={_MARK})G(?=\d)"
)
_NUMBER = rf"(?:{_MARK}+(?:(?:{GUIDE_WORD}|G){_MARK}?)?\d+|(?<=[A-Z])s?g\d+|(?<!\d)\d+|{_MARK}+[ACGT]{{17,}})"
_NUMBERED = re.compile(rf"(.*?[^\W_]){_NUMBER}")
_NEUROTROPHIN = re.compile(r"NT\d+")
_BETWEEN = re.compile(r"\s*[|;,+&]+\s*")
_SUFFIX = re.compile(_NUMBER)
GENES = ("CTRL", "Ctrl")  # a protease, which some write for control
# "none", "na" and "<na>" are missing values that were once written as text; blanks and marks are left out.
_NEVER = frozenset(
    {"", "*", "?", "nan", "none", "na", "<na>", "n/a", "null", "unassigned", "notassigned", "unknown", "undetermined"}
    | {"ambiguous", "negative", "multiple", "multiplet", "multiplets", "doublet", "doublets", "nocall", "uncalled"}
    | {"noguide", "noguides", "nogrna", "nosgrna", "noguidedetected", "undetected", "notdetected", "unmapped"}
)


def is_never(label: str) -> bool:
    """Whether a label says that no perturbation of the cell is known."""
    return re.sub(_MARK, "", label).casefold() in _NEVER


def is_control_name(label: str) -> bool:
    """Whether a label is that of control cells, of one guide or of several ("NT-1|NT-2")."""
    return all(part not in GENES and _is_control(part) for part in _BETWEEN.split(label))


def _is_control(label: str) -> bool:
    start = PREFIX.match(label)
    at = start.end() if start else 0
    word = _WORD.match(label, at)
    if word is None:
        return False
    while word is not None:
        at = word.end()
        word = _WORD.match(label, at) or _MORE.match(label, at)
    return at == len(label)


def number_of(label: str) -> str:
    """What stands apart and tells a label from others of its kind: "1" of "NT-1", nothing of "NT" and "NTg3"."""
    rest = label[len(kind_of(label)) :]
    return rest.lstrip("-_ .") if rest[:1] in ("-", "_", " ", ".") else ""


def find_controls(labels: Iterable[str]) -> list[str]:
    """Labels of control cells in a column with these distinct labels.

    "ctrl_g1" beside "g1" is "g1" with a control; "NT1" and "NT2" together are control guides, one alone is a gene; "CTRL" is a gene beside another control.
    """
    labels = list(labels)
    found = [label for label in labels if is_control_name(label)]
    there = {*labels}.difference(found, [""])
    found = [label for label in found if number_of(label) not in there]
    numbered = [label for label in labels if _NEUROTROPHIN.fullmatch(PREFIX.sub("", label))]
    found += numbered if len(numbered) > 1 else []
    return sorted(found or [label for label in labels if label in GENES])


def kind_of(label: str) -> str:
    """A label without the number or sequence that tells guides of a kind apart: "NT" of "NT-1" and of "NTg3|NTg4"."""
    first = _BETWEEN.split(label)[0]
    numbered = _NUMBERED.fullmatch(first)
    return numbered[1] if numbered else first


def is_named(label: str, names: Iterable[str]) -> bool:
    """Whether a label is one of these names, or one of them and the number or sequence of a guide, or several such."""
    names = [name for name in names if name != ""]
    return label in names or all(
        any(part == name or (part.startswith(name) and _SUFFIX.fullmatch(part, len(name))) for name in names)
        for part in _BETWEEN.split(label)
    )
