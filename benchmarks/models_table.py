"""Write docs/models.md: what `vitrim.adopt` says to every name that timm knows, by family.

Models whose class a family hosts are built without data; the others are told by their files. That an adopted name
gives equal logits is what tests/test_door.py and tests/test_swin.py prove; they also hold this table against their own
results.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from vitrim import families
from vitrim.deploy.hub import ARCHITECTURE
from vitrim.deploy.parent import refusal_by_file, unfilled, why_not_cut
from vitrim.words.costs import cost_of
from vitrim.words.errors import AdoptError

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

HEAD = """# Models at the door

`vitrim.adopt` on every name that timm knows, T2T-ViT's among them, which `import vitrim.families` registers: of {all}
names, {adopted} are adopted. No name is adopted with other logits: `tests/test_door.py` and `tests/test_swin.py` run
all of them, shrunk and two blocks deep, with random weights. `vitrim models PATTERN` prints the same verdicts.

Multiply-accumulates and parameters are those of the whole model at the image size given, by our arithmetic, which those
tests hold against PyTorch's own counter.

Made with timm {timm}, torch {torch} by `python benchmarks/models_table.py`.

| family | names | adopted | refused |
|---|---:|---:|---:|
{counts}
"""

ELSE = """
## No family

The other {count} names of timm. What is near begins with the given names.

| models | names | why not | near |
|---|---:|---|---|
"""

SECTION = """
## `{family}`

{adopted} of {all} names.

| name | blocks | status | image | macs (G) | params (M) |
|---|---|---|---:|---:|---:|
"""


class Row(NamedTuple):
    """One line of a family's table."""

    name: str
    blocks: str
    status: str
    image: str
    macs: str
    params: str


def row(name: str, model: Any) -> Row:
    runs = model.blocks if hasattr(model, "blocks") else model.layers
    block = runs[0].blocks[0] if hasattr(runs[0], "blocks") else runs[0]
    kinds = [type(part).__name__ for part in (block, getattr(block, "attn", None), getattr(block, "mlp", None)) if part]
    if hasattr(getattr(model, "patch_embed", None), "backbone"):
        kinds.insert(0, type(model.patch_embed.backbone).__name__)
    image = "x".join(map(str, model.patch_embed.img_size))
    params = sum(p.numel() for p in model.parameters())
    try:
        cost = cost_of(families.describe(model))
    except AdoptError:
        return Row(name, ", ".join(kinds), f"refused: {why_not_cut(name)}", image, "", f"{params / 1e6:.2f}")
    if cost.params != params:
        raise SystemExit(f"{name}: priced {cost.params:,} parameters, but has {params:,}")
    return Row(name, ", ".join(kinds), "adopted", image, f"{cost.macs / 1e9:.3f}", f"{params / 1e6:.2f}")


def page(rows: dict[str, list[Row]], others: Counter[tuple[str, str, str]]) -> str:
    adopted = {family: sum(each.status == "adopted" for each in mine) for family, mine in rows.items()}
    counts = [
        f"| [`{family}`](#{family}) | {len(mine)} | {adopted[family]} | {len(mine) - adopted[family]} |"
        for family, mine in sorted(rows.items())
    ]
    rest, whole = others.total(), others.total() + sum(map(len, rows.values()))
    counts.append(f"| [none](#no-family) | {rest} | 0 | {rest} |")
    counts.append(f"| all | {whole} | {sum(adopted.values())} | {whole - sum(adopted.values())} |")
    text = HEAD.format(
        all=f"{whole:,}",
        adopted=sum(adopted.values()),
        timm=timm.__version__,
        torch=torch.__version__.split("+")[0],
        counts="\n".join(counts),
    )
    for family, mine in sorted(rows.items()):
        text += SECTION.format(family=family, adopted=adopted[family], all=len(mine))
        text += "".join(f"| `{each.name}` | {' | '.join(each[1:])} |\n" for each in mine)
    text += ELSE.format(count=rest)
    return text + "".join(f"| {what} | {n} | {why} | {near} |\n" for (what, why, near), n in sorted(others.items()))


def main() -> None:
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    others: Counter[tuple[str, str, str]] = Counter()
    for name in timm.list_models(exclude_filters=ARCHITECTURE):  # which names no structure
        refused = refusal_by_file(name)
        model = None if refused is not None else unfilled(name)
        family = None if model is None else families.name_of(model)
        if family is not None:
            rows[family].append(row(name, model))
        elif refused is not None:
            near = " or ".join(f"`{start}*`" for start in refused.near)
            others[f"{refused.what}: {_examples(name)}", refused.why, near] += 1
        else:
            raise SystemExit(f"{name}: no family hosts {type(model).__name__}, and no reason is listed for its file")
    PAGE.write_text(page(rows, others), encoding="utf-8")


def _examples(name: str) -> str:
    """The first names of the same file of timm's."""
    home = timm.model_entrypoint(name).__module__
    file = home.rpartition(".")[2]
    mine = sorted(other for other in timm.list_models(module=file))
    return ", ".join(f"`{one}`" for one in mine)


if __name__ == "__main__":
    main()
