"""The laws of docs/architecture.md, over every preset of every family and random plans."""

import pytest

from tests.samples import IDS, PRESETS, adopted
from vitrim.testing import FAMILY_LAWS, Sample


@pytest.mark.parametrize(("family", "preset"), PRESETS, ids=IDS)
@pytest.mark.parametrize("law", FAMILY_LAWS, ids=lambda law: law.__name__)
def test_every_preset_keeps_every_law(law, family, preset):
    assert list(law(Sample(family, preset, adopted(family, preset)))) == []
