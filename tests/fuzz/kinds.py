"""The kinds of files that are fuzzed: a sound sample of each, how it is changed, and all that reads it."""

import contextlib
import copy
import io
import json
import random
import shutil
import signal
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

from tests.fuzz.mutate import bytes_of, folder_, text_of, tree_of
from tests.samples import adopted
from vitrim import report
from vitrim.cut import surgery
from vitrim.data import Input, find_source
from vitrim.data.folders import Reading
from vitrim.deploy import store
from vitrim.deploy.push import push
from vitrim.families import describe
from vitrim.methods.post_training.budgets import read_off
from vitrim.methods.post_training.calibration import Calibration, read_calibration, write_calibration
from vitrim.nn.weights import fingerprint
from vitrim.run.job import prepare
from vitrim.run.recipe import read_recipe
from vitrim.testing import random_plan
from vitrim.words.budget import Budget
from vitrim.words.errors import VitrimError
from vitrim.words.plan import read_plan, write_plan

__all__ = ["KINDS", "Case", "Kind", "attempt", "samples"]

LIMIT = 20.0
"""Seconds that reading one file may take; 0.02 is usual."""

LONGEST = 2_500
"""Characters of a sentence."""


class TooLong(BaseException):
    """A file was read for longer than `LIMIT`."""


@dataclass(frozen=True)
class Case:
    """What came of one mutated file: ``read``, ``refused``, or what is wrong with how it ended."""

    kind: str
    number: int
    end: str
    seconds: float

    @property
    def wrong(self) -> bool:
        """Whether it ended otherwise than it must."""
        return self.end not in ("read", "refused")


@dataclass(frozen=True)
class Kind:
    """One kind.

    Attributes:
        make: writes a sound file or folder below a folder, and returns its path.
        change: changes it in place.
        read: reads it with all that a user would; gets its path, and a folder to write to.
    """

    make: Callable[[Path], Path]
    change: Callable[[Path, random.Random], None]
    read: Callable[[Path, Path], Any]


def attempt(kind: str, number: int, sample: Path, place: Path) -> Case:
    """Change a copy of a sample, read it, and say how that ended.

    Args:
        kind: key of `KINDS`.
        number: seed of the mutation.
        sample: what `Kind.make` wrote.
        place: an empty folder for the copy and the output; nothing else may change below its parent.
    """
    one, draw = KINDS[kind], random.Random(f"{kind} {number}")
    path, out = place / sample.name, place / "out"
    shutil.copytree(sample, path) if sample.is_dir() else shutil.copy(sample, path)
    one.change(path, draw)
    before = _listed(place.parent, out)
    start = time.perf_counter()
    end = "read"
    try:
        with _limited():
            one.read(path, out)
    except VitrimError as problem:
        end = "refused"
        text = str(problem)
        if not text.strip() or len(text) > LONGEST:
            end = f"a sentence of {len(text)} characters"
    except (Exception, TooLong) as problem:
        end = f"{type(problem).__name__}: {str(problem)[:300]}"
    seconds = time.perf_counter() - start
    if end in ("read", "refused") and _listed(place.parent, out) != before:
        end = "files outside of the output folder changed"
    return Case(kind, number, end, seconds)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TooLong(f"more than {LIMIT:g} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _listed(root: Path, out: Path) -> list[tuple[str, int, int]]:
    """Names of all files below `root`, with the sizes and times of those that are no folders; not the output folder."""
    found = []
    for path in root.rglob("*"):
        if path != out and out not in path.parents:
            about = path.lstat()
            found.append((str(path), *((0, 0) if path.is_dir() else (about.st_size, about.st_mtime_ns))))
    return sorted(found)


def samples(root: Path) -> dict[str, Path]:
    """Write a sound sample of each kind below `root`."""
    found = {}
    for name, kind in KINDS.items():
        (root / name).mkdir(parents=True)
        found[name] = kind.make(root / name)
    return found


def _rewritten(read: Callable[[str], Any], write: Callable[[Any], str]) -> Callable[[Path, random.Random], None]:
    """Change a file of text as text or, more often, as the tree that it holds."""

    def change(path: Path, draw: random.Random) -> None:
        text = path.read_text(encoding="utf-8")
        with contextlib.suppress(TypeError, ValueError, AttributeError):  # a tree that cannot be written
            if draw.randrange(3):
                text = write(tree_of(read(text), draw))
                path.write_text(text, encoding="utf-8", errors="surrogatepass")
                return
        path.write_text(text_of(text, draw), encoding="utf-8")

    return change


# -- recipes


def _recipe(root: Path) -> Path:
    _pictures(root / "images")
    recipe = {
        "model": {
            "name": "test_vit",
            "random_weights": True,
            "arguments": {
                "img_size": 32,
                "patch_size": 8,
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "num_classes": 3,
            },
        },
        "data": {"train": str(root / "images"), "calibration": 4},
        "method": {"name": "vit_slim", "train": {"epochs": 1, "batch": 4}},
        "budget": "macs=0.6",
        "train": {"epochs": 1, "batch": 4, "lr": 0.001, "augment": {"kind": "light"}, "distill": {"kind": "soft"}},
        "measure": {"latency": False, "batch": 1},
        "seed": 3,
        "device": "cpu",
    }
    (root / "recipe.toml").write_text(tomli_w.dumps(recipe))
    return root / "recipe.toml"


def _read_recipe(path: Path, out: Path) -> None:
    recipe = read_recipe(path).resolved()
    prepare(recipe, recipe.found_method(), out, None, (recipe.data.train, recipe.data.test), lambda _: None)


# -- plans


def _plan(root: Path) -> Path:
    spec = describe(adopted("vit", "plain"))
    write_plan(root / "plan.json", spec, random_plan(spec, 3, drops="mixed"), {"model": "0" * 64})
    return root / "plan.json"


def _read_plan(path: Path, out: Path) -> None:
    parent, plan = read_plan(path)
    report.plan_table(parent, plan)
    plan.then(plan.keep(plan.child(parent)), parent)


# -- stored models


def _stored(root: Path) -> Path:
    parent = adopted("vit", "plain")
    child = surgery.apply(parent, random_plan(describe(parent), 3)).float()
    return store.save(child, root / "model.safetensors", provenance={"recipe": {"model": {"name": "x"}}, "seconds": 1})


def _change_stored(path: Path, draw: random.Random) -> None:
    if draw.randrange(3) == 0:
        path.write_bytes(bytes_of(path.read_bytes(), draw))
        return
    with safe_open(path, framework="pt") as opened:
        key, text = next(iter((k, v) for k, v in opened.metadata().items() if k != "format"))
    tensors = load_file(path)
    with contextlib.suppress(TypeError, ValueError):
        text = json.dumps(tree_of(json.loads(text), draw)) if draw.randrange(4) else text_of(text, draw)
    if draw.randrange(6) == 0 and tensors:
        name = draw.choice(sorted(tensors))
        tensors[name] = draw.choice((tensors[name].flatten()[:1], tensors[name].double() * 1e300, torch.zeros(0)))
    path.write_bytes(save(tensors, {key: text.encode("utf-8", "replace").decode()}))


def _read_stored(path: Path, out: Path) -> None:
    store.given(path)
    model: Any = store.load(path)
    if sum(p.numel() for p in model.parameters()) < 10**6 and model.num_classes == 10:
        with contextlib.suppress(VitrimError):
            push(path, "owner/name", licence="mit", folder=out)


# -- calibrations


def _calibration(root: Path) -> Path:
    model = copy.deepcopy(adopted("vit", "plain")).float()
    spec = describe(model)
    losses: dict[str, tuple[float, ...]] = {}
    for path, _, _ in spec.blocks():
        losses |= {f"{path}.hidden": (0.1, 0.2, 0.9), f"{path}.qk": (0.1, 0.3), f"{path}.heads": (0.1, 0.2, 0.3, 0.9)}
    shares = {name: (1.0,) * 4 if name.endswith("heads") else (0.25, 0.5, 1.0)[: len(x)] for name, x in losses.items()}
    known = Calibration(
        spec=spec,
        weights=fingerprint(model),
        input=Input.of(model),
        count=8,
        shares=shares,
        losses=losses,
        merges=((0, 0, 0), (0, 4, 0)),
        merged=(0.0, 0.2),
    )
    write_calibration(root / "calibration.safetensors", known)
    return root / "calibration.safetensors"


def _read_calibration(path: Path, out: Path) -> None:
    found = read_calibration(path)
    found.check(copy.deepcopy(adopted("vit", "plain")).float(), found.input, str(path))
    read_off(found, Budget.parse("macs=0.6"), merge=True, exact=False)


# -- logs and what lies beside them


def _log(root: Path) -> Path:
    run = root / "run"
    run.mkdir()
    spec = describe(adopted("vit", "plain"))
    write_plan(run / "plan.json", spec, random_plan(spec, 3))
    lines = [
        {
            "stage": "train",
            "event": event,
            "epoch": 1,
            "step": step,
            "loss": 2.0 / step,
            "task": 1.0,
            "penalty": 0.1,
            "lr": 0.001,
            "seconds": 0.5,
            "top1": 10.0 * step,
        }
        for step in range(1, 6)
        for event in ("step", "epoch")
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "trials.jsonl").write_text("".join(json.dumps({"trial": n, "score": 0.1 * n}) + "\n" for n in range(4)))
    (run / "recipe.toml").write_text('budget = "macs=0.5"\n')
    measured = {
        "model": "vit",
        "method": "taylor",
        "budget": "macs=0.5",
        "macs": 10**9,
        "macs_parent": 2 * 10**9,
        "top1": 70.0,
        "macs_ratio": 0.5,
        "latency_ratio": 0.6,
        "latency_ratio_low": 0.5,
        "latency_ratio_high": 0.7,
        "warnings": "a\nb",
        "top1_parent": 80.0,
        "top1_error": 1.0,
        "test_images": 100,
        "test_source": "digits",
        "agreement": 80.0,
        "batch": 8,
    }
    (run / "measured.json").write_text(json.dumps(measured))
    return run


def _change_log(path: Path, draw: random.Random) -> None:
    name = draw.choice(("log.jsonl", "log.jsonl", "trials.jsonl", "measured.json", "recipe.toml"))
    if name == "measured.json":
        _rewritten(json.loads, json.dumps)(path / name, draw)
    elif name == "recipe.toml" or not draw.randrange(3):
        (path / name).write_text(text_of((path / name).read_text(), draw), encoding="utf-8", errors="replace")
    else:
        lines = [json.loads(line) for line in (path / name).read_text().splitlines()]
        changed = tree_of(lines, draw)
        lines = changed if isinstance(changed, list) else [changed]
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _read_log(path: Path, out: Path) -> None:
    out.mkdir()
    (out / "report.html").write_text(report.html([path]), encoding="utf-8")
    report.markdown([path, path])
    report.csv([path])


# -- images


def _pictures(root: Path, each: int = 2) -> Path:
    for split in ("train", "test"):
        for label in range(3):
            (root / split / f"class{label}").mkdir(parents=True)
            for number in range(each):
                picture = Image.new("RGB", (16, 16), (60 * label, 30 * number, 7))
                picture.save(root / split / f"class{label}" / f"{number}.{'png' if number else 'jpg'}")
    return root


def _folder(root: Path) -> Path:
    return _pictures(root / "images")


def _tar(root: Path) -> Path:
    _pictures(root / "images")
    with tarfile.open(root / "images.tar", "w") as tar:
        for path in sorted((root / "images").rglob("*.*")):
            tar.add(path, path.relative_to(root / "images"))
    return root / "images.tar"


def _change_tar(path: Path, draw: random.Random) -> None:
    if draw.randrange(2):
        data = path.read_bytes()
        place = 512 * draw.randrange(max(1, len(data) // 512))  # a header, or what looks like one
        path.write_bytes(data[:place] + bytes_of(data[place:] or b"x", draw))
        return
    with tarfile.open(path, "a") as tar:
        for _ in range(draw.randint(1, 3)):
            info = tarfile.TarInfo(
                draw.choice(
                    ("../../x.png", "/etc/x.png", "train/class0/x.png", "a" * 300 + ".png", "train", "\udcff.png")
                )
            )
            info.type = draw.choice(
                (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
            )
            info.linkname = draw.choice(("../x", "/dev/zero", info.name))
            if draw.randrange(3) == 0:
                info.pax_headers = {"path": "x" * draw.choice((10, 2000)), "size": draw.choice(("x", "-1", "9" * 30))}
            data = draw.choice((b"", b"\x89PNG\r\n\x1a\n" + bytes(40), bytes(600)))
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))


def _read_images(path: Path, out: Path) -> None:
    source = find_source(str(path))
    for split in source.splits or (None,):
        images = source.images(split, Reading(classes=3))
        images.fingerprint()
        for index in range(len(images)):
            images[index]


KINDS: dict[str, Kind] = {
    "recipe": Kind(_recipe, _rewritten(tomllib.loads, tomli_w.dumps), _read_recipe),
    "plan": Kind(_plan, _rewritten(json.loads, json.dumps), _read_plan),
    "stored": Kind(_stored, _change_stored, _read_stored),
    "calibration": Kind(_calibration, _change_stored, _read_calibration),
    "log": Kind(_log, _change_log, _read_log),
    "tar": Kind(_tar, _change_tar, _read_images),
    "folder": Kind(_folder, folder_, _read_images),
}
