"""What a host gives to its blocks besides tokens, for blocks that are run without their host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitrim.families import _plain
from vitrim.nn import Block

__all__ = ["Source", "host"]


@dataclass(eq=False)
class Source:
    """Angles or biases of one block at the image size of its model.

    A block that is copied alone keeps asking the model that it is from; one that is copied with its model, the copy.

    Attributes:
        model: the host.
        index: of the block.
        ask: returns what the host gives to a block.
    """

    model: Any
    index: int
    ask: Callable[[Any, int], Tensor | None]

    def __call__(self) -> Tensor | None:
        """Return what the host gives to the block."""
        return self.ask(self.model, self.index)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Source":
        return Source(memo.get(id(self.model), self.model), self.index, self.ask)


def host(model: Any, blocks: Sequence[Block], ask: Callable[[Any, int], Tensor | None]) -> nn.Module:
    """Return a copy of `model` with other blocks that know what it gives them; old hooks are not copied."""
    shell: Any = _plain.host(model, blocks)
    for index, block in enumerate(shell.blocks):
        block.source = Source(shell, index, ask)
    return shell  # type: ignore[no-any-return]
