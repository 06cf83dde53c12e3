"""Every timm name whose class is a plain ViT's is adopted or refused, and so are other models."""

import copy
import dataclasses
import functools
import inspect
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from tests.samples import WHOLE, apart, timm_model, without_data
from tests.tolerance import SINGLE
from vitrim import families
from vitrim.families import adopt, describe
from vitrim.measure import counted
from vitrim.nn.layers import input_channels
from vitrim.words.costs import cost_of
from vitrim.words.errors import AdoptError, WeightsError

PLAIN = (VisionTransformer, Eva, Beit, VisionTransformerRelPos)
STRANGERS = {
    "is on attention alone",
    "ParallelThingsBlock",
    "ResPostBlock",
    "ParallelScalingBlock",
    "DiffAttention",
    "DiffParallelScalingBlock",
}
TABLE = Path(__file__).parents[1] / "docs" / "models.md"
CELLS = 2
"""Patches along a side: few, for what takes the time is the weights of 200 models."""

HUGE = 40_000_000 if WHOLE else 4_000_000
"""Parameters of two blocks beyond which a model gets fewer heads."""


def candidates() -> list[str]:
    """Every name of a timm module that knows the class at all; it spares building a thousand other models.

    Every third of them, or all with ``VITRIM_WHOLE``.
    """
    found = [name for name in timm.list_models() if _knows_vit(timm.model_entrypoint(name).__module__)]
    return found if WHOLE else found[::3]


@functools.cache
def _knows_vit(module: str) -> bool:
    return any(inspect.isclass(v) and issubclass(v, PLAIN) for v in vars(sys.modules[module]).values())


def skeleton(name: str, **arguments: Any) -> nn.Module:
    """The model of that name, two blocks deep, without data where this version of timm can build so."""
    if "sapiens2" in name:  # one number for each of many blocks, of which the first have as many as there are heads
        heads = arguments.get("num_heads") or _whole(name).blocks[0].attn.num_heads
        arguments["num_kv_heads"] = (heads, heads)
    return without_data(lambda: timm.create_model(name, depth=2, **arguments))


@functools.cache
def _whole(name: str) -> Any:
    return without_data(lambda: timm.create_model(name))


@functools.cache
def _noise() -> torch.Tensor:
    """Drawn once: to draw the weights of 200 models anew would take longer than all the rest."""
    return torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Give data to a skeleton: every parameter matters, and signals neither die nor blow up."""
    model = model.to_empty(device="cpu")
    for index, (name, parameter) in enumerate(model.named_parameters()):
        flat, row = parameter.view(-1), _noise()[7919 * index % 65536 :]
        for start in range(0, flat.numel(), row.numel()):
            piece = flat[start : start + row.numel()]
            piece.copy_(row[: piece.numel()])
        flat.mul_(parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2)
        if parameter.dim() == 1 and name.endswith("weight"):
            flat.add_(1.0)
    for name, buffer in model.named_buffers():
        buffer.fill_(1 if name.endswith("var") else 0)
    for module in model.modules():
        getattr(module, "init_non_persistent_buffers", lambda: None)()  # angles of positions, and indices of tables
    return model.eval()


@dataclass(frozen=True)
class Verdict:
    """Whether one name is adopted; the numbers are those of the adopted model."""

    refusal: str = ""
    apart: float = 0.0
    counted: tuple[int, int] = (0, 0)
    priced: tuple[int, int] = (0, 0)
    same_class: bool = True
    same_weights: bool = True
    same_spec: bool = True


_shared: list[Path] = []
"""A folder of pytest's that all processes of one run share; empty if there is one process."""


@pytest.fixture(scope="session", autouse=True)
def _share(tmp_path_factory):
    if "PYTEST_XDIST_WORKER" in os.environ:
        _shared.append(tmp_path_factory.getbasetemp().parent / "verdicts")


@functools.cache
def verdict(name: str) -> Verdict | None:
    """The verdict on a name, shared by the processes of one run of the tests."""
    if not _shared:
        return _verdict(name)
    shared = _shared[0] / f"{name}.json"
    if shared.is_file():
        known = json.loads(shared.read_text(encoding="utf-8"))
        return None if known is None else Verdict(**known)
    found = _verdict(name)
    shared.parent.mkdir(exist_ok=True)
    part = shared.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(None if found is None else dataclasses.asdict(found)), encoding="utf-8")
    part.replace(shared)
    return found


def _verdict(name: str) -> Verdict | None:
    """Adopt a random model of that name; None if its class is not one of `PLAIN`."""
    model = skeleton(name)
    if not isinstance(model, PLAIN):
        return None
    model = skeleton(name, **_shrinking(model))
    key = _signature(model)
    if key not in _verdicts:
        _verdicts[key] = _knock(randomised(model))
    return _verdicts[key]


_verdicts: dict[Any, Verdict] = {}


def _shrinking(model: Any) -> dict[str, Any]:
    """Arguments that leave a model what it is, on its smallest image and with fewer heads where its blocks are huge."""
    small = {"img_size": CELLS * model.patch_embed.img_size[0] // model.patch_embed.grid_size[0]}
    if sum(p.numel() for p in model.blocks.parameters()) > HUGE and not hasattr(model.patch_embed, "backbone"):
        heads = next(part.num_heads for part in model.blocks.modules() if hasattr(part, "num_heads"))
        small |= {"num_heads": 6, "embed_dim": 6 * model.embed_dim // heads}
    return small


def _signature(model: nn.Module) -> Any:
    """All that tells two skeletons apart; many names differ in their image or their weights alone."""
    plain = (bool, int, float, str, tuple, type(None))
    values = [
        (path, type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for path, module in model.named_modules()
    ]
    return repr((model, values, [(name, tuple(value.shape)) for name, value in model.state_dict().items()]))


def _knock(model: nn.Module) -> Verdict:
    try:
        ours = adopt(model)
    except AdoptError as refusal:
        return Verdict(refusal=str(refusal))
    spec = describe(ours)
    x = torch.randn(2, 3, *spec.image)
    with torch.no_grad():
        difference = apart(ours(x), model(x))
    cost = cost_of(spec)
    with torch.device("meta"):
        again = families.build(spec)
    return Verdict(
        apart=difference,
        priced=cost,
        counted=counted(ours),
        same_class=type(ours) is type(model),
        same_weights=_shapes(again) == _shapes(ours) == _shapes(model),
        same_spec=describe(again) == spec,
    )


def _shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, value.shape) for name, value in model.state_dict().items()]


@pytest.mark.parametrize("name", candidates())
def test_every_timm_name_is_welcome_or_refused(name: str):
    said = verdict(name)
    if said is None:
        pytest.skip("its class is no plain ViT's")
    if said.refusal:
        assert re.match(r"blocks\.\d+(\.\w+)*: .+", said.refusal)
        assert any(said.refusal.endswith(f" {kind}") for kind in STRANGERS), said.refusal
        return
    assert said.apart < SINGLE
    assert said.priced == said.counted
    assert said.same_class
    assert said.same_weights
    assert said.same_spec


def test_most_names_are_welcome():
    said = [verdict(name) for name in candidates()]
    vits = [each for each in said if each is not None]
    welcome = [each for each in vits if not each.refusal]
    assert len(vits) >= (200 if WHOLE else 90)
    assert len(welcome) >= 0.85 * len(vits)
    if timm.__version__ == "1.0.31":
        assert len(welcome) >= (265 if WHOLE else 85)


def test_the_table_says_the_same():
    text = TABLE.read_text(encoding="utf-8")
    if f"timm {timm.__version__}," not in text:
        pytest.skip("the table was made with another timm")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    table = {row[1].strip(" `"): row[3].strip() == "adopted" for row in rows}
    heard = {name: verdict(name) for name in candidates()}
    heard_of = {name: not said.refusal for name, said in heard.items() if said is not None}
    assert {name: adopted for name, adopted in table.items() if name in heard_of} == heard_of


def small(**arguments: Any) -> Any:
    return families.get("vit").example(**arguments)


def test_another_model_is_refused():
    with pytest.raises(AdoptError, match=r"family that vitrim knows .* but got ResNet"):
        adopt(timm.create_model("test_resnet"))


def test_no_model_without_blocks():
    with pytest.raises(AdoptError, match="at least one block"):
        adopt(small(depth=0))


class OwnBlock(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        return super().forward(x) * 2


class OwnAttention(Attention):
    pass


def test_changed_blocks_are_refused_by_name():
    with pytest.raises(AdoptError, match=r"blocks\.0: .* but got OwnBlock"):
        adopt(small(block_fn=OwnBlock))
    model = small()
    model.blocks[1].attn = OwnAttention(48, num_heads=3)
    with pytest.raises(AdoptError, match=r"blocks\.1\.attn: .* but got OwnAttention"):
        adopt(model)
    model = small()
    model.blocks[2].mlp.act = nn.Softshrink()
    with pytest.raises(AdoptError, match=r"blocks\.2\.mlp\.act: .* but got torch.Softshrink"):
        adopt(model)
    model = small()
    model.blocks[2].attn.qkv = nn.Sequential(model.blocks[2].attn.qkv)
    with pytest.raises(AdoptError, match=r"blocks\.2\.attn\.qkv"):
        adopt(model)


def test_gated_attention_is_refused():
    model = small()
    model.blocks[0].attn.gate = nn.Linear(48, 48)
    with pytest.raises(AdoptError, match=r"blocks\.0\.attn: gated attention is not supported"):
        adopt(model)


def test_parameters_of_ones_own_are_refused():
    model = small()
    model.blocks[1].mine = nn.Parameter(torch.zeros(3))
    with pytest.raises(AdoptError, match=r"stages\.0\.blocks\.1: .*mine"):
        adopt(model)


def test_uneven_blocks_are_refused():
    model = small()
    model.blocks[2].norm1.eps = 0.5
    model.blocks[2].norm2.eps = 0.5
    with pytest.raises(AdoptError, match=r"blocks\.2: every block must have the form of block 0"):
        adopt(model)


@pytest.mark.parametrize("part", ["block", "attn", "mlp"])
def test_a_forward_of_ones_own_is_seen_in_the_logits(part: str):
    model = timm_model("vit", "plain", torch.float32)
    owner = model.blocks[1] if part == "block" else getattr(model.blocks[1], part)
    plain = owner.forward
    owner.forward = lambda x, **others: plain(x, **others) * 1.1
    with pytest.raises(AdoptError, match="logits must stay within"):
        adopt(model)


def test_hooks_that_change_the_logits_are_seen():
    model = timm_model("vit", "plain", torch.float32)
    model.blocks[0].register_forward_hook(lambda _m, _i, out: out.abs())
    with pytest.raises(AdoptError, match="logits must stay within"):
        adopt(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.weight", "head.bias", "pos_embed"])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float):
    model = small()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(WeightsError, match=f"^{re.escape(name)}: weights must be finite"):
        adopt(model)


def test_weights_without_data_are_refused():
    model = small().to("meta")
    describe(model)
    with pytest.raises(
        WeightsError, match=r"^cls_token: weights must hold data, but these are on the meta device; load"
    ):
        adopt(model)
    model = small()
    model.head.weight = nn.Parameter(model.head.weight.to("meta"))
    with pytest.raises(WeightsError, match=r"^head.weight: weights must hold data"):
        adopt(model)


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.weight", "head.weight"])
def test_weights_that_are_not_computed_in_are_refused(name: str, kind: torch.dtype):
    model = small()
    owner, _, last = name.rpartition(".")
    weight = nn.Parameter(model.get_parameter(name).detach().to(kind), requires_grad=False)
    setattr(model.get_submodule(owner), last, weight)
    with pytest.raises(WeightsError, match=f"^{re.escape(name)}: weights must be float16, .* but are"):
        adopt(model)


def test_adopting_twice_is_adopting_once():
    once = adopt(small())
    twice = adopt(once)
    assert describe(twice) == describe(once)
    assert not {p.data_ptr() for p in once.parameters()} & {p.data_ptr() for p in twice.parameters()}
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(once.eval()(x), twice.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_guest_is_left_as_it_was(training: bool):
    model = small(drop_path_rate=0.2, proj_drop_rate=0.1).train(training)
    model.patch_embed.train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    kinds = [type(block) for block in model.blocks]
    dice = torch.random.get_rng_state()
    ours = adopt(model)
    assert torch.equal(torch.random.get_rng_state(), dice)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [type(block) for block in model.blocks] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: module.training for name, module in ours.named_modules() if name in modes} == {
        name: mode for name, mode in modes.items() if name in dict(ours.named_modules())
    }


def test_the_guest_is_left_as_it_was_when_refused():
    model = small().train()
    model.blocks[0].register_forward_hook(lambda _m, _i, out: out.abs())
    with pytest.raises(AdoptError):
        adopt(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types_stay_what_they_are(dtype: torch.dtype):
    ours = adopt(timm_model("vit", "registers", torch.float32).to(dtype))
    assert {p.dtype for p in ours.parameters()} == {dtype}


def test_frozen_parameters_stay_frozen():
    model = small()
    frozen = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.2.mlp.fc2.bias", "cls_token"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    assert {name for name, p in adopt(model).named_parameters() if not p.requires_grad} == frozen


class OwnVit(VisionTransformer):
    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, attn_mask=attn_mask) * 3


def test_a_subclass_is_welcome():
    model = OwnVit(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5).eval()
    ours = adopt(model)
    assert type(ours) is OwnVit
    x = torch.randn(2, 3, 32, 32)
    assert apart(ours(x), model(x)) < SINGLE


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels: int):
    ours = adopt(small(in_chans=channels))
    assert input_channels(ours) == channels
    assert describe(ours).host.arguments["in_chans"] == channels


def test_dropout_and_checkpointing_come_along():
    model = small(drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.1, drop_rate=0.4, pos_drop_rate=0.05)
    model.set_grad_checkpointing()
    ours: Any = adopt(model)
    assert ours.grad_checkpointing
    assert [b.drop_path1.drop_prob for b in ours.blocks] == pytest.approx([0.0, 0.15, 0.3])
    assert (ours.blocks[0].attn.proj_drop.p, ours.blocks[0].attn.attn_drop.p) == (0.2, 0.1)
    assert (ours.blocks[0].mlp.drop1.p, ours.head_drop.p, ours.pos_drop.p) == (0.2, 0.4, 0.05)


def test_an_image_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(AdoptError, match=r"must take images of its own size, but says: .*32.*17.*; choose another"):
        adopt(timm.create_model("test_vit", img_size=32, patch_size=17))
