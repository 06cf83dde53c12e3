"""SPViT: the identities of its convolutions, gates and costs, and what it refuses."""

import copy

import pytest
import torch

from tests.samples import PRESETS, adopted, apart, images
from tests.tolerance import EXACT
from vitrim.families import describe
from vitrim.methods import _spvit_plan
from vitrim.methods._spvit import SinglePath, layout
from vitrim.spec import Form, Norm, folded
from vitrim.surgery import apply, fold

# Every preset whose attention can become both convolutions.
FREE = [(f, p) for f, p in PRESETS if p not in ("scale_norms",) and not (f == "vit" and p == "dynamic")]
IDS = [f"{f}-{p}" for f, p in FREE]
FORM = Form(
    norm=Norm(name="timm.LayerNorm", eps=1e-6), qkv_bias=True, out_bias=True, mlp="plain", activation="torch.GELU",
    hidden_bias=True, mlp_out_bias=True,
)  # fmt: skip


def single_of(family, preset, **arguments):
    """A search model in which every parameter matters, in evaluation mode."""
    model = copy.deepcopy(adopted(family, preset))
    windowed = arguments.pop("windowed", False)
    single = SinglePath(model, layout(describe(model), **arguments), windowed).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path in single.names:
            beside = single.beside(path)
            beside.mix.copy_(torch.randn(beside.mix.shape, generator=draw) * beside.mixture.temperature)
            for tensor in (beside.bn.weight, beside.bn.bias, beside.bn.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=draw))
            beside.bn.running_var.uniform_(0.5, 2.0, generator=draw)
    return single


def set_levels_(single, levels, signs=False):
    """Open as many gates of each attention as `levels` says; with `signs` a later gate of a closed one is open too."""
    with torch.no_grad():
        for path, level in levels.items():
            step = torch.full((3,), -5.0)
            step[:level] = 5.0
            if signs and level < 2:
                step[2] = 5.0
            single.step(path).copy_(step)


def cut_neurons_(single, seed=0):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path in single.gates:
            gate = single.gates[path]
            gate.copy_(torch.where(torch.rand(gate.shape, generator=draw) < 0.4, -5.0, 5.0))


@pytest.mark.parametrize(("family", "preset"), FREE, ids=IDS)
def test_search_is_child_is_folded(family, preset):
    """A search model under hard gates, the child that training starts from, and the folded child are one function."""
    single = single_of(family, preset)
    spec = describe(single.model)
    how, x = layout(spec), images(spec)
    for shift in range(4):
        set_levels_(single, {path: (i + shift) % 4 for i, path in enumerate(single.names)}, signs=shift == 1)
        cut_neurons_(single, shift)
        levels, neurons = _spvit_plan.as_evaluated(single)
        plan = _spvit_plan.planned(spec, how, levels, neurons)
        child = apply(single.model, plan, grafts=_spvit_plan.grafts(single, levels))
        plain = fold(child)
        assert describe(plain) == folded(describe(child)) == folded(plan.child(spec))
        with torch.no_grad():
            wanted = single(x)
            assert apart(child(x), wanted) < EXACT
            assert apart(plain(x), wanted) < EXACT


@pytest.mark.parametrize(("family", "preset"), FREE, ids=IDS)
def test_all_gates_open_is_the_model(family, preset):
    single = SinglePath(copy.deepcopy(adopted(family, preset)), layout(describe(adopted(family, preset)))).eval()
    with torch.no_grad():
        assert torch.equal(
            single(images(describe(single.model))), adopted(family, preset)(images(describe(single.model)))
        )
