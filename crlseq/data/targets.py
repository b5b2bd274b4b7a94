"""The programs that perturbations act on, where a user knows them."""

from pathlib import Path

from crlseq.data.guide_targets import read_pairs


def read_targets(path: str | Path) -> dict[str, str]:
    """Program of each perturbation from a table with both a line, in its order: upstream programs come first.

    InputError as `crlseq.data.guide_targets.read_pairs`.
    """
    return read_pairs(path, "table of targets", "perturbation", "program", ("program",))
