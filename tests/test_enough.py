"""How many calibration images are used if nobody asks for a number."""

from collections import Counter

import pytest
import timm

from tests.samples import PRESETS, adopted
from vitrim import methods
from vitrim.cut.compensate import images_for_tokens
from vitrim.families import adopt, describe
from vitrim.methods._init import few_for
from vitrim.run.pipeline import run
from vitrim.run.recipe import Recipe
from vitrim.words.plain import load
from vitrim.words.spec import Attention


@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_the_least_number_of_images_with_so_many_tokens(family, preset):
    spec = describe(adopted(family, preset))
    for tokens in (0.25, 1, 6, 16):
        count, kinds = images_for_tokens(spec, tokens), Counter()
        for _, stage, block in spec.blocks():
            widths = [block.hidden or 0, sum(block.mixer.v) if isinstance(block.mixer, Attention) else 0]
            kinds["enough"] += all(count * stage.tokens >= tokens * width for width in widths)
            kinds["needed"] += any((count - 1) * stage.tokens < tokens * width for width in widths)
        assert kinds["enough"] == len(spec.blocks())
        assert kinds["needed"] or count == 1


def small(**settings):
    """A ViT whose 17 tokens are few for its 768 neurons."""
    return adopt(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=10, **settings))


@pytest.mark.parametrize("name", ["post_training", "vit_slim", "cait", "mdc", "spvit", "taylor", "magnitude", "random"])
def test_closed_forms_ask_for_more_images_where_tokens_are_few(name):
    spec = describe(small())
    fitted = (
        methods.get(name, {} if name == "post_training" else {"init": "closed_form"}) if name not in PLAIN else None
    )
    if fitted is None:
        assert not hasattr(methods.get(name), "calibrates")
        return
    assert fitted.calibrates(spec) == 723 == images_for_tokens(spec, 16)
    assert fitted.calibrates(describe(adopt(timm.create_model("vit_tiny_patch16_224", depth=1)))) == 256
    assert fitted.calibrates(describe(adopt(timm.create_model("vit_base_patch32_224", depth=1)))) == 768
    if name != "post_training":
        assert methods.get(name).calibrates(spec) == 256
    assert few_for(spec) == 272


PLAIN = ("taylor", "magnitude", "random")


@pytest.mark.parametrize(("asked", "count"), [({}, 723), ({"calibration": 300}, 300)])
def test_a_run_uses_what_its_method_asks_for(asked, count, tmp_path):
    """As far as there are so many images, and unless the recipe names another number."""
    shape = {"img_size": 64, "depth": 1, "num_classes": 10}
    recipe = load(Recipe, {
        "model": {"name": "vit_tiny_patch16_224", "random_weights": True, "arguments": shape},
        "data": {"train": "digits", **asked},
        "method": {"name": "post_training", "merge": "none", "operators": False, "candidates": 0, "probe": 8},
        "budget": "macs=0.8", "measure": {"latency": False}, "device": "cpu",
    })  # fmt: skip
    told = []
    run(recipe, tmp_path / "run", say=told.append)
    assert any(f"{count} for calibration" in line for line in told)
