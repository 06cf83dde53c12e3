"""Losses of single cuts: what is left out of the passes changes nothing, and bf16 changes little."""

import pytest
import torch

from tests.samples import FEW, adopted, images, timm_model
from vitrim.cut.compensate import AttentionCut, BlockChoice, NeuronCut, Walk, arriving, importances, passed
from vitrim.cut.compensate.closed_form import Moments
from vitrim.cut.outputs import divergence, logits_of
from vitrim.cut.surgery import apply
from vitrim.families import adopt, blocks_of, describe
from vitrim.methods.post_training.probe import Probe, precision_for
from vitrim.nn.modes import evaluating
from vitrim.words.plan import BlockPlan, Plan


def cuts(model, streams, alone, precision="fp32"):
    """Losses of dropping a third of the neurons of each block, by a probe, and by running the whole cut model."""
    spec, blocks = describe(model), [block for _, block in blocks_of(model)]
    probe, found, whole = Probe(model, blocks, streams, precision), [], []
    entering = arriving(model, blocks, 0, streams, None)
    if alone:
        probe.skip_stem(entering)
    for number, (_, stage, node) in enumerate(spec.blocks()):
        block = blocks[number]
        if number and stage is not spec.blocks()[number - 1][1]:
            entering = arriving(model, blocks, number, streams, entering)
        kept = tuple(range(0, node.hidden, 3))
        plans = [BlockPlan()] * len(blocks)
        plans[number] = BlockPlan(hidden=kept)
        child = apply(model, Plan.of(spec, plans)).eval()
        cut = [block for _, block in blocks_of(child)][number]
        found.append(probe.loss(block, entering, cut, probe.floor(block, entering)))
        whole.append(divergence(probe.dense, logits_of(child, streams)))
        entering = passed(block, entering)
    return probe, found, whole


@pytest.mark.parametrize(("family", "preset"), [pair for pair in FEW if pair[0] not in ("swin_v2",)])
def test_a_block_in_place_of_another_is_the_model_that_was_cut(family, preset):
    """With the stem run on one image of a batch where the host allows it; models of one stage do."""
    model = adopted(family, preset)
    spec = describe(model)
    x = list(images(spec, 6).split(4))
    with evaluating(model, frozen=True), torch.no_grad():
        probe, found, whole = cuts(model, x, alone=len(spec.stages) == 1)
    assert found == pytest.approx(whole, rel=1e-9, abs=1e-12)
    assert max(whole) > 1e-6
    if family == "vit":
        assert probe.alone


def test_a_host_that_reads_the_stem_again_runs_it_whole():
    """Such as one that adds something of the images after the blocks."""
    model = adopt(timm_model("vit", "plain")).eval()
    x = list(images(describe(model), 6).split(4))
    blocks = [block for _, block in blocks_of(model)]
    for reads, alone in ((False, True), (True, False)):
        handle = model.register_forward_hook(
            lambda _, given, out, on=reads: out + on * given[0].mean((1, 2, 3))[:, None]
        )
        probe = Probe(model, blocks, x, "fp32")
        probe.skip_stem(arriving(model, blocks, 0, x, None))
        assert probe.alone == alone
        handle.remove()


def test_losses_in_bf16_are_those_of_float32():
    """Within a tenth of the loss and half of what rounding adds, which is subtracted; float64 stays as it is."""
    single, double = adopt(timm_model("vit", "plain", torch.float32)).eval(), adopted("vit", "plain")
    x = [part.float() for part in images(describe(single), 60).split(30)]
    with torch.no_grad():
        probe, short, whole = cuts(single, x, alone=True, precision="bf16")
        entering = arriving(single, probe.blocks, 0, x, None)
        floor = probe.floor(probe.blocks[0], entering)
        assert floor > 0
        assert short == pytest.approx(whole, rel=0.1, abs=floor / 2)
        assert probe.loss(probe.blocks[0], entering, probe.blocks[0], floor) == 0.0
        _, wide, exact = cuts(double, list(images(describe(double), 6).split(4)), alone=True, precision="bf16")
    assert wide == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_auto_is_bf16_where_it_is_multiplied_in_tiles(monkeypatch):
    single, double = (adopt(timm_model("vit", "plain", kind)) for kind in (torch.float32, torch.float64))
    for tiles in (True, False):
        monkeypatch.setattr("vitrim.methods.post_training.probe.multiplies_bf16", lambda _, tiles=tiles: tiles)
        assert precision_for("auto", single) == ("bf16" if tiles else "fp32")
        assert precision_for("auto", double) == "fp32"
        assert precision_for("fp32", single) == "fp32"


def test_statistics_are_recorded_once(monkeypatch):
    """One pass of an attention gives targets, moments, and those of queries and keys, for all cuts of it."""
    model = adopted("vit", "plain")
    x = list(images(describe(model), 24).split(12))
    worth, added, runs = importances(model, x, seed=0), [], []
    add = Moments.add

    def counted(self, weights, features, targets):
        added.append((self.at, features.shape[-1]))
        add(self, weights, features, targets)

    monkeypatch.setattr(Moments, "add", counted)
    with evaluating(model, frozen=True), torch.no_grad():
        place = Walk(model, x, worth, 1e-2, 0.0).first()
        place.block.attn.proj.register_forward_hook(lambda *_: runs.append(1))
        cut = AttentionCut(place)
        cut.cut(BlockChoice(v=4))
        before = len(runs)
        cut.cut(BlockChoice(heads=()))
        assert (before, len(runs)) == (2, 2)
        fresh = AttentionCut(place)
        assert len(fresh.squares[0]) == len(place.block.attn.qk)
        assert fresh.moments.weight == pytest.approx(cut.moments.weight)
        assert torch.allclose(fresh.moments.gram, cut.moments.gram, rtol=0, atol=1e-12)
        assert len(runs) == 4
        mlp = NeuronCut(place, place.block)
        added.clear()
        target = mlp.target
        assert added == [(f"{place.path}.hidden", 0)] * 2
        assert torch.allclose(target, mlp.moments.target, rtol=0, atol=1e-12)
        place.block.attn.proj._forward_hooks.clear()
