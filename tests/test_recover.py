"""Compensation and allocation on plain matrices: identities, and what must never get worse."""

import itertools

import pytest
import torch

from tests.tolerance import EXACT
from vitrim.cut.compensate.closed_form import (
    Moments,
    directions,
    divider,
    query_key_maps,
    refit,
    root,
    value_map,
)
from vitrim.cut.compensate.removal import removal_order, working_type
from vitrim.cut.spend import choose_options, power_law
from vitrim.words.errors import BudgetError, MethodError

LOW_RANK = 1e-10
"""Products of several decompositions in float64."""


def gram(size: int, seed: int, count: int = 200) -> torch.Tensor:
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return x.mT @ x / count


def matrix(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(weight, cross, squares, target):
    """Mean squared error up to what no weight changes."""
    return float((weight @ squares * weight).sum() - 2 * (weight * cross).sum() + target)


def test_refit_with_nothing_removed_is_the_dense_weight():
    squares, weight = gram(12, 0), matrix(7, 12)
    assert torch.allclose(refit(squares, weight @ squares, weight, 1e-2), weight, rtol=0, atol=EXACT)


@pytest.mark.parametrize("strength", [0.0, 1e-2, 1.0])
def test_refit_never_does_worse_than_its_start(strength):
    squares, weight = gram(12, 0), matrix(7, 12)
    kept = torch.tensor([0, 2, 3, 7, 9])
    cross, small = (weight @ squares)[:, kept], squares[kept][:, kept]
    whole = float((weight @ squares * weight).sum())
    fitted = refit(small, cross, weight[:, kept], strength)
    assert error(fitted, cross, small, whole) <= error(weight[:, kept], cross, small, whole)
    if strength == 0:
        assert torch.allclose(fitted, cross @ torch.linalg.inv(small), rtol=1e-6, atol=1e-9)


def test_removal_follows_optimal_brain_surgeon():
    """Each neuron that goes is the one whose loss is least after the others were fitted anew, checked one by one."""
    squares, weight, metric = gram(9, 3), matrix(6, 9), gram(6, 8)
    order = removal_order(squares, weight, 0.0, half=root(metric)).tolist()
    half = root(metric) @ weight

    def cost(kept):
        cross, small = (half @ squares)[:, kept], squares[kept][:, kept]
        fitted = cross @ torch.linalg.inv(small)
        return error(fitted, cross, small, float((half @ squares * half).sum()))

    left = list(range(9))
    for gone in order[:6]:
        best = min(left, key=lambda n: cost([m for m in left if m != n]))
        assert gone == best
        left.remove(gone)
    assert sorted(order) == list(range(9))


def test_removal_takes_dead_and_double_neurons_first():
    squares, weight = gram(8, 1), matrix(5, 8)
    weight[:, 6] = 0
    twin = torch.eye(8, dtype=torch.float64)
    twin[3, 2], twin[3, 3] = 1.0, 0.0  # neuron 3 says what neuron 2 says
    order = removal_order(twin @ squares @ twin.mT, weight, 1e-9, half=torch.eye(5, dtype=torch.float64)).tolist()
    assert set(order[:2]) in ({6, 2}, {6, 3})


def test_low_rank_at_full_rank_is_identity():
    q, k = gram(8, 0), gram(8, 4)
    a, b = query_key_maps(directions(q, k), k, 8)
    assert torch.allclose(a @ b.mT, torch.eye(8, dtype=torch.float64), rtol=0, atol=LOW_RANK)
    assert torch.allclose(b.mT @ b, torch.eye(8, dtype=torch.float64), rtol=0, atol=LOW_RANK)
    weight = matrix(6, 8)
    back, columns = value_map(gram(8, 2), weight, root(gram(6, 9)))
    assert torch.allclose(columns @ back.mT, weight, rtol=0, atol=LOW_RANK)


@pytest.mark.parametrize("width", [1, 3, 6])
def test_low_rank_is_the_best_there_is(width):
    """Against the truncated singular value decomposition of the weighted product."""
    q, k = gram(8, 0), gram(8, 4)
    a, b = query_key_maps(directions(q, k), k, width)
    left, right = root(q), root(k)
    values = torch.linalg.svdvals(left @ right)
    lost = (left @ (torch.eye(8, dtype=torch.float64) - a @ b.mT) @ right).square().sum()
    assert float(lost) == pytest.approx(float(values[width:].square().sum()), rel=1e-6)
    weight, metric = matrix(6, 8), gram(6, 9)
    back, columns = (part[:, :width] for part in value_map(q, weight, root(metric)))
    lost = (left @ (weight - columns @ back.mT).mT @ root(metric)).square().sum()
    values = torch.linalg.svdvals(left @ weight.mT @ root(metric))
    assert float(lost) == pytest.approx(float(values[width:].square().sum()), rel=1e-6, abs=1e-9)


def test_constant_and_broken_activations_are_named():
    moments = Moments("stages.0.blocks.1.hidden")
    x = torch.ones(2, 5, 4, dtype=torch.float64)
    moments.add(torch.ones(2, 5), x, x)
    with pytest.raises(MethodError, match=r"stages\.0\.blocks\.1\.hidden: activations must vary"):
        refit(moments.gram, moments.cross, torch.zeros(4, 4, dtype=torch.float64), 1e-2, moments.at)
    with pytest.raises(MethodError, match=r"stages\.0\.blocks\.1\.hidden: activations must be finite"):
        moments.add(torch.ones(2, 5), x * float("nan"), x)


# -- allocation


def brute(losses, costs, limits):
    best = None
    for chosen in itertools.product(*(range(len(group)) for group in losses)):
        spent = [sum(group[i][b] for group, i in zip(costs, chosen, strict=True)) for b in range(len(limits))]
        loss = sum(group[i] for group, i in zip(losses, chosen, strict=True))
        if all(a <= b for a, b in zip(spent, limits, strict=True)) and (best is None or loss < best):
            best = loss
    return best


@pytest.mark.parametrize("seed", range(8))
def test_allocation_equals_brute_force(seed):
    draw = torch.Generator().manual_seed(seed)
    losses = [torch.rand(4, generator=draw).tolist() for _ in range(5)]
    costs = [[[int(n)] for n in torch.randint(0, 60, (4,), generator=draw)] for _ in range(5)]
    limits = [110]
    wanted = brute(losses, costs, limits)
    if wanted is None:
        with pytest.raises(BudgetError, match="must be at least"):
            choose_options(losses, costs, limits)
        return
    chosen = choose_options(losses, costs, limits)
    assert sum(group[i][0] for group, i in zip(costs, chosen, strict=True)) <= limits[0]
    assert sum(group[i] for group, i in zip(losses, chosen, strict=True)) == pytest.approx(wanted)


def test_allocation_keeps_two_bounds():
    draw = torch.Generator().manual_seed(3)
    losses = [torch.rand(4, generator=draw).sort().values.tolist() for _ in range(5)]
    costs = [[[100 - 20 * i, 400 - 40 * i - 40 * i * (g % 2)] for i in range(4)] for g in range(5)]
    limits = [420, 1500]
    chosen = choose_options(losses, costs, limits)
    for bound, limit in enumerate(limits):
        assert sum(group[i][bound] for group, i in zip(costs, chosen, strict=True)) <= limit
    loss = sum(group[i] for group, i in zip(losses, chosen, strict=True))
    assert loss <= 1.1 * brute(losses, costs, limits)


def test_power_law_goes_through_its_points():
    shares, losses = (0.25, 0.5, 1.0), (0.01, 0.04, 0.16)
    for share, loss in zip(shares, losses, strict=True):
        assert power_law(shares, losses, share) == pytest.approx(loss)
    assert power_law(shares, losses, 0.125) == pytest.approx(0.0025)  # the square goes on
    assert power_law(shares, losses, 0.0) == 0.0
    assert power_law((0.25, 0.5), (0.01, 0.04), 1.0) == pytest.approx(0.16)


def test_removal_in_chunks_is_removal_one_by_one():
    """Against the plain recursion, in which weights and the whole inverse are updated after each removal."""
    squares, weight, half = gram(150, 3, 400), matrix(6, 150), root(gram(6, 8))
    inverse = torch.linalg.inv(squares + 1e-2 * squares.diagonal().mean() * torch.eye(150, dtype=torch.float64))
    rows, left, order = (half @ weight).mT.clone(), torch.ones(150, dtype=torch.bool), []
    for _ in range(150):
        costs = torch.where(left, rows.square().sum(1) / inverse.diagonal().clamp_min(1e-300), torch.inf)
        gone = int(costs.argmin())
        column, pivot = inverse[:, gone].clone(), inverse[gone, gone].clamp_min(1e-300).clone()
        rows = rows - (column / pivot)[:, None] * rows[gone]
        inverse = inverse - torch.outer(column, column) / pivot
        left[gone] = False
        order.append(gone)
    assert removal_order(squares, weight, 1e-2, half=half).tolist() == order


def spread(size, largest, seed=3):
    """A Gram matrix with eigenvalues from 1 to `largest` in random directions."""
    basis = torch.linalg.qr(matrix(size, size, seed=seed))[0]
    return (basis * torch.logspace(0, largest, size, dtype=torch.float64)) @ basis.mT


def lost_after(order, squares, weight, half, count):
    """Loss after the first `count` neurons of `order` were removed and the others fitted, over that of removing all."""
    kept = order[count:].sort().values
    target, cross = half @ weight @ squares, (half @ weight @ squares)[:, kept]
    whole = float((target * (half @ weight)).sum())
    fitted = cross @ torch.linalg.inv(squares[kept][:, kept])
    return error(fitted, cross, squares[kept][:, kept], whole) / whole


@pytest.mark.parametrize(("largest", "kind"), [(1, torch.float32), (9, torch.float64)])
def test_removal_in_float32_loses_what_float64_loses(largest, kind):
    """On well conditioned moments within 1e-3 of the loss; on ill conditioned ones it is the order of float64."""
    squares, weight, half = spread(200, largest), matrix(6, 200), root(gram(6, 8))
    noise = torch.finfo(torch.float32).eps
    assert working_type(squares, torch.linalg.inv(squares), noise) == kind
    double, single = (removal_order(squares, weight, 0.0, half=half, noise=n) for n in (0.0, noise))
    assert sorted(single.tolist()) == list(range(200))
    if kind == torch.float64:
        assert single.tolist() == double.tolist()
    for count in (50, 100, 150):
        lost = [lost_after(order, squares, weight, half, count) for order in (double, single)]
        assert lost[1] == pytest.approx(lost[0], rel=1e-3, abs=1e-9)


def test_moments_of_float64_are_worked_on_in_float64():
    squares = spread(20, 0)
    for noise in (0.0, torch.finfo(torch.float64).eps):
        assert working_type(squares, torch.linalg.inv(squares), noise) == torch.float64


@pytest.mark.parametrize("size", [1, 5, 384, 385, 800])
def test_gram_matrix_in_blocks_is_the_product(size):
    """Only columns from the diagonal on are multiplied; sums of two batches, against the plain product."""
    moments, x, w = Moments("layer"), matrix(2, 30, size, seed=7), matrix(2, 30, seed=8).abs()
    moments.add(w[:1], x[:1], x[:1, :, :1])
    moments.add(w[1:], x[1:], x[1:, :, :1])
    flat = (x - moments.origin).flatten(0, 1)
    whole = flat.mT @ (w.reshape(-1, 1) * flat)
    assert torch.allclose(moments.squares, whole, rtol=0, atol=EXACT * float(whole.abs().max()))


def test_products_that_overflow_are_named():
    """The activations are finite, but the square of one of them is not in float32."""
    moments, x = Moments("layer"), torch.randn(1, 9, 500, generator=torch.Generator().manual_seed(0))
    x[0, 4, 499] = 1e25
    with pytest.raises(MethodError, match="layer: activations must be finite"):
        moments.add(torch.ones(1, 9), x, x[..., :3])


def test_rows_are_divided_by_matrices_that_are_not_positive():
    """Rounding leaves negative eigenvalues; the factors of a general matrix take over."""
    sound, broken, rows = gram(6, 0), gram(6, 0), matrix(4, 6)
    broken -= 1.5 * torch.linalg.eigvalsh(broken)[0] * torch.eye(6, dtype=torch.float64)
    assert torch.linalg.cholesky_ex(broken)[1] > 0
    for one in (sound, broken, torch.stack([sound, broken])):
        assert torch.allclose(divider(one)(rows.expand(*one.shape[:-2], 4, 6)) @ one, rows, rtol=0, atol=1e-8)


def test_maps_of_several_heads_at_once_are_those_of_each():
    q, k, weight = torch.stack([gram(8, 0), gram(8, 4)]), torch.stack([gram(8, 2), gram(8, 6)]), matrix(2, 12, 8)
    half = root(gram(12, 9))
    both, maps = directions(q, k), value_map(q, weight, half)
    for head in range(2):
        assert torch.allclose(both[head], directions(q[head], k[head]), rtol=0, atol=LOW_RANK)
        for mine, one in zip(maps, value_map(q[head], weight[head], half), strict=True):
            assert torch.allclose(mine[head], one, rtol=0, atol=LOW_RANK)
    narrow = query_key_maps(both, k, 5)
    for head in range(2):
        for mine, one in zip(narrow, query_key_maps(both[head], k[head], 5), strict=True):
            assert torch.allclose(mine[head], one, rtol=0, atol=LOW_RANK)
