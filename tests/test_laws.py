"""The laws of docs/architecture.md, over every preset of every family and random plans."""

import pytest

from tests.samples import FEW, PRESETS, WHOLE, adopted
from vitrim.testing import FAMILY_LAWS, Sample

LONG = {"built_from_paper", "plans_compose"}
"""Laws that take as long as all others together; `test_accepted_plans.py` composes plans of every preset, too."""
CASES = [
    (law, family, preset)
    for law in FAMILY_LAWS
    for family, preset in (PRESETS if WHOLE or law.__name__ not in LONG else FEW)
]


@pytest.mark.parametrize(
    ("law", "family", "preset"), CASES, ids=[f"{law.__name__}-{family}-{preset}" for law, family, preset in CASES]
)
def test_every_preset_keeps_every_law(law, family, preset):
    assert list(law(Sample(family, preset, adopted(family, preset)))) == []
