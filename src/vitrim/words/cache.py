"""Where files that can be made or fetched again are kept on this machine."""

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_folder"]


def cache_folder(variable: str) -> Path:
    """Return the folder that an environment variable names, else the user's cache folder of this platform.

    On Linux that is ``~/.cache/vitrim``, on macOS ``~/Library/Caches/vitrim``, on Windows ``vitrim`` and ``Cache``
    below the user's local application data.
    """
    return Path(os.environ.get(variable) or platformdirs.user_cache_path("vitrim", appauthor=False)).expanduser()
