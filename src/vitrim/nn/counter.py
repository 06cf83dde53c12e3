"""Count the operations of a call with PyTorch's counter, without changing state that threads share."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["operations"]


def operations(call: Callable[[], object]) -> int:
    """Run `call` once without gradients and return its operations, two for each multiply-accumulate.

    Other threads may run models at the same time. Therefore this neither selects the math kernel of attention for the
    whole process nor registers global module hooks, because both would change the models of other threads.
    """
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with torch.no_grad(), _PlainAttention(), counter:
        call()
    return int(counter.get_total_flops())


class _NoModules:
    """Replacement for PyTorch's module tracker, which registers global hooks; the counts by module are not needed."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _PlainAttention(TorchFunctionMode):
    """Computes attention as plain matrix products, in this thread only.

    Which fused kernels the counter supports depends on the version of PyTorch. It counts unsupported kernels as zero.
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
