"""The stem and the positions of T2T-ViT against plain loops and the formulas of the papers."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.samples import apart
from tests.tolerance import EXACT
from vitrim.families._t2t import PerformerLayer, TokensToToken, TransformerLayer, performer, sinusoid

KINDS = ["performer", "transformer"]


def unfolded(image: torch.Tensor, kernel: int, stride: int, pad: int) -> torch.Tensor:
    """Patches as rows, channel outermost, then rows, then columns; by loops."""
    padded = F.pad(image, (pad,) * 4)
    _, rows, columns = padded.shape
    return torch.stack(
        [
            padded[:, y : y + kernel, x : x + kernel].flatten()
            for y in range(0, rows - kernel + 1, stride)
            for x in range(0, columns - kernel + 1, stride)
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_soft_split_by_hand(kind):
    stem = TokensToToken((32, 48), 3, 20, kind, 8).double().eval()
    image = torch.randn(3, 32, 48, dtype=torch.float64)
    first = stem.token1(unfolded(image, 7, 4, 2)[None])
    assert first.shape == (1, 8 * 12, 8)
    second = stem.token2(unfolded(first[0].T.reshape(8, 8, 12), 3, 2, 1)[None])
    assert second.shape == (1, 4 * 6, 8)
    third = stem.proj(unfolded(second[0].T.reshape(8, 4, 6), 3, 2, 1))
    assert third.shape == (2 * 3, 20)
    assert apart(stem(image[None])[0], third) < EXACT


def test_tokens_at_224():
    counts = []
    stem = TokensToToken(224, 3, 16, "performer", 4)
    for part in (stem.token1, stem.token2, stem.proj):
        part.register_forward_hook(lambda _m, _i, out: counts.append(out.shape[1]))
    stem(torch.zeros(1, 3, 224, 224))
    assert counts == [3136, 784, 196]


def test_performer_token_by_token():
    q, k, v = torch.randn(3, 2, 7, 6, dtype=torch.float64).unbind()
    w = torch.randn(5, 6, dtype=torch.float64)

    def phi(u: torch.Tensor) -> torch.Tensor:
        return torch.tensor([math.exp(float(row @ u - u @ u / 2)) for row in w], dtype=torch.float64) / math.sqrt(5)

    expected = torch.zeros_like(v)
    for b in range(2):
        for i in range(7):
            weights = [float(phi(q[b, i]) @ phi(k[b, j])) for j in range(7)]
            expected[b, i] = sum(a * v[b, j] for j, a in enumerate(weights)) / (sum(weights) + 1e-8)
    assert apart(performer(q, k, v, w), expected) < EXACT


@pytest.mark.parametrize(("features", "allowed"), [(4096, 0.05), (32, 0.30)])
def test_performer_approaches_softmax_attention(features, allowed):
    w = torch.empty(features, 64, dtype=torch.float64)
    torch.nn.init.orthogonal_(w, gain=math.sqrt(features))
    q, k = 0.1 * torch.randn(2, 1, 100, 64, dtype=torch.float64)
    v = torch.eye(100, dtype=torch.float64)[None]
    exact = (q @ k.mT).softmax(dim=-1)
    assert float(((performer(q, k, v, w) - exact).abs() / exact).mean()) < allowed


def test_performer_is_whole_in_mixed_precision():
    layer = PerformerLayer(30, 16).eval()
    x = torch.randn(2, 50, 30)
    heard = []
    plain = layer.attend
    layer.attend = lambda q, k, v: heard.append((q.dtype, plain(q, k, v))) or heard[-1][1]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        q, k, v = torch.randn(3, 2, 50, 16).bfloat16().unbind()
        assert torch.equal(
            performer(q, k, v, layer.features), performer(*(t.float() for t in (q, k, v)), layer.features).bfloat16()
        )
        layer(x)
    assert heard[0][0] == heard[0][1].dtype == torch.bfloat16


def test_random_features_are_orthonormal_rows_times_root_m():
    features = PerformerLayer(20, 64).features
    assert features.shape == (32, 64)
    assert apart(features @ features.T, 32 * torch.eye(32)) < 1e-5


@pytest.mark.parametrize("layer", [PerformerLayer, TransformerLayer])
def test_a_token_layer_by_hand(layer):
    token = layer(30, 16).double()
    assert token.drop.p == token.mlp.drop2.p == (0.1 if layer is PerformerLayer else 0.0)
    assert token.mlp.drop1.p == 0
    token.eval()
    x = torch.randn(2, 9, 30, dtype=torch.float64)
    linear = token.get_submodule(token.product)
    assert (linear.bias is not None) == (layer is PerformerLayer)
    a, b, v = (F.layer_norm(x, (30,), token.norm1.weight, token.norm1.bias, 1e-5) @ linear.weight.T).split(16, dim=-1)
    if layer is PerformerLayer:
        k, q = a + linear.bias[:16], b + linear.bias[16:32]
        v = v + linear.bias[32:]
        mixed = performer(q, k, v, token.features)
    else:
        mixed = (a @ b.mT * 30**-0.5).softmax(dim=-1) @ v
    u = v + token.proj(mixed)
    expected = u + token.mlp(token.norm2(u))
    assert apart(token(x), expected) < EXACT
    token.fused_attn = False
    assert apart(token(x), expected) < EXACT


def test_sinusoid_table():
    table = sinusoid(197, 384).double()
    assert table.shape == (197, 384)
    assert torch.equal(table[0], torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(192))
    for place, channel in ((1, 0), (3, 7), (100, 200), (196, 383)):
        angle = place / 10000 ** (2 * (channel // 2) / 384)
        wave = math.cos(angle) if channel % 2 else math.sin(angle)
        assert float(table[place, channel]) == pytest.approx(wave, abs=1e-7)
    assert table.square().sum(dim=1).tolist() == pytest.approx([192] * 197, abs=1e-4)
