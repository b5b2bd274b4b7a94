"""Wires the commands, and turns errors into one sentence, a hint and an exit code."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from typing import Annotated

import typer

from crlseq._version import __version__
from crlseq.cli import inspect
from crlseq.cli.benchmark import benchmark
from crlseq.cli.check import check
from crlseq.cli.cite import cite
from crlseq.cli.compare import compare
from crlseq.cli.evaluate import evaluate
from crlseq.cli.export import export, plot, report
from crlseq.cli.fit import fit, prepare, rerun
from crlseq.cli.options import at_the_shell
from crlseq.cli.output import say
from crlseq.cli.power import power
from crlseq.cli.predict import predict, project
from crlseq.cli.simulate import simulate
from crlseq.cli.streams import suit_streams
from crlseq.errors import CrlseqError, InputError, UsageError
from crlseq.storage import interrupts

app = typer.Typer(
    name="crlseq",
    help="Causal gene programs from Perturb-seq screens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"crlseq {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.", metavar="")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", metavar="", envvar="CRLSEQ_DEBUG")
    ] = False,
) -> None:
    """Causal gene programs from Perturb-seq screens."""
    if debug:
        os.environ["CRLSEQ_DEBUG"] = "1"


# Address space in which libraries can be loaded at all: with torch, and without.
WITH_TORCH, SMALL = 1280 << 20, 512 << 20
HEAVY = (prepare, fit, predict, project, evaluate, compare, rerun, benchmark, power)
for command in (
    check, prepare, fit, predict, project, evaluate, compare, export, report, rerun, plot, simulate, benchmark, power, cite,
):  # fmt: skip
    app.command()(command)
for known in (*app.registered_commands, *inspect.app.registered_commands):
    assert known.callback is not None
    known.callback = at_the_shell(known.callback, WITH_TORCH if known.callback in HEAVY else SMALL)
app.add_typer(inspect.app, name="inspect")

# What is wrong with a path whoever opens it, and what to do.
PATHS = {
    errno.EACCES: "Check its permissions.", errno.EPERM: "Check its permissions.", errno.ENAMETOOLONG: "Give a shorter path.",
    errno.ELOOP: "Its links lead back to itself.",
}  # fmt: skip
LONGEST = 80  # letters of a path that are shown
FAREWELL = "Interrupted. The same command with --resume continues an unfinished fit."


def main() -> None:
    """Entry point of ``crlseq``, ``scanpy crlseq`` and ``python -m crlseq``."""
    # Before torch and numpy load: threads that spin while they wait make a fit ten times slower on a busy machine. Those of
    # OpenBLAS always do; what numpy computes is small, or divided among threads here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    atexit.register(gc.freeze)  # else Python ends with a search for garbage in all there is, of up to a second
    suit_streams()
    with interrupts.watched(FAREWELL):
        sys.exit(_run())


def _run() -> int:
    """Run the command, say what went wrong, and give the exit code."""
    try:
        if sys.flags.optimize > 1:
            raise UsageError("crlseq does not run under python -OO: anndata needs its docstrings.", "Use python -O.")
        try:
            os.getcwd()
        except FileNotFoundError:
            raise InputError("The working folder was removed.", "Change to one that exists.") from None
        # Not standalone: click would turn an interrupt into exit code 1.
        code = typer.main.get_command(app)(prog_name="crlseq", standalone_mode=False)
        sys.stdout.flush()
        if code == interrupts.INTERRUPTED:  # which click makes of an interrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        say(FAREWELL)
        return interrupts.INTERRUPTED
    except Exception as error:
        known = getattr(error, "exit_code", None) == interrupts.INTERRUPTED
        if interrupts.received() and not known:  # a library made another exception of it
            say(FAREWELL)
            return interrupts.INTERRUPTED
        if isinstance(error, CrlseqError):
            return _fail(error.message, error.hint, error.exit_code)
        if isinstance(error, OSError) and error.errno in PATHS and error.filename:
            name = str(error.filename)
            told = name if len(name) <= LONGEST else f"{name[:LONGEST]}…"
            return _fail(f"{told} cannot be used: {error.strerror}.", PATHS[error.errno], 3)
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own usage errors, which it formats itself
            said = str(getattr(error, "message", ""))
            if said.endswith(" is not readable."):  # which is about the file and not about how it was given
                return _fail(said[0].upper() + said[1:], "Check its permissions.", 3)
            error.show()
            if "unexpected extra argument" in said and getattr(getattr(error, "ctx", None), "info_name", "") == "fit":
                say("A fit takes one screen. `crlseq prepare FILES --output STORE` makes one of several.")
            return int(error.exit_code)
        from crlseq.training.memory import out_of_memory

        if out_of_memory(error):
            return _fail(
                "There is not enough memory.", "Fit fewer genes with --n-top-genes, or use a larger machine.", 3
            )
        message = f"A fault in crlseq: {type(error).__name__}: {error}"
        return _fail(message, "Run again with `crlseq --debug ...` and report it.", 1)


def _fail(message: str, hint: str, code: int) -> int:
    """Say what went wrong; called where an exception is handled, which ``--debug`` lets through."""
    if os.environ.get("CRLSEQ_DEBUG"):
        raise
    say(f"crlseq: {message}")
    if hint:
        say(f"  {hint}")
    return code
