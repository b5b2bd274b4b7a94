"""A signal to end is never lost: not if it was ignored at the start, not in a destructor, not in a long call into C."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from crlseq.storage import interrupts
from tests.support import environment

ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# A command whose body is given; it says "ready", and where its finally block was reached.
COMMAND = """
import hashlib, sys, time
from crlseq.storage import interrupts
from crlseq.cli import app
interrupts.AGAIN, interrupts.PATIENCE = 0.1, 1.0
def ready():
    print("ready", flush=True)
def endless():
    for _ in range(600):
        time.sleep(0.1)
class Destroyed:
    def __del__(self):
        ready()
        endless()
@app.app.command("body")
def body() -> None:
    {body}
sys.argv = ["crlseq", "body"]
app.main()
"""


def interrupted(body: str, number: int, ignored: int | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that gets a signal when it says that it is ready."""
    lines = "\n    ".join(body.strip().splitlines())

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite itself may run under nohup
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    with subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(body=lines)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=prepare,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


@pytest.mark.parametrize("number", ENDINGS)
def test_python_code(number: int) -> None:
    code, out, err = interrupted("try:\n    ready()\n    endless()\nfinally:\n    print('cleaned')", number)
    assert (code, out) == (130, "cleaned\n")
    assert err == "Interrupted. The same command with --resume continues an unfinished fit.\n"


def test_a_process_that_was_started_with_interrupts_ignored() -> None:
    """As a shell starts ``crlseq fit ... &`` in a script."""
    assert interrupted("ready()\nendless()", signal.SIGINT, ignored=signal.SIGINT)[0] == 130


def test_nohup_is_respected() -> None:
    code, out, _ = interrupted("ready()\ntime.sleep(0.5)\nprint('done')", signal.SIGHUP, ignored=signal.SIGHUP)
    assert (code, out) == (0, "done\n")


def test_an_interrupt_lost_in_a_destructor_comes_again() -> None:
    """Python forgets what a destructor raises and goes on; no traceback is printed."""
    code, out, err = interrupted("Destroyed()\nprint('lost')\nendless()\nprint('never')", signal.SIGINT)
    assert (code, out) == (130, "lost\n")
    assert err == "Interrupted. The same command with --resume continues an unfinished fit.\n"


def test_an_interrupt_that_became_another_error() -> None:
    body = "try:\n    ready()\n    endless()\nexcept BaseException as error:\n    raise OSError('odd') from error"
    code, _, err = interrupted(body, signal.SIGTERM)
    assert code == 130 and "odd" not in err


def test_cleaning_up_is_not_interrupted_again() -> None:
    body = "try:\n    ready()\n    endless()\nfinally:\n    time.sleep(0.4)\n    print('cleaned')"
    assert interrupted(body, signal.SIGINT)[:2] == (130, "cleaned\n")


def test_a_call_that_lets_no_handler_run() -> None:
    """It releases the GIL, as h5py, numpy and torch do, and would go on for half an hour."""
    code, _, err = interrupted("ready()\nhashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)", signal.SIGTERM)
    assert code == 130
    assert err == "Interrupted. The same command with --resume continues an unfinished fit.\n"


def test_handlers_are_put_back() -> None:
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite itself may run under nohup
    before = [signal.getsignal(number) for number in ENDINGS]
    with interrupts.watched("bye"):
        assert all(signal.getsignal(number) != old for number, old in zip(ENDINGS, before, strict=True))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.received()
    assert [signal.getsignal(number) for number in ENDINGS] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.set_wakeup_fd(-1) == -1
    signal.signal(signal.SIGHUP, outside)
