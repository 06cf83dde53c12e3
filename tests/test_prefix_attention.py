"""Prefix tokens that keep the attention beside a convolution: the same outputs, at a hundredth of the cost."""

import itertools

import pytest
import timm
import torch

import vitrim
from vitrim import families
from vitrim.cut.compensate import BlockChoice, compensated, importances
from vitrim.cut.surgery import apply
from vitrim.families import describe
from vitrim.measure import counted
from vitrim.nn.attention import Attention
from vitrim.nn.read import PrefixAttention
from vitrim.testing.samples import apart, random_images, sample_model
from vitrim.words.costs import block_cost, cost_of
from vitrim.words.errors import PlanError
from vitrim.words.plain import dump, load
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Conv, Form, Norm
from vitrim.words.steps.grid_merge import GridMerge

LINEAR = Conv(kernel=3, width=8, prefix="attention", act="none")


@pytest.fixture(scope="module")
def parent():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=10, reg_tokens=2
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return families.adopt(model.double().eval())


def form_of(bias, k_bias, layout):
    return Form(
        norm=Norm(name="layernorm", eps=1e-6), qkv_bias=bool(bias), out_bias=True, mlp="plain", activation="gelu",
        hidden_bias=True, mlp_out_bias=True, k_bias=bool(k_bias), qkv=layout,
    )  # fmt: skip


class TestTheFunction:
    @pytest.mark.parametrize(
        ("qk", "v"),
        [((5, 5, 5), (5, 5, 5)), ((4, 4), (7, 7)), ((3, 6, 2), (5, 1, 4))],
        ids=["even", "unequal", "uneven"],
    )
    @pytest.mark.parametrize("form", [form_of(*each) for each in itertools.product((0, 1), (0, 1), ("fused", "split"))])
    @pytest.mark.parametrize("raised", [False, True])
    def test_it_is_the_attention_of_the_first_tokens(self, qk, v, form, raised):
        torch.manual_seed(1)
        spec = AttentionSpec(qk=qk, v=v, scale=0.3)
        whole, first = Attention(24, spec, form).double(), PrefixAttention(24, spec, form).double()
        for p in whole.parameters():
            torch.nn.init.normal_(p)
        first.load_state_dict(whole.state_dict())
        x = torch.randn(2, 11, 24, dtype=torch.float64)
        key_bias = torch.randn(2, 1, 1, 11, dtype=torch.float64) if raised else None
        wanted = whole(x, n_queries=3, key_bias=key_bias)
        assert apart(first(x, 3, key_bias), wanted) < 1e-12

    def test_a_child_keeps_what_prefix_tokens_read(self, parent):
        """The attention branch of the cut block gives prefix tokens what the dense one gives them."""
        spec = describe(parent)
        child = apply(parent, Plan.of(spec, [BlockPlan(), BlockPlan(mixer=LINEAR), BlockPlan(), BlockPlan()]))
        heard = []
        for model in (parent, child):
            with_out = model.blocks[1].attn.register_forward_hook(lambda _m, _i, out: heard.append(out))
            model(random_images(spec))
            with_out.remove()
        dense, small = heard
        assert apart(small[:, :3], dense[:, :3]) < 1e-12
        assert apart(small[:, 3:], dense[:, 3:]) > 1e-3

    def test_tokens_of_a_merged_grid_count_as_often_as_they_have_patches(self, parent):
        spec = describe(parent)
        merge = BlockPlan(tokens=GridMerge(axis="w", form="mean", size_bias=True))
        conv = LINEAR.model_copy(update={"kernel": 1})
        kept, cut = (
            apply(parent, Plan.of(spec, [merge, BlockPlan(mixer=mixer), BlockPlan(), BlockPlan()]))
            for mixer in (None, conv)
        )
        heard = []
        for model in (kept, cut):
            with_out = model.blocks[1].attn.register_forward_hook(lambda _m, _i, out: heard.append(out))
            model(random_images(spec))
            with_out.remove()
        assert apart(heard[1][:, :3], heard[0][:, :3]) < 1e-12

    def test_a_patch_attention_that_is_not_needed_costs_nothing_in_the_last_block(self, parent):
        """The head reads the class token alone, so what patches get in the last block changes no logit."""
        spec = describe(parent)
        plan = Plan.of(spec, [*[BlockPlan()] * 3, BlockPlan(mixer=LINEAR)])
        images = random_images(spec)
        assert apart(apply(parent, plan)(images), parent(images)) < 1e-12
        assert cost_of(plan.child(spec)).macs < cost_of(spec).macs


class TestPlans:
    def test_cost_is_what_pytorch_counts(self, parent):
        child = apply(parent, Plan.of(describe(parent), [BlockPlan(mixer=LINEAR)] * 4))
        assert counted(child).macs == cost_of(describe(child)).macs
        assert sum(p.numel() for p in child.parameters()) == cost_of(describe(child)).params

    def test_reading_costs_little(self):
        model = vitrim.adopt(timm.create_model("vit_tiny_patch16_224"))
        spec = describe(model)
        stage, block = spec.stages[0], spec.stages[0].blocks[0]
        conv = LINEAR.model_copy(update={"heads": block.mixer})
        with_it, without = (
            block_cost(block.model_copy(update={"mixer": mixer, "hidden": None}), stage)[0]
            for mixer in (conv, LINEAR.model_copy(update={"prefix": "zero"}))
        )
        whole = block_cost(block.model_copy(update={"hidden": None}), stage)[0]
        assert with_it - without < whole / 100

    def test_two_plans_compose(self, parent):
        """Heads are cut first, then patches get a convolution; prefix tokens keep the cut attention."""
        spec = describe(parent)
        heads = BlockPlan(qk=((0, 3, 5), (), tuple(range(16))), v=((1, 2), (), tuple(range(9))))
        first = Plan.of(spec, [heads, BlockPlan(), BlockPlan(), BlockPlan()])
        second = Plan.of(first.child(spec), [BlockPlan(mixer=LINEAR)] * 2 + [BlockPlan()] * 2)
        both = first.then(second, spec)
        images = random_images(spec)
        apart_ = apart(apply(parent, both)(images), apply(apply(parent, first), second)(images))
        assert apart_ < 1e-12
        assert load(Plan, dump(both), PlanError, at="plan") == both

    @pytest.mark.parametrize(
        ("family", "why"),
        [("swin", "has none"), ("beit", "norms and positions"), ("eva", "norms and positions")],
    )
    def test_where_it_is_impossible_it_says_why(self, family, why):
        preset = next(iter(families.get(family).TEST_PRESETS))
        spec = describe(families.adopt(sample_model(family, preset, torch.float32)))
        with pytest.raises(PlanError, match=why):
            Plan.of(spec, [BlockPlan(mixer=LINEAR) for _ in spec.blocks()]).child(spec)

    def test_heads_of_another_attention_are_refused(self, parent):
        other = LINEAR.model_copy(update={"heads": AttentionSpec(qk=(2,), v=(2,), scale=1.0)})
        with pytest.raises(PlanError, match="leave heads out"):
            Plan.of(describe(parent), [BlockPlan(mixer=other)] * 4).child(describe(parent))

    def test_heads_without_an_attention_are_refused(self):
        with pytest.raises(ValueError, match="set prefix=attention"):
            Conv(kernel=1, width=4, heads=AttentionSpec(qk=(2,), v=(2,), scale=1.0))


class TestFits:
    def test_a_fitted_child_gives_prefix_tokens_the_attention_and_stores_it(self, parent, tmp_path):
        spec, images = describe(parent), [random_images(describe(parent), 64)]
        conv = Conv(kernel=1, width=20, prefix="attention", act="none", heads=spec.stages[0].blocks[2].mixer)
        choices = [BlockChoice(), BlockChoice(), BlockChoice(conv=conv), BlockChoice()]
        plan, grafts = compensated(parent, choices, images, importances(parent, images, seed=0))
        child = apply(parent, plan, grafts=grafts).eval()
        x = torch.randn(2, 19, 48, dtype=torch.float64)
        wanted = parent.blocks[2].attn(x, n_queries=3)
        assert apart(child.blocks[2].attn(x)[:, :3], wanted) < 1e-12
        vitrim.save(child, tmp_path / "child.safetensors")
        with torch.no_grad():
            images = random_images(spec)
            assert torch.equal(vitrim.load(tmp_path / "child.safetensors").eval()(images), child(images))
