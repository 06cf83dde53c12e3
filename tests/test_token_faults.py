"""Inputs that once gave a silently wrong model, or a raw error: each is right now, or refused with a sentence."""

import copy
import json

import pytest
import torch
from timm.layers import DropPath

from tests.samples import adopted, apart, images
from tests.tolerance import EXACT
from vitrim import families
from vitrim.cut import surgery
from vitrim.deploy import store
from vitrim.families import blocks_of, describe
from vitrim.families.swin import example as small_swin
from vitrim.families.vit import example as small_vit
from vitrim.nn.attention import Heard
from vitrim.words.errors import AdoptError, DataError, PlanError
from vitrim.words.formats import FORMAT
from vitrim.words.plan import BlockPlan, Plan, read_plan, write_plan
from vitrim.words.spec import Conv, Skip
from vitrim.words.steps.drop import Drop
from vitrim.words.steps.grid_merge import GridMerge
from vitrim.words.steps.merge import Merge
from vitrim.words.steps.top_k import TopK


def cut(model, *decisions):
    """A child with one decision a block, the rest kept."""
    spec = describe(model)
    rest = [BlockPlan()] * (len(spec.blocks()) - len(decisions))
    return surgery.apply(model, Plan.of(spec, [*decisions, *rest]))


def steps(*kinds):
    return [BlockPlan(tokens=kind) for kind in kinds]


def random(model):
    """Weights that all matter."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if bool((parameter == 1).all()) else 0.0, 0.25)
    return families.adopt(model.eval())


class TestImageSizes:
    def test_merged_patches_of_any_image_are_all_pooled(self):
        """16 tokens stood for 64: three quarters of the image were lost."""
        model = random(small_vit(dynamic_img_size=True, global_pool="avg", class_token=False).double())
        child = cut(model, BlockPlan(tokens=Merge(count=1)))
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        x[..., 8:, :] = x[..., :8, :1].mean()  # all rows of patches but the first alike, so that merging loses nothing
        heard = []
        child.norm.register_forward_hook(lambda _m, _i, out: heard.append(out.shape[1]))
        with torch.no_grad():
            apart_by = apart(child(x), model(x))
        assert heard == [64]
        assert apart_by < 0.05

    def test_too_small_an_image_is_refused(self):
        child = cut(random(small_vit(dynamic_img_size=True)), BlockPlan(tokens=Merge(count=8)))
        with pytest.raises(DataError, match="must be given 16 or more, but got 4; give larger images"):
            child(torch.zeros(1, 3, 16, 16))

    @pytest.mark.parametrize(
        ("step", "words"),
        [
            (Drop(kept=(0, 5)), "must be dropped on one grid, but dynamic_img_size is on"),
            (GridMerge(axis="w"), "must stay where neighbors are merged, but dynamic_img_size is on"),
            (TopK(kept=6, by="hsic_attn", weights=(1.0,) * 16), "must be for one grid, but dynamic_img_size is on"),
        ],
    )
    def test_steps_of_one_grid_are_refused_where_it_changes(self, step, words):
        with pytest.raises(PlanError, match=words):
            cut(random(small_vit(dynamic_img_size=True)), BlockPlan(tokens=step))

    def test_a_convolution_before_a_merge_follows_a_new_size(self):
        model = random(small_vit(class_token=False, global_pool="avg"))
        conv = BlockPlan(mixer=Conv(kernel=3, width=16), v=(tuple(range(16)),) * 3)
        child = cut(model, conv, BlockPlan(), BlockPlan(tokens=GridMerge(axis="h")))
        child.set_input_size((64, 64))
        assert torch.isfinite(child(torch.randn(1, 3, 64, 64))).all()
        assert describe(child).stages[0].grid == (8, 8)

    def test_a_convolution_on_a_merged_grid(self):
        model = random(small_vit(class_token=False, global_pool="avg"))
        conv = BlockPlan(mixer=Conv(kernel=3, width=16), v=(tuple(range(16)),) * 3)
        child = cut(model, BlockPlan(tokens=GridMerge(axis="h")), conv)
        assert child.blocks[1].attn.grid == (2, 4)
        child.set_input_size((64, 64))
        assert child.blocks[1].attn.grid == (4, 8)
        assert torch.isfinite(child(torch.randn(1, 3, 64, 64))).all()

    def test_sizes_of_merged_and_chosen_tokens(self):
        """Steps that no place is tied to live on any grid; where weights belong to patches, that is the reason told."""
        model = random(small_vit())
        for step in (Merge(count=3), TopK(kept=9)):
            child = cut(model, BlockPlan(tokens=step))
            child.set_input_size((64, 64))
            assert torch.isfinite(child(torch.randn(1, 3, 64, 64))).all()
        child = cut(model, BlockPlan(tokens=TopK(kept=6, by="hsic_attn", weights=(1.0,) * 16)))
        with pytest.raises(DataError, match="chosen by weights of 16 patches; set the input size on the dense model"):
            child.set_input_size((64, 64))
        with pytest.raises(DataError, match="weights of 16 patches, but 36 came"):
            child.blocks[0](torch.randn(1, 37, 48))


class TestHeads:
    def test_no_patch_left_for_a_head_that_pools(self):
        child = cut(random(small_vit()), BlockPlan(), BlockPlan(), BlockPlan(tokens=Drop(kept=())))
        with pytest.raises(DataError, match=r"a head that pools patches \(avg\) must have at least one"):
            child.reset_classifier(5, "avg")
        child.reset_classifier(5)
        assert torch.isfinite(child(torch.randn(1, 3, 32, 32))).all()

    def test_pruned_layers_of_a_merged_model(self):
        """The block that is now the last gives each token as often as it has patches."""
        model = random(small_vit())
        child = cut(model, *steps(Merge(count=4), Merge(count=4)))
        child.prune_intermediate_layers([0], prune_head=True)
        assert child(torch.randn(2, 3, 32, 32)).shape == (2, 17, 48)
        assert len(describe(child).blocks()) == 1

    def test_pruning_away_the_block_of_prefix_tokens(self):
        child = cut(random(small_vit()), BlockPlan(), BlockPlan(), BlockPlan(only_prefix=True))
        with pytest.raises(DataError, match="only if the head reads the prefix tokens"):
            child.prune_intermediate_layers([2], prune_head=True)
        assert len(child.blocks) == 3
        child.prune_intermediate_layers([1], prune_head=True)
        child.reset_classifier(4, "avg")
        assert child(torch.randn(2, 3, 32, 32)).shape == (2, 4)


class TestNumbers:
    def test_a_fused_token_in_half_precision(self):
        """655 values of 100 sum to more than float16 holds."""
        step = cut(random(small_vit()), BlockPlan(tokens=TopK(kept=600))).blocks[0].step
        keys = torch.randn(1, 1370, 48).half()
        heard = Heard(keys, keys, (16, 16, 16), 0.25)
        out = step.after_attention(torch.full((1, 1370, 48), 100.0).half(), heard)
        assert torch.equal(out, torch.full((1, 601, 48), 100.0).half())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_counts_of_many_equal_patches(self, dtype):
        """In bfloat16 counts stopped at 256."""
        model = random(small_vit(img_size=320, class_token=False, global_pool="avg"))
        child = cut(model, *steps(Merge(count=800), Merge(count=400), Merge(count=200))).to(dtype)
        stream = torch.full((1, 1600, 48), 0.5, dtype=dtype)
        for block in child.blocks[:2]:
            stream = block(stream)
        sizes = stream.sizes
        assert sizes.dtype == torch.float32
        assert float(sizes.sum()) == 1600
        assert float(sizes.max()) > 256
        assert child.blocks[2](stream).shape == (1, 1600, 48)

    def test_a_query_that_may_see_no_key(self):
        """Fused attention gives it nothing; so does the path that a cut head takes."""
        model = random(small_vit())
        mask = torch.ones(17, 17, dtype=torch.bool)
        mask[3] = False
        narrow = [BlockPlan(qk=(tuple(range(8)),) * 3, v=(tuple(range(16)),) * 3)] * 3
        child = cut(model, *narrow)
        x = torch.randn(2, 3, 32, 32)
        wide = cut(model, *[BlockPlan(qk=(tuple(range(16)),) * 3)] * 3)
        hidden = torch.zeros(17, 17).masked_fill(~mask, -torch.inf)
        with torch.no_grad():
            for net in (wide, child):
                both = [net.forward_features(x, attn_mask=m) for m in (mask, hidden)]
                assert torch.isfinite(both[0]).all()
                assert apart(*both) < 1e-5
            for block in wide.blocks:
                block.attn.fused_attn = False
            assert apart(wide.forward_features(x, attn_mask=mask), model.forward_features(x, attn_mask=mask)) < 1e-5


class TestStepsTogether:
    @pytest.mark.parametrize(
        "kinds",
        [
            (TopK(kept=9), Merge(count=2)),
            (GridMerge(axis="w"), Merge(count=2)),
            (GridMerge(axis="w"), Merge(count=2), Merge(count=1)),
            (TopK(kept=9, fused=False), Merge(count=2)),
        ],
    )
    @pytest.mark.parametrize("preset", ["plain", "average", "map", "registers"])
    def test_merging_after_other_steps(self, preset, kinds):
        if preset in ("average", "map") and isinstance(kinds[0], TopK):
            kinds = (TopK(kept=10), *kinds[1:])
        parent = adopted("vit", preset)
        child = cut(parent, *steps(*kinds))
        x = images(describe(parent))
        with torch.no_grad():
            assert torch.isfinite(child(x)).all()

    def test_only_prefix_needs_no_merge_in_its_block(self):
        """The patches leave with the block, so a step after attention would change nothing but the cost."""
        parent = adopted("vit", "plain")
        merged = cut(parent, BlockPlan(), BlockPlan(), BlockPlan(tokens=Merge(count=4)))
        one = cut(parent, BlockPlan(), BlockPlan(), BlockPlan(tokens=Merge(count=4), only_prefix=True))
        two = cut(merged, BlockPlan(), BlockPlan(), BlockPlan(only_prefix=True))
        assert describe(one) == describe(two)
        assert describe(one).blocks()[2][2].tokens is None
        x = images(describe(parent))
        with torch.no_grad():
            assert torch.equal(one(x), two(x))
            assert apart(one(x), merged(x)) < EXACT

    @pytest.mark.parametrize("gone", [BlockPlan(mixer=Skip()), BlockPlan(qk=((),) * 3, v=((),) * 3)])
    def test_a_second_plan_cannot_take_the_attention_that_chooses(self, gone):
        child = cut(random(small_vit()), BlockPlan(tokens=TopK(kept=9)))
        with pytest.raises(PlanError, match=r"stages\.0\.blocks\.0\.tokens: tokens are chosen by the attention of"):
            cut(child, gone)

    def test_blocks_that_contradict_one_another_are_described_in_a_sentence(self):
        child = cut(random(small_vit()), BlockPlan(tokens=TopK(kept=9)))
        block = child.blocks[0]
        block.spec = block.spec.model_copy(update={"mixer": Skip()})
        with pytest.raises(AdoptError, match=r"must fit one another, but blocks\.0\.tokens: tokens are chosen by"):
            describe(child)


class TestWhatTheOwnerSet:
    @pytest.mark.parametrize("build", [small_vit, small_swin])
    def test_rates_modes_and_paths_of_attention(self, build, tmp_path):
        model = build()
        first = families.family_of(model).blocks_by_stage(model)[0][0]
        first.mlp.drop1.p, first.drop_path2, first.attn.fused_attn = 0.3, DropPath(0.25), False
        first.attn.eval()
        ours = families.adopt(model)
        _, block = blocks_of(ours)[0]
        heads = block.spec.mixer.v
        kept = tuple(tuple(range(k // 2)) for k in heads)
        child = cut(ours, BlockPlan(qk=kept, v=kept, hidden=tuple(range(8))))
        for net in (ours, child):
            block = blocks_of(net)[0][1]
            assert block.mlp.drop1.p == 0.3
            assert block.mlp.drop2.p == 0.0
            assert block.drop_path2.drop_prob == 0.25
            assert block.drop_path1.drop_prob == 0.0
            assert block.mlp.training
            assert not block.attn.training
            assert not block.attn.attn_drop.training
            assert describe(net).blocks()[0][2].rates.hidden == 0.3
        if build is small_vit:
            assert not blocks_of(child)[0][1].attn.fused_attn
        store.save(child, tmp_path / "model.safetensors")
        again = blocks_of(store.load(tmp_path / "model.safetensors"))[0][1]
        assert (again.mlp.drop1.p, again.drop_path2.drop_prob, again.mlp.drop2.p) == (0.3, 0.25, 0.0)

    def test_what_is_made_of_frozen_parts_is_frozen(self):
        model = random(small_vit())
        model.blocks[:2].requires_grad_(False)
        conv = BlockPlan(mixer=Conv(kernel=3, width=16), v=(tuple(range(16)),) * 3, hidden=())
        child = cut(model, conv, BlockPlan(tokens=GridMerge(axis="w"), qk=((),) * 3, v=((),) * 3), conv)
        trained = {name for name, parameter in child.named_parameters() if parameter.requires_grad}
        assert not [name for name in trained if name.startswith(("blocks.0.", "blocks.1."))]
        assert {"blocks.2.attn.conv.weight", "blocks.2.mlp.bias"} <= trained


class TestWords:
    def test_a_spec_is_frozen_through_and_through(self):
        spec = describe(random(small_vit()))
        child = Plan.keep(spec).child(spec)
        assert hash(child) == hash(spec)
        with pytest.raises(TypeError, match="a frozen table cannot be changed"):
            child.host.arguments["global_pool"] = "avg"
        assert isinstance(spec.host.arguments["patch_size"], tuple)

    def test_rates_are_no_structure(self):
        plain, dropping = (describe(small_vit(**more)) for more in ({}, {"drop_path_rate": 0.2, "proj_drop_rate": 0.1}))
        assert plain == dropping
        assert hash(plain) == hash(dropping)
        assert plain.model_dump() != dropping.model_dump()
        assert plain != describe(small_vit(depth=2))

    def test_plans_have_a_version_and_the_one_before_reads(self, tmp_path):
        spec = describe(small_vit(drop_path_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3))
        plan = Plan.of(spec, [BlockPlan(hidden=(0, 1))] * 3)
        path = tmp_path / "plan.json"
        write_plan(path, spec, plan)
        sheet = json.loads(path.read_text())
        assert sheet["format"] == FORMAT
        assert read_plan(path) == (spec, plan)
        del sheet["format"]
        for block in sheet["parent"]["stages"][0]["blocks"]:
            block["drop_path"] = block.pop("rates")["mlp_path"]
        sheet["parent"]["stages"][0]["form"] |= {"drop": 0.2, "attention_drop": 0.3}
        path.write_text(json.dumps(sheet))
        old, again = read_plan(path)
        assert again == plan
        assert old.model_dump() == spec.model_dump()
        path.write_text(json.dumps(sheet | {"format": FORMAT + 1}))
        with pytest.raises(PlanError, match=f"must be at most {FORMAT}, but is {FORMAT + 1}; install a newer vitrim"):
            read_plan(path)


def test_a_copy_of_a_child_keeps_its_methods():
    """Methods that a model with cut tokens has of its own belong to the copy, not to the original."""
    child = cut(random(small_vit()), BlockPlan(tokens=GridMerge(axis="w")))
    twin = copy.deepcopy(child)
    twin.set_input_size((64, 64))
    assert twin.patch_embed.grid_size == (8, 8)
    assert child.patch_embed.grid_size == (4, 4)
