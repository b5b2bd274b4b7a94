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
    from crlseq.run import load

    found = load(run)
    asked = {"h5ad": h5ad, "graphml": graphml, "json": dag_json, "csv": csv}
    wanted = {name: path for name, path in asked.items() if path is not None}
    if not wanted:
        raise UsageError("Nothing to export was named.", "Give --h5ad, --graphml, --json or --csv with a path.")
    for name, path in wanted.items():
        if path.is_dir() and name != "csv":
            raise InputError(f"{path} is a folder.", "Name a file to write.")
        if path.exists() and not force:
            raise InputError(f"{path} exists.", "Choose another path, or replace it with --force.")
    try:
        for name, path in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == "csv":
                path.mkdir(exist_ok=True)
                for table, rows in found.tables().items():
                    rows.to_csv(path / f"{table}.csv", index=False)
            else:
                _write_file(found, name, path)
            say(f"{name}: {path}")
    except OSError as error:
        raise InputError(f"The export cannot be written: {error}.", "Check the path and its permissions.") from error
    if {"graphml", "json", "csv"} & set(wanted):
        say(f"The graph is {found.info['identification']['verdict']}: {found.info['identification']['reason']}")


def _write_file(run: Run, name: str, path: Path) -> None:
    """Written beside and renamed, so that a reader never sees half a file."""
    from crlseq.export import dag_json, graphml

    beside = path.with_name(path.name + ".tmp")
    try:
        if name == "h5ad":
            assert run.path is not None
            run.write_h5ad(run.path / "crlseq.h5ad", beside)
        else:
            beside.write_bytes(graphml(run.dag) if name == "graphml" else dag_json(run.dag).encode())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
