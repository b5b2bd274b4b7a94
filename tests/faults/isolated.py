"""A function in a child process: a crash, a hang or a hunger for memory is an outcome, and not the end of the tests."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

SECONDS, MEMORY = 30.0, 16 << 30


def isolated(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `function` returned (JSON), with ``seconds``; ``{"outcome": "fault", "detail": ...}`` where it did not."""
    reads, writes = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reads)
        try:
            faulthandler.enable(sys.__stderr__)
            faulthandler.dump_traceback_later(SECONDS - 2, file=sys.__stderr__)
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
        left = SECONDS - (time.monotonic() - started)
        if left <= 0 or not select.select([reads], [], [], left)[0]:
            hung = True
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(reads, 65536)
        if not piece:
            break
        content += piece
    os.close(reads)
    status = os.waitpid(child, 0)[1]
    if hung:
        return {"outcome": "fault", "detail": f"no end after {SECONDS:.0f} s", "seconds": SECONDS}
    try:
        found = dict(json.loads(content))
    except ValueError:
        found = {"outcome": "fault", "detail": f"the process ended with status {status}"}
    return {**found, "seconds": time.monotonic() - started}
