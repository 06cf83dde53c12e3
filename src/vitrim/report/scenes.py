"""The report of a segmentation: its scores, every class, and pictures of predictions."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrim.report.folder import Record, Run, number
from vitrim.report.tables import DASH, TextTable, percent, short
from vitrim.words.errors import RunError

__all__ = ["class_table", "colors", "gallery", "segmented", "spoken"]

_COLOR = re.compile(r"#[0-9a-f]{6}")


def segmented(measured: Record) -> TextTable:
    """Return the table of scores and costs of a segmentor."""
    batch = number(measured, "batch")
    time = number(measured, "latency_ms")
    rows = [
        ("mean intersection over union", percent(number(measured, "miou"), 2)),
        ("pixel accuracy", percent(number(measured, "accuracy"), 2)),
        ("multiply-accumulates", short(number(measured, "macs"))),
        ("of these in the head", short(number(measured, "macs_head"))),
        ("parameters", short(number(measured, "params"))),
        (
            "latency" if batch is None else f"latency, batch of {batch:g}",
            DASH if time is None else f"{time:.2f} ms",
        ),
    ]
    return TextTable("Segmentor", ("", "value"), rows)


def class_table(classes: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return the table of classes: intersection over union, recall in pixels, and fraction of all pixels."""
    total = sum(number(dict(each), "pixels") or 0 for each in classes)
    rows = []
    for each in classes:
        pixels = number(dict(each), "pixels")
        share = None if pixels is None or not total else 100 * pixels / total
        name = str(each.get("name", ""))
        rows.append(
            (name, percent(number(dict(each), "iou"), 2), percent(number(dict(each), "recall"), 2), percent(share, 2))
        )
    return TextTable("Every class", ("class", "IoU", "found", "of all pixels"), rows)


def spoken(measured: Record) -> str:
    """Return the result of a transfer in one sentence."""
    head, model, device = (measured.get(key) for key in ("head", "model", "device"))
    score, time = number(measured, "miou"), number(measured, "latency_ms")
    parts = [f"{head} on {model} segments {measured.get('test_scenes', DASH)} test scenes"]
    if score is not None:
        parts.append(
            f"mean intersection over union is {percent(score, 2)} over {measured.get('classes', DASH)} classes"
        )
    if time is not None:
        parts.append(f"a batch takes {time:.1f} ms" + (f" on {device}" if device else ""))
    return "; ".join(parts) + "."


def colors(run: Run) -> list[tuple[str, str]]:
    """Return color and name of each class that has a color ``#rrggbb``."""
    return [
        (color, str(each.get("name", "")))
        for each in run.classes
        if _COLOR.fullmatch(color := str(each.get("colour", "")))
    ]


def gallery(run: Run) -> list[dict[str, str]]:
    """Return name and bytes (base64) of each picture of predictions."""
    return [{"name": path.stem, "data": _embedded(path)} for path in run.pictures]


def _embedded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise RunError(f"{path}: the picture must be readable, but {problem}") from None
    return base64.b64encode(data).decode("ascii")
