"""Names of guides -> the genes they target: the styles in which libraries write them, and when labels are guides.

One style is chosen for all names, by the targeting ones alone: the one that fits most; a name that it does not fit is a
gene of its own. Labels are taken for guides of their own accord only where that explains them better than names of
genes would: "HLA-A", "NKX2-1" or "Drug_1" are no guides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from crlseq.data.controls import GUIDE_WORD, PREFIX, find_controls, is_named, kind_of
from crlseq.errors import InputError

CONTROL = "control"
_WORDS = rf"(?:{GUIDE_WORD}|G)"
_TWO = re.compile(rf"[_\-. ]{_WORDS}[_\-. ]?\d+(?:[_\-. ]|$)|_[+-]_\d")  # one guide after the other
_LOCUS = re.compile(r"chr(?:\d{1,2}|[XYM]|MT)(?:[:.\-_].*)?|(?:\d{1,2}|[XY])(?:[:.\-_]\d.*)?", re.IGNORECASE)
# Strand and position in the genome, the length of the guide, and the transcript or promoter; or the latter alone.
_PLACE = r"(?:_[+-]_?\d{3,}|_\d{6,})(?:\.\d+)?(?:[-_][A-Za-z][A-Za-z0-9.,]*)?|[-_](?:P1P2|P1|P2)"
GUIDE_STYLES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("GENE_+_POSITION", re.compile(rf"(.+?)(?:{_PLACE})")),
    ("GENE_SEQUENCE", re.compile(r"(.+)[_\-.:][ACGT]{17,}")),
    ("GENE_g1", re.compile(rf"(.+)[_\-. ]{_WORDS}[_\-. ]?\d+")),
    ("GENEg1", re.compile(r"(.+?)(?:sg|g)\d+")),
    ("GENE_1", re.compile(r"(.+)[_\-.]\d+")),
)
_UNMISTAKABLE = frozenset({"GENE_+_POSITION", "GENE_SEQUENCE", "sgGENE"})
ENOUGH = 0.8  # share of labels that a style must fit for them to be guides
SHARED = 0.5  # and of genes with two guides or more


def genes_of_guides(
    names: Iterable[str], controls: str | Sequence[str] | None = None, table: Mapping[str, str] | None = None
) -> tuple[dict[str, str], str]:
    """Gene of each guide, sorted by guide, and the rule: one of `GUIDE_STYLES`, ``sgGENE`` (a prefix), or ``table``.

    Control guides have the first of the names ``controls`` (``control`` where none were given): those whose gene or name
    is one of them, or, where none were given, those with a known name of controls; others with a known name keep it,
    without their number. InputError if a guide is not in the table of genes by guide, or no style fits half of the
    targeting names.
    """
    guides = sorted(set(names))
    given = (controls,) if isinstance(controls, str) else tuple(controls or ())
    known = set(find_controls(guides))
    if table is not None:
        if missing := [guide for guide in guides if guide not in table]:
            what = f"{len(missing)} of {len(guides)} guides are not in the guide map, first {missing[0]!r}."
            raise InputError(what, "Add one line per guide: the guide, a tab, its gene.")
        parsed, rule = {guide: table[guide] for guide in guides}, "table"
    else:
        named = {g for g in guides if g in known or _is_given(g, PREFIX.sub("", g), given)}
        parsed, rule = _by_style([g for g in guides if g not in named])
        parsed |= {guide: kind_of(PREFIX.sub("", guide)) for guide in named}
    known |= set(find_controls(set(parsed.values())))
    control = given[0] if given else CONTROL
    genes = {}
    for guide, gene in parsed.items():
        is_control = _is_given(guide, gene, given) if given else guide in known or gene in known
        genes[guide] = control if is_control else gene
    return {guide: genes[guide] for guide in guides}, rule


def _is_given(guide: str, gene: str, given: Sequence[str]) -> bool:
    return gene in given or is_named(guide, given) or is_named(gene, given)


def _fits(guides: Iterable[str]) -> dict[str, dict[str, str]]:
    """Gene by guide for every style, where it fits."""
    short = {guide: PREFIX.sub("", guide) for guide in guides}
    fits = {name: {g: m[1] for g in short if (m := style.fullmatch(short[g]))} for name, style in GUIDE_STYLES}
    place = fits["GENE_+_POSITION"]
    fits["GENE_+_POSITION"] = {g: gene for g, gene in place.items() if not _LOCUS.fullmatch(gene)}
    for style in ("GENE_+_POSITION", "GENE_g1"):
        fits[style] = {g: gene for g, gene in fits[style].items() if not _TWO.search(gene)}
    fits["sgGENE"] = {g: name for g, name in short.items() if name != g}
    return fits


def _by_style(guides: Sequence[str]) -> tuple[dict[str, str], str]:
    """Of targeting guides."""
    fits = _fits(guides)
    rule = max(fits, key=lambda name: len(fits[name]))  # the first of equals
    if 2 * len(fits[rule]) < len(guides):
        first = next(g for g in guides if g not in fits[rule])
        what = f"The names of the {len(guides)} guides do not contain their genes in a known style, such as {first!r}."
        hint = "Give a table of guides and genes with --guide-map; if the names are genes, use --perturbation-key."
        raise InputError(what, hint)
    return {g: fits[rule].get(g, PREFIX.sub("", g)) for g in guides}, rule


def recognised(names: Iterable[str], measured: frozenset[str] = frozenset()) -> tuple[dict[str, str], str] | None:
    """Gene of each label (controls are not among ``names``) and the style, if the labels are guides; None if not.

    A style must fit `ENOUGH` of them and find several genes. Numbers alone are evidence only where `SHARED` of the genes
    have several guides, counted from 0 or 1, some genes are ``measured`` (if these are known), and the labels are not.
    """
    labels = sorted(set(names))
    for style, genes in _fits(labels).items():
        if len(genes) < ENOUGH * len(labels) or len(set(genes.values())) < 2:
            continue
        if style in _UNMISTAKABLE or _is_counted(style, genes, set(labels), measured):
            rule = _by_style(labels) if style == "sgGENE" else None
            return rule or ({label: genes.get(label, PREFIX.sub("", label)) for label in labels}, style)
    return None


def _is_counted(style: str, genes: Mapping[str, str], labels: Collection[str], measured: frozenset[str]) -> bool:
    """Whether guides of genes are numbered 1, 2, 3, as libraries do, and not by dose or position."""
    own = set(genes.values())
    if any(gene in labels or not any(c.isalpha() for c in gene) or _LOCUS.fullmatch(gene) for gene in own):
        return False
    used = {int(re.sub(r".*\D", "", guide)[-9:]) for guide in genes}
    if max(used) - min(used) + 1 > len(used) or min(used) > 1:
        return False
    if style == "GENE_g1":
        return True
    several = sum(n > 1 for n in Counter(genes.values()).values())
    told = style == "GENEg1" or not measured or any(gene in measured for gene in own)
    return told and measured.isdisjoint(genes) and several > 1 and several >= SHARED * len(own)
