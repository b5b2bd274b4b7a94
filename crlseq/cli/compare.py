"""``crlseq compare``: two runs, or two halves of one screen, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crlseq.cli.options import AsJson, Force, RunFolder, load, setting
from crlseq.cli.output import refuse_output, say, show_json
from crlseq.errors import UsageError


def compare(
    run: RunFolder,
    other: Annotated[Path | None, typer.Argument(help="Another run folder.", show_default=False)] = None,
    output: Annotated[Path | None, setting("Folder for tables and a page.", "--output", "-o", default="none")] = None,
    split: Annotated[
        str | None,
        setting(
            "In place of another run: fit both halves of this one's screen, which share no guide or batch.",
            choices=("guides", "batches"),
            default="none",
        ),
    ] = None,
    split_key: Annotated[
        str | None,
        setting("Column with the guides or batches of --split.", default="the run's own, or the only one that can be"),
    ] = None,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Compare two runs: which programs, targets, effects and pairs of programs are found again.

    Programs are matched by their loadings over the genes that both runs fitted; matches are tested by exchanging genes.
    """
    if (other is None) == (split is None):
        raise UsageError(
            "A run is compared with another one, or with its own halves.", "Give a second run, or --split guides."
        )
    if split_key is not None and split is None:
        raise UsageError("--split-key belongs to --split.", "Omit it.")
    first = load(run)
    if output is not None:
        refuse_output(output, force, folder=True)
    from crlseq.evaluation.replication import compare_runs
    from crlseq.export.registry import write_folder
    from crlseq.report.comparison import comparison_files, in_sentences

    names = str(run), str(other)
    if split is None:
        assert other is not None
        pair = first, load(other)
    else:
        from crlseq.experiments.halves import fit_halves

        pair = fit_halves(first, split, split_key, None, say)
        names = f"{run}, half 1 by {split}", f"{run}, half 2 by {split}"
    found = compare_runs(*pair)
    if output is not None:
        write_folder(output, comparison_files(found, names))
    for note in found.notes:
        say(f"note: {note}")
    if json:
        show_json({"a": names[0], "b": names[1], **found.summary, "sentences": in_sentences(found)})
    else:
        for sentence in in_sentences(found):
            print(sentence)
    if output is not None:
        say(f"comparison: {output}")
