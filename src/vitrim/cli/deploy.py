"""The commands that take a model elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from vitrim.cli.shared import Random, Weights, app, say, show_table

__all__ = ["export"]


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A timm name, an hf-hub: name, or a file that vitrim stored.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .onnx, or .pt2 for torch.export.")],
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX operator set; 20 by default.")] = None,
    weights: Weights = None,
    random_weights: Random = False,
) -> None:
    """Write a model for another runtime, once its logits there are eager PyTorch's."""
    from vitrim.export import OPSET
    from vitrim.export import export as export_model
    from vitrim.parent import open_parent

    net = open_parent(model, weights=weights, random_weights=random_weights)
    done = export_model(net, out, opset=OPSET if opset is None else opset)
    row = [done.path, f"{done.bytes / 1e6:.2f} MB", "-" if done.opset is None else str(done.opset), f"{done.apart:.1e}"]
    show_table("", ["file", "size", "opset", "logits apart"], [row])
    say(f"checked in {done.runtime}; the batch is dynamic, images are {'x'.join(map(str, done.image))}")
