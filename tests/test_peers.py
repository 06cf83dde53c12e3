"""The comparison with peers compares like with like; a taste of benchmarks/peers/run.py."""

import copy

import pytest
import timm
import torch

from benchmarks.peers.run import compare, table
from tests.samples import apart
from tests.tolerance import SINGLE
from vitrim.data import Input, split
from vitrim.measure import counted

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return timm.create_model("test_vit", **TINY).eval().requires_grad_(False)


def test_every_model_meets_the_budget(dense):
    pytest.importorskip("torch_pruning")
    names = ["taylor", "tome", "torch-pruning width"]
    images = split("digits", seed=0)
    train, test = images.train.pick(range(64)), images.test.pick(range(50))
    known = split(train, test, calibration=32, validation=8, seed=0)
    records = compare(dense, train, known, Input.of(dense), [0.7], names, seconds=0.1)
    assert [record["model"] for record in records] == ["dense", *names]
    assert (records[0]["macs_ratio"], records[0]["agreement"]) == (1, 100)
    for record in records[1:]:
        assert 0.5 < record["macs_ratio"] <= 0.7
        assert record["images"] == 50
    lines = table(records).splitlines()
    assert len(lines) == 2 + len(records)
    assert len({line.count("|") for line in lines}) == 1


def test_torch_pruning_is_mended(dense):
    """Channels that are zero can go, and with the dense model's temperature nothing changes."""
    pytest.importorskip("torch_pruning")
    from benchmarks.peers.torch_pruning_fixed import _pruned, gradients

    model, x = copy.deepcopy(dense), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 4  # or attention would be even, whatever its temperature
            for layer, groups in ((block.attn.qkv, 9), (block.mlp.fc1, 1)):
                for part in (layer.weight, layer.bias):
                    part.view(groups, part.shape[0] // groups, -1)[:, part.shape[0] // groups // 2 :] = 0
        wanted = model(x)
    batches = [(x, torch.tensor([0, 1, 2, 3]))]
    child = _pruned(model, gradients(model, batches), (3, 32, 32), 0.5, "inner")
    assert [block.attn.head_dim for block in child.blocks] == [8] * 3
    assert [block.mlp.fc1.out_features for block in child.blocks] == [dense.blocks[0].mlp.fc1.out_features // 2] * 3
    assert counted(child, (3, 32, 32)).macs < 0.6 * counted(model, (3, 32, 32)).macs
    assert apart(child(x), wanted) < SINGLE
    for block in child.blocks:
        block.attn.qkv.weight.data[:24] /= 0.5**0.5  # as it comes from Torch-Pruning
    assert apart(child(x), wanted) > 100 * SINGLE
