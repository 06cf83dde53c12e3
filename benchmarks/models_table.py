"""Write docs/models.md: what `vitrim.adopt` says to every timm name whose class a family takes in.

Models are built without data, so the whole table takes about 30 seconds. That an adopted name gives equal logits is
what tests/test_door.py and tests/test_swin.py prove; the first also holds this table against its own results.
"""

import inspect
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from vitrim import families
from vitrim.families import describe
from vitrim.words.costs import cost_of
from vitrim.words.errors import AdoptError

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

HEAD = """# Models at the door

`vitrim.adopt` on every timm name whose class is `VisionTransformer` or a Swin (T2T-ViT's names are registered with timm
by `import vitrim.families`): {adopted} of {all} are adopted, the others are refused with path and reason. No name
is adopted with other logits: `tests/test_door.py` and `tests/test_swin.py` run them all, shrunk, with random weights.
Multiply-accumulates and parameters are those of the whole model at the image size
given, by our arithmetic, which that test holds against PyTorch's own counter.

Made with timm {timm}, torch {torch} by `python benchmarks/models_table.py`.

Refused are {reasons}.

| name | blocks | status | image | macs (G) | params (M) |
|---|---|---|---:|---:|---:|
"""


class Row(NamedTuple):
    """One line of the table."""

    name: str
    blocks: str
    status: str
    image: str
    macs: str
    params: str


def names() -> list[str]:
    hosts = tuple(host for name in families.names() for host in families.get(name).HOSTS)
    return [name for name in timm.list_models() if _knows(sys.modules[timm.model_entrypoint(name).__module__], hosts)]


def _knows(module: Any, hosts: tuple[type, ...]) -> bool:
    return any(inspect.isclass(v) and issubclass(v, hosts) for v in vars(module).values())


def row(name: str) -> Row | None:
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    owner = families.name_of(model)
    if owner is None:
        return None
    runs = model.blocks if hasattr(model, "blocks") else model.stages if hasattr(model, "stages") else model.layers
    block = runs[0].blocks[0] if hasattr(runs[0], "blocks") else runs[0]
    kinds = [type(part).__name__ for part in (block, getattr(block, "attn", None), getattr(block, "mlp", None)) if part]
    if hasattr(getattr(model, "patch_embed", None), "backbone"):
        kinds.insert(0, type(model.patch_embed.backbone).__name__)
    image = "x".join(map(str, model.patch_embed.img_size))
    params = sum(p.numel() for p in model.parameters())
    try:
        cost = cost_of(describe(model))
    except AdoptError as refusal:
        return Row(name, ", ".join(kinds), f"refused: {refusal}", image, "", f"{params / 1e6:.2f}")
    if cost.params != params:
        raise SystemExit(f"{name}: priced {cost.params:,} parameters, but has {params:,}")
    return Row(name, ", ".join(kinds), "adopted", image, f"{cost.macs / 1e9:.3f}", f"{params / 1e6:.2f}")


def _odd(blocks: str) -> str:
    """The part of a refused block that is not timm's plain one."""
    return next(part for part in blocks.split(", ") if part not in ("Block", "Attention", "Mlp"))


def page(rows: list[Row]) -> str:
    refused = Counter(_odd(each.blocks) for each in rows if each.status != "adopted")
    head = HEAD.format(
        adopted=len(rows) - refused.total(),
        all=len(rows),
        timm=timm.__version__,
        torch=torch.__version__.split("+")[0],
        reasons=", ".join(f"`{kind}` ({count})" for kind, count in refused.most_common()),
    )
    lines = [f"| `{each.name}` | {' | '.join(each[1:])} |" for each in rows]
    return head + "\n".join(lines) + "\n"


def main() -> None:
    found = [row(name) for name in names()]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page([each for each in found if each is not None]), encoding="utf-8")


if __name__ == "__main__":
    main()
