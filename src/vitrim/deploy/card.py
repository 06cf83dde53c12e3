"""The model card of a pushed model: what it is, what it was made from, how to open it, and what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vitrim import report
from vitrim.deploy.hub import Plain, labels_of
from vitrim.words.plan import Plan
from vitrim.words.private import public
from vitrim.words.spec import Spec

__all__ = ["Known", "card", "is_of_transformers"]

_HUB = "hf-hub:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The contents of a model card; values that were not measured are absent.

    Attributes:
        repository: ``owner/name``.
        spec: structure of the model.
        recipe: the recipe of its run; empty if it has none.
        measured: ``measured.json``, or costs alone.
        plan: structure of the parent, and what was cut.
        licence: of the parent's weights.
        plain: how timm alone opens the model, where it can.
        also: suffixes of the exported files beside it.
    """

    repository: str
    spec: Spec
    recipe: Mapping[str, Any]
    measured: Mapping[str, Any]
    plan: tuple[Spec, Plan] | None
    licence: str
    plain: Plain | None = None
    also: tuple[str, ...] = ()

    @property
    def model(self) -> Mapping[str, Any]:
        """The table ``model`` of the recipe."""
        given = self.recipe.get("model")
        return given if isinstance(given, Mapping) else {}


def card(known: Known) -> str:
    """Return the model card: front matter, structure, how to open the model, measurements, and how it was made."""
    parts = [
        f"# {known.repository.split('/')[1]}",
        report.outcome(dict(known.measured)) if "method" in known.measured else "A model that vitrim stored.",
        *_use(known),
        *_tables(known),
        _origin(known),
    ]
    text = "\n\n".join(parts)
    return str(ModelCard(f"---\n{_front(known).to_yaml()}\n---\n\n{text}\n"))


def is_of_transformers(spec: Spec) -> bool:
    """Return whether the weights of a model, or of its parent, were opened from files of transformers."""
    return str(spec.host.pretrained.get("description", "")).endswith("of Hugging Face transformers")


# -- where it comes from


def _base(known: Known) -> tuple[str | None, str]:
    """Return the parent's repository on the Hub, if its weights are from there, and a description of the parent.

    timm's repositories are named only where timm's weights were taken: a timm name may come with other weights.
    """
    model = known.model
    name, weights = str(model.get("name") or ""), model.get("weights")
    if not name:
        return None, f"not recorded; a {known.spec.host.name or known.spec.family} by its structure"
    shown = str(public(name))
    if model.get("random_weights"):
        return None, f"{shown} with random weights"
    if weights:
        return None, f"{shown} with the weights of {public(str(weights))}"
    if name.startswith(_HUB):
        repository = name.removeprefix(_HUB).partition("@")[0]
        return repository, repository
    if timm.is_model(name):
        place = _timm_place(name)
        return place, f"{name} of timm"
    if name.startswith("("):
        return None, f"a model in memory {name}"
    if is_of_transformers(known.spec):
        return None, f"{shown}, {known.spec.host.pretrained['description']}"
    return None, shown


def _timm_place(name: str) -> str | None:
    """Return the repository on the Hub of a timm name's weights; None if timm takes them from elsewhere."""
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    place = getattr(known, "hf_hub_id", None) or ""
    tag = getattr(known, "tag", "") or ""
    if place.endswith("/"):
        return f"{place}{name}" + (f".{tag}" if tag and "." not in name else "")
    return place or None


# -- parts


def _front(known: Known) -> ModelCardData:
    """Return the values that the Hub reads."""
    task, score, metric = _task(known)
    data, results = _data(known), []
    if isinstance(score, int | float) and data is not None:
        results = [
            EvalResult(
                task_type=task, dataset_type=data, dataset_name=data, metric_type=metric, metric_value=round(score, 3)
            )
        ]
    return ModelCardData(
        license=known.licence,
        library_name="timm",
        pipeline_tag=task,
        base_model=_base(known)[0],
        tags=[task, "timm", "vitrim", "pruning"],
        model_name=known.repository.split("/")[1] if results else None,
        eval_results=results or None,
    )


def _task(known: Known) -> tuple[str, Any, str]:
    """Return task, score and metric under the Hub's names."""
    if known.spec.family == "segmentor":
        return "image-segmentation", known.measured.get("miou"), "mean_iou"
    if known.spec.classes == 0:
        return "image-feature-extraction", None, ""
    return "image-classification", known.measured.get("top1"), "accuracy"


def _data(known: Known) -> str | None:
    """Return the source of the test images, if the recipe contains it."""
    data = known.recipe.get("data", {})
    source = data.get("test") or data.get("train")
    return str(source) if source else None


def _use(known: Known) -> list[str]:
    """Return how to open the model with vitrim, timm, transformers, and without any of them."""
    height, width = known.spec.image
    channels = known.spec.host.arguments.get("in_chans", 3)
    repository, first = known.repository, [] if known.plain is not None else ["import vitrim.hub", ""]
    after = "timm alone opens it" if known.plain is not None else "`import vitrim.hub` tells timm its structure"
    parts = [
        "## Use it",
        _code(
            "import torch, vitrim",
            "",
            f'model = vitrim.load("{_HUB}{repository}")',
            f"logits = model(torch.randn(1, {channels}, {height}, {width}))",
        ),
        f"With timm; {after}, and `forward_intermediates`, `reset_classifier` and "
        "`timm.data.resolve_model_data_config` work as for any model of timm's:",
        _code("import timm", *(first or [""]), f'model = timm.create_model("{_HUB}{repository}", pretrained=True)'),
    ]
    if known.spec.classes and known.spec.family != "segmentor":
        parts += [
            "With transformers:",
            _code(
                *first,
                "from transformers import AutoModelForImageClassification, pipeline",
                "",
                f'model = AutoModelForImageClassification.from_pretrained("{repository}")',
                f'classify = pipeline("image-classification", model="{repository}")',
            ),
        ]
    if known.also:
        files = " and ".join(f"`model.{kind}`" for kind in known.also)
        parts.append(
            f"Without any of them: {files}, of float32 images `(B, {channels}, {height}, {width})`, normalised as "
            "`pretrained_cfg` of `config.json` says."
        )
    return parts


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _tables(known: Known) -> list[str]:
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


def _origin(known: Known) -> str:
    measured, data = known.measured, known.recipe.get("data", {})
    told = {
        "parent": _base(known)[1],
        "license of the parent's weights": known.licence,
        "classes": report.classes_of(known.spec.classes, labels_of(known.spec)),
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
