"""What a GPU says, in one command: ``python benchmarks/gpu.py --out FOLDER``, at most 7 minutes on an H100.

    python benchmarks/gpu.py --out FOLDER                      # all parts
    python benchmarks/gpu.py --out FOLDER --part train budget  # some of them
    python benchmarks/gpu.py --out FOLDER --tiny               # a taste on a CPU, for the tests: its times mean nothing

Parts, each with its share of the time; what does not fit is written as left out:

- ``tests``: the tests with the mark ``gpu``;
- ``train``: training of a ViT-Ti against a bare PyTorch loop (`throughput.py`);
- ``latency``: children of a DeiT-S against timm's dense model in the same mode (eager, CUDA graph, compiled), in the
  form of `vitrim.deploy.optimized` and as they are stored, random weights;
- ``calibration``: seconds of ``post_training`` (calibration and one budget) on ViT-B and ViT-L, random weights, 256
  images of noise;
- ``budget``: a budget of time, ``latency=0.5``, of DeiT-S.

Results are appended to ``FOLDER/results.jsonl`` as they come; ``FOLDER/table.md`` is written at the end, and printed.
"""

import argparse
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import throughput

import vitrim
from vitrim.data import Images
from vitrim.deploy.runtimes import ready
from vitrim.measure.turns import name_of, percentiles, place_of, turns, waiting
from vitrim.methods.cait.masks import merge_plan
from vitrim.words.errors import VitrimError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Conv
from vitrim.words.steps.merge import Merge

Row = dict[str, Any]

FULL: dict[str, Any] = {
    "name": "deit_small_patch16_224", "arguments": {}, "half": 6, "structure": ("deit_s", "macs=3.36G"),
    "merges": (16, 8), "grid": [(4, "w"), (8, "h")], "batches": (256, 128, 1), "seconds": 0.8, "dtype": torch.bfloat16,
    "modes": ("eager", "cudagraph", "compile"), "train": throughput.BIG, "pairs": 4,
    "calibration": ({"model_name": "vit_base_patch16_224"}, {"model_name": "vit_large_patch16_224"}), "images": 256,
    "probe": 80, "budget_batch": 256,
}  # fmt: skip
_TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
TINY: dict[str, Any] = {
    "name": "vit_tiny_patch16_224", "arguments": _TINY_VIT, "half": 1, "structure": None,
    "merges": (2,), "grid": [(1, "w"), (2, "h")], "batches": (1,), "seconds": 0.01, "dtype": torch.float32,
    "modes": ("eager",), "pairs": 2,
    "train": {"size": 32, "batch": 4, "steps": 2, "model": {"model_name": "vit_tiny_patch16_224"} | {
        key: value for key, value in _TINY_VIT.items() if key not in ("img_size", "num_classes")}},
    "calibration": ({"model_name": "vit_tiny_patch16_224", **_TINY_VIT},), "images": 24, "probe": 4, "budget_batch": 2,
}  # fmt: skip


class Run:
    """The folder, the clock and the device of one call.

    Args:
        folder: where results are written.
        device: where models run.
        case: sizes, see `FULL`.
        minutes: time for everything.
    """

    def __init__(self, folder: Path, device: torch.device, case: Mapping[str, Any], minutes: float) -> None:
        self.folder, self.device, self.case = folder, device, case
        self.end = time.perf_counter() + 60 * minutes
        self.rows: list[Row] = []
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.perf_counter()

    def write(self, **row: Any) -> None:
        """Append one result."""
        self.rows.append(row)
        with (self.folder / "results.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def tried(self, part: str, what: str, call: Callable[[], Row], need: float) -> None:
        """Write what `call` gives, or why there is nothing: its error, or less than `need` seconds left."""
        if self.left() < need:
            self.write(part=part, what=what, left_out=f"{self.left():.0f} s left of {need:.0f} s needed")
            return
        start = time.perf_counter()
        try:
            found = call()
        except (VitrimError, RuntimeError) as problem:
            found = {"error": f"{type(problem).__name__}: {str(problem)[:300]}"}
        self.write(part=part, what=what, **found, took=round(time.perf_counter() - start, 1))


def noise(count: int, size: int) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return Images(lambda i: Image.fromarray(pixels[i]), np.full(count, -1), classes=0, source="noise", fixed=True)


# The parts.


def tests(run: Run) -> None:
    def call() -> Row:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, run.left()), check=False)
        return {"returned": done.returncode, "said": done.stdout.strip().rpartition("\n")[2]}

    run.tried("tests", "pytest -m gpu", call, 60 if run.device.type == "cuda" else 0)


def train(run: Run) -> None:
    run.tried("train", "fit against a bare loop", lambda: throughput.compared(
        run.case["train"], run.device, run.case["pairs"]), 20)  # fmt: skip


def children(run: Run) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of section 1 of the targets, each in evaluation mode on the CPU."""
    case = run.case
    torch.manual_seed(0)
    dense = vitrim.adopt(timm.create_model(case["name"], **case["arguments"]).eval())
    spec = vitrim.describe(dense)
    last = len(spec.blocks()) - 1
    yield "adopted dense", dense

    def cut(budget: str, method: str = "magnitude", **settings: Any) -> nn.Module:
        quiet = {"latency": False}
        return vitrim.compress(dense, None, method=method, budget=budget, settings=settings, measure=quiet).model

    for choice in ("heads", "even", "free"):
        yield f"{choice} widths", cut("macs=0.5", choice=choice)
    for count in case["merges"]:
        steps = [BlockPlan(tokens=Merge(count=count) if i < last else None) for i in range(last + 1)]
        yield f"merging r={count}", vitrim.apply(dense, Plan.of(spec, steps))
    yield "grid merging", vitrim.apply(dense, merge_plan(spec, case["grid"]))
    for kernel in (1, 3):
        conv = Conv(kernel=kernel, width=64, prefix="attention", act="none")
        late = [BlockPlan(mixer=conv if i > last // 2 else None) for i in range(last + 1)]
        yield f"{kernel} x {kernel} convolutions in the last half", vitrim.apply(dense, Plan.of(spec, late))
    if case["structure"] is not None:
        structure, budget = case["structure"]
        yield f"spvit {structure}", cut(budget, "spvit", structure=structure)
    yield "half the blocks", timm.create_model(case["name"], **case["arguments"] | {"depth": case["half"]}).eval()


def latency(run: Run) -> None:
    case = run.case
    torch.manual_seed(0)
    host = timm.create_model(case["name"], **case["arguments"]).eval()
    nets = dict(children(run))
    whole = vitrim.cost(nets["adopted dense"]).macs
    shape = (3, *vitrim.describe(nets["adopted dense"]).image)
    for mode in case["modes"]:
        for batch in case["batches"][: 1 if mode == "compile" else None]:
            for stored in (False, True) if mode == "eager" else (False,):
                for name, net in nets.items():
                    half = case["half"] / len(host.blocks)
                    macs = half if name == "half the blocks" else vitrim.cost(net).macs / whole
                    about = {"child": name, "mode": mode, "batch": batch, "as_stored": stored, "macs": round(macs, 3)}
                    what = f"{name}, {mode}, batch {batch}" + (", as stored" if stored else "")
                    call = functools.partial(timed, net, host, shape, about, run)
                    run.tried("latency", what, call, 45 if mode == "compile" else 4)


def timed(net: nn.Module, host: nn.Module, shape: tuple[int, ...], about: Row, run: Run) -> Row:
    """Time a child in turns with timm's dense model, both in the mode that `about` names."""
    images = torch.randn(about["batch"], *shape, generator=torch.Generator().manual_seed(0))
    images = images.to(run.device, run.case["dtype"])
    passes = [ready(one, images, about["mode"], as_stored=about["as_stored"]) for one in (net, host)]
    calls = [lambda found=found: found.run(images) for found in passes]
    taken = turns(calls, wait=waiting(run.device), seconds=run.case["seconds"]).samples
    low, middle, high = percentiles([a / b for a, b in zip(*taken, strict=True)])
    times = [1e3 * percentiles(each)[1] for each in taken]
    return about | {"ratio": middle, "low": low, "high": high, "ms": times[0], "dense_ms": times[1]}


def calibration(run: Run) -> None:
    case = run.case
    for arguments in case["calibration"]:

        def call(arguments: Mapping[str, Any] = arguments) -> Row:
            torch.manual_seed(0)
            model = timm.create_model(**arguments).eval()
            images = noise(case["images"] + case["probe"], model.patch_embed.img_size[0])
            start = time.perf_counter()
            found = vitrim.compress(
                model, images, method="post_training", budget="macs=0.5", measure={"latency": False},
                settings={"probe": case["probe"]}, recipe={"data": {"calibration": case["images"]}},
                device=run.device.type,
            )  # fmt: skip
            return {"seconds": time.perf_counter() - start, "macs": found.measured["macs_ratio"]}

        run.tried("calibration", arguments["model_name"], call, 100 if run.device.type == "cuda" else 0)


def budget(run: Run) -> None:
    case = run.case

    def call() -> Row:
        torch.manual_seed(0)
        model = timm.create_model(case["name"], **case["arguments"]).eval()
        kind = str(case["dtype"]).removeprefix("torch.")
        how = {"batch": case["budget_batch"], "dtype": kind, "seconds": 20 * case["seconds"] / 8}
        found = vitrim.compress(
            model, None, method="magnitude", budget="latency=0.5", settings={"choice": "heads"}, measure=how,
            device=run.device.type,
        )  # fmt: skip
        return {"asked": 0.5, "ratio": found.measured["latency_ratio"], "macs": found.measured["macs_ratio"]}

    run.tried("budget", "latency=0.5, whole heads", call, 50 if run.device.type == "cuda" else 0)


PARTS: dict[str, Callable[[Run], None]] = {
    "tests": tests, "train": train, "budget": budget, "calibration": calibration, "latency": latency,
}  # fmt: skip


def table(rows: list[Row]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| child | mode | batch | form | MACs | time | dense, ms |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "ratio" in row and row["part"] == "latency":
            form = "as stored" if row["as_stored"] else "optimized"
            lines.append(
                f"| {row['child']} | {row['mode']} | {row['batch']} | {form} | {row['macs']:.3f} | {row['ratio']:.2f} "
                f"({row['low']:.2f} to {row['high']:.2f}) | {row['dense_ms']:.2f} |"
            )
    lines += ["", "| part | what | result |", "| --- | --- | --- |"]
    told = ("error", "left_out", "said", "seconds", "ratio", "macs", "images_per_second")
    for row in rows:
        if row["part"] in ("machine", "latency") and not row.keys() & {"error", "left_out"}:
            continue
        values = [
            f"{key} {row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in told if key in row
        ]
        lines.append(f"| {row['part']} | {row['what']} | {', '.join(values)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    try:
        device = place_of("cpu" if args.tiny else "cuda")
    except VitrimError as problem:
        parser.error(str(problem))
    run = Run(args.out, device, TINY if args.tiny else FULL, args.minutes)
    run.write(
        part="machine", what=name_of(device), torch=torch.__version__, timm=timm.__version__, cuda=torch.version.cuda,
        vitrim=vitrim.__version__, python=platform.python_version(), tiny=args.tiny,
    )  # fmt: skip
    for name in args.part:
        PARTS[name](run)
    text = table(run.rows)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
