"""Take out of text what is nobody else's business: passwords and tokens, and where files lie on a machine.

Passwords never reach a file or a message. Local paths stay in the files of a run folder, which need them to go on, and
are cut to their last part in what is pushed.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["HIDDEN", "hide_passwords", "public"]

HIDDEN = "***"
"""Stands in place of a password."""

# A password may hold any sign, also those that a URL should encode: all up to the last @ is taken out.
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s'\"/?#@]*:[^\s'\"]*|[^\s'\"/?#@]*)@")
_QUERY = re.compile(
    r"(?P<key>[?&;][\w.-]*(?:pass|pwd|token|secret|key|sig|auth|cred)[\w.-]*=)[^\s&;#'\"]+", re.IGNORECASE
)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,})\b")

_FILE_URL = re.compile(r"\bfile:(?://[^\s/]*)?(?=/)", re.IGNORECASE)
_WINDOWS = re.compile(r"(?<![\w.])(?:[A-Za-z]:[\\/]|\\\\)[^\s'\"<>|,;)\]]+")
_POSIX = re.compile(r"(?<![\w.:/~*<-])(?:~[\w.-]*|\.{1,2})?/[^\s'\"<>|,;:)\]]+")


def hide_passwords(value: Any) -> Any:
    """Return plain values with `HIDDEN` in place of user and password of each URL, and of tokens.

    ``postgresql://me:word@host/db`` becomes ``postgresql://***@host/db``; ``?password=word`` becomes ``?password=***``.
    """
    return _changed(value, _hidden)


def public(value: Any) -> Any:
    """Return plain values as they may leave the machine: `hide_passwords`, and each local path as its last part.

    Local are absolute paths, paths from a home or a working folder, those of Windows, and ``file:`` URLs. Names of
    sources keep their kind: ``wds//data/me/shards`` becomes ``wds/shards``.
    """
    return _changed(value, _public)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _changed(part, change) for key, part in value.items()}
    return [_changed(part, change) for part in value] if isinstance(value, list | tuple) else value


def _hidden(text: str) -> str:
    text = _USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    return _TOKEN.sub(HIDDEN, _QUERY.sub(rf"\g<key>{HIDDEN}", text))


def _public(text: str) -> str:
    text = _FILE_URL.sub("", _hidden(text))
    kind, slash, rest = text.partition("/")
    if slash and kind.lower() in ("wds", "hfds", "torch"):
        return f"{kind}/{_whole(rest)}"
    return _whole(text)


def _whole(text: str) -> str:
    """Return a text without folders; a text that is one path may hold spaces and commas."""
    if text.startswith(("/", "~", "./", "../")) and "\n" not in text:
        return PurePosixPath(text).name
    if re.match(r"[A-Za-z]:[\\/]|\\\\", text) and "\n" not in text:
        return PureWindowsPath(text).name
    text = _WINDOWS.sub(lambda found: PureWindowsPath(found[0]).name, text)
    return _POSIX.sub(lambda found: PurePosixPath(found[0]).name, text)
