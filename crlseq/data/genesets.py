"""Gene sets: read from gmt files, and matched with the genes that are fitted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crlseq.data.names import GeneNames, naming
from crlseq.errors import InputError
from crlseq.storage.files import not_for_ever, written_beside

MIN_FITTED = 5  # fitted genes of a set whose activity is told from a single gene's
MAX_LINE, MAX_FILE = 4_000_000, 500_000_000  # bytes: ten times what the largest collections take
MAX_ENTRIES = 200_000_000  # sets times genes of an encoder: 3 GB while it is trained
GZIP = b"\x1f\x8b"
Line = tuple[str, str, tuple[str, ...]]  # name, description and all genes


@dataclass(frozen=True)
class GeneSets:
    """The sets that an encoder reads, a unit each."""

    names: tuple[str, ...]  # of each unit: the first set in the file with these fitted genes
    same: tuple[str, ...]  # other sets with the same fitted genes, which no data tell from the first; joined by "; "
    members: NDArray[np.bool_]  # (sets, genes)
    lines: tuple[Line, ...]  # of each set in `names` and `same`
    n_small: int  # sets left out, with fewer than `MIN_FITTED` fitted genes

    def in_words(self) -> str:
        """``Encoder: 87 gene sets, which hold 210 of 299 fitted genes; left out: ...``"""
        held, n_same = int(self.members.any(0).sum()), len(self.lines) - len(self.names)
        left = [f"{self.n_small} with fewer than {MIN_FITTED} fitted genes"] if self.n_small else []
        left += [f"{n_same} with the same fitted genes as another"] if n_same else []
        return (
            f"The encoder reads {len(self.names)} gene sets, which contain {held} of {self.members.shape[1]} fitted genes."
            + (f" Left out: {' and '.join(left)}." if left else "")
        )

    def digest(self) -> str:
        """SHA-256 of which genes each unit reads."""
        found = hashlib.sha256("\n".join(self.names).encode(errors="surrogatepass"))
        found.update(np.packbits(self.members).tobytes())
        return found.hexdigest()

    def write(self, path: Path) -> None:
        """As a gmt file, from which `fitted_sets` makes the same units again."""
        text = "".join("\t".join([name, about, *genes]) + "\n" for name, about, genes in self.lines)
        with written_beside(path) as beside:
            beside.write_text(text, encoding="utf-8", newline="\n")


def fitted_sets(path: Path, genes: GeneNames) -> GeneSets:
    """Sets of a gmt file with at least `MIN_FITTED` of the fitted genes, in the order of the file.

    InputError if the file cannot be read or is malformed, no set has enough of the genes, or there are too many sets.
    """
    units = dict[tuple[int, ...], list[Line]]()
    seen, n_small, common = list[str](), 0, False
    for name, about, own in read_gmt(path):
        seen += own[: max(0, 200 - len(seen))]
        found = tuple(sorted({place for gene in own for place in genes.find(gene)}))
        common = common or bool(found)
        if len(found) < MIN_FITTED:
            n_small += 1
            continue
        units.setdefault(found, []).append((name, about, tuple(own)))
        if len(units) * len(genes.index) > MAX_ENTRIES:
            raise InputError(
                f"The encoder cannot read more than {MAX_ENTRIES // len(genes.index)} gene sets of {len(genes.index)} genes; {path} has more.",
                "Give a smaller collection, or fit fewer genes.",
            )
    refuse_unmatched(str(path), seen, common, genes.index)
    if not units:
        what = f"No gene set of {path} contains {MIN_FITTED} or more of the {len(genes.index)} fitted genes."
        raise InputError(what, "Fit more genes, or give other gene sets.")
    members = np.zeros((len(units), len(genes.index)), dtype=bool)
    for row, found in zip(members, units, strict=True):
        row[list(found)] = True
    return GeneSets(
        names=tuple(lines[0][0] for lines in units.values()),
        same=tuple("; ".join(name for name, _, _ in lines[1:]) for lines in units.values()),
        members=members,
        lines=tuple(line for lines in units.values() for line in lines),
        n_small=n_small,
    )


def refuse_unmatched(source: str, seen: Sequence[str], common: bool, genes: Sequence[str] | np.ndarray) -> None:
    """Refuse sets without genes, or with none in `common` with those that were fitted; `seen` are the first ones."""
    if not seen:
        raise InputError(f"There is no gene set in {source}.", "Give a gmt file with one gene set per line.")
    if not common:
        raise InputError(
            f"No gene set of {source} contains a fitted gene: its genes are {naming(seen)}, those of the run "
            f"{naming(genes)}.",
            "Use the same gene names in the gene sets and in the screen.",
        )


def read_gmt(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Name, description (unless it is a link) and genes of each line; one line is in memory at a time.

    InputError if the file cannot be read, is packed or no text, or a line is malformed, too long or repeats a name.
    """
    at, read, number = dict[str, int](), 0, 0
    try:
        with open(path, "rb", opener=not_for_ever) as file:
            while line := file.readline(MAX_LINE + 1):
                number, read = number + 1, read + len(line)
                where = f"Line {number} of {path}"
                if number == 1 and line.startswith(GZIP):
                    raise InputError(f"{path} is compressed with gzip.", "Decompress it first with gunzip.")
                if len(line) > MAX_LINE or read > MAX_FILE:
                    raise InputError(f"{where} is too large for a gmt file.", f"At most {MAX_FILE:,} bytes are read, and {MAX_LINE:,} per line.")  # fmt: skip
                if not line.strip():
                    continue
                if b"\0" in line:
                    raise InputError(f"{where} is not text.", "Give an uncompressed gmt file.")
                name, *rest = (part.strip() for part in line.decode("utf-8-sig").split("\t"))
                if not name or len(rest) < 2 or "\r" in line.decode("utf-8-sig").strip():
                    raise InputError(f"{where} is not a gene set in gmt format.", "Each line has a name, a description and genes, separated by tabs.")  # fmt: skip
                if name in at:
                    raise InputError(f"{where} repeats the name of the gene set in line {at[name]}.", "Give each gene set a unique name.")  # fmt: skip
                at[name] = number
                description, *genes = rest
                yield name, "" if description.startswith(("http:", "https:")) else description, [*filter(None, genes)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", "Give a gmt file.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"Line {number} of {path} is not UTF-8 text.", "Give an uncompressed gmt file.") from error


def check_gmt(path: Path) -> None:
    """Read a gmt file for its faults alone, before anything slower is done; not a pipe, which can be read only once."""
    if not path.is_fifo() and not sum(1 for _ in read_gmt(path)):
        raise InputError(f"There is no gene set in {path}.", "Give a gmt file with one gene set per line.")
