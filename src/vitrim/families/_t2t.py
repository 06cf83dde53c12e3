"""T2T-ViT: a Vision Transformer whose stem turns pixels into tokens in three overlapping steps.

B images, N tokens, D width, C input channels, K unfolded channels, c token width of the stem, m random features.

Yuan et al.: Tokens-to-Token ViT, ICCV 2021, section 3; its performer is that of Choromanski et al.: Rethinking
Attention with Performers, ICLR 2021, section 2.3. Written from the definition; parameter names follow timm.

The stem has one head and is not cut. It takes 0.30 G multiply-accumulates with performer layers (6 % of T2T-ViT-14) and
1.60 G with transformer layers.
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm, Mlp, use_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.feed import precise
from vitrim.words.errors import DataError, RecipeError
from vitrim.words.plain import did_you_mean

__all__ = ["KINDS", "REDUCTION", "T2TVisionTransformer", "TokensToToken", "performer", "sinusoid"]

REDUCTION = 16
"""Pixels per token along each side, from strides of 4, 2 and 2."""

_EPS = 1e-5


def performer(q: Tensor, k: Tensor, v: Tensor, features: Tensor) -> Tensor:
    """Return attention by random features, ``phi(q) (phi(k)' v) / (phi(q) . sum phi(k))``, linear in the tokens.

    ``phi(u) = exp(W u - |u|^2 / 2) / sqrt(m)``, with no ``1 / sqrt(c)`` on q or k. It is computed in float32 or
    finer, also under autocast, because exponentials overflow in half precision and sums over thousands of tokens lose
    their last digits.

    Args:
        q: queries, ``(B, N, c)``.
        k: keys, ``(B, N, c)``.
        v: values, ``(B, N, c)``.
        features: W, ``(m, c)``.

    Returns:
        ``(B, N, c)``, in the type of `v`.
    """
    kind = precise(v)
    with _full_precision(v.device):
        q, k = (_phi(u.to(kind), features.to(kind)) for u in (q, k))
        mixed = q @ (k.mT @ v.to(kind))
        total = q @ k.sum(dim=1).unsqueeze(-1)
    return (mixed / (total + 1e-8)).to(v.dtype)


def _phi(u: Tensor, features: Tensor) -> Tensor:
    # The division by sqrt(m) is done in the exponent, where it is one subtraction per token.
    half = torch.linalg.vector_norm(u, dim=-1, keepdim=True).square() / 2 + math.log(features.shape[0]) / 2
    estimate: Tensor = (u @ features.mT - half).exp()
    return estimate


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context that disables autocast, on devices that support it (the meta device does not)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class TokenLayer(nn.Module):
    """One layer of the stem, from width K to c: ``u = v + proj(attention)``, then ``u + mlp(norm2(u))``.

    The skip connection adds the values and not the input, because the input has another width.

    Args:
        width: K.
        out: c.
        bias: whether the linear layer for keys, queries and values has a bias.
        drop: dropout of both branches' outputs.
    """

    product: str
    """Name of the linear layer for keys, queries and values; its letters are their order."""

    def __init__(self, width: int, out: int, *, bias: bool, drop: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=_EPS)
        self.add_module(self.product, nn.Linear(width, 3 * out, bias=bias))
        self.proj = nn.Linear(out, out)
        self.drop = nn.Dropout(drop)
        self.norm2 = LayerNorm(out, eps=_EPS)
        self.mlp = Mlp(out, drop=(0.0, drop))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, N, K)`` to ``(B, N, c)``."""
        parts = self.get_submodule(self.product)(self.norm1(x)).chunk(3, dim=-1)
        of = dict(zip(self.product, parts, strict=True))
        x = of["v"] + self.drop(self.proj(self.attend(of["q"], of["k"], of["v"])))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values of all tokens, each ``(B, N, c)``."""
        raise NotImplementedError


class PerformerLayer(TokenLayer):
    """A token layer with `performer` attention; its random features, half as many as channels, are not trained.

    Args:
        width: K.
        out: c.
    """

    product = "kqv"

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=True, drop=0.1)
        self.features = nn.Parameter(torch.empty(out // 2, out), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw orthonormal rows times ``sqrt(m)``.

        An unbiased estimate of the softmax kernel needs rows of length ``sqrt(c)``, but the published weights were
        trained with these rows.
        """
        nn.init.orthogonal_(self.features, gain=math.sqrt(len(self.features)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values of all tokens, each ``(B, N, c)``."""
        return performer(q, k, v, self.features)


class TransformerLayer(TokenLayer):
    """A token layer with softmax attention; the logit scale uses the width of the input, ``K ** -0.5``.

    Args:
        width: K.
        out: c.
    """

    product = "qkv"

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False, drop=0.0)
        self.scale = width**-0.5
        self.fused_attn = use_fused_attn()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values of all tokens, each ``(B, N, c)``."""
        if self.fused_attn:
            q, k, v = (t.unsqueeze(1) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale).squeeze(1)
        weights: Tensor = (q * self.scale @ k.mT).softmax(dim=-1)
        return weights @ v


KINDS: dict[str, type[PerformerLayer | TransformerLayer]] = {
    "performer": PerformerLayer,
    "transformer": TransformerLayer,
}


class TokensToToken(nn.Module):
    """The stem: unfold 7x7 by 4, layer, unfold 3x3 by 2, layer, unfold 3x3 by 2, linear. timm's `patch_embed`.

    Unfolded channels are ordered by input channel, then row, then column.

    Args:
        img_size: height and width, multiples of 16.
        in_chans: C.
        embed_dim: D.
        tokens: kind of the layers, ``performer`` or ``transformer``.
        token_width: c.

    Raises:
        RecipeError: a size or kind is not valid.
    """

    def __init__(
        self, img_size: int | tuple[int, int], in_chans: int, embed_dim: int, tokens: str, token_width: int
    ) -> None:
        super().__init__()
        if tokens not in KINDS:
            raise RecipeError(
                f"tokens must be one of {', '.join(KINDS)}, but got {tokens!r}{did_you_mean(str(tokens), KINDS)}"
            )
        if token_width < 2 or token_width % 2:
            raise RecipeError(f"token_width must be even and at least 2, but got {token_width}")
        self.tokens, self.token_width, self.in_chans = tokens, token_width, in_chans
        self.patch_size = (REDUCTION, REDUCTION)
        self.strict_img_size = True
        self.set_input_size(img_size)
        self.token1 = KINDS[tokens](7 * 7 * in_chans, token_width)
        self.token2 = KINDS[tokens](3 * 3 * token_width, token_width)
        self.proj = nn.Linear(3 * 3 * token_width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, height, width)`` to tokens ``(B, N, D)``.

        Raises:
            DataError: the images have another size than the stem was built for.
        """
        if tuple(x.shape[-2:]) != self.img_size:
            raise DataError(
                f"images must be {_times(self.img_size)}, the size that T2T-ViT was built for, but are "
                f"{_times(x.shape[-2:])}; resize them, or build the model with img_size="
            )
        rows, columns = self.img_size[0] // 4, self.img_size[1] // 4
        x = self.token1(F.unfold(x, kernel_size=7, stride=4, padding=2).mT)
        x = self.token2(self._again(x, rows, columns))
        out: Tensor = self.proj(self._again(x, rows // 2, columns // 2))
        return out

    def _again(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Arrange tokens as a picture and unfold it, ``(B, N, c)`` to ``(B, N / 4, 9 c)``."""
        picture = x.mT.reshape(x.shape[0], -1, rows, columns)
        return F.unfold(picture, kernel_size=3, stride=2, padding=1).mT

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Set the image size; no parameter of the stem depends on it.

        Raises:
            RecipeError: a side is not a multiple of 16, or `patch_size` is not 16; nothing changes then.
        """
        if patch_size is not None and _pair(patch_size) != self.patch_size:
            raise RecipeError(
                f"patch_size must be {REDUCTION}, the product of the strides of the T2T stem, but got {patch_size}"
            )
        if img_size is None:
            return
        rows, columns = _pair(img_size)
        if min(rows, columns) < REDUCTION or rows % REDUCTION or columns % REDUCTION:
            raise RecipeError(
                f"img_size must be multiples of {REDUCTION} for T2T-ViT, because of its strides, "
                f"but got {rows} x {columns}; the nearest is {_times([_near(rows), _near(columns)])}"
            )
        self.img_size = (rows, columns)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the pixels per token along a side; part of timm's interface of patch embeddings."""
        return REDUCTION if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of tokens for an image size; part of timm's interface of patch embeddings."""
        return int(img_size[0]) // REDUCTION, int(img_size[1]) // REDUCTION


class T2TVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """A timm ``VisionTransformer`` with the T2T stem and fixed positions.

    Differences: `patch_embed` is `TokensToToken`; `pos_embed` contains the sinusoid table and is not trained; blocks
    have no qkv bias, LayerNorm eps 1e-5 and drop path up to 0.1.

    Args:
        img_size: height and width, multiples of 16.
        patch_size: 16, as timm passes it.
        in_chans: C.
        tokens: kind of the stem's layers, ``performer`` or ``transformer``.
        token_width: c.
        mlp_ratio: M / D.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path_rate: drop path rate of the last block; it rises linearly from 0.
        norm_layer: norm of the blocks and the final norm; None is LayerNorm with eps 1e-5.
        **others: further arguments of ``VisionTransformer``, for blocks, pooling and head.

    Raises:
        RecipeError: an argument would change the stem or the positions.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = REDUCTION,
        in_chans: int = 3,
        *,
        tokens: str = "performer",
        token_width: int = 64,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        drop_path_rate: float = 0.1,
        norm_layer: Any = None,
        **others: Any,
    ) -> None:
        odd = sorted(set(others) & _FOREIGN)
        if odd:
            raise RecipeError(f"T2T-ViT must keep its own stem and positions, but got {', '.join(odd)}; leave it out")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer or functools.partial(LayerNorm, eps=_EPS),
            embed_layer=functools.partial(_stem, tokens=tokens, token_width=token_width),
            **others,
        )
        self._fix_positions()

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialize the weights as timm does, and the positions with their table."""
        super().init_weights(*args, **kwargs)
        self._fix_positions()

    @torch.no_grad()
    def _fix_positions(self) -> None:
        table = sinusoid(self.pos_embed.shape[1], self.embed_dim)
        self.pos_embed.requires_grad_(False).copy_(table)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Set the image size, and interpolate the positions so that neighboring tokens keep similar positions.

        A model that is built at the new size has another table, because the table depends on the index of a token.
        Weights trained at one size do not fit the table of another size.

        Raises:
            RecipeError: a side is not a multiple of 16; nothing changes then.
        """
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.pos_embed.requires_grad_(False)


_FOREIGN = frozenset(
    "class_token dynamic_img_pad dynamic_img_size embed_layer embed_norm_layer no_embed_class pos_embed pre_norm "
    "reg_tokens".split()
)


def _stem(
    *,
    img_size: int | tuple[int, int],
    patch_size: int | tuple[int, int],
    in_chans: int,
    embed_dim: int,
    tokens: str,
    token_width: int,
    device: Any = None,
    dtype: Any = None,
    **_: Any,
) -> TokensToToken:
    """Return the stem; has the signature with which timm's constructor builds a patch embedding."""
    with torch.device(device) if device is not None else contextlib.nullcontext():
        stem = TokensToToken(img_size, in_chans, embed_dim, tokens, token_width)
    stem.set_input_size(patch_size=patch_size)
    return stem.to(dtype=dtype)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    return int(rows), int(columns)


def _near(pixels: int) -> int:
    return max(1, round(pixels / REDUCTION)) * REDUCTION


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def sinusoid(places: int, width: int) -> Tensor:
    """Return positions as sines (even channels) and cosines (odd) of ``place / 10000 ** (2 floor(channel / 2) / D)``.

    Returns:
        ``(places, width)`` in float32, computed in float64; place 0 is the class token.
    """
    channel = torch.arange(width, dtype=torch.float64)
    place = torch.arange(places, dtype=torch.float64)[:, None]
    angle = place / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()
