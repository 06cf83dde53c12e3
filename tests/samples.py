"""Every preset of every family, adopted once for all tests; what is drawn at random is in `vitrim.testing`."""

import os
from collections.abc import Callable

import torch

from vitrim import families
from vitrim.nn import modes
from vitrim.testing.samples import apart, digits, keeps_constants, kept_widths, masks_of, places, random_plan
from vitrim.testing.samples import random_images as images
from vitrim.testing.samples import sample_model as timm_model

__all__ = [
    "FEW",
    "IDS",
    "PRESETS",
    "WHOLE",
    "adopted",
    "apart",
    "digits",
    "images",
    "keeps_constants",
    "kept_widths",
    "masks_of",
    "places",
    "random_plan",
    "timm_model",
    "without_data",
]

PRESETS = [(family, name) for family in families.names() for name in families.get(family).TEST_PRESETS]
IDS = [f"{family}-{name}" for family, name in PRESETS]

FEW = [(family, name) for family, name in PRESETS if name == next(iter(families.get(family).TEST_PRESETS))]
"""One preset of each family, for what presets do not change."""


def without_data(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build on the meta device, or with data where timm cannot (before 1.0.21)."""
    try:
        with modes.without_data():
            return build()
    except (NotImplementedError, RuntimeError):
        return build()


WHOLE = bool(os.environ.get("VITRIM_WHOLE"))
"""Whether every preset meets every case, also those that go the ways of others: see CONTRIBUTING.md."""


SHARED: dict[tuple[str, str], torch.nn.Module] = {}
"""Models that `adopted` gave; `tests/conftest.py` looks after each test whether they are still in float64."""


def _adopted(family: str, preset: str) -> torch.nn.Module:
    if (family, preset) not in SHARED:
        SHARED[family, preset] = families.adopt(timm_model(family, preset))
    return SHARED[family, preset]


def adopted(family: str, preset: str) -> torch.nn.Module:
    """The same, adopted; shared between tests, so it must be left as it is."""
    return _adopted(family, preset)
