"""Read every tensor of a weights file, and explain what a file is if it contains no weights.

No code in a file is run: PyTorch files are read with ``weights_only=True`` and only the extra types of `_harmless`.
"""

import argparse
import collections
import datetime
import functools
import io
import pickletools
import re
import types
import typing
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitrim.words.errors import WeightsError
from vitrim.words.parsing import shown
from vitrim.words.plain import is_file

__all__ = ["read_checkpoint", "what_else_it_is"]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file under dotted names, wherever they are nested.

    Args:
        path: a safetensors file or one that ``torch.save`` wrote; told apart by content, not by suffix.

    Returns:
        Tensors on the CPU, by names such as ``model_ema.module.blocks.0.norm1.weight``; items of lists are numbered.

    Raises:
        WeightsError: if the file is missing, damaged or of another kind, or contains types that are not allowed,
            quantized weights, or no named tensor.
    """
    if not is_file(path):
        raise WeightsError(f"{shown(str(path))}: the weights file must exist, but it does not")
    other = what_else_it_is(path)
    if other is not None:
        raise WeightsError(f"{path}: the file must hold weights of PyTorch or safetensors, but {other}")
    try:
        held = load_file(path) if _is_safetensors(path) else _load(path)
    except Exception:  # torch raises pickle's own classes for what weights_only refuses, and many more
        raise WeightsError(f"{path}: the weights file must be whole and readable, but {_fault(path)}") from None
    tensors = dict(_flat(held)) if isinstance(held, Mapping | list | tuple) else {}
    for name, value in tensors.items():
        if value.is_quantized:
            raise WeightsError(
                f"{path}: weights must be floating-point numbers, but {name} is quantized to {value.dtype}; give the "
                "weights from before the quantization"
            )
    if all(name.rpartition(".")[2].isdecimal() for name in tensors):
        raise WeightsError(f"{path}: the file must hold a state dict of tensors, but it holds something else")
    return tensors


def _flat(held: Any, prefix: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in nested mappings and lists, with its dotted name."""
    if isinstance(held, Tensor):
        yield prefix.removesuffix("."), held.detach()
    elif isinstance(held, Mapping | list | tuple) and id(held) not in above:  # a pickle may hold itself
        items = held.items() if isinstance(held, Mapping) else enumerate(held)
        for name, value in items:
            yield from _flat(value, f"{prefix}{name}.", (*above, id(held)))


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts like safetensors: the length of a JSON table, and that table."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{" or path.suffix == ".safetensors"


# -- reading without running anything


class _Settings:
    """A replacement for a node of an OmegaConf configuration; the node's contents become its attributes."""


def _path(*parts: str) -> str:
    return "/".join(parts)


def _table(*_: Any) -> dict[Any, Any]:
    return {}


def _series(*_: Any) -> list[Any]:
    return []


_TABLES = (
    "addict.addict.Dict",
    "easydict.EasyDict",
    "fvcore.common.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "mmengine.config.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
"""Dictionary types of configurations. Each is read as a `collections.OrderedDict`, so its package is not needed."""

_OMEGACONF = (
    *(f"base.{name}" for name in ("ContainerMetadata", "Metadata")),
    "dictconfig.DictConfig",
    "listconfig.ListConfig",
    *(f"nodes.{name}Node" for name in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")),
)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")


@functools.cache
def _harmless() -> dict[str, Any]:
    """Return the types other than tensors that a file may use, by pickled name, and what is built in their place.

    All are values that training scripts store with weights: arguments, configurations, metrics, dates, paths. None of
    them reads or writes anything or imports a package.
    """
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDGSUMmO"}
    known: dict[str, Any] = {
        "argparse.Namespace": argparse.Namespace,
        "types.SimpleNamespace": types.SimpleNamespace,
        "collections.defaultdict": _table,
        "collections.deque": _series,
        "torch.torch_version.TorchVersion": torch.torch_version.TorchVersion,
        "typing.Any": typing.Any,
        "numpy.dtype": np.dtype,
        "numpy.ndarray": np.ndarray,
        **{f"builtins.{kind.__name__}": kind for kind in (bool, dict, float, frozenset, int, list, str)},
        **{f"datetime.{kind.__name__}": kind for kind in (datetime.date, datetime.datetime, datetime.timedelta)},
        **{f"datetime.{kind.__name__}": kind for kind in (datetime.time, datetime.timezone)},
        **{f"numpy.dtypes.{kind.__name__}": kind for kind in dtypes},
        **{f"pathlib.{home}{name}": _path for name in _PATHS for home in ("", "_local.")},
        **dict.fromkeys(_TABLES, collections.OrderedDict),
        **{f"omegaconf.{name}": _Settings for name in _OMEGACONF},
    }
    for home in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
        known |= {f"{home}.multiarray.scalar": scalar, f"{home}.multiarray._reconstruct": rebuild}
    return known


def _load(path: Path) -> Any:
    given = torch.serialization.get_safe_globals()
    added: list[Any] = [entry for name, value in _harmless().items() if (entry := (value, name)) not in given]
    with torch.serialization.safe_globals(added), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols and old storages, which can still be read
        return torch.load(path, map_location="cpu", weights_only=True)


# -- why a file cannot be read

_PLAIN = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|set|complex)"
    r"|torch\.(\w+Storage|[a-z]\w*|Size|Tensor|storage\.\w+|nn\.parameter\.Parameter|serialization\._get_layout)"
    r"|torch\._utils\._rebuild\w+|torch\._tensor\._rebuild_from_type_v2"
)
"""Names that PyTorch itself accepts in any file."""

_MODULES = ("timm.models.", "torch.nn.modules.", "torch.nn.parallel.", "torch.fx.", "torchvision.", "transformers.")
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_RENAMED = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str", "builtins.xrange": "builtins.range"}
"""Pickle protocol 2, which ``torch.save`` writes, uses the names of Python 2."""


def _fault(path: Path) -> str:
    """Return why weights could not be read from a file, and the way out."""
    damaged = f"its {path.stat().st_size:,} bytes are not; copy or download it again"
    if _is_safetensors(path):
        return damaged
    try:
        pickles = _pickles(path)
    except Exception:  # pickletools and zipfile raise many types for bytes that they cannot parse
        return damaged
    names = {name for operations in pickles for name in _globals(operations)}
    unknown = sorted(name for name in names if not _PLAIN.fullmatch(name) and name not in _harmless())
    top = next((name for name, _ in pickles[-1] if name not in ("PROTO", "FRAME")), "")
    read, part = f"torch.load({str(path)!r}, weights_only=False)", "held['model']" if top == "EMPTY_DICT" else "held"
    models = [name for name in unknown if name.startswith(_MODULES)]
    if models:
        what, part = f"it holds a whole pickled model ({models[0]})", f"{part}.state_dict()"
    elif unknown:
        what = f"it holds {', '.join(unknown[:3])}" + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
    elif len(pickles) == 1 and not zipfile.is_zipfile(path):
        what, read, part = "it was written by pickle", f"pickle.loads(pathlib.Path({str(path)!r}).read_bytes())", "held"
    else:
        return damaged
    return (
        f"{what}, whose code would have to run; where you trust the file, write the weights alone with "
        f"`held = {read}` and `torch.save({part}, 'weights.pth')`"
    )


def _pickles(path: Path) -> list[list[tuple[str, Any]]]:
    """Return the operations of each pickle in a file up to that of the object, parsed without running them.

    A zip archive has one pickle. An older file has three further pickles before it, and the tensors' bytes after it.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            file: IO[bytes] = io.BytesIO(archive.read(member))
    else:
        file = path.open("rb")
    found: list[list[tuple[str, Any]]] = []
    with file:
        while len(found) < 4:
            try:
                found.append([(operation.name, value) for operation, value, _ in pickletools.genops(file)])
            except Exception:
                if not found:
                    raise
                break
    return found


def _globals(operations: list[tuple[str, Any]]) -> Iterator[str]:
    """Yield the names of all functions and classes in a pickle."""
    words: list[str] = []
    for operation, value in operations:
        if operation == "GLOBAL" or (operation == "STACK_GLOBAL" and len(words) > 1):
            module, name = value.split(" ", 1) if operation == "GLOBAL" else words[-2:]
            full = f"{_PYTHON_2.get(module, module)}.{name}"
            yield _RENAMED.get(full, full)
        elif isinstance(value, str):
            words.append(value)


# -- files of other kinds


_CONTROL = frozenset(range(32)) - {*b"\t\n\r"}
"""Bytes that no JSON text contains; damaged weights that happen to begin with a brace do."""


def what_else_it_is(path: Path) -> str | None:
    """Return a clause on what a file is instead of weights and the way out, or None if it may be weights."""
    with path.open("rb") as file:
        head = file.read(512)
    for mark, (what, way) in _MARKS.items():
        if head.startswith(mark):
            return f"it is {what}; {way}"
    name, text = path.name.lower(), head.lstrip()[:32].lower()
    for ends, (what, way) in _SUFFIXES.items():
        if name.endswith(ends) or (ends == ".index" and ".data-0" in name):
            return f"it is {what}; {way}"
    if len(head) > 2 and head[0] == 8 and 3 <= head[1] <= 32 and head[2] in b"\x12\x1a\x22\x28\x32\x3a\x42":
        return f"it is an ONNX model; {_ORIGINAL}"
    if head[4:8] == b"TFL3":
        return f"it is a TensorFlow Lite model; {_ORIGINAL}"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is an HTML page, not a download; fetch the file itself"
    if text.startswith(b"{") and not _CONTROL & {*head} and not _is_safetensors(path):
        return "it is a JSON file; give the weights themselves, joined in one file if they are in several"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    return _archive(path, members)


def _archive(path: Path, members: list[str]) -> str | None:
    """Return a clause on what a zip archive is that ``torch.save`` did not write."""
    ends = {member.partition("/")[2] for member in members}
    if "constants.pkl" in ends:
        return (
            f"it is a TorchScript archive, whose code would have to run; where you trust it, write the weights alone "
            f"with `held = torch.jit.load({str(path)!r})` and `torch.save(held.state_dict(), 'weights.pth')`"
        )
    if "archive_format" in ends or "models/model.json" in ends:
        return (
            f"it is a program of torch.export; write its weights with `held = torch.export.load({str(path)!r})` and "
            "`torch.save(held.state_dict, 'weights.pth')`"
        )
    if "data.pkl" in ends:
        return None
    if members and all(member.endswith(".npy") for member in members):
        return (
            f"it is a NumPy archive; where timm reads it, write its weights with `model = timm.create_model(NAME, "
            f"checkpoint_path={str(path)!r})` and `torch.save(model.state_dict(), 'weights.pth')`"
        )
    return "it is a zip archive of other files; unpack it"


_ORIGINAL = "give the PyTorch weights that it was made of"
_FETCH = "run `git lfs pull`, or download the file itself"

_MARKS = {
    b"version https://git-lfs": ("a git-LFS pointer and not the file that it points to", _FETCH),
    b"GGUF": ("a GGUF model", _ORIGINAL),
    b"\x89HDF": ("an HDF5 file, as Keras and TensorFlow write", _ORIGINAL),
    b"\x08\x01\x12": ("a TensorFlow model", _ORIGINAL),
    b"\x1f\x8b": ("compressed by gzip", "unpack it"),
    b"7z\xbc\xaf": ("compressed by 7-Zip", "unpack it"),
    b"\x93NUMPY": ("a NumPy array", _ORIGINAL),
}
_SUFFIXES = {
    ".onnx": ("an ONNX model", _ORIGINAL),
    ".tflite": ("a TensorFlow Lite model", _ORIGINAL),
    ".pb": ("a TensorFlow model", _ORIGINAL),
    ".h5": ("a Keras or TensorFlow file", _ORIGINAL),
    ".keras": ("a Keras model", _ORIGINAL),
    ".index": ("part of a TensorFlow checkpoint", _ORIGINAL),
    ".msgpack": ("a Flax checkpoint", _ORIGINAL),
}
