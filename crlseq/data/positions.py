"""Where genes lie on chromosomes: from columns of ``var``, or from a GTF, a BED or a table beside the screen."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pandas as pd

from crlseq.data.names import MISSING, GeneNames, naming
from crlseq.errors import InputError
from crlseq.storage.files import not_for_ever

# Centromeres of GRCh38, in millions of bases: where the bands of the short arm end (UCSC's cytoBand of hg38).
CENTROMERES = {
    "1": 123.4, "2": 93.9, "3": 90.9, "4": 50.0, "5": 48.8, "6": 59.8, "7": 60.1, "8": 45.2, "9": 43.0, "10": 39.8,
    "11": 53.4, "12": 35.5, "13": 17.7, "14": 17.2, "15": 19.0, "16": 36.8, "17": 25.1, "18": 18.5, "19": 26.2,
    "20": 28.1, "21": 12.0, "22": 15.0, "X": 61.0, "Y": 10.4,
}  # fmt: skip
CHROMOSOME = (
    "chromosome", "chrom", "chr", "seqname", "seqnames", "seqid", "chromosome_name", "chromosome_scaffold_name",
)  # fmt: skip
START = ("start", "chromstart", "start_position", "gene_start", "gene_start_bp", "tss")
GENE = ("gene", "gene_id", "gene_name", "gene_symbol", "symbol", "name", "ensembl_id", "gene_ids")
HINT = "Give a GTF of GENCODE or Ensembl, a BED with names, or a CSV with the columns gene, chromosome and start."
MAX_LINE, MAX_FILE = 1 << 20, 8 << 30  # bytes, unpacked: GENCODE's GTF of man takes 2 GB
GZIP = b"\x1f\x8b"
_NAMES = re.compile(r'gene_(id|name) "([^"]*)"')


@dataclass(frozen=True)
class Positions:
    """Of N genes: names, `chromosome` (N,) as ``1``, ``X``, and `start` (N,) in bases; `source` says from where."""

    names: GeneNames
    chromosome: np.ndarray
    start: np.ndarray
    source: str

    def find(self, names: Iterable[str]) -> tuple[str, float] | None:
        """Chromosome and first base of the gene with these names; None if it is not known, or lies on two chromosomes."""
        for name in names:
            if places := list(self.names.find(name)):
                own = {*self.chromosome[places]}
                return (own.pop(), float(self.start[places].min())) if len(own) == 1 else None
        return None

    @cached_property
    def with_arms(self) -> bool:
        """Whether centromeres are known: genes lie on 21 and 22 and on no later autosome, as those of man alone do."""
        there = {*self.chromosome}
        return {"21", "22"} <= there and not any(name.isdigit() and int(name) > 22 for name in there)

    def arm(self, chromosome: str, start: float) -> str:
        """``p``, ``q``, or nothing where the centromere is not known."""
        if not self.with_arms or chromosome not in CENTROMERES:
            return ""
        return "p" if start < 1e6 * CENTROMERES[chromosome] else "q"

    def in_words(self, measured: GeneNames, targets: Iterable[str]) -> str:
        """``18,000 of 20,000 genes and 23 of 24 perturbed genes (columns chromosome and start of var)``."""
        genes, targets = range(len(measured.index)), [*dict.fromkeys(targets)]
        known = sum(self.find(measured.all_of(place)) is not None for place in genes)
        perturbed = sum(self.find(names_of(measured, target)) is not None for target in targets)
        return f"{known:,} of {len(genes):,} genes and {perturbed} of {len(targets)} perturbed genes ({self.source})"


def names_of(measured: GeneNames, target: str) -> list[str]:
    """A perturbed gene as it is called, and under the other names that the screen has of it."""
    return [target, *(name for place in measured.find(target) for name in measured.all_of(place))]


def read_positions(var: pd.DataFrame, path: str | None) -> Positions | None:
    """Positions from the file, or without one from the columns of ``var``; None if neither has any.

    InputError if the file cannot be read or is malformed, or knows none of the genes of ``var``.
    """
    if path is None:
        chromosome, start = _column(var, CHROMOSOME), _column(var, START)
        if chromosome is None or start is None:
            return None
        source = f"columns {chromosome} and {start} of var"
        table = var.assign(_chromosome=var[chromosome], _start=pd.to_numeric(var[start], errors="coerce"))
        return _positions(table, source) if table["_start"].notna().any() else None
    found = _positions(_read(Path(path)), str(path))
    measured = GeneNames.of(var)
    if not any(found.find(measured.all_of(place)) for place in range(len(measured.index))):
        what = f"The gene positions {path} have none of the screen's genes: theirs are {naming(found.names.index)}, those of the screen {naming(measured.index)}."  # fmt: skip
        raise InputError(what, "Give positions with the same gene names.")
    return found


def _positions(table: pd.DataFrame, source: str) -> Positions:
    """Of genes in the index, and their other names in columns of texts; what lies on no chromosome of a nucleus is left out."""
    chromosome = table["_chromosome"].astype(object).where(table["_chromosome"].notna(), "").map(str).map(_plain)
    known = ((chromosome != "") & table["_start"].notna()).to_numpy()
    kept = table[known].drop(columns=["_chromosome", "_start"])
    start = table["_start"].to_numpy(float)[known]
    return Positions(GeneNames.of(kept), chromosome.to_numpy(object)[known], start, source)


def _plain(chromosome: str) -> str:
    """``1`` of ``chr1`` and ``1.0``; empty of mitochondria, alternative sequences and what is missing."""
    name = re.sub(r"\.0$", "", re.sub(r"^chr(omosome)?[ _]?", "", chromosome.strip(), flags=re.IGNORECASE))
    return "" if name.casefold() in MISSING | {"m", "mt"} or "_" in name else name.upper() if name in "xy" else name


def _column(table: pd.DataFrame, known: tuple[str, ...]) -> str | None:
    """The column that is called by the first of these names, in any case and with blanks for underscores."""
    plain = {re.sub(r"\W+", "_", str(name).casefold()).strip("_"): str(name) for name in reversed(table.columns)}
    return next((plain[name] for name in known if name in plain), None)


def _read(path: Path) -> pd.DataFrame:
    """Genes of a file, in the index, with ``_chromosome``, ``_start`` and perhaps other names."""
    kind = path.name.lower().removesuffix(".gz")
    try:
        if kind.endswith((".gtf", ".gff")):
            rows = [*_of_gtf(_lines(path), path)]
        elif kind.endswith(".bed"):
            rows = [*_of_bed(_lines(path), path)]
        else:
            return _of_table(_lines(path), path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        why = getattr(error, "strerror", None) or ("it is no text" if isinstance(error, ValueError) else str(error))
        raise InputError(f"The gene positions {path} cannot be read: {why.rstrip('.')}.", HINT) from None
    if not rows:
        raise InputError(f"The gene positions {path} have no gene.", HINT)
    gene, symbol, chromosome, start = zip(*rows, strict=True)
    return pd.DataFrame({"gene_name": symbol, "_chromosome": chromosome, "_start": start}, index=pd.Index(gene))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without comments, unpacked where the file is a gzip; one is in memory at a time."""
    read = 0
    with open(path, "rb", opener=not_for_ever) as raw:
        packed = raw.peek(2).startswith(GZIP)
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            read += len(line)
            if len(line) > MAX_LINE or read > MAX_FILE:
                raise InputError(f"Line {number} of the gene positions {path} is too large.", HINT)
            text = line.decode("utf-8-sig").rstrip("\r\n")
            if text.strip() and not text.startswith(("#", "track ", "browser ")):
                yield number, text


def _of_gtf(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[tuple[str, str, str, float]]:
    """Identifier, symbol, chromosome and start of every line of the kind ``gene``."""
    for number, line in lines:
        fields = line.split("\t", 8)
        if len(fields) < 9:
            raise InputError(f"Line {number} of the gene positions {path} has not the nine fields of a GTF.", HINT)
        if fields[2] == "gene":
            names: dict[str, str] = dict(_NAMES.findall(fields[8]))
            if "id" not in names:
                raise InputError(f"Line {number} of the gene positions {path} has no gene_id.", HINT)
            yield names["id"], names.get("name", names["id"]), fields[0], _base(fields[3], number, path)


def _of_bed(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[tuple[str, str, str, float]]:
    """Name, chromosome and start, counted from 1 as elsewhere."""
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) < 4:
            raise InputError(
                f"Line {number} of the gene positions {path} has not four fields: a BED needs names.", HINT
            )
        yield fields[3], fields[3], fields[0], _base(fields[1], number, path) + 1


def _of_table(lines: Iterator[tuple[int, str]], path: Path) -> pd.DataFrame:
    """Of a CSV or TSV with a header."""
    rows = [*lines]
    mark = "\t" if rows and "\t" in rows[0][1] else ","
    split = [[field.strip().strip('"') for field in line.split(mark)] for _, line in rows]
    head = pd.DataFrame(columns=split[0] if split else [])
    keys = [_column(head, known) for known in (GENE, CHROMOSOME, START)]
    if None in keys:
        raise InputError(f"The gene positions {path} have no columns gene, chromosome and start.", HINT)
    for (number, _), fields in zip(rows, split, strict=True):
        if len(fields) != len(split[0]):
            raise InputError(f"Line {number} of the gene positions {path} has {len(fields)} fields, the header {len(split[0])}.", HINT)  # fmt: skip
    if len(split) < 2:
        raise InputError(f"The gene positions {path} have no gene.", HINT)
    table = pd.DataFrame(split[1:], columns=split[0], dtype=object)
    gene, chromosome, start = (str(key) for key in keys)
    starts = [_base(text, number, path) for text, (number, _) in zip(table[start], rows[1:], strict=True)]
    named = table.drop(columns=[chromosome, start]).set_index(gene)
    return named.assign(_chromosome=table[chromosome].to_numpy(), _start=starts)


def _base(text: str, number: int, path: Path) -> float:
    if not text.strip().isdecimal():
        raise InputError(f"Line {number} of the gene positions {path} has {text[:40]!r} for a start, which is no whole number.", HINT)  # fmt: skip
    return float(text)
