"""``crlseq export``: any part of a run, written again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crlseq.cli.output import say

if TYPE_CHECKING:
    from crlseq.run import Run


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    h5ad: Annotated[Path | None, typer.Option(help="The annotated input.")] = None,
    graphml: Annotated[Path | None, typer.Option(help="The DAG as GraphML, for Cytoscape.")] = None,
    dag_json: Annotated[Path | None, typer.Option("--json", help="The DAG as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="A folder for all tables.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Write parts of a run again: h5ad, GraphML, JSON, CSV."""
    from crlseq.errors import InputError, UsageError
    from crlseq.files import written_whole
    from crlseq.run import load
    from crlseq.runfolder import refuse_part_of_run
    from crlseq.tables import to_csv

    found = load(run)
    asked = {"h5ad": h5ad, "graphml": graphml, "json": dag_json, "csv": csv}
    wanted = {name: path for name, path in asked.items() if path is not None}
    if not wanted:
        raise UsageError("Nothing to export was named.", "Give --h5ad, --graphml, --json or --csv with a path.")
    for name, path in wanted.items():
        if path.is_dir() and name != "csv":
            raise InputError(f"{path} is a folder.", "Name a file to write.")
        refuse_part_of_run(path)
        if path.exists() and not force:
            raise InputError(f"{path} exists.", "Choose another path, or replace it with --force.")
    for name, path in wanted.items():
        if name == "csv":
            for table, rows in found.tables().items():
                with written_whole(path / f"{table}.csv") as beside:
                    beside.write_bytes(to_csv(rows))
        else:
            with written_whole(path) as beside:
                _write(found, name, beside)
        say(f"{name}: {path}")
    if {"graphml", "json", "csv"} & set(wanted):
        say(f"The graph is {found.info['identification']['verdict']}: {found.info['identification']['reason']}")


def _write(run: Run, name: str, path: Path) -> None:
    from crlseq.export import dag_json, graphml

    if name == "h5ad":
        assert run.path is not None
        run.write_h5ad(run.path / "crlseq.h5ad", path)
    else:
        path.write_bytes(graphml(run.dag) if name == "graphml" else dag_json(run.dag).encode())
