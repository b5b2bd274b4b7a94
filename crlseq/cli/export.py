"""``crlseq export``: a run in the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from crlseq.cli.options import Force, RunFolder, setting
from crlseq.cli.output import refuse_output, say
from crlseq.export.registry import FORMATS, check_format, write

CHOICES = "\n\n".join(["What to write:", *(f"{name}: {about.what}." for name, about in FORMATS.items())])


def export(
    run: RunFolder,
    name: Annotated[str, setting(CHOICES, "--format", "-f")],
    output: Annotated[Path, setting("File or folder to write.", "--output", "-o")],
    force: Force = False,
) -> None:
    """Write a run in the format of another tool."""
    from crlseq.pipeline.fitted import load

    check_format(name)
    found = load(run)
    refuse_output(output, force, folder=not FORMATS[name].suffix)
    notes = write(found, name, output)
    say(f"{name}: {output}")
    for note in notes:
        say(note)
