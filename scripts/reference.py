"""The command reference, docs/commands.md, made from the program itself.

.venv/bin/python scripts/reference.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from rich.text import Text

from crlseq.cli.app import app
from crlseq.cli.options import FIELDS
from crlseq.config import SECTIONS, Config, to_toml

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
KINDS = {bool: "", int: "number", float: "number", str: "text", Path: "path"}
HEAD = """# Commands

Made by `python scripts/reference.py` from the program; `crlseq COMMAND --help` prints the same. Exit codes: 0 done, 1 a
fault in crlseq, 2 wrong usage, 3 unusable input, 4 did not converge, 130 interrupted. In brackets: the values that are
allowed and the default. `crlseq fit --config FILE.toml` sets the rest ([Configuration](#configuration)).
"""


def reference() -> str:
    """The page."""
    root: Any = typer.main.get_command(app)
    parts = [HEAD, "\n".join(_table("", root.params, {}))]
    for words, command in _commands(root, "crlseq"):
        parts.append(f"## {words}\n\n{_text(command.help)}\n\n```\n{_usage(words, command)}\n```")
        signature = inspect.signature(inspect.unwrap(command.callback), eval_str=True)
        hints = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        if arguments:
            rows = [f"| `{_metavar(p)}` | {_cell(p.help)} |" for p in arguments]
            parts.append("\n".join(["| argument | |", "|---|---|", *rows]))
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        for panel in dict.fromkeys(p.rich_help_panel for p in options):
            own = [p for p in options if p.rich_help_panel == panel]
            parts.append("\n".join(_table(f"{panel}:" if panel else "", own, hints)))
    parts.append(_configuration())
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _configuration() -> str:
    """What ``--config`` takes: every field with its default and what it is; those without a default by name."""
    lines, unset = [], []
    for line in to_toml(Config()).splitlines():
        name = line.partition(" = ")[0]
        about = FIELDS[name].description if name in FIELDS else None
        lines.append(f"{line}  # {about}" if about else line)
    for section, model in SECTIONS.items():
        unset += [f"`{section}.{name}`" for name, field in model.model_fields.items() if field.default is None]
    text = "A TOML file for `crlseq fit --config`, and what `run.json` keeps under `config`. Options win over it. Unset"
    return f"## Configuration\n\n{text} unless given: {', '.join(unset)}.\n\n```toml\n" + "\n".join(lines) + "\n```"


def _commands(group: Any, words: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{words} {name}")
        else:
            yield f"{words} {name}", command


def _usage(words: str, command: Any) -> str:
    needed = [p for p in command.params if p.required]
    told = [
        _metavar(p) if p.param_type_name == "argument" else f"{p.opts[0]} {p.name.upper().replace('_', '-')}"
        for p in sorted(needed, key=lambda p: p.param_type_name)
    ]
    return " ".join([words, *told, "[OPTIONS]"])


def _table(title: str, options: list[Any], hints: dict[str, Any]) -> list[str]:
    rows = [
        f"| `{'`, `'.join([*p.opts, *p.secondary_opts])}` | {_kind(hints.get(p.name, bool))} | {_cell(p.help)}{_default(p)} |"
        for p in options
    ]
    return [*([title, ""] if title else []), "| option | value | |", "|---|---|---|", *rows]


def _metavar(parameter: Any) -> str:
    return str(parameter.name.upper()) + ("..." if parameter.nargs == -1 else "")


def _kind(hint: Any) -> str:
    """The kind of value in a word; of a list, that it may be given again."""
    if get_origin(hint) is Annotated:
        return _kind(get_args(hint)[0])
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) in (Union, UnionType) and len(parts) == 1:
        return _kind(parts[0])
    if get_origin(hint) is list:
        return f"{_kind(parts[0])}, several"
    return KINDS.get(hint, "word")


def _default(option: Any) -> str:
    if option.required:
        return " Needed."
    default = option.default
    return "" if default is None or default is False or default == () else f" [default: {default}]"


def _cell(text: str | None) -> str:
    """Help in one line, without the markup of the terminal."""
    plain = Text.from_markup(_text(text)).plain
    return " ".join(plain.split()).replace("|", "\\|")


def _text(text: str | None) -> str:
    return inspect.cleandoc(text or "")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE)
