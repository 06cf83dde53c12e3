"""Distributions of other authors, as `pip install` leaves them: a module, and a folder with metadata beside it."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def listings(page: str) -> dict[str, str]:
    """The listings of a page of the documentation that are files, by their names."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```$', text, flags=re.DOTALL | re.MULTILINE)
    return dict(found)


METHOD = '''"""Keep channels with large numbers."""

from typing import ClassVar

import torch

from vitrim.cut.observe import axes
from vitrim.methods import ScoreMethod


class Method(ScoreMethod):
    """Keep the last channels, or the first."""

    sentence: ClassVar[str] = "keeps the last channels"

    first: bool = False

    def scores(self, model, data, *, seed):
        sign = -1.0 if self.first else 1.0
        return {path: sign * torch.arange(axis.size, dtype=torch.float64) for path, axis in axes(model).items()}
'''

FAMILY = listings("adding.md")["tinted_vits.py"]

REGISTERED = (
    FAMILY
    + """

from timm.models import register_model  # noqa: E402

@register_model
def tinted_vit_small(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **named):
    return example(**named)
"""
)
"""The same with a name of timm's, which no process may register twice."""


def install(root: Path, name: str, version: str, entry_points: str, **modules: str) -> Path:
    """Lay a distribution into `root`, which must be on `sys.path` then; returns `root`."""
    info = root / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    for module, text in modules.items():
        (root / f"{module}.py").write_text(text, encoding="utf-8")
    return root
