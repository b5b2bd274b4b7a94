"""All tables, and the genes of the programs as a network, as gene sets and as rankings."""

from __future__ import annotations

import re
from pathlib import Path

from crlseq.export.graph import verdict
from crlseq.export.registry import write_folder
from crlseq.readout.enrichment import TOP_MOST, TOP_SHARE
from crlseq.run.run import Run
from crlseq.run.tables import shown
from crlseq.storage.csv import to_csv
from crlseq.storage.text import escaped


def csv(run: Run, path: Path) -> list[str]:
    """A folder of all tables."""
    write_folder(path, {f"{table}.csv": to_csv(rows) for table, rows in run.tables().items()})
    return [verdict(run)]


def network(run: Run, path: Path) -> None:
    """``source, target, weight``: every program's loadings that are not 0, as decoupler's methods take networks."""
    table = run.programs.loc[run.programs["loading"] != 0, ["program", "gene", "loading"]]
    path.write_bytes(to_csv(table.set_axis(["source", "target", "weight"], axis=1)))


def gmt(run: Run, path: Path) -> None:
    """Two sets per program: its strongest genes that rise and that fall with it."""
    lines = []
    for program in run.facts.programs:
        own = run.programs[run.programs["program"] == program.name]
        most = min(TOP_MOST, max(1, round(TOP_SHARE * len(own))))
        for direction, sign in (("up", 1.0), ("down", -1.0)):
            ordered = own.assign(strength=sign * own["loading"]).sort_values("strength", ascending=False, kind="stable")
            genes = [str(gene) for gene in shown(ordered[ordered["strength"] > 0])[:most]]
            if genes:
                lines.append("\t".join(map(_field, [f"{program.name}_{direction}", program.label, *genes])))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def rnk(run: Run, path: Path) -> None:
    """A ranking of all genes per program, by signed loading."""
    files = {}
    for name in run.program_names:
        own = run.programs[run.programs["program"] == name].sort_values("loading", ascending=False, kind="stable")
        pairs = zip(shown(own), own["loading"].tolist(), strict=True)
        files[f"{name}.rnk"] = "".join(f"{_field(str(gene))}\t{value!r}\n" for gene, value in pairs).encode()
    write_folder(path, files)


def _field(text: str) -> str:
    return escaped(re.sub(r"[\t\r\n]", " ", text))
