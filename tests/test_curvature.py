"""Losses of single cuts that are estimated from the curvature of the divergence."""

import math
from collections import Counter

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.samples import FEW, adopted, images
from vitrim import methods
from vitrim.cut.compensate import arriving
from vitrim.cut.outputs import logits_of
from vitrim.cut.surgery import apply
from vitrim.data import Input
from vitrim.families import blocks_of, describe
from vitrim.methods import Data
from vitrim.methods.post_training import curvature
from vitrim.methods.post_training.curvature import Curvature, corrected
from vitrim.nn.copying import copied
from vitrim.nn.modes import evaluating
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Skip


def test_drawn_vectors_have_the_moments_of_the_fisher_matrix():
    """The mean of v v' is diag p - p p', for a model that is unsure, sure, and for two classes."""
    torch.manual_seed(0)
    for logits in (torch.randn(1, 5), 6 * torch.randn(1, 4), torch.tensor([[3.0, -1.0]])):
        z = logits.double().repeat(40_000, 1).requires_grad_()
        (v,) = torch.autograd.grad(curvature._product(z, torch.Generator().manual_seed(1)), z)
        p = logits.double().softmax(-1)[0]
        assert (v.mT @ v / len(v)).numpy() == pytest.approx((p.diag() - p[:, None] * p).numpy(), abs=5e-3)
        assert float(v.sum(-1).abs().max()) < 1e-12  # a shift of all logits changes nothing


def changed(block, size, branch):
    """The block with other weights in one branch."""
    other = copied(block)
    with torch.no_grad():
        for number, parameter in enumerate((other.attn if branch == "mixer" else other.mlp).parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            parameter += size * noise
    return other


@pytest.mark.parametrize(
    ("family", "preset", "plans"),
    [
        ("vit", "plain", None),
        ("vit", "registers", None),
        ("swin", "windows", None),
        ("vit", "plain", (BlockPlan(mlp=Skip()), BlockPlan(hidden=()), BlockPlan(only_prefix=True))),
    ],
)
def test_an_estimate_is_the_loss_of_a_small_error(family, preset, plans, monkeypatch):
    """In both branches of every block of every stage, also where a block has no MLP, or a constant in its place.

    It is the second-order term of the measured divergence, up to the draws.
    """
    monkeypatch.setattr(curvature, "_DRAWS", 300)
    model = adopted(family, preset).double()
    if plans is not None:
        model = apply(model, Plan.of(describe(model), plans)).eval()
    spec, x = describe(model), [batch.double() for batch in images(describe(model), 4).split(3)]
    blocks = [block for _, block in blocks_of(model)]
    dense = logits_of(model, x).double()
    with evaluating(model, frozen=True):
        found = Curvature(model, blocks, x, "fp32", seed=0)
        entering = None
        for index, block in enumerate(blocks):
            before = None if entering is None else [blocks[index - 1](batch) for batch in entering]
            entering = arriving(model, blocks, index, x, before)
            for branch in ("mixer", "mlp") if block.mlp is not None else ("mixer",):
                new = changed(block, 1e-3, branch)
                (estimate,) = found.losses(index, block, entering, [new], branch)
                handle = block.register_forward_hook(lambda _m, given, _out, new=new: new(given[0]))
                ours = torch.cat([model(batch) for batch in x]).detach()
                handle.remove()
                loss = F.kl_div(ours.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True)
                assert estimate == pytest.approx(float(loss), rel=0.25), (index, branch, spec.family)
                assert float(loss) > 0


def test_memory_bounds_the_draws(monkeypatch):
    model = adopted("vit", "plain")
    blocks, x = [block for _, block in blocks_of(model)], list(images(describe(model), 6).split(4))
    for memory, draws in ((1 << 30, 4), (1, 1)):
        monkeypatch.setattr(curvature, "_MEMORY", memory)
        with evaluating(model, frozen=True):
            found = Curvature(model, blocks, x, "fp32", seed=0)
        assert {tensor.shape[1] for row in found.gradients.values() for tensor in row} == {draws}
        assert [tensor.shape[0] for tensor in found.gradients[0, "mlp"]] == [4, 2]


positive = st.floats(1e-9, 1e3)


@hypothesis.given(
    st.lists(st.tuples(positive, st.one_of(st.none(), st.floats(0.3, 9.0))), min_size=1, max_size=8),
)
def test_corrected_losses(rows):
    """Measured ones stay; others lie between the estimate and the estimate times a measured factor."""
    estimates = [one for one, _ in rows]
    measured = [None if factor is None else one * factor for one, factor in rows]
    found = corrected(estimates, measured)
    assert found is not None
    factors = [1.0, *(loss / one for one, loss in zip(estimates, measured, strict=True) if loss is not None)]
    for loss, estimate, known in zip(found, estimates, measured, strict=True):
        if known is not None:
            assert loss == known
        else:
            assert min(factors) * estimate * (1 - 1e-9) <= loss <= max(factors) * estimate * (1 + 1e-9)
    if len(factors) == 1:
        assert found == estimates


@pytest.mark.parametrize("estimates", [[0.0, 1.0], [math.nan, 1.0], [math.inf, 1.0], [1.0, 20.0], [1.0, 0.05]])
def test_estimates_that_mean_nothing_are_not_used(estimates):
    assert corrected(estimates, [None, 1.0]) is None


def calibrated(model, **settings):
    x = images(describe(model), 60)
    method = methods.get("post_training", {"probe": 12, "merge": "none", **settings})
    data = Data(train=None, calibration=None, validation=None, input=Input.of(model))
    return method.calibrated(model, data, list(x[:48].split(12)), list(x[48:].split(12)), 0)


@pytest.mark.parametrize(("family", "preset"), FEW)
def test_a_calibration_with_estimates_is_near_one_without(family, preset):
    """Cuts that are measured in both are equal; the others are near. Cuts of every family come."""
    model = adopted(family, preset)
    ours, whole = calibrated(model), calibrated(model, estimates=False)
    assert ours.losses.keys() == whole.losses.keys()
    kinds, gaps = Counter(), []
    for name, losses in whole.losses.items():
        kind = name.rpartition(".")[2]
        kinds[kind] += len(losses)
        for one, other in zip(ours.losses[name], losses, strict=True):
            if one != other:
                gaps.append(abs(math.log(max(one, 1e-12) / max(other, 1e-12))))
        if kind != "qk":
            assert ours.losses[name][-1] == losses[-1]
    assert kinds["hidden"] > 0
    assert kinds["block"] > 0
    assert not gaps or sorted(gaps)[len(gaps) // 2] < 0.5


def test_a_sure_model_is_measured():
    """No gradient is left of outputs that are sure, so nothing can be estimated."""
    model = adopted("vit", "plain")
    with torch.no_grad():
        model.head.weight *= 1e4
        model.head.bias *= 1e4
    assert calibrated(model).losses == calibrated(model, estimates=False).losses


@pytest.mark.parametrize(("family", "preset"), FEW)
def test_a_calibration_in_bf16_is_near_one_in_float32(family, preset):
    """Statistics, estimates and measured losses of every family."""
    model = adopted(family, preset).float()
    x = images(describe(model), 60).float()
    whole, ours = (
        methods.get("post_training", {"probe": 12, "precision": precision, "strength": 0.1}).calibrated(
            model,
            Data(train=None, calibration=None, validation=None, input=Input.of(model)),
            list(x[:48].split(12)),
            list(x[48:].split(12)),
            0,
        )
        for precision in ("fp32", "bf16")
    )
    assert ours.losses.keys() == whole.losses.keys()
    gaps = []
    for name, losses in whole.losses.items():
        gaps += [abs(one - other) / other for one, other in zip(ours.losses[name], losses, strict=True) if other > 1e-4]
    gaps += [abs(a - b) / b for a, b in zip(ours.merged, whole.merged, strict=True) if b > 1e-4]
    assert gaps
    assert sorted(gaps)[len(gaps) // 2] < 0.15
