"""The command line. Exit 0: done. Exit 1: a bug in vitrim. Exit 2: a wrong request, explained in one sentence.

Packages are imported inside the commands that use them, so that `vitrim explain` finishes before torch would have been
imported. Each command is in the file of its kind and is registered with `app` from `shared`.
"""

import sys
import warnings
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from vitrim import __version__
from vitrim.cli import compress, curve, deploy, look, measure, search, sweep, transfer
from vitrim.cli.shared import app
from vitrim.words.errors import VitrimError

__all__ = ["app", "compress", "curve", "deploy", "look", "main", "measure", "search", "sweep", "transfer"]

_INTERRUPTED = 130
"""The exit code that typer returns for ctrl-C, by the convention of shells."""


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
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="vitrim", standalone_mode=False)
    except VitrimError as problem:
        _fail(str(problem))
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as problem:
        if not hasattr(problem, "format_message"):
            raise
        # A wrong option or argument.
        command = getattr(getattr(problem, "ctx", None), "command_path", "vitrim")
        _fail(f"{problem.format_message().rstrip('.')}; see `{command} --help`")
    if code == _INTERRUPTED:
        _fail("interrupted; the same command continues from the last checkpoint")
    sys.exit(code)


def _fail(text: str) -> NoReturn:
    one_line = " ".join(text.split())
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error", "bold red"), " ", one_line))
    sys.exit(2)
