"""Push a model to the Hugging Face Hub, with a model card on its structure, its origin and its measurements.

The files are ``model.safetensors`` (weights, structure and provenance, without names of local folders), ``config.json``
for the loaders of timm and transformers, ``README.md``, the model card, and ``model.onnx`` or ``model.pt2`` if asked.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from vitrim.deploy import store
from vitrim.deploy.card import Known, card, is_of_transformers
from vitrim.deploy.export import export
from vitrim.deploy.hub import config, plain_timm
from vitrim.deploy.remote import upload
from vitrim.families import describe
from vitrim.nn.layers import input_channels
from vitrim.words.costs import cost_of
from vitrim.words.errors import RunError, StoreError, VitrimError
from vitrim.words.plain import read_json, reason, write_text
from vitrim.words.plan import read_plan
from vitrim.words.private import public
from vitrim.words.spec import Spec

__all__ = ["CARD", "CONFIG", "Pushed", "card", "push"]

CARD, CONFIG = "README.md", "config.json"

FORMS = ("onnx", "pt2")
"""Further forms of a model, by the suffix of their file."""


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


def push(
    model: str | Path,
    repository: str,
    *,
    licence: str | None = None,
    folder: Path | None = None,
    private: bool = False,
    revision: str | None = None,
    also: Sequence[str] = (),
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
        also: further forms of the model to lay beside it, which need no library of ours: ``onnx``, ``pt2``
            (torch.export).
        say: called with a line of text at each stage.

    Raises:
        StoreError: if the model cannot be read, the license is not known, the folder is not empty, or the Hub refuses.
        ExportError: if the model cannot be written in one of the further forms.
    """
    odd = [kind for kind in also if kind not in FORMS]
    if odd:
        raise StoreError(f"a further form must be one of {', '.join(FORMS)}, but got '{odd[0]}'")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise StoreError(f"a repository must be named owner/name, but got '{repository}'")
    file = _file_of(Path(model))
    known = _known(file, repository, licence, also)
    with _place(folder) as place:
        net = store.load(file)
        store.save(net, place / store.FILE, provenance=_given(file))
        held = public(config(describe(net), input_channels(net), known.licence, known.plain))
        write_text(place / CONFIG, json.dumps(held, indent=1) + "\n")
        for kind in known.also:
            say(f"exporting model.{kind}")
            export(net, place / f"model.{kind}")
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
    target = folder.resolve()
    made = [path for path in target.parents if not path.exists()]
    try:
        for path in reversed(made):
            path.mkdir(exist_ok=True)
        if target.exists() and any(target.iterdir()):
            raise StoreError(f"{folder}: the folder must be new or empty, but is not; choose another")
        # Some of the files are no model, and whoever finds the folder would take them for one: it appears whole. A
        # disk that became read-only keeps what was written; the next push removes it.
        place = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            yield place
            if target.exists():  # it may be the current folder of a shell
                for path in place.iterdir():
                    path.rename(target / path.name)
            else:
                place.rename(target)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        if isinstance(problem, OSError) and not isinstance(problem, VitrimError):
            raise _unwritable(folder, problem) from None
        raise


def _unwritable(folder: Path, problem: OSError) -> StoreError:
    return StoreError(
        f"{folder}: the folder must be writable and have room, but {reason(problem)}; make room or choose another"
    )


def _file_of(model: Path) -> Path:
    file = model / store.FILE if model.is_dir() else model
    if not file.is_file():
        raise StoreError(
            f"{model}: a model to push must be a run folder or a file that vitrim stored, but it is neither"
        )
    return file


def _given(file: Path) -> dict[str, Any]:
    """Return the provenance given when the model was stored, without local folders; empty if it is not a table."""
    return _table(public(store.provenance(file).get("given")))


def _table(value: Any) -> dict[str, Any]:
    """Return `value` if it is a table of names and values, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def _known(file: Path, repository: str, licence: str | None, also: Sequence[str]) -> Known:
    given, spec = _given(file), store.read_spec(file)
    recipe = _table(given.get("recipe"))
    recipe |= {part: _table(recipe.get(part)) for part in ("model", "data")}
    plan, measured = file.with_name("plan.json"), file.with_name("measured.json")
    parent, decided = read_plan(plan) if plan.is_file() else (None, None)
    told = _table(public(read_json(measured, RunError))) if measured.is_file() else {}
    cost = cost_of(spec)
    if told and told.get("macs") != cost.macs:
        raise StoreError(
            f"{measured}: what was measured must be of this model ({cost.macs:,} MACs), but is of another; "
            "push the run folder's own model, or move the file away"
        )
    if parent is not None and decided is not None and cost_of(decided.child(parent)).macs != cost.macs:
        parent = decided = None  # the model was changed later, so the plan does not describe its blocks
    return Known(
        repository=repository,
        spec=spec,
        recipe=recipe,
        measured=told or {"macs": cost.macs, "params": cost.params},
        plan=None if parent is None or decided is None else (parent, decided),
        licence=licence or _licence_of(recipe["model"], file, spec),
        plain=plain_timm(spec),
        also=tuple(dict.fromkeys(also)),
    )


def _licence_of(model: Mapping[str, Any], file: Path, spec: Spec | None = None) -> str:
    """Return the license that timm records for its own weights, or that the card of a model of transformers states.

    Raises:
        StoreError: if the weights are of neither, or no license is stated.
    """
    name = str(model.get("name", ""))
    if not model.get("weights") and not model.get("random_weights"):
        known = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
        if known is not None and known.license:
            return str(known.license)
        stated = None if spec is None or not is_of_transformers(spec) else spec.host.pretrained.get("license")
        if isinstance(stated, str):
            return stated
    raise StoreError(
        f"{file}: the license of the parent's weights must be known, but neither the file nor timm states it; "
        "give --license, such as apache-2.0"
    )
