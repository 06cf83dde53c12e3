"""Whole numbers of specs, bounded so that a file cannot ask for a model that no machine holds.

Each bound is far above what any published Vision Transformer has; memory itself is bounded where a model is built.
"""

from typing import Annotated

from pydantic import Field

__all__ = ["MOST_BLOCKS", "MOST_HEADS", "MOST_STAGES", "Count", "Size", "Total"]

MOST = 2**20

Size = Annotated[int, Field(gt=0, le=MOST)]
"""Channels, neurons, rows, columns, pixels: 1 to 1,048,576."""

Count = Annotated[int, Field(ge=0, le=MOST)]
"""The same or 0."""

Total = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""Multiply-accumulates or parameters of a part."""

MOST_HEADS = 1024
MOST_BLOCKS = 1024
MOST_STAGES = 64
