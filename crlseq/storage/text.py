"""Names from users on their way out: what would steer a terminal or turn the direction of writing is written as an escape."""

from __future__ import annotations

import json
import re
from typing import Any

# What moves a cursor, changes a title, breaks a line or turns the direction of writing: C0 but for tab and line feed, C1,
# line separators and bidi; and half pairs of surrogates, which are no text.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ESCAPED = re.compile(r"(\\+)(u[0-9a-f]{4})")
_BEFORE = re.compile(rf"(\\*)(u[0-9a-f]{{4}}|{CONTROLS.pattern})")


def visible(text: str) -> str:
    """The text with control characters written out as ``\\x1b``: a name from a file must not steer the terminal."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def escaped(text: str) -> str:
    """The text with control characters written out as ``\\u001b``."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def to_json(value: Any, indent: int | None = 1) -> str:
    """JSON in UTF-8 whose texts are what they were, with control characters as escapes."""
    return escaped(json.dumps(value, indent=indent, ensure_ascii=False))


def reversibly_escaped(text: str) -> str:
    """As `escaped`, in a way that `unescaped` undoes: backslashes before an escape, or what looks like one, are doubled."""
    return _BEFORE.sub(lambda found: found[1] * 2 + escaped(found[2]), text)


def unescaped(text: str) -> str:
    """What `reversibly_escaped` was given."""

    def back(found: re.Match[str]) -> str:
        n = len(found[1])
        return found[1][: n // 2] + (chr(int(found[2][1:], 16)) if n % 2 else found[2])

    return _ESCAPED.sub(back, text)
