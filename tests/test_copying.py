"""Copies of modules are those of `copy.deepcopy`, attribute by attribute."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from tests.samples import PRESETS, adopted
from vitrim.nn.copying import copied


def same(a, b, seen=None):
    """Compare attributes at every depth: types, values, tensors bit by bit, and which objects are one and the same."""
    seen = {} if seen is None else seen
    if id(a) in seen:
        return seen[id(a)] is b
    seen[id(a)] = b
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.requires_grad == b.requires_grad and torch.equal(a, b) and (not a.numel() or a.data_ptr() != b.data_ptr())
        )
    if isinstance(a, nn.Module):
        return list(vars(a)) == list(vars(b)) and all(same(vars(a)[key], vars(b)[key], seen) for key in vars(a))
    if isinstance(a, dict | OrderedDict):
        return list(a) == list(b) and all(same(a[key], b[key], seen) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, seen) for x, y in zip(a, b, strict=True))
    return a == b or a is b or same(vars(a), vars(b), seen)


@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_a_copy_is_that_of_deepcopy(family, preset):
    model = adopted(family, preset)
    assert same(copy.deepcopy(model), copied(model))
    assert same(model, copied(model))


class Told(nn.Linear):
    def __deepcopy__(self, memo):
        return "as it says"


def test_shared_parts_hooks_and_own_copies():
    one = nn.Linear(2, 2)
    model = nn.Sequential(one, one, nn.LayerNorm(2))
    model.also = [one]
    model[2].weight = model[0].bias
    model.told = Told(2, 2)
    calls = []
    one.register_forward_hook(lambda *_: calls.append(1))
    again = copied(model)
    assert again[0] is again[1] is again.also[0] is not one
    assert again[2].weight is again[0].bias
    assert again.told == "as it says"
    again.told = nn.Identity()
    again(torch.ones(1, 2))
    assert len(calls) == 2
    assert not model[2]._forward_hooks
    again[2].register_forward_hook(lambda *_: None)
    assert not model[2]._forward_hooks


def test_what_is_given_takes_the_place_of_a_copy():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    other = nn.Identity()
    again = copied(model, {id(model[0]): other})
    assert again[0] is other
    assert again[1] is not model[1]
