"""Attention pooling that is wider inside than the tokens that it reads.

B images, N tokens, D width of the tokens, H heads, K channels of a head, L latents (timm: one).
"""

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WidePool", "widen_"]


class WidePool(AttentionPoolLatent):  # type: ignore[misc]
    """timm's attention pooling for tokens of another width than its heads have together.

    Only the columns of `kv` read the tokens. The latents, the heads and all that follows them are of a width of their
    own, which timm's forward pass takes from the tokens. Parameters, their names and, for tokens of that width, the
    function are timm's.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map tokens ``(B, N, D)`` to one vector of ``H K`` channels for each image, ``(B, H K)``.

        Args:
            x: tokens.
            attn_mask: as for ``scaled_dot_product_attention``, of shape ``(B, 1, L, N)``.
        """
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q = self.q(self.latent.expand(x.shape[0], -1, -1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            logits = (q * self.scale) @ k.transpose(-2, -1)
            mixed = (logits if attn_mask is None else logits + attn_mask).softmax(dim=-1) @ v
        pooled: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        if self.mlp is not None:
            pooled = pooled + self.mlp(self.norm(pooled))
        if self.pool == "token":
            return pooled[:, 0]
        return pooled.mean(1) if self.pool == "avg" else pooled


def widen_(pool: nn.Module) -> None:
    """Let timm's attention pooling read tokens of any width, in place; anything else is left as it is."""
    if type(pool) is AttentionPoolLatent:
        pool.__class__ = WidePool
