"""A record of what vitrim computes, to prove that a change of its code changes none of its outputs.

    python benchmarks/record.py --out FILE.json
    python benchmarks/record.py --compare A.json B.json

The first writes a JSON file of sorted keys, each with a plain number or the SHA-256 of bytes, and prints one digest of
all of them; the second lists the keys that differ or are missing, and exits 1 if there are any. Take a record before
and one after the change, on the same machine with the same packages: logits are compared bit for bit.

Recorded are, on random weights and fixed inputs:

- ``family/``: every preset of every family adopted, cut by fixed plans of every kind, stored and loaded again, with the
  gradients of a training step; a plan that is refused is recorded by the class of its error;
- ``method/``: a run of every method on a ViT and a Swin, with what its run folder holds, and ``pareto/``, ``transfer/``
  through the command line;
- ``cost/``: costs of whole models.

Left out is what is never the same twice (seconds, latencies, dates), or is not meant to stay (messages, reports). Only
the front door, the names of families and methods, and the command line are used, so that modules may move.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

import vitrim
from vitrim import cli, families, methods

Record = dict[str, Any]
Draw = random.Random

NEVER_THE_SAME = re.compile(r"seconds|latency|per_second|date|^time|^(vitrim|torch|timm|python|threads)$")
"""Fields of files that are left out."""

# Digests.


def sha(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The digest of names, types, shapes and bytes."""
    parts = []
    for name, value in sorted(tensors.items()):
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        parts += [f"{name} {value.dtype} {tuple(value.shape)}".encode(), flat.numpy().tobytes()]
    return sha(*parts)


def of_tensor(value: Tensor) -> str:
    return of_tensors({"": value})


def of_plain(value: Any) -> str:
    """The digest of plain values; floats are written so that they come back bit for bit."""
    return sha(json.dumps(value, sort_keys=True).encode())


def spec_of(model: nn.Module) -> dict[str, Any]:
    return without_origin(vitrim.describe(model).model_dump(mode="json"))


def without_origin(spec: dict[str, Any]) -> dict[str, Any]:
    """A dumped spec without where timm has its weights from, which is timm's to change."""
    return spec | {"host": {key: value for key, value in spec["host"].items() if key != "pretrained"}}


def lasting(value: Any) -> Any:
    """Plain values without what another run of the same code writes otherwise."""
    if isinstance(value, dict):
        kept = {key: lasting(item) for key, item in value.items() if not NEVER_THE_SAME.search(key)}
        return {key: item for key, item in kept.items() if not (isinstance(item, str) and os.sep in item)}
    return [lasting(item) for item in value] if isinstance(value, list) else value


# Models.


def generator(*words: object) -> torch.Generator:
    """A source of random numbers for the thing that `words` name, whatever was drawn before."""
    seed = int.from_bytes(hashlib.sha256(" ".join(map(str, words)).encode()).digest()[:4], "little")
    return torch.Generator().manual_seed(seed)


def guest(family: str, preset: str, dtype: torch.dtype) -> nn.Module:
    """A timm model in which every trained parameter matters: no zero biases, no unit norms."""
    torch.manual_seed(1)
    module = families.get(family)
    model = module.example(**module.TEST_PRESETS[preset])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
                parameter.copy_(centre + 0.25 * torch.randn(parameter.shape, generator=generator(name)))
    return model.to(dtype).eval()


def images(model: nn.Module, dtype: torch.dtype = torch.float64, count: int = 2) -> Tensor:
    size = vitrim.describe(model).image
    return torch.randn(count, 3, *size, generator=generator("images"), dtype=torch.float64).to(dtype)


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """`model` itself, with noise on all that a cut has set to one value: merges, mixtures, batch norms, constants."""
    for name, value in sorted(model.state_dict().items()):
        if value.is_floating_point() and value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            value.add_(0.2 * torch.rand(value.shape, generator=generator(name), dtype=torch.float64).to(value.dtype))
    return model


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> str:
    return of_tensor(model(x))


def gradients(model: nn.Module, x: Tensor) -> str:
    """The digest of all gradients of one training step; stochastic depth is drawn from a fixed seed."""
    torch.manual_seed(3)
    model.train()
    model(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    model.zero_grad(set_to_none=True)
    return of_tensors(found)


def stored(path: Path) -> Record:
    """What a stored model's file holds."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        sheet = json.loads(file.metadata()["vitrim"])
    return {"file": of_tensors(tensors), "file_spec": of_plain(without_origin(sheet["spec"]))}


def portrait(model: nn.Module, x: Tensor, file: Path | None = None, step: bool = False) -> Record:
    """All that is recorded of one model.

    Args:
        model: adopted, in evaluation mode.
        x: images.
        file: where to store it and load it from.
        step: whether a training step is taken, which changes the statistics of batch norms.
    """
    cost = vitrim.cost(model)
    found = {
        "macs": cost.macs,
        "params": cost.params,
        "spec": of_plain(spec_of(model)),
        "state": of_tensors(model.state_dict()),
        "logits": logits(model, x),
    }
    if file is not None:
        vitrim.save(model, file)
        again = vitrim.load(file)
        found |= stored(file) | {"loaded_logits": logits(again, x), "loaded_spec": of_plain(spec_of(again))}
    if step:
        found |= {"gradients": gradients(model, x), "state_after_step": of_tensors(model.state_dict())}
    return found


# Plans, as plain values: one decision for each block, of dumped specs.

Decisions = list[dict[str, Any]]
Kind = Callable[[Draw, list[tuple[dict[str, Any], dict[str, Any]]]], Decisions]


def blocks_of(spec: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every block with its stage."""
    return [(stage, block) for stage in spec["stages"] for block in stage["blocks"]]


def plan_of(spec: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]]) -> vitrim.Plan:
    rest = iter(decisions)
    stages = [{"blocks": [dict(next(rest)) for _ in stage["blocks"]]} for stage in spec["stages"]]
    return vitrim.Plan.model_validate({"stages": stages})


def some(draw: Draw, size: int, least: int = 1) -> list[int]:
    return sorted(draw.sample(range(size), draw.randint(min(least, size), size)))


def attends(block: Mapping[str, Any]) -> bool:
    return block["mixer"]["kind"] == "attention" and bool(block["mixer"]["v"])


def heads(draw: Draw, stage: Mapping[str, Any], block: Mapping[str, Any], dead: Sequence[int] = ()) -> dict[str, Any]:
    """Random channels of each head, none of those in `dead`; whole heads where a norm ties their channels."""
    form = stage["form"]
    tied_qk, tied_v = (form[name] is not None for name in ("head_norm", "mixed_norm"))
    tied_qk = tied_qk or form.get("cosine", False) or (form.get("positions") or {}).get("kind") == "rotary"
    if not attends(block):
        return {}
    qk, v = [], []
    for head, (a, b) in enumerate(zip(block["mixer"]["qk"], block["mixer"]["v"], strict=True)):
        gone = head in dead and not tied_v
        qk.append([] if gone else list(range(a)) if tied_qk else some(draw, a))
        v.append([] if gone else list(range(b)) if tied_v else some(draw, b))
    return {"qk": qk, "v": v}


def neurons(draw: Draw, stage: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    free = block["hidden"] and stage["form"]["hidden_norm"] is None
    return {"hidden": some(draw, block["hidden"], block["hidden"] // 4)} if free else {}


def channels(draw: Draw, blocks: list[Any]) -> Decisions:
    return [heads(draw, stage, block) | neurons(draw, stage, block) for stage, block in blocks]


def only_qk_or_v(draw: Draw, blocks: list[Any]) -> Decisions:
    return [{"qk" if i % 2 else "v": heads(draw, *pair)["qk" if i % 2 else "v"]} for i, pair in enumerate(blocks)]


def dead_heads(draw: Draw, blocks: list[Any]) -> Decisions:
    found = []
    for i, (stage, block) in enumerate(blocks):
        last = len(block["mixer"]["v"]) - 1
        found.append(heads(draw, stage, block, dead=[0] if i % 2 else [last]))
    return found


def dead_branches(draw: Draw, blocks: list[Any]) -> Decisions:
    """Branches that leave their output bias: an attention, an MLP, both."""
    found = []
    for i, (stage, block) in enumerate(blocks):
        every = range(len(block["mixer"]["v"]))
        attention = {} if stage["form"]["mixed_norm"] or i % 3 == 1 else heads(draw, stage, block, dead=every)
        found.append(attention | ({} if stage["form"]["hidden_norm"] or i % 3 == 0 else {"hidden": []}))
    return found


def skips(draw: Draw, blocks: list[Any]) -> Decisions:
    """An attention, an MLP and a norm skipped, and channels cut beside them."""
    decisions = channels(draw, blocks)
    for i, (decision, pair) in enumerate(zip(decisions, blocks, strict=True)):
        decisions[i] = (
            {"mixer": {"kind": "skip"}} | neurons(draw, *pair),
            {key: value for key, value in decision.items() if key != "hidden"} | {"mlp": {"kind": "skip"}},
            {"mixer": {"kind": "skip", "leaves": "norm"}},
        )[i % 3]
    return decisions


def whole_block(draw: Draw, blocks: list[Any]) -> Decisions:
    decisions = channels(draw, blocks)
    decisions[1] = {"mixer": {"kind": "skip"}, "mlp": {"kind": "skip"}}
    return decisions


def patches_of(blocks: list[Any]) -> int:
    rows, columns = blocks[0][0]["grid"]
    return rows * columns


def dropping(exact: bool) -> Kind:
    def plan(draw: Draw, blocks: list[Any]) -> Decisions:
        kept, decisions = list(range(patches_of(blocks))), channels(draw, blocks)
        for i, decision in enumerate(decisions):
            if i != 1:
                kept = sorted(draw.sample(kept, max(1, len(kept) * 3 // 4)))
                decision["tokens"] = {"kind": "drop", "kept": kept, "exact": exact}
            else:
                decision["tokens"] = {"kind": "drop", "kept": kept, "exact": not exact}
        return decisions

    return plan


def halving(**how: Any) -> Kind:
    def plan(draw: Draw, blocks: list[Any]) -> Decisions:
        decisions = channels(draw, blocks)
        for decision, axis in zip(decisions[1:], "wh", strict=False):
            decision["tokens"] = {"kind": "grid", "axis": axis, **how}
        return decisions

    return plan


def merging(draw: Draw, blocks: list[Any]) -> Decisions:
    count = patches_of(blocks) // 4
    decisions = channels(draw, blocks)
    for decision in decisions[:2]:
        decision["tokens"] = {"kind": "merge", "count": count}
    return decisions


def choosing(weighted: bool, fused: bool) -> Kind:
    def plan(draw: Draw, blocks: list[Any]) -> Decisions:
        prefix, patches = blocks[0][0]["prefix"], patches_of(blocks)
        decisions = channels(draw, blocks)
        how: dict[str, Any] = {"kind": "top_k", "fused": fused}
        first = {"by": "hsic_attn", "weights": [draw.random() for _ in range(patches)]} if weighted else {}
        decisions[0]["tokens"] = how | first | {"kept": prefix + patches // 2}
        decisions[1]["tokens"] = how | {"kept": prefix + max(1, patches // 4)}
        return decisions

    return plan


def only_prefix(draw: Draw, blocks: list[Any]) -> Decisions:
    decisions = channels(draw, blocks)
    decisions[-1]["only_prefix"] = True
    return decisions


def convolving(*states: Mapping[str, Any]) -> Kind:
    """Convolutions in place of all attentions but the last, in turn in the given states."""

    def plan(draw: Draw, blocks: list[Any]) -> Decisions:
        decisions = []
        for i, (stage, block) in enumerate(blocks):
            decisions.append(neurons(draw, stage, block))
            if i == len(blocks) - 1:
                continue
            state, width = dict(states[i % len(states)]), draw.randint(1, min(block["mixer"]["v"]))
            dead = len(block["mixer"]["v"]) - 1 if i == 1 else None
            v = [
                [] if head == dead else sorted(draw.sample(range(size), width))
                for head, size in enumerate(block["mixer"]["v"])
            ]
            if state.get("mixture") is not None:
                state["mixture"] = state["mixture"] | {"heads": sum(map(bool, v))}
            decisions[-1] |= {"mixer": {"kind": "conv", "width": width, **state}, "v": v}
        return decisions

    return plan


MIXED = {"kernel": 3, "norm": True, "mixture": {"temperature": 1.0, "slots": "columns"}}
CENTRE = {"kernel": 3, "norm": True, "prefix": "zero", "mixture": {"temperature": 100.0, "slots": "centre"}}
POINT = {"kernel": 1, "norm": True, "prefix": "norm", "mixture": {"temperature": 0.01, "slots": "columns"}}
NORMED = {"kernel": 3, "norm": True, "prefix": "zero"}
FOLDED = {"kernel": 3}
LINEAR = {"kernel": 1, "prefix": "zero"}


def folding(draw: Draw, blocks: list[Any]) -> Decisions:
    """Every convolution a state or two further."""
    decisions, count = [], 0
    for _, block in blocks:
        decisions.append({})
        if block["mixer"]["kind"] == "conv":
            norm = block["mixer"]["norm"] and count % 2 == 0 and block["mixer"]["mixture"] is not None
            decisions[-1]["mixer"] = block["mixer"] | {"mixture": None, "norm": norm}
            count += 1
    return decisions


def anything(draw: Draw, blocks: list[Any]) -> Decisions:
    """Cuts of every kind by chance, dropped patches too where there are no windows."""
    kept, decisions = list(range(patches_of(blocks))), []
    for stage, block in blocks:
        count = len(block["mixer"]["v"]) if attends(block) else 0
        dead = [head for head in range(count) if draw.random() < 0.25]
        decision = heads(draw, stage, block, dead) if draw.random() < 0.8 else {}
        if draw.random() < 0.15:
            decision = {"mixer": {"kind": "skip"}}
        if draw.random() < 0.15:
            decision["mlp"] = {"kind": "skip"}
        elif draw.random() < 0.9:
            decision |= neurons(draw, stage, block)
        if block["tokens"] is not None:
            kept = [place for place in block["tokens"]["kept"] if place in kept]
        if stage["window"] is None and draw.random() < 0.6:
            kept = sorted(draw.sample(kept, draw.randint(1, len(kept))))
            decision["tokens"] = {"kind": "drop", "kept": kept, "exact": draw.random() < 0.5}
        decisions.append(decision)
    return decisions


def wrong(draw: Draw, blocks: list[Any]) -> Decisions:
    return [{"hidden": [5, 5]} for _ in blocks]


PLANS: dict[str, Sequence[Kind]] = {
    "channels": (channels,),
    "only_qk_or_v": (only_qk_or_v,),
    "dead_heads": (dead_heads,),
    "dead_branches": (dead_branches,),
    "skips": (skips,),
    "whole_block": (whole_block,),
    "drop": (dropping(exact=False),),
    "drop_exact": (dropping(exact=True),),
    "grid_linear": (halving(form="linear"),),
    "grid_mean": (halving(form="mean", size_bias=True),),
    "grid_channel": (halving(form="channel", size_bias=True),),
    "merge": (merging,),
    "top_k": (choosing(weighted=False, fused=True),),
    "top_k_weighted": (choosing(weighted=True, fused=False),),
    "only_prefix": (only_prefix,),
    "conv_mixed": (convolving(MIXED, CENTRE),),
    "conv_point": (convolving(POINT, LINEAR),),
    "conv_plain": (convolving(NORMED, FOLDED),),
    "random_0": (anything,),
    "random_1": (anything,),
    "random_2": (anything,),
    "wrong": (wrong,),
    "twice_channels": (channels, dead_heads),
    "twice_random": (anything, anything),
    "twice_merge": (halving(form="linear"), channels),
    "twice_top_k": (choosing(weighted=True, fused=True), channels),
    "thrice_conv": (convolving(MIXED, POINT), folding, folding),
}
"""A name and the plans that are carried out one after another."""

SINGLE = ("random_0", "drop_exact", "grid_linear", "merge", "top_k", "conv_mixed", "conv_plain")
"""Those that are tried in single precision too."""


def cut(model: nn.Module, name: str, kinds: Sequence[Kind]) -> tuple[nn.Module | None, Record]:
    """Carry out plans one after another; the last child, if none was refused, and what is known of the plans."""
    known: Record = {}
    parent, plans = vitrim.describe(model), []
    for number, kind in enumerate(kinds):
        spec = vitrim.describe(model).model_dump(mode="json")
        try:
            plan = plan_of(spec, kind(random.Random(f"{name} {number}"), blocks_of(spec)))
            model = stirred(vitrim.apply(model, plan).eval())
        except (vitrim.VitrimError, ValueError) as problem:
            return None, known | {f"plan_{number}": f"refused: {type(problem).__name__}"}
        plans.append(plan)
        known[f"plan_{number}"] = of_plain(plan.model_dump(mode="json"))
    if len(plans) == 2:
        known["both"] = of_plain(plans[0].then(plans[1], parent).model_dump(mode="json"))
    return model, known


def family_records(family: str, preset: str, folder: Path) -> Iterator[tuple[str, Record]]:
    file = folder / "model.safetensors"
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        theirs = guest(family, preset, dtype)
        model = vitrim.adopt(theirs)
        x = images(model, dtype)
        yield f"adopted_{name}", portrait(model, x, file) | {"guest_logits": logits(theirs, x)}
        for plan, kinds in PLANS.items():
            double = dtype == torch.float64
            if not double and plan not in SINGLE:
                continue
            child, known = cut(model, plan, kinds)
            yield (
                f"{plan}_{name}",
                known | ({} if child is None else portrait(child, x, file if double else None, True)),
            )


# Runs.

CLASSES = 10
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": CLASSES}
SHORT = {"epochs": 0.2, "batch": 16, "augment": {"kind": "light"}, "mixup": 0, "cutmix": 0, "warmup_epochs": 0}
SEARCH = SHORT | {"epochs": 0.5, "lr": 1e-3}
FULL = {"epochs": 0.4, "batch": 16, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "ema": 0.9, "drop_path": 0.1,
        "accumulate": 2, "augment": {"kind": "full"}, "distill": {"kind": "hard"}}  # fmt: skip
POLICIES = {"trials": 6, "initial": 4, "measure": "loss"}
FINE = {"group_attention": 4, "floor_attention": 4, "group_mlp": 16, "floor_mlp": 16}

RUNS: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "random": ("random", "vit swin t2t", "macs=0.6", {}, {}),
    "magnitude": ("magnitude", "vit swin t2t", "macs=0.6", {}, {}),
    "magnitude_free": ("magnitude", "vit", "params=0.6", {"choice": "free"}, {}),
    "taylor": ("taylor", "vit swin t2t", "macs=0.6", {}, {"epochs": 0.2, "train": SHORT}),
    "taylor_output": ("taylor", "vit", "macs=0.6", {"target": "output"}, {"epochs": 0.4, "train": FULL}),
    "ridge": ("magnitude", "vit swin", "macs=0.6", {}, {"recover": "ridge"}),
    "vit_slim": ("vit_slim", "vit swin t2t", "macs=0.6", {"train": SEARCH, "gate_lr": 0.01}, {}),
    "vit_slim_tokens": (
        "vit_slim", "vit", "macs=0.6", {"train": SEARCH, "gate_lr": 0.01, "token_l1": 1e-4, "dropping": "drop_exact"},
        {"epochs": 0.2, "train": SHORT},
    ),
    "spvit": ("spvit", "vit swin", "macs=0.5", {"train": SEARCH, "gate_lr": 0.01}, {"epochs": 0.2, "train": SHORT}),
    "spvit_search": (
        "spvit", "vit", "macs=0.5", {"train": SEARCH, "gate_lr": 0.01, "inherit": "search"},
        {"epochs": 0.2, "train": SHORT},
    ),
    "mdc": ("mdc", "vit swin t2t", "macs=0.7", POLICIES, {}),
    "mdc_even": (
        "mdc", "vit", "macs=0.6", {"proposal": "even", "tokens_by": "hsic_attn", "heads_by": "greedy"}, {}
    ),
    "mdc_shared": ("mdc", "vit", "macs=0.7", POLICIES | {"train": SEARCH, "neurons_by": "released",
                   "estimator": "biased_multi", "proposal": "random"}, {}),
    "cait": ("cait", "vit swin t2t", "macs=0.6", {"train": SEARCH, **FINE}, {"epochs": 0.2, "train": SHORT}),
    "cait_resrep": (
        "cait", "vit", "macs=0.6", {"train": SEARCH, **FINE, "scorer": "resrep", "order": "channel_first"}, {}
    ),
    "post_training": ("post_training", "vit swin t2t", "macs=0.7", {"probe": 16}, {}),
    "post_training_half": ("post_training", "vit swin", "macs=0.5", {"probe": 16}, {}),
    "post_training_grid": ("post_training", "vit", "macs=0.6", {"probe": 16, "merge": "grid"}, {}),
    "post_training_widths": ("post_training", "vit", "macs=0.6", {"probe": 16, "merge": "none"}, {}),
}  # fmt: skip
"""A name; the method, the models, the budget, the method's settings and further arguments of `vitrim.compress`."""


def pictures(root: Path, each: int, kind: str) -> None:
    """Noise, brighter from class to class."""
    rng = np.random.default_rng(each)
    for label in range(CLASSES):
        (root / kind / f"class{label}").mkdir(parents=True)
        for number in range(each):
            values = rng.integers(0, 150, (32, 32, 3)) + 10 * label
            Image.fromarray(values.astype(np.uint8)).save(root / kind / f"class{label}" / f"{number}.png")


def scenes(root: Path) -> None:
    """Scenes of three classes whose red says the class of each pixel."""
    rng = np.random.default_rng(0)
    root.mkdir()
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    for split, count in (("train", 8), ("test", 3)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            mask = np.zeros((48, 60), dtype=np.uint8)
            mask[24:] = 1
            row, column = rng.integers(0, 28), rng.integers(0, 36)
            mask[row : row + 20, column : column + 24] = 2
            picture = np.stack([60 * mask, rng.integers(0, 90, mask.shape, dtype=np.uint8), 0 * mask + 30], -1)
            Image.fromarray(picture).save(root / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def folder_record(folder: Path) -> Record:
    """What a run folder holds, without what is never the same twice."""
    found: Record = {"files": sorted(path.name for path in folder.iterdir())}
    if (folder / "plan.json").is_file():
        sheet = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        found["plan"] = of_plain(sheet["plan"])
        found["plan_parent"] = of_plain(without_origin(sheet["parent"]))
    for name in ("measured.json", "classes.json"):
        if (folder / name).is_file():
            found[name] = of_plain(lasting(json.loads((folder / name).read_text(encoding="utf-8"))))
    for name in ("trials.jsonl", "log.jsonl"):
        if (folder / name).is_file():
            found[name] = of_plain(lasting(lines(folder / name)))
    model = vitrim.load(folder / "model.safetensors")
    return found | stored(folder / "model.safetensors") | portrait(model, images(model, torch.float32))


def called(*arguments: object) -> None:
    """Run the command line in this process.

    Raises:
        RuntimeError: if it fails, with what it told.
    """
    told, before = io.StringIO(), sys.argv
    sys.argv = ["vitrim", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            cli.main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"vitrim {arguments[0]} failed: {told.getvalue()}") from None
    finally:
        sys.argv = before


def small(family: str) -> nn.Module:
    return guest(family, next(iter(families.get(family).TEST_PRESETS)), torch.float32)


def run_record(name: str, family: str, data: Path, folder: Path) -> Record:
    method, _, budget, settings, more = RUNS[name]
    recipe = {"device": "cpu", "data": {"calibration": 32, "validation": 20}}
    try:
        result = vitrim.compress(
            small(family), str(data), method=method, budget=budget, settings=settings, measure={"latency": False},
            recipe=recipe, out=folder, seed=1, verbose=False, **{"recover": "none", **more},
        )  # fmt: skip
    except (vitrim.VitrimError, ValueError) as problem:
        return {"run": f"refused: {type(problem).__name__}"}
    return folder_record(folder) | {"living_logits": logits(result.model, images(result.model, torch.float32))}


def method_records(root: Path) -> Iterator[tuple[str, Record]]:
    data = root / "pictures"
    pictures(data, 12, "train")
    pictures(data, 4, "test")
    missing = set(methods.names()) - {run[0] for run in RUNS.values()}
    for name in sorted(missing):
        yield f"method/{name}", {"run": "not recorded"}
    for name, (_, kinds, *_) in RUNS.items():
        for family in kinds.split():
            yield f"method/{name}/{family}", run_record(name, family, data, root / f"{name}_{family}")
    quick = ("--set", f"model.arguments={json.dumps(VIT)}", "--set", "measure.latency=false", "--set", "device=cpu")
    source = ("test_vit", "--random-weights", "--data", data, *quick)
    budgets = ("--budgets", "macs=0.8", "--budgets", "macs=0.6")
    few = ("--set", "data.calibration=24", "--set", "data.validation=16")
    called("pareto", *source, *few, *budgets, "--out", root / "curve")
    for budget in ("macs=0.8", "macs=0.6"):
        yield f"pareto/{budget}", folder_record(root / "curve" / budget)
    with safe_open(root / "curve" / "calibration.safetensors", framework="pt") as file:
        yield "pareto/calibration", {"tensors": of_tensors({name: file.get_tensor(name) for name in file.keys()})}
    called(
        "compress", "test_vit", "--random-weights", "--data", "digits", *quick, "--set", "data.calibration=32",
        "--method", "taylor", "--budget", "macs=0.6", "--epochs", "0.05", "--out", root / "digits",
    )  # fmt: skip
    yield "command/digits", folder_record(root / "digits")


def transfer_records(root: Path) -> Iterator[tuple[str, Record]]:
    street = root / "street"
    scenes(street)
    for name, method in (("dense", None), ("merged", "cait")):
        backbone: tuple[object, ...] = (root / "cait_vit" / "model.safetensors",)
        if method is None:
            vitrim.save(vitrim.adopt(small("vit")), root / "dense.safetensors")
            backbone = (root / "dense.safetensors",)
        for head in ("fpn", "linear"):
            out = root / f"{name}_{head}"
            told = [
                f"train={json.dumps({'epochs': 2, 'batch': 4, 'lr': 2e-3, 'log_every': 1})}",
                'augment={"ratio": [0.8, 1.2]}', 'test={"align": 32, "pictures": 1}', "measure.latency=false",
                "device=cpu", "head.width=32", *(["head.channels=32"] if head == "fpn" else []),
            ]  # fmt: skip
            sets = [word for setting in told for word in ("--set", setting)]
            where = ("--backbone", *backbone, "--data", street, "--head", head, "--out", out)
            called("transfer", "seg", *where, *sets)
            yield f"transfer/{name}/{head}", folder_record(out)


# Whole models, and what is left of the front door.

WHOLE = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "deit_small_distilled_patch16_224",
         "vit_base_patch16_clip_224", "vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224",
         "swin_small_patch4_window7_224", "t2t_vit_14", "t2t_vit_t_14")  # fmt: skip
BUDGETS = ("macs=0.5", "macs=2.3G", "params=12M", "macs=0.6,params=0.7", "latency=0.5", "half")


def whole_records() -> Iterator[tuple[str, Record]]:
    for name in WHOLE:
        if timm.is_model(name):
            with torch.device("meta"):
                model = timm.create_model(name)
            cost = vitrim.cost(model)
            yield f"cost/{name}", {"macs": cost.macs, "params": cost.params, "spec": of_plain(spec_of(model))}
    for text in BUDGETS:
        try:
            budget = vitrim.Budget.parse(text)
        except vitrim.VitrimError as problem:
            yield f"budget/{text}", {"parsed": f"refused: {type(problem).__name__}"}
        else:
            yield f"budget/{text}", {"parsed": str(budget), "fields": of_plain(budget.model_dump(mode="json"))}
    for family in families.names():
        model = vitrim.adopt(small(family))
        child = vitrim.apply(model, plan_of(spec_of(model), channels(random.Random(1), blocks_of(spec_of(model)))))
        batches = [(images(model, torch.float32, 16), torch.arange(16) % CLASSES)]
        found = vitrim.evaluate(child, batches, reference=model)
        yield f"evaluate/{family}", {name: getattr(found, name) for name in ("top1", "agreement", "count")}


def records(root: Path) -> Iterator[tuple[str, Record]]:
    """Every group of values with the beginning of its keys."""
    yield "environment", {
        "python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
        "numpy": np.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    yield from whole_records()
    for family in families.names():
        for preset in families.get(family).TEST_PRESETS:
            for name, found in family_records(family, preset, root):
                yield f"family/{family}/{preset}/{name}", found
    yield from method_records(root)
    yield from transfer_records(root)


def record(out: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    start = last = time.perf_counter()
    found: Record = {}
    with tempfile.TemporaryDirectory() as folder:
        for prefix, values in records(Path(folder)):
            found |= {f"{prefix}/{key}": value for key, value in values.items()}
            now = time.perf_counter()
            print(f"{now - start:6.1f} s {now - last:6.2f} s  {prefix}", file=sys.stderr)
            last = now
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(found)} keys in {time.perf_counter() - start:.0f} s")
    print(f"digest {of_plain(found)}")


def compare(a: Path, b: Path) -> int:
    """List the keys that differ, and tell whether there are any."""
    one, two = (json.loads(path.read_text(encoding="utf-8")) for path in (a, b))
    wrong = 0
    for key in sorted(one.keys() | two.keys()):
        if key not in one or key not in two:
            print(f"missing in {b if key in one else a}: {key}")
        elif one[key] != two[key]:
            print(f"differs: {key}: {one[key]} and {two[key]}")
        else:
            continue
        wrong += 1
    print(f"{wrong} of {len(one.keys() | two.keys())} keys differ")
    return int(wrong > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"))
    args = parser.parse_args()
    if (args.out is None) == (args.compare is None):
        parser.error("give either --out FILE or --compare A B")
    if args.compare is not None:
        sys.exit(compare(*args.compare))
    record(args.out)


if __name__ == "__main__":
    main()
