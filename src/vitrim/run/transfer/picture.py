"""Draw predictions as pictures: the scene, its mask and the prediction, side by side."""

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrim.data import IGNORE

__all__ = ["colours", "side_by_side"]

_WIDEST = 360
"""Pixels of one panel; limited because a report contains its pictures."""

_GAP = 6
_GOLDEN = 0.618033988749895


def colours(count: int) -> list[str]:
    """Return `count` class colors, ``#rrggbb``: hues a golden ratio apart, so that consecutive colors differ."""
    found = []
    for index in range(count):
        bright, full = (0.92, 0.62, 0.78)[index % 3], (0.72, 0.88, 0.5)[index // 3 % 3]
        rgb = colorsys.hsv_to_rgb(index * _GOLDEN % 1, full, bright)
        found.append("#" + "".join(f"{round(255 * part):02x}" for part in rgb))
    return found


def side_by_side(
    picture: Image.Image, truth: NDArray[np.uint8], said: NDArray[np.uint8], palette: Sequence[str]
) -> Image.Image:
    """Draw three panels: the scene, its mask and the prediction; ignored pixels are black.

    Args:
        picture: the scene.
        truth: labels `(h, w)`, `IGNORE` for none.
        said: labels `(h, w)`.
        palette: colors of the classes.
    """
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = [tuple(bytes.fromhex(colour[1:])) for colour in palette]
    table[IGNORE] = 0
    panels = [picture.convert("RGB"), Image.fromarray(table[truth]), Image.fromarray(table[said])]
    if picture.width > _WIDEST:
        size = (_WIDEST, max(1, round(picture.height * _WIDEST / picture.width)))
        kinds = (Image.Resampling.BICUBIC, Image.Resampling.NEAREST, Image.Resampling.NEAREST)
        panels = [panel.resize(size, kind) for panel, kind in zip(panels, kinds, strict=True)]
    width, height = panels[0].size
    sheet = Image.new("RGB", (3 * width + 2 * _GAP, height), "white")
    for place, panel in enumerate(panels):
        sheet.paste(panel, (place * (width + _GAP), 0))
    return sheet
