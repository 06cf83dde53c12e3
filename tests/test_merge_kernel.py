"""The fused kernels of merging, in Triton's interpreter, against PyTorch's operators: the same pairs, sums, sizes."""

import copy
import sys

import pytest
import torch

from tests.samples import adopted, apart, images
from tests.test_merge import merging
from vitrim.cut import surgery
from vitrim.deploy import optimized
from vitrim.deploy.bench import _Entry, _why_slow
from vitrim.families import blocks_of, describe
from vitrim.nn.attention import Heard
from vitrim.nn.steps.merge import Merged
from vitrim.nn.stream import Stream

merged = pytest.importorskip("vitrim.nn.kernels.merge").merged
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="conftest turns the interpreter on without a GPU")

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""One rounding of the results; inside, both add in float32."""


def both(x, keys, sizes, prefix, count, *more):
    """Tokens and sizes after PyTorch's operators, and after the kernel."""
    step = Merged(prefix, count, *more)
    given = x if sizes is None else Stream(x, sizes, int(sizes.sum()))
    heard = None if keys is None else Heard(keys, keys, (keys.shape[-1],), 1.0)
    plain = step.after_attention(given, heard)
    step.fused, step.fused_on = merged, "cpu"
    fused = step.after_attention(given, heard)
    assert fused.patches == plain.patches
    return plain, fused


@pytest.mark.parametrize("more", [("keys", False), ("tokens", True)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("tokens", "prefix", "count", "width", "channels", "sized"),
    [
        (17, 1, 8, 24, 12, True),
        (16, 0, 3, 20, 70, False),
        (40, 5, 17, 48, 48, True),
        (71, 2, 34, 10, 6, True),
        (9, 1, 0, 12, 8, True),
        (4, 2, 1, 8, 8, False),
    ],
)
def test_the_kernel_merges_as_the_operators_do(tokens, prefix, count, width, channels, sized, dtype, more):
    draw = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, tokens, width, generator=draw).to(dtype)
    qkv = torch.randn(3, tokens, channels + 5, generator=draw).to(dtype)
    sizes = torch.randint(1, 9, (3, tokens, 1), generator=draw).float() if sized else None
    plain, fused = both(x, qkv[..., :channels] if more[0] == "keys" else None, sizes, prefix, count, *more)
    assert torch.equal(fused.sizes, plain.sizes)
    assert fused.sizes.dtype == torch.float32
    assert fused.x.dtype == dtype
    assert apart(fused.x.double(), plain.x.double()) <= TOLERANCE[dtype]


def test_keys_need_not_be_given():
    """A block without attention compares the stream itself."""
    x = torch.randn(2, 21, 16, generator=torch.Generator().manual_seed(3))
    plain, fused = both(x, None, None, 1, 6)
    assert torch.equal(fused.sizes, plain.sizes)
    assert apart(fused.x, plain.x) < 1e-6


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ties_are_broken_alike(levels):
    """Keys of few kinds, so that most cosines are equal: of the second set and of the first, the first ones win."""
    draw = torch.Generator().manual_seed(levels)
    kinds = torch.eye(4)[:levels] * torch.tensor([1.0, 2.0, 4.0, 8.0])[:levels, None]
    keys = kinds[torch.randint(0, levels, (4, 38), generator=draw)]
    x = torch.randn(4, 38, 7, generator=draw)
    plain, fused = both(x, keys, None, 1, 9)
    assert torch.equal(fused.sizes, plain.sizes)
    assert apart(fused.x, plain.x) < 1e-6
    alike = keys[0, 1:]
    first, second = alike[::2], alike[1::2]
    partner = [next((j for j, b in enumerate(second) if torch.equal(a, b)), None) for a in first]
    if all(j is not None for j in partner):  # every cosine is 1, so the first patches go to the first equal ones
        want = torch.ones(len(second))
        for j in partner[:9]:
            want[j] += 1
        assert fused.sizes[0, -len(second) :, 0].tolist() == want.tolist()


def test_a_merge_is_two_launches(monkeypatch):
    """One that matches, one that chooses, merges and counts; nothing else runs on the card but making empty tensors."""
    launched, kernels = [], sys.modules[merged.__module__]
    named = {name: value for name, value in vars(kernels).items() if hasattr(value, "arg_names")}
    assert set(named) == {"_match", "_merge"}

    class Counting:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append((self.name, grid))
            return self.kernel[grid]

    for name, kernel in named.items():
        monkeypatch.setattr(kernels, name, Counting(name, kernel))
    both(torch.randn(3, 41, 12), None, None, 1, 7)
    assert launched == [("_match", (3, 1)), ("_merge", (3, 3))]


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_many_patches_of_few_kinds_are_chosen_alike_by_all_programs():
    """More patches than the programs are made for at least, with ties in most scores, and one that is not a number."""
    draw = torch.Generator().manual_seed(9)
    keys = torch.eye(6)[torch.randint(0, 6, (1, 530), generator=draw)]
    x = torch.randn(1, 530, 8, generator=draw)
    plain, fused = both(x, keys, None, 3, 130)
    assert torch.equal(fused.sizes, plain.sizes)
    assert apart(fused.x, plain.x) < 1e-6
    keys[0, 11, 0] = float("nan")
    _, fused = both(x, keys, None, 3, 130)
    assert fused.sizes.sum(dim=1).flatten().tolist() == [530.0]


def test_a_whole_model_runs_with_it():
    parent = adopted("vit", "registers")
    child = copy.deepcopy(surgery.apply(parent, merging(describe(parent), 3))).float()
    x = images(describe(parent), 2, torch.float32)
    with torch.no_grad():
        wanted = child(x)
        for _, block in blocks_of(child):
            if block.step is not None:
                block.step.fused, block.step.fused_on = merged, "cpu"
        assert apart(child(x), wanted) < 1e-4


def test_training_runs_the_operators():
    """The kernel has no backward pass: gradients are those of PyTorch's operators."""
    x = torch.randn(2, 17, 12, generator=torch.Generator().manual_seed(5))
    gradients = []
    for fused in (None, merged):
        step, leaf = Merged(1, 5), x.clone().requires_grad_()
        step.fused, step.fused_on = fused, "cpu"
        step.after_attention(leaf, None).x.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_only_the_run_form_on_cuda_uses_it(monkeypatch):
    step = Merged(1, 2)
    step.fix_(torch.float32, torch.device("cpu"))
    assert step.fused is None
    step.fix_(torch.float64, torch.device("cuda"))
    assert step.fused is None
    step.fix_(torch.bfloat16, torch.device("cuda"))
    assert step.fused is merged
    assert step.fused_on == "cuda"
    child = surgery.apply(adopted("vit", "plain"), merging(describe(adopted("vit", "plain"))))
    assert all(block.step is None or block.step.fused is None for block in optimized(child).blocks)


def test_bench_says_once_that_triton_is_missing(monkeypatch, tmp_path):
    parent = adopted("vit", "plain")
    child = surgery.apply(parent, merging(describe(parent)))
    cuda = torch.device("cuda")

    def said(model, dtype, place=cuda, as_stored=False):
        entry = _Entry(name="a", model=model, image=(3, 32, 32), folder=tmp_path, as_stored=as_stored)
        return sorted(_why_slow(entry, dtype, place))

    assert said(child, torch.float32) == []
    assert len(said(child, torch.float64)) == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert said(child, torch.float32) == [
        "merging runs in PyTorch's operators, for Triton is not installed; run pip install triton"
    ]
    assert said(parent, torch.float32) == said(child, torch.float32, torch.device("cpu")) == []
    assert said(child, torch.float32, as_stored=True) == []
