"""Which operators a forward pass runs: those that compute, of PyTorch's own names, views left out."""

from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace == "aten":
            self.found[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


FREE = ("_unsafe_view", "detach", "alias", "lift_fresh", "empty", "new_empty")
"""What computes nothing, though PyTorch does not call it a view."""


def operators(model: nn.Module, images: torch.Tensor) -> Counter[str]:
    """How often each operator runs in one pass."""
    with torch.inference_mode(False), torch.no_grad(), _Counting() as counting:
        model(images)
    return Counter({name: n for name, n in counting.found.items() if name not in FREE})


def _written() -> None:
    """Write the table that `test_optimized.py` holds every pass against."""
    from tests.children import KINDS, child
    from tests.samples import images
    from vitrim.deploy import optimized
    from vitrim.families import describe

    told: dict[str, dict[str, list[int]]] = {}
    for name in ("vit-plain", "vit-registers", "vit-average", "swin-windows", "t2t-performer"):
        told[name] = {}
        for kind in KINDS:
            model = child(*name.split("-"), kind)
            if model is None:
                continue
            x = images(describe(model))
            forms = (model, optimized(model), optimized(model, multiple=8, pad_heads=True))
            told[name][kind] = [operators(net, x).total() for net in forms]
    lines = [
        f'  "{name}": {{\n' + ",\n".join(f'    "{kind}": {counts}' for kind, counts in kinds.items()) + "\n  }"
        for name, kinds in told.items()
    ]
    path = Path(__file__).with_suffix(".json")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    _written()
