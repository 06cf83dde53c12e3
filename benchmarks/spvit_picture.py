"""Draw a released SPViT structure: ``python benchmarks/spvit_picture.py deit_b_t60 docs/methods/spvit_deit_base.svg``.

The picture is the report's, with the colours that the page would give it.
"""

import argparse
import re
from pathlib import Path

import timm
import torch

from vitrim.families import describe
from vitrim.methods.spvit.published import published, structures
from vitrim.methods.spvit.search import layout
from vitrim.report.blocks import fates
from vitrim.report.picture import picture
from vitrim.report.style import STYLE


def alone(drawing: str) -> str:
    """The drawing as a file of its own."""
    rules = [
        line for line in STYLE.splitlines() if "svg.kept" in line or "rect." in line or line.startswith("  stroke")
    ]
    colours = dict(re.findall(r"(--[a-z]+): (#[0-9a-f]{6})", STYLE.partition("@media")[0]))
    style = re.sub(r"var\((--[a-z]+)\)", lambda found: colours[found[1]], "\n".join(rules))
    start, rest = drawing.split(">", 1)
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', start)
    assert size is not None
    paper = f'<rect width="{size[1]}" height="{size[2]}" style="fill: {colours["--paper"]}"/>'
    space = f'xmlns="http://www.w3.org/2000/svg" width="{size[1]}" height="{size[2]}" font-family="sans-serif"'
    return f"{start.replace('<svg', f'<svg {space}', 1)}>\n<style>{style}</style>\n{paper}{rest}\n"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structure", choices=structures())
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with torch.device("meta"):
        spec = describe(timm.create_model(structures()[args.structure]["model"]))
    args.out.write_text(alone(picture(fates(spec, published(args.structure, spec, layout(spec))))))


if __name__ == "__main__":
    main()
