"""Operations of a call as PyTorch counts them, without changing anything that threads share."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["operations"]


def operations(call: Callable[[], object]) -> int:
    """Run `call` once without gradients and return its operations, two for each multiply-accumulate.

    Other threads may train or attend meanwhile: to select the plain kernel of attention for all of the process, or to
    follow modules by hooks that every module has, would change what they do.
    """
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with torch.no_grad(), _PlainAttention(), counter:
        call()
    return int(counter.get_total_flops())


class _NoModules:
    """In place of PyTorch's tracker of modules, which hangs hooks on all modules of the process; only sums are read."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _PlainAttention(TorchFunctionMode):
    """Attention by the products that define it: of the fused kernels, each version of the counter knows others.

    A kernel that it does not know counts as nothing. The mode holds for this thread alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    plain: Any = torch.ops.aten._scaled_dot_product_attention_math
    return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
