"""Dependence: what the estimators must be by hand, by definition and on average."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.tolerance import EXACT
from vitrim.methods.mdc import hsic
from vitrim.words.errors import MethodError


def grams(n, seed=0, dim=3):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=draw, dtype=torch.float64)
    y = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    return x, y, hsic.gaussian(1.0)(x), hsic.linear(y)


def centring(n):
    return torch.eye(n, dtype=torch.float64) - 1 / n


def by_definition(k, g):
    """The unbiased estimator as Song et al. write it."""
    n, one = len(k), torch.ones(len(k), dtype=torch.float64)
    k, g = k - torch.diag(k.diagonal()), g - torch.diag(g.diagonal())
    whole = (
        (k @ g).trace() + (one @ k @ one) * (one @ g @ one) / ((n - 1) * (n - 2)) - 2 * (one @ k @ g @ one) / (n - 2)
    )
    return whole / (n * (n - 3))


def test_hand_values():
    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    assert float(hsic.biased(hsic.linear(x), hsic.linear(x))) == 1.0
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    y = F.one_hot(torch.tensor([0, 0, 1, 1])).double()
    k, g = hsic.gaussian(1.0)(x), hsic.linear(y)
    assert float(hsic.biased(k, g)) == pytest.approx(4 * (1 - math.exp(-0.5)) / 9, abs=EXACT)
    assert float(hsic.unbiased(k, g)) == pytest.approx(2 * (1 - math.exp(-0.5)) / 3, abs=EXACT)


@pytest.mark.parametrize("n", [4, 7, 32])
def test_fast_forms_are_the_definitions(n):
    x, y, k, g = grams(n)
    j = centring(n)
    assert float(hsic.biased(k, g) - (k @ j @ g @ j).trace() / (n - 1) ** 2) == pytest.approx(0, abs=EXACT)
    assert float(hsic.unbiased(k, g) - by_definition(k, g)) == pytest.approx(0, abs=EXACT)
    both = (hsic.u_centred(k) * hsic.u_centred(g)).sum() / (n * (n - 3))
    assert float(hsic.unbiased(k, g) - both) == pytest.approx(0, abs=EXACT)
    linear = (x.T @ j @ y).square().sum() / (n - 1) ** 2
    assert float(hsic.biased(hsic.linear(x), g) / linear) == pytest.approx(1, abs=EXACT)


def test_one_hot_outputs_are_a_scatter_between_classes():
    x, _, k, _ = grams(20)
    o = F.one_hot(torch.arange(20) % 3).double()
    j = centring(20)
    wanted = sum(o[:, c] @ (j @ k @ j) @ o[:, c] for c in range(3)) / 19**2
    assert float(hsic.biased(k, hsic.linear(o)) - wanted) == pytest.approx(0, abs=EXACT)
    means = torch.stack([x[torch.arange(20) % 3 == c].mean(dim=0) for c in range(3)])
    counts = o.sum(dim=0)
    wanted = (counts**2 * (means - x.mean(dim=0)).square().sum(dim=1)).sum() / 19**2
    assert float(hsic.biased(hsic.linear(x), hsic.linear(o)) - wanted) == pytest.approx(0, abs=EXACT)


@pytest.mark.parametrize(("n", "mean"), [(32, 0.01296), (64, 0.00652), (128, 0.00326)])
def test_independence(n, mean):
    """Means over 200 draws; the biased estimator's floor halves where n doubles, the unbiased one has none."""
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(200, n, 3, generator=draw, dtype=torch.float64)
    o = F.one_hot(torch.randint(10, (200, n), generator=draw), 10).double()
    k, g = hsic.gaussian(2.0)(x), hsic.linear(o)
    spread = {32: 0.0026, 64: 0.0011, 128: 0.0006}[n]
    assert float(hsic.biased(k, g).mean()) == pytest.approx(mean, abs=4 * spread / math.sqrt(200))
    assert abs(float(hsic.unbiased(k, g).mean())) < 4 * spread / math.sqrt(200)
    assert float(hsic.unbiased(k, g).std()) == pytest.approx(spread, rel=0.3)
    informed = hsic.gaussian(2.0)(x + 2 * o[..., :3])
    assert float(hsic.unbiased(informed, g).mean()) == pytest.approx(0.008, abs=5e-4)


def test_permuting_one_side_leaves_the_floor():
    _, _, k, g = grams(50, dim=2)
    draw, j = torch.Generator().manual_seed(0), centring(50)
    orders = [torch.randperm(50, generator=draw) for _ in range(2000)]
    shuffled = torch.stack([g[o][:, o] for o in orders])
    floor = (j @ k @ j).trace() * (j @ g @ j).trace() / 49**3
    assert float(hsic.biased(k, shuffled).mean() / floor) == pytest.approx(1, abs=0.02)
    values = hsic.unbiased(k, shuffled)
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(2000)
    same = torch.randperm(50, generator=draw)
    assert float(hsic.unbiased(k[same][:, same], g[same][:, same]) - hsic.unbiased(k, g)) == pytest.approx(0, abs=EXACT)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_symmetry_scale_shift_and_turn(estimator):
    x, _, k, g = grams(16)
    value = hsic.hsic(k, g, estimator)
    assert float(hsic.hsic(g, k, estimator) - value) == pytest.approx(0, abs=EXACT)
    assert float(hsic.hsic(3 * k, 5 * g, estimator) / value) == pytest.approx(15, abs=1e-10)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    for moved in (x + 100, x @ turn):
        assert float(hsic.hsic(hsic.gaussian(1.0)(moved), g, estimator) - value) == pytest.approx(0, abs=1e-12)


def test_cka():
    for seed in range(20):
        _, _, k, g = grams(12, seed)
        value = float(hsic.cka(k, g, "biased"))
        assert -EXACT <= value <= 1 + EXACT
        assert float(hsic.cka(k, k, "biased")) == pytest.approx(1, abs=EXACT)
        assert float(hsic.cka(7 * k, g, "biased")) == pytest.approx(value, abs=EXACT)
    assert float(hsic.cka(torch.ones_like(k), g, "biased")) == 0


def test_constants_depend_on_nothing():
    _, _, _, g = grams(16)
    for value in (0.0, 1.0, 1e6):
        x = torch.full((16, 5), value, dtype=torch.float64)
        assert abs(float(hsic.biased(hsic.gaussian(*hsic.BANDWIDTHS)(x), g))) < 1e-15
        assert float(hsic.unbiased(hsic.median_gaussian(x), g)) == 0
    rounded = torch.ones(16, 5) + 1e-7 * torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    assert float(hsic.unbiased(hsic.median_gaussian(rounded), g.float())) == 0


def test_median_kernel():
    x, *_ = grams(9)
    distances = hsic.squared_distances(x)
    assert torch.allclose(distances, torch.cdist(x, x).square(), atol=EXACT)
    middle = torch.cdist(x, x)[tuple(torch.triu_indices(9, 9, 1))].median()
    assert torch.allclose(hsic.median_gaussian(x), torch.exp(-distances / (2 * middle**2)), atol=EXACT)
    assert torch.allclose(hsic.median_gaussian(1e-3 * x), hsic.median_gaussian(x), atol=EXACT)


def test_half_precision_is_computed_in_single():
    x, y, _, _ = grams(16, dim=64)
    for kind in (torch.float16, torch.bfloat16):
        assert hsic.squared_distances(x.to(kind)).dtype == torch.float32
        assert hsic.linear(y.to(kind)).dtype == torch.float32
    near = torch.ones(4, 64) * 1000 + torch.arange(4)[:, None] * 1e-4
    assert float(hsic.squared_distances(near).min()) >= 0


@pytest.mark.parametrize("memory", [1, 2**14, 2**30])
def test_chunks_change_nothing(memory):
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(8, 5, 11, generator=draw, dtype=torch.float64)
    against = hsic.target(grams(8)[3], "unbiased")
    wanted = [hsic.unbiased(hsic.median_gaussian(a[:, :, c]), grams(8)[3]) for c in range(11)]
    found = hsic.dependence(a, against, memory=memory)
    assert torch.allclose(found, torch.stack(wanted), atol=EXACT)


def test_three_samples_are_too_few():
    with pytest.raises(MethodError, match="at least 4 images, but got 3"):
        hsic.target(torch.eye(3), "unbiased")


def test_planted_components():
    """Every informative amplitude above every noise and constant, ten seeds; the biased floor lifts loud noise."""
    lifted = 0
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        o = F.one_hot(torch.randint(10, (128,), generator=draw), 10).double()
        mean = torch.randn(10, 16, generator=draw, dtype=torch.float64)

        def noise(draw=draw):
            return torch.randn(128, 16, generator=draw, dtype=torch.float64)

        informative = [size * (o @ mean + 0.3 * noise()) for size in (0.1, 0.5, 2.0)]
        empty = [size * noise() for size in (0.1, 1.0, 5.0)] + [torch.full((128, 16), 2.0, dtype=torch.float64)]
        stacked = torch.stack([*informative, *empty], dim=-1)
        found = hsic.dependence(stacked, hsic.target(hsic.linear(o), "unbiased"))
        assert float(found[:3].min()) > float(found[3:].max())
        floor = hsic.dependence(stacked, hsic.target(hsic.linear(o), "biased"), hsic.kernel_of("multi"))
        lifted += float(floor[5]) > float(floor[0])
    assert lifted == 10
