"""A function in a child process: a crash, a hang or a hunger for memory is an outcome, and not the end of the tests."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 30, 16 << 30
PATIENCE = 40  # seconds of the clock for each of the processor, since the machine may be busy with other things


def preload(function: Callable[[], object]) -> None:
    """Import here what `function` imports, so that no fork has to: it is run in one to find out."""
    with tempfile.NamedTemporaryFile("r") as names:

        def look() -> dict[str, Any]:
            function()
            Path(names.name).write_text("\n".join(sys.modules))
            return {}

        isolated(look)
        for name in names.read().split():
            with suppress(Exception):  # what is no module that can be found, or only in its turn
                importlib.import_module(name)


def isolated(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `function` returned (JSON), with its ``seconds`` of the processor; ``{"outcome": "fault", "detail": ...}`` where it did not."""
    reads, writes = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reads)
        try:
            faulthandler.enable(sys.__stderr__)
            faulthandler.register(signal.SIGXCPU, sys.__stderr__, chain=True)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 2))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            found = function()
        except BaseException:
            found = {"outcome": "fault", "detail": traceback.format_exc()}
        try:
            os.write(writes, json.dumps(found, default=str).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writes)
    content, hung = b"", False
    while True:
        left = PATIENCE * SECONDS - (time.monotonic() - started)
        if left <= 0 or not select.select([reads], [], [], left)[0]:
            hung = True
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(reads, 65536)
        if not piece:
            break
        content += piece
    os.close(reads)
    _, status, used = os.wait4(child, 0)
    seconds = used.ru_utime + used.ru_stime
    if hung or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return {"outcome": "fault", "detail": f"no end after {SECONDS} s", "seconds": seconds}
    try:
        found = dict(json.loads(content))
    except ValueError:
        found = {"outcome": "fault", "detail": f"the process ended with status {status}"}
    return {**found, "seconds": seconds}
