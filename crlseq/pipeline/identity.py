"""What makes a fit this fit and no other: the content of its input, its options and the version; and how two differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crlseq._version import __version__
from crlseq.config import Config, DataConfig
from crlseq.data.embeddings import COEXPRESSION
from crlseq.data.source import digest_of
from crlseq.errors import InputError
from crlseq.run.run import Run
from crlseq.storage.files import written_whole
from crlseq.storage.runfolder import GENE_SETS, IDENTITY, empty

# Options that name a table beside the screen, whose content counts as the screen's does.
TABLES = tuple(
    name
    for name, field in DataConfig.model_fields.items()
    if isinstance(field.json_schema_extra, dict)
    and isinstance(flag := field.json_schema_extra.get("flag"), dict)
    and flag["shell"] == "path"
)


@dataclass(frozen=True)
class Identity:
    """Of a fit; ``content`` is a digest of its screen, ``tables`` those of `TABLES` by option."""

    version: str
    content: str
    tables: dict[str, str | None]
    config: dict[str, Any]

    @classmethod
    def of(cls, content: str, tables: dict[str, str | None], config: Config) -> Identity:
        """A fit by this version."""
        return cls(__version__, content, tables, config.model_dump(mode="json"))

    @classmethod
    def of_run(cls, run: Run) -> Identity:
        """A finished fit; versions that did not record a digest left it empty."""
        given = run.facts.input
        return cls(run.facts.version, given.sha256 or given.cells_sha256 or "", given.tables, run.info["config"])

    def to_json(self) -> str:
        """All of it, in one order."""
        return json.dumps(asdict(self), sort_keys=True)

    def differences(self, asked: Identity) -> list[str]:
        """What is otherwise in the fit that is asked for, in words; nothing if it is the same."""
        return [*self._otherwise(asked)]

    def _otherwise(self, asked: Identity) -> Iterator[str]:
        if self.content != asked.content:
            yield "the input has other content"
        for name, digest in self.tables.items():
            if digest and asked.tables.get(name) not in (None, digest):
                yield f"the file of {name} has other content"
        for section in dict.fromkeys([*self.config, *asked.config]):
            before, now = self.config.get(section), asked.config.get(section)
            if not isinstance(before, dict) or not isinstance(now, dict):
                before, now = {section: before}, {section: now}
            for name in dict.fromkeys([*before, *now]):
                if before.get(name) != now.get(name):
                    yield f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        if self.version != asked.version:
            yield f"the version of crlseq was {self.version} and is {asked.version}"


def digests_of_tables(config: Config, folder: Path | None) -> dict[str, str | None]:
    """Digests of `TABLES`; None of those not given, of pipes, which can be read once, and of gene sets whose file is gone
    where the folder has its copy.
    """
    copied = folder is not None and (folder / GENE_SETS).exists()
    digests: dict[str, str | None] = dict.fromkeys(TABLES)
    for name in TABLES:
        given = getattr(config.data, name)
        if given is None or (name, given) == ("embeddings", COEXPRESSION):
            continue
        path = Path(given)
        if path.is_file() or path.is_dir() or not (path.exists() or (name == "gene_sets" and copied)):
            digests[name] = digest_of(path)  # which says so of a file that is gone
    return digests


def settle(folder: Path, asked: Identity, force: bool, note: Callable[[str], None]) -> Identity:
    """Give a folder to a fit, new or begun there before, whose identity then knows tables that are gone since.

    What another fit left is an InputError; with `force` it is removed, and that is noted.
    """
    path = folder / IDENTITY
    if path.exists():
        try:
            begun = Identity(**json.loads(path.read_text(encoding="utf-8")))
            differences = "; ".join(begun.differences(asked))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged.", "Start over with --force and without --resume.") from error
        if not differences:
            asked = begun
        elif force:
            note(f"{folder} held another fit, and is replaced: {differences}.")
            empty(folder)
        else:
            what = f"The unfinished run {folder} was started with another input or other options: {differences}."
            raise InputError(what, "Resume it with the same input and options, or replace it with --force.")
    with written_whole(path) as beside:
        beside.write_text(asked.to_json(), encoding="utf-8")
    return asked
