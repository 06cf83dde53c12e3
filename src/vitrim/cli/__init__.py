"""The command line.

Exit 0: done. Exit 1: a bug in vitrim. Exit 2: a wrong request, or a full disk or memory, explained in one sentence.
Exit 130: ctrl-C. Exit 143: SIGTERM.

Packages are imported inside the commands that use them, so that `vitrim explain` finishes before torch would have been
imported. Each command is in the file of its kind and is registered with `app` from `shared`.
"""

import errno
import os
import signal
import sys
import warnings
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from vitrim import __version__
from vitrim.cli import compress, curve, deploy, look, measure, search, sweep, transfer
from vitrim.cli.shared import app
from vitrim.words import launched
from vitrim.words.chain import behind
from vitrim.words.errors import VitrimError
from vitrim.words.parsing import shown
from vitrim.words.plain import reason
from vitrim.words.private import hide_passwords
from vitrim.words.shorten import shortened
from vitrim.words.stopping import Terminated, raising_terminated, terminated

__all__ = ["app", "compress", "curve", "deploy", "look", "main", "measure", "search", "sweep", "transfer"]

_INTERRUPTED, _TERMINATED, _PIPE_CLOSED = 130, 143, 141
"""Exit codes by the convention of shells: 128 and the number of the signal. Typer returns the first for ctrl-C."""

_TOGETHER = {"compress", "evaluate", "pareto", "run", "search", "sweep", "transfer"}
"""Commands that all processes of a launcher do together; the first one does any other alone."""


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"vitrim {__version__}\n")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and exit."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*|timm\..*")
    asked = sys.argv[1:] or ["--help"]
    if not launched.first() and asked[0] not in _TOGETHER:
        sys.exit(0)
    if launched.count() > 1:
        # A launcher terminates all processes when one has ended; outside the work, that must not cut off the message.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with raising_terminated():
            code = app(args=asked, prog_name="vitrim", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Terminated as problem:
        _terminated(problem)
    except SystemExit as end:
        # Whoever read the output needs no more, as in `vitrim models | head`; typer would exit with 1.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        sys.exit(_PIPE_CLOSED)
    except Exception as problem:
        # Of several processes, one that is told to end may have the death of another to tell, which is no stop.
        told_to = launched.count() == 1 or not isinstance(problem, VitrimError)
        stop = _stop_behind(problem) if told_to else None
        if isinstance(stop, Terminated):
            _terminated(stop)
        if stop is None:
            told = str(problem) if isinstance(problem, VitrimError) else _told(problem)
            if told is None:
                raise
            _fail(told, problem=problem)
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        _fail("interrupted; the same command continues from the last checkpoint", _INTERRUPTED)
    if launched.count() > 1 and asked[0] in _TOGETHER:
        from vitrim.train import ranks

        ranks.end()
    sys.exit(code)


def _stop_behind(problem: BaseException) -> BaseException | None:
    """Return the ctrl-C or SIGTERM in whose handling an error was raised; None if there was none.

    A signal may come anywhere, also between two lines of a library that must both run: leaving a context of PyTorch's
    then raises an error of its own, and compiled code may raise one that has no cause.
    """
    if terminated():
        return Terminated()
    return next((each for each in behind(problem) if isinstance(each, KeyboardInterrupt | Terminated)), None)


def _terminated(problem: BaseException) -> NoReturn:
    # A launcher terminates the others where a process dies, perhaps before they have said so.
    known = getattr(sys.modules.get("vitrim.train.ranks"), "lost_before", None)
    lost = None if known is None else known(problem)
    if lost is not None:
        _fail(str(lost), problem=lost)
    _fail("terminated; the same command continues from the last checkpoint", _TERMINATED)


def _told(problem: Exception) -> str | None:
    """Return a sentence on an error that is no bug: wrong options, the file system, memory; None for any other."""
    if hasattr(problem, "format_message"):
        command = getattr(getattr(problem, "ctx", None), "command_path", "vitrim")
        return f"{problem.format_message().rstrip('.')}; see `{command} --help`"
    if _is_memory(problem):
        return (
            "there must be enough memory for this command, but it ran out; lower train.batch, measure.batch or "
            "--batch, use a smaller model, or a machine with more memory"
        )
    if isinstance(problem, OSError) and problem.errno is not None:
        where = "a file" if problem.filename is None else shown(os.fsdecode(problem.filename)).strip("'\"")
        way = "make room" if problem.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
        return f"{where}: must be readable or writable, but is not: {reason(problem)}; {way} and run the command again"
    return None


def _is_memory(problem: Exception) -> bool:
    """Whether memory ran out. PyTorch raises a RuntimeError of its own for each device."""
    texts = ("DefaultCPUAllocator", "out of memory", "can't allocate memory", "not enough memory")
    of_torch = isinstance(problem, RuntimeError) and any(text in str(problem) for text in texts)
    return isinstance(problem, MemoryError) or of_torch


def _fail(text: str, code: int = 2, problem: BaseException | None = None) -> NoReturn:
    if launched.count() > 1 and not _tells(problem):
        _leave(code)
    # A name that is no text in UTF-8 is printed with signs in place of what cannot be.
    one_line = " ".join(hide_passwords(shortened(text)).split()).encode("utf-8", "replace").decode("utf-8")
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error", "bold red"), " ", one_line))
    _leave(code)


def _tells(problem: BaseException | None) -> bool:
    try:
        from vitrim.train import ranks
    except ImportError:  # a signal came in the middle of its import
        return launched.first()
    return ranks.tells(problem)


def _leave(code: int) -> NoReturn:
    """Exit; one of several processes without leaving the group, whose others may never answer."""
    if launched.count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
