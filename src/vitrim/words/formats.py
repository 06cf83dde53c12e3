"""Versions of what is stored: model files, ``plan.json``, calibrations, ``config.json`` on the Hub.

docs/formats.md lists the contents of each version. Older versions are read. A newer version raises an error.
"""

from collections.abc import Mapping
from typing import Any

from vitrim.words.errors import VitrimError
from vitrim.words.plain import load
from vitrim.words.spec import Spec

__all__ = ["FORMAT", "check_format", "parse_spec"]

FORMAT = 3
"""The version that vitrim writes.

1: specs had one dropout rate for all blocks of a stage (``form.drop``, ``form.attention_drop``) and one drop path for
both branches of a block (``drop_path``); ``plan.json`` had no version.
2: every block has its own ``rates``.
3: hosts know what a channel of each stage's residual stream costs (``channels``), plans may cut that stream
(``stages.0.width``), and a segmentor's spec has no costs of its backbone's host.
"""


def check_format(found: object, at: str, error: type[VitrimError]) -> int:
    """Return the format version found in a stored file.

    Args:
        found: the value of the file's version field.
        at: path of the file, for messages.
        error: the class of error to raise.

    Raises:
        error: if `found` is not an integer above 0, or is newer than `FORMAT`.
    """
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise error(f"{at}: the format must be a whole number above 0, but is {found!r}; the file was changed by hand")
    if found > FORMAT:
        raise error(f"{at}: the format must be at most {FORMAT}, but is {found}; install a newer vitrim")
    return found


def parse_spec(data: Any, error: type[VitrimError], at: str) -> Spec:
    """Read a stored spec of this version or an older one.

    Args:
        data: plain values.
        error: the class of error to raise.
        at: path of `data` inside its file, for messages.

    Raises:
        error: if the data is not a valid spec; the message names the path and the problem.
    """
    return load(Spec, _without_inner_costs(_with_rates(data)), error, at=at)


def _without_inner_costs(data: Any) -> Any:
    """Leave out the costs of the backbone's host, which versions 1 and 2 had in a segmentor's spec."""
    if not isinstance(data, Mapping) or data.get("family") != "segmentor":
        return data
    host = data.get("host")
    arguments = host.get("arguments") if isinstance(host, Mapping) else None
    inner = arguments.get("host") if isinstance(arguments, Mapping) else None
    if not isinstance(host, Mapping) or not isinstance(arguments, Mapping) or not isinstance(inner, Mapping):
        return data
    kept = {key: value for key, value in inner.items() if key in ("name", "arguments", "pretrained")}
    return {**data, "host": {**host, "arguments": {**arguments, "host": kept}}}


def _with_rates(data: Any) -> Any:
    """Convert a spec of version 1 to version 2; return anything else unchanged."""
    if not isinstance(data, Mapping) or not isinstance(data.get("stages"), list):
        return data
    return {**data, "stages": [_stage_with_rates(stage) for stage in data["stages"]]}


def _stage_with_rates(stage: Any) -> Any:
    if not isinstance(stage, Mapping) or not isinstance(stage.get("form"), Mapping):
        return stage
    form, blocks = dict(stage["form"]), stage.get("blocks")
    if not isinstance(blocks, list) or not ("drop" in form or "attention_drop" in form):
        return stage
    attention, rest = form.pop("attention_drop", 0.0), form.pop("drop", 0.0)
    made = []
    for block in blocks:
        if isinstance(block, Mapping) and "rates" not in block:
            path = block.get("drop_path", 0.0)
            rates = {"attention": attention, "projection": rest, "hidden": rest, "output": rest}
            rates |= {"attention_path": path, "mlp_path": path}
            block = {key: value for key, value in block.items() if key != "drop_path"} | {"rates": rates}
        made.append(block)
    return {**stage, "form": form, "blocks": made}
