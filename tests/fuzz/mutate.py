"""Mutations of texts, trees of plain values, bytes and folders; each is a function of a random generator alone."""

import copy
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["bytes_of", "folder_", "text_of", "tree_of"]

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**20 + 1,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e-320,
    1e29,
    1e308,
    "",
    "x",
    "none",
    "nan",
    "../../../etc/passwd",
    "/dev/zero",
    "hf-hub:owner/name",
    "os.system",
    "a" * 5000,
    "\x00",
    "\ud800",
    "é\u202e",
    [],
    {},
    [[]],
    [1] * 2000,
    {"a": {"b": {"c": []}}},
    {"kind": "drop"},
    {"name": "torch.Linear", "eps": 1.0},
)
"""Values in place of others: of other types, too large, too small, names of things that must not be opened."""

PIECES = (
    "[" * 5000,
    "]" * 50,
    "{",
    "}",
    '"',
    "\\",
    "9" * 5000,
    "1e999",
    "NaN",
    "Infinity",
    "-",
    "\x00",
    "\ufeff",
    "\n\n",
    ",",
    "=",
    "'''",
    "0x" + "f" * 3000,
    "[a]\n" * 3,
    "null",
    "\u2028",
    "é",
    "a.b.c = 1\n",
    "#",
)


def tree_of(tree: Any, draw: random.Random) -> Any:
    """Return a copy of plain values with one to three of them replaced, taken away, added or repeated."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return draw.choice(ODD)
        holder, key = draw.choice(places)
        action = draw.randrange(6)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[draw.choice(("checkpoint_path", "kind", "name", "x", ""))] = copy.deepcopy(draw.choice(ODD))
        elif action == 2 and isinstance(holder, list):
            holder[key:key] = [holder[key]] * draw.choice((1, 2, 500))
        elif action == 3:
            other, there = draw.choice(places)
            holder[key] = copy.deepcopy(other[there])
        elif action == 4 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * draw.choice((-1, 0, 2, 1000, 10**15)) + draw.choice((0, 1, 0.5))
        else:
            holder[key] = copy.deepcopy(draw.choice(ODD))
    return tree


def _places(tree: Any) -> Any:
    """Yield every holder and key of nested values."""
    todo = [tree]
    while todo:
        holder = todo.pop()
        keys: Any = (
            holder.keys() if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        )
        for key in list(keys):
            yield holder, key
            todo.append(holder[key])


def text_of(text: str, draw: random.Random) -> str:
    """Return a text with pieces put in, taken out, repeated or cut off."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice((1, 3, 20, 200)))
        action = draw.randrange(4)
        if action == 0:
            text = text[:start] + draw.choice(PIECES) + text[start:]
        elif action == 1:
            text = text[:start] + text[end:]
        elif action == 2:
            text = text[:end] + text[start:end] * draw.choice((1, 2, 100)) + text[end:]
        else:
            text = text[:start] if draw.randrange(4) == 0 else text[:start] + chr(draw.randrange(1, 300)) + text[end:]
    return text


def bytes_of(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with some changed, put in, taken out or cut off, more often near the start, where headers are."""
    for _ in range(draw.randint(1, 4)):
        reach = draw.choice((8, 64, 600, len(data))) or 1
        start = draw.randrange(min(reach, len(data)) or 1)
        action = draw.randrange(5)
        if action == 0:
            data = data[:start] + bytes([draw.randrange(256)]) + data[start + 1 :]
        elif action == 1:
            data = data[:start] + draw.choice((b"\xff" * 8, b"\x00" * 8, b"9" * 11, draw.randbytes(16))) + data[start:]
        elif action == 2:
            data = data[:start] + data[start + draw.choice((1, 8, 512)) :]
        elif action == 3:
            data = data[: draw.randrange(len(data) + 1)]
        else:
            data = data[:start] + draw.choice((b"\xff" * 8, b"7" * 11, b"\x80" + b"\xff" * 10)) + data[start + 8 :]
    return data


def folder_(root: Path, draw: random.Random) -> None:
    """Change a folder in one to four ways, in place."""
    for _ in range(draw.randint(1, 4)):
        inside = [root, *(path for path in sorted(root.rglob("*")) if path.is_dir() and not path.is_symlink())]
        draw.choice(_FOLDER)(draw.choice(inside), draw)


def _file(folder: Path, draw: random.Random) -> Path | None:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    return draw.choice(files) if files else None


def _damaged(folder: Path, draw: random.Random) -> None:
    if (file := _file(folder, draw)) is not None:
        file.write_bytes(bytes_of(file.read_bytes() or b"x", draw))


def _gone(folder: Path, draw: random.Random) -> None:
    if (file := _file(folder, draw)) is not None:
        file.unlink()


def _named(folder: Path, draw: random.Random) -> None:
    name = draw.choice(
        (".x.png", "._a.png", "a b,c.png", "é\u202e.png", "x" * 240 + ".png", "10", "train", "Thumbs.db")
    )
    if not (folder / name).exists() and not (folder / name).is_symlink():
        (folder / name).write_bytes(draw.choice((b"", b"\x89PNG\r\n\x1a\n", b"BM" + bytes(60), b"GIF89a" + bytes(20))))


def _raw_name(folder: Path, draw: random.Random) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png")).write_bytes(b"x")


def _link(folder: Path, draw: random.Random) -> None:
    to = draw.choice((folder, folder.parent, Path("/dev/zero"), Path("/nowhere"), Path("loop")))
    link = folder / draw.choice(("loop", "loop.png"))
    if not link.is_symlink() and not link.exists():
        link.symlink_to(to)


def _pipe(folder: Path, draw: random.Random) -> None:
    if not (folder / "pipe.png").exists():
        os.mkfifo(folder / "pipe.png")


def _nested(folder: Path, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 2, 40))):
        folder = folder / draw.choice(("deeper", "train", "class0", ".hidden"))
    folder.mkdir(parents=True, exist_ok=True)


def _copied(folder: Path, draw: random.Random) -> None:
    if not (folder.parent / "copy").exists() and folder.parent.exists() and len(folder.parts) > 3:
        shutil.copytree(folder, folder.parent / "copy", symlinks=True, ignore=shutil.ignore_patterns("pipe.png"))


def _renamed(folder: Path, draw: random.Random) -> None:
    if (file := _file(folder, draw)) is not None:
        file.rename(file.with_suffix(draw.choice((".jpg", ".JPEG", ".txt", ".tar", ".webp", ""))))


_FOLDER: tuple[Callable[[Path, random.Random], None], ...] = (
    _damaged,
    _gone,
    _named,
    _raw_name,
    _link,
    _pipe,
    _nested,
    _copied,
    _renamed,
)
