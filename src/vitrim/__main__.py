"""The command line as a process: ``vitrim`` and ``python -m vitrim``."""

import gc
import os

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit."""
    # Looking for plugins of pydantic reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # What is imported stays, so collecting garbage meanwhile finds none, and later need not look at it.
    gc.disable()
    from vitrim.cli import main as run

    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
