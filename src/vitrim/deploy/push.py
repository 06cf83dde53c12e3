"""Push a model to the Hugging Face Hub, with a model card on its structure, its origin and its measurements.

The files are ``model.safetensors`` (weights, structure and provenance, without names of local folders), ``config.json``
for timm's loader, and ``README.md``, the model card.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import timm

from vitrim import report
from vitrim.deploy import store
from vitrim.deploy.hub import config
from vitrim.deploy.remote import upload
from vitrim.nn.layers import input_channels
from vitrim.words.costs import cost_of
from vitrim.words.errors import RunError, StoreError
from vitrim.words.plain import read_json, reason, write_text
from vitrim.words.plan import Plan, read_plan
from vitrim.words.spec import Spec

__all__ = ["CARD", "CONFIG", "Pushed", "card", "push"]

CARD, CONFIG = "README.md", "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """The files that were pushed, or written to a folder instead.

    Attributes:
        repository: ``owner/name``.
        files: names, and sizes in bytes.
        folder: the folder that contains them; None if they are only on the Hub.
    """

    repository: str
    files: Mapping[str, int]
    folder: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """The contents of a model card; values that were not measured are absent."""

    repository: str
    spec: Spec
    recipe: Mapping[str, Any]
    measured: Mapping[str, Any]
    plan: tuple[Spec, Plan] | None
    licence: str

    @property
    def parent(self) -> str:
        name = str(self.recipe.get("model", {}).get("name") or self.measured.get("model") or self.spec.host.name)
        return _without_folders(name)


def push(
    model: str | Path,
    repository: str,
    *,
    licence: str | None = None,
    folder: Path | None = None,
    private: bool = False,
    revision: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Pushed:
    """Push a model and its model card.

    Args:
        model: a run folder, or a file that vitrim stored; ``plan.json`` and ``measured.json`` in the same folder are
            read if they exist.
        repository: ``owner/name``; created if it does not exist.
        licence: identifier of the license of the parent's weights, as the Hub writes it (``apache-2.0``); if not given,
            the one that timm records.
        folder: write the files to this folder and push nothing; must be new or empty.
        private: whether a newly created repository is private.
        revision: branch to push to.
        say: called with a line of text at each stage.

    Raises:
        StoreError: if the model cannot be read, the license is not known, the folder is not empty, or the Hub refuses.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise StoreError(f"a repository must be named owner/name, but got '{repository}'")
    file = _file_of(Path(model))
    known = _known(file, repository, licence)
    with _place(folder) as place:
        net = store.load(file)
        store.save(net, place / store.FILE, provenance=_given(file))
        write_text(place / CONFIG, json.dumps(config(known.spec, input_channels(net), known.licence), indent=1) + "\n")
        write_text(place / CARD, card(known))
        files = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
        if folder is None:
            say(f"pushing to {repository}")
            upload(place, repository, private=private, revision=revision)
    return Pushed(repository=repository, files=files, folder=folder)


@contextlib.contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="vitrim-push-") as name:
            yield Path(name)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise StoreError(f"{folder}: the folder must be new or empty, but is not; choose another")
    except OSError as problem:
        if isinstance(problem, StoreError):
            raise
        raise StoreError(
            f"{folder}: the folder must be writable, but is not: {reason(problem)}; choose another"
        ) from None
    yield folder


def _file_of(model: Path) -> Path:
    file = model / store.FILE if model.is_dir() else model
    if not file.is_file():
        raise StoreError(
            f"{model}: a model to push must be a run folder or a file that vitrim stored, but it is neither"
        )
    return file


def _given(file: Path) -> dict[str, Any]:
    """Return the provenance given when the model was stored, without local folders; empty if it is not a table."""
    return _table(_without_local(store.provenance(file).get("given")))


def _table(value: Any) -> dict[str, Any]:
    """Return `value` if it is a table of names and values, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def _known(file: Path, repository: str, licence: str | None) -> _Known:
    given, spec = _given(file), store.read_spec(file)
    recipe = _table(given.get("recipe"))
    recipe |= {part: _table(recipe.get(part)) for part in ("model", "data")}
    plan, measured = file.with_name("plan.json"), file.with_name("measured.json")
    parent, decided = read_plan(plan) if plan.is_file() else (None, None)
    told = _table(read_json(measured, RunError)) if measured.is_file() else {}
    cost = cost_of(spec)
    if told and told.get("macs") != cost.macs:
        raise StoreError(
            f"{measured}: what was measured must be of this model ({cost.macs:,} MACs), but is of another; "
            "push the run folder's own model, or move the file away"
        )
    if parent is not None and decided is not None and cost_of(decided.child(parent)).macs != cost.macs:
        parent = decided = None  # the model was changed later, so the plan does not describe its blocks
    return _Known(
        repository=repository,
        spec=spec,
        recipe=recipe,
        measured=told or {"macs": cost.macs, "params": cost.params},
        plan=None if parent is None or decided is None else (parent, decided),
        licence=licence or _licence_of(recipe["model"], file),
    )


def _licence_of(model: Mapping[str, Any], file: Path) -> str:
    """Return the license that timm records for its own weights.

    Raises:
        StoreError: if the weights are not timm's, or timm records no license.
    """
    name = str(model.get("name", ""))
    if not model.get("weights") and not model.get("random_weights") and timm.is_model(name):
        known = timm.get_pretrained_cfg(name, allow_unregistered=True)
        if known is not None and known.license:
            return str(known.license)
    raise StoreError(
        f"{file}: the license of the parent's weights must be known, but neither the file nor timm states it; "
        "give --license, such as apache-2.0"
    )


def _without_local(value: Any) -> Any:
    """Return plain values without local folders: only the last part of each absolute path remains."""
    if isinstance(value, dict):
        return {key: _without_local(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_local(part) for part in value]
    return _without_folders(value) if isinstance(value, str) else value


def _without_folders(text: str) -> str:
    kind, slash, rest = text.partition("/")
    if kind in ("wds", "hfds", "torch") and slash:
        return f"{kind}/{_without_folders(rest)}" if rest.startswith(("/", "~", ".")) else text
    return PurePath(text).name if text.startswith(("/", "~", "./", "../")) else text


def card(known: _Known) -> str:
    """Return the model card: front matter, structure, how to open the model, measurements, and how it was made."""
    parts = [
        _front(known),
        f"# {known.repository.split('/')[1]}",
        report.outcome(dict(known.measured)) if "method" in known.measured else "A model that vitrim stored.",
        _use(known),
        *_tables(known),
        _origin(known),
    ]
    return "\n\n".join(parts) + "\n"


def _front(known: _Known) -> str:
    """Return the YAML front matter that the Hub reads; values are written as JSON, which is valid YAML."""
    task, score, metric = _task(known)
    tags = [task, "timm", "vitrim", "pruning"]
    lines = [f"license: {json.dumps(known.licence)}", "library_name: timm", f"pipeline_tag: {task}"]
    if timm.is_model(known.parent):
        lines.append(f"base_model: {json.dumps(_base(known.parent))}")
    lines.append(f"tags: {json.dumps(tags)}")
    data = _data(known)
    if isinstance(score, int | float) and data is not None:
        entry = {
            "name": known.repository.split("/")[1],
            "results": [
                {
                    "task": {"type": task},
                    "dataset": {"name": data, "type": data},
                    "metrics": [{"type": metric, "value": round(score, 3)}],
                }
            ],
        }
        lines.append(f"model-index: {json.dumps([entry])}")
    return "\n".join(["---", *lines, "---"])


def _task(known: _Known) -> tuple[str, Any, str]:
    """Return task, score and metric under the Hub's names."""
    if known.spec.family == "segmentor":
        return "image-segmentation", known.measured.get("miou"), "mean_iou"
    return "image-classification", known.measured.get("top1"), "accuracy"


def _base(name: str) -> str:
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    tag = getattr(known, "tag", "") or ""
    return f"timm/{name}" + (f".{tag}" if tag and "." not in name else "")


def _data(known: _Known) -> str | None:
    """Return the source of the test images, if the recipe contains it."""
    data = known.recipe.get("data", {})
    source = data.get("test") or data.get("train")
    return str(source) if source else None


def _use(known: _Known) -> str:
    height, width = known.spec.image
    return "\n".join(
        [
            "## Use it",
            "",
            "```python",
            "import torch, vitrim",
            "",
            f'model = vitrim.load("hf-hub:{known.repository}")',
            f"logits = model(torch.randn(1, 3, {height}, {width}))",
            "```",
            "",
            "Or with timm, after `import vitrim.hub`: "
            f'`timm.create_model("hf-hub:{known.repository}", pretrained=True)`. It is a timm model: '
            "`forward_intermediates`, `reset_classifier` and `timm.data.resolve_model_data_config` work.",
        ]
    )


def _tables(known: _Known) -> list[str]:
    measured = dict(known.measured)
    table = report.segmented(measured) if measured.get("task") == "segmentation" else report.result(measured)
    parts = ["## Measured", report.as_markdown(table)]
    machine = [str(measured[key]) for key in ("device", "dtype") if measured.get(key)]
    machine += [f"{measured[key]} {key}" for key in ("threads",) if measured.get(key)]
    machine += [f"{key} {measured[key]}" for key in ("torch", "timm", "vitrim") if measured.get(key)]
    images = measured.get("test_images")
    words = [f"Top-1 on {images} images of {_data(known)}." if images and _data(known) else ""]
    words.append(f"Times on {', '.join(machine)}." if measured.get("latency_ms") else "")
    if any(words):
        parts.append(" ".join(word for word in words if word))
    parts += [f"**Warning:** {text}." for text in report.warnings(measured)]
    if known.plan is not None:
        parts += ["## Structure", report.as_markdown(report.plan_table(*known.plan))]
    return parts


def _origin(known: _Known) -> str:
    measured, data = known.measured, known.recipe.get("data", {})
    told = {
        "parent": known.parent,
        "parent's weights": known.recipe.get("model", {}).get("weights"),
        "license of the parent's weights": known.licence,
        "method": measured.get("method"),
        "budget": measured.get("budget"),
        "epochs of training after the cut": measured.get("epochs"),
        "training images": data.get("train"),
        "test images": data.get("test"),
        "seed": measured.get("seed"),
        "date": measured.get("date"),
    }
    rows = [(key, str(value)) for key, value in told.items() if value is not None]
    table = report.as_markdown(report.TextTable("Origin", ("", "value"), rows))
    words = (
        "The weights were made from the parent's and are under its license. Every setting of the run is in the "
        "metadata of `model.safetensors` (`vitrim.deploy.store.provenance`)."
    )
    return "\n\n".join(["## Origin", table, words])
