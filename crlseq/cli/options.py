"""Options of commands: those of the configuration, made from its fields, and those that several commands share."""

from __future__ import annotations

import inspect
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from crlseq.config import SECTIONS, Config, make_config, read_toml
from crlseq.errors import InputError, UsageError
from crlseq.storage.files import not_for_ever, read_text
from crlseq.storage.runfolder import is_run

if TYPE_CHECKING:
    from crlseq.pipeline.fitted import FittedRun

Command = Callable[..., None]
FIELDS = {name: field for section in SECTIONS.values() for name, field in section.model_fields.items()}
PANELS = {name: title.capitalize() for title, section in SECTIONS.items() for name in section.model_fields}
FLAGS: dict[str, dict[str, Any]] = {
    name: field.json_schema_extra["flag"]  # type: ignore[misc]
    for name, field in FIELDS.items()
    if isinstance(field.json_schema_extra, dict)
}
LONG = 30  # characters that a narrow terminal would cut
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def setting(text: str, *names: str, default: str = "", choices: Iterable[str] = (), **limits: Any) -> Any:
    """An option with a value, one of `choices` if there are any; `default` says in words what is taken where it is not given."""
    words = list(choices)
    told = in_brackets(text, _listed(words), f"default: {default}" if default else "")
    return typer.Option(*names, help=told, **{"autocompletion": completing(words), **limits})


def _listed(words: Sequence[str]) -> str:
    """Words to choose from: where they are many, with blanks at which a terminal can break the line."""
    listed = "|".join(words)
    return listed if len(listed) < LONG else ", ".join(words)


def in_brackets(text: str, *parts: str) -> str:
    """Help with values and default behind it, which rich is not to take for markup."""
    told = "; ".join(filter(None, parts))
    return escape(f"{text} [{told}]" if told else text)


def completing(words: Iterable[str]) -> Callable[[str], list[str]] | None:
    """What a shell completes a value to; None leaves it to the shell, which knows files."""
    known = list(words)
    return (lambda incomplete: [word for word in known if word.startswith(incomplete)]) if known else None


def switch(name: str, text: str, *short: str) -> Any:
    """An option without a value."""
    return typer.Option(name, *short, help=text, metavar="")


def _in_place(context: typer.Context, run: Path) -> Path:
    """The run, unless it stands behind another word: ``crlseq plot dag RUN``."""
    words = sys.argv[sys.argv.index(str(run)) + 1 :] if str(run) in sys.argv else []
    if words and not run.exists() and is_run(Path(words[0])):
        hint = f"Write: {context.command_path} {words[0]} {run}."
        raise UsageError(f"The run {words[0]} belongs before {str(run)!r}.", hint)
    return run


RunFolder = Annotated[Path, typer.Argument(help="Run folder.", show_default=False, callback=_in_place)]
AsJson = Annotated[bool, switch("--json", "Print JSON to stdout.")]
Force = Annotated[bool, switch("--force", "Replace what exists at --output.")]
Cluster = Annotated[
    str | None,
    setting(
        "Compute passes over cells on a Dask cluster: tcp://HOST:8786, or a number of processes to start here.",
        "--cluster", default="none",
    ),
]  # fmt: skip
Quiet = Annotated[bool, switch("--quiet", "Print errors only.", "-q")]


def at_the_shell(command: Command, memory: int) -> Command:
    """The command as it is called from a shell: ``~`` is expanded, here and nowhere else, and memory must do for imports.

    Where the address space is smaller, libraries abort or wait for ever while they are loaded.
    """

    @wraps(command)
    def called(**given: Any) -> None:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY and limit < memory:
            what = f"The memory of a process is limited to {limit >> 20} MiB, and the command needs {memory >> 20} MiB."
            raise InputError(what, "Raise the limit: ulimit -v unlimited.")
        command(**{name: _expanded(value) for name, value in given.items()})

    return called


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    if not isinstance(value, Path):
        return value
    try:
        return value.expanduser()
    except RuntimeError:  # of a user that does not exist
        return value


def load(run: Path) -> FittedRun:
    """The run in a folder; what loads it is imported when it is needed, so that help is quick."""
    from crlseq.pipeline.fitted import load

    return load(run)


def takes_config(*names: str) -> Callable[[Command], Command]:
    """Options for these fields of the configuration, which the command takes as ``**given``; all flags if none is named.

    typer reads a command's signature: the fields stand there in place of ``**given``, with None where they are not given.
    """

    def with_fields(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        fields = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option(name))
            for name in names or FLAGS
        ]
        command.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
        return command

    return with_fields


def option(name: str) -> Any:
    """The type and the help of a field's option, as typer's annotation."""
    field, flag = FIELDS[name], FLAGS[name]
    typed = _typed(field, flag["shell"])
    metavar = {bool: "", list[str]: "<str>"}.get(typed)
    text = in_brackets(str(field.description), _range(field), _default(field, flag))
    words = [word for each in _alternatives(field.annotation) if get_origin(each) is Literal for word in get_args(each)]
    # Two names are wide: beside them other options' help would be a narrow column.
    panel = flag["panel"] or ("Switches" if flag["switch"] else PANELS[name])
    names = filter(None, [flag["switch"]])
    told: Any = {"metavar": metavar, "rich_help_panel": panel, "autocompletion": completing(words)}
    return Annotated[typed | None, typer.Option(*names, help=text, **told)]


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union but None; another annotation alone."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [member for member in members if member is not type(None)]


def _typed(field: FieldInfo, shell: str) -> Any:
    """What typer is to read: words and numbers that pydantic checks later, so that Python and TOML are refused alike."""
    if shell:
        return Path
    first, *others = _alternatives(field.annotation)
    if first in (bool, int, float) and not others:
        return first
    return list[str] if get_origin(first) is tuple else str


def _range(field: FieldInfo) -> str:
    """Words to choose from and bounds of numbers."""
    found = []
    for each in _alternatives(field.annotation):
        limits = field.metadata
        if get_origin(each) is Literal:
            found.append(_listed(get_args(each)))
            continue
        if get_origin(each) is Annotated:
            limits = [limit for inner in get_args(each)[1:] for limit in getattr(inner, "metadata", ())]
        pairs = [(word, getattr(limit, key)) for limit in limits for key, word in BOUNDS.items() if hasattr(limit, key)]
        found += [", ".join(f"{word} {bound:.12g}" for word, bound in pairs)] if pairs else []
    return ", or ".join(found)


def _default(field: FieldInfo, flag: Mapping[str, str]) -> str:
    value = field.default
    if flag["switch"] and isinstance(value, bool):
        return f"default: {flag['switch'].split('/')[not value]}"
    if value is None or value == ():
        return f"default: {flag['unset'] or 'none'}"
    return f"default: {value:g}" if isinstance(value, float) else f"default: {value}"


def read_config(given: Mapping[str, Any], preset: str | None = None, file: Path | None = None) -> Config:
    """The configuration of a command: preset, file, options.

    Raises `InputError` if the file or a list of names cannot be read, and `UsageError` for a value out of range.
    """
    options = {name: _value(name, value) for name, value in given.items() if value not in (None, [])}
    return make_config(preset, read_toml(file, not_for_ever) if file else None, **options)


def _value(name: str, value: Any) -> Any:
    """What was typed, as the configuration has it."""
    if FLAGS[name]["shell"] == "lines":
        return _lines(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list):
        return tuple(value)
    number = int in [get_args(each)[0] for each in _alternatives(FIELDS[name].annotation) if get_args(each)]
    return int(value) if number and value.isdigit() else value


def _lines(path: Path) -> tuple[str, ...]:
    """Genes in a text file: one per line, without comments and repetitions."""
    hint = "Give a text file with one gene per line."
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"The gene list {path} cannot be read: {why}.", hint) from None
    found = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise InputError(f"The gene list {path} is empty.", hint)
    return found
