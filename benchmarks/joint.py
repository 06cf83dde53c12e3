"""The joint search of post_training, each kind of cut left out, and each kind alone, at equal MACs and at equal time.

    python benchmarks/joint.py MODEL TRAIN TEST --weights FILE --out FOLDER --budgets macs=0.7 latency=0.5 --draws 0 1
    python benchmarks/joint.py MODEL TRAIN TEST --weights FILE --out FOLDER --times
    python benchmarks/joint.py MODEL TRAIN TEST --weights FILE --out FOLDER --minutes 4
    python benchmarks/joint.py --table RECORD.jsonl

MODEL is a timm name, TRAIN and TEST are tars or folders of images. A draw decides which of the TRAIN images make the
statistics and which others single cuts and candidates are measured on. Nothing is chosen on TEST. Each row is one
command with other switches: `vitrim compress MODEL --method post_training --set method.operators=false` and so on.
"static" is the joint search without tokens, but with the exact saving of the last block.

Appends a line for each draw, budget and row to ``FOLDER/joint.jsonl``; lines that are there are skipped. The
calibration of a draw is made once. A budget of latency is met by measured times, as in a run: 5 % over at most.
Differences to the dense model are paired, on the same images, with their standard error. A row that cannot reach a
budget says so. With ``--times``, the children that lie in FOLDER are timed in turns with the dense model, on a quiet
machine, and ``FOLDER/times.jsonl`` is written. With ``--minutes``, those of the rows, budgets and draws are distilled
for so long, as ``vitrim compress --minutes`` does, on the TRAIN images but those that candidates were measured on, and
``FOLDER/minutes.jsonl`` is written; its ``gain`` is the paired difference in divergence to the child before.
"""

import argparse
import datetime
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitrim
from vitrim import measure, methods
from vitrim.cut.surgery import apply
from vitrim.data import Input, eval_loader, open_source
from vitrim.deploy.parent import open_parent
from vitrim.families import describe
from vitrim.methods import Data, Found
from vitrim.methods.post_training.calibration import write_calibration
from vitrim.methods.post_training.sensitivity import logits_of
from vitrim.run.latency_budget import meet, table_for, time_child
from vitrim.run.recipe import Measure
from vitrim.train import DISTILLED, Train, fit
from vitrim.words.budget import Budget
from vitrim.words.errors import BudgetError
from vitrim.words.plain import load

KINDS = tuple(
    kind
    for kind in ("operators", "heads", "widths", "tokens", "depth")
    if kind in methods.settings_of("post_training").model_fields
)
ROWS: dict[str, dict[str, bool]] = {
    "joint": {},
    **{f"joint less {kind}": {kind: False} for kind in KINDS},
    **{f"{kind} alone": {other: False for other in KINDS if other != kind} for kind in KINDS},
    "tokens and widths": {kind: False for kind in KINDS if kind not in ("tokens", "widths")},
    "static": {"tokens": False, "only_prefix": True},
}


def divergences(dense: Tensor, logits: Tensor) -> Tensor:
    """Divergence from the dense output, image by image."""
    ours, theirs = logits.double().log_softmax(-1), dense.double().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


class Bench:
    """The model, the images, and what is the same for all rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.batch = args.out, args.batch
        self.out.mkdir(parents=True, exist_ok=True)
        self.model = open_parent(args.model, weights=args.weights)
        asked: Any = methods.get("post_training", {})
        self.size = (args.images or asked.calibrates(describe(self.model)), args.probe)
        given = {} if args.mean is None else {"mean": (args.mean,) * 3, "std": (args.std,) * 3}
        self.input = Input.of(self.model, **given)
        classes = describe(self.model).classes
        about: dict[str, Any] = {"classes": classes, "class_map": args.class_map}
        self.train, test = (open_source(source, None, **about) for source in (args.train, args.test))
        pairs = list(eval_loader(test if args.limit is None else test.pick(range(args.limit)), self.input))
        self.test, self.labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
        self.dense = logits_of(self.model, self.test.split(self.batch))
        self.measure = Measure(batch=args.time_batch, threads=args.threads, seconds=args.seconds)
        self.look = {"candidates": args.candidates, "swaps": args.swaps}

    def parts(self, draw: int) -> tuple[list[int], list[int], list[int]]:
        """Numbers of the TRAIN images of a draw: for statistics, for the probe, and the others."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(draw)).tolist()
        first, second = self.size
        return sorted(order[:first]), sorted(order[first : first + second]), sorted(order[first + second :])

    def data(self, draw: int) -> Data:
        """The images of a draw."""
        first, second, _ = self.parts(draw)
        return Data(
            train=None,
            calibration=self.train.pick(first),
            validation=self.train.pick(second),
            input=self.input,
        )

    def calibration(self, draw: int) -> Path:
        """The calibration of a draw, made once."""
        path: Path = self.out / f"calibration-{draw}.safetensors"
        if not path.is_file():
            method: Any = methods.get("post_training", {"probe": self.size[1]})
            data = self.data(draw)
            images, probe = method.images(data)
            made = method.calibrated(self.model, data, images, probe, draw)
            write_calibration(path, made)
            print(f"calibrated draw {draw} in {made.seconds:.0f} s", flush=True)
        return path

    def record(self, row: str, text: str, draw: int) -> dict[str, Any]:
        """Search with the switches of a row, and measure the child."""
        settings = {**ROWS[row], **self.look, "calibration": str(self.calibration(draw)), "probe": self.size[1]}
        method, data, budget = methods.get("post_training", settings), self.data(draw), Budget.parse(text)
        about = {"row": row, "budget": text, "draw": draw}
        start = time.perf_counter()
        try:
            found, child, ratio = self.found(method, data, budget, draw)
        except BudgetError as problem:
            return about | {"refused": str(problem)}
        seconds = time.perf_counter() - start
        vitrim.save(child, self.out / f"{row.replace(' ', '_')}-{text}-{draw}.safetensors")
        known, apart = self.apart(child)
        root = len(apart) ** 0.5
        known |= {
            "seconds": round(seconds, 1),
            "macs_ratio": measure.cost(child).macs / measure.cost(self.model).macs,
            "time_ratio": ratio,
            "trials": sum("trial" in record for record in found.trials),
        }
        torch.save(apart, self.out / f"{row.replace(' ', '_')}-{text}-{draw}.kl")
        joint = self.out / f"joint-{text}-{draw}.kl"
        if row != "joint" and joint.is_file():
            gap = apart - torch.load(joint)
            known |= {"kl_over_joint": float(gap.mean()), "kl_over_joint_error": float(gap.std()) / root}
        return about | known

    def apart(self, child: nn.Module) -> tuple[dict[str, Any], Tensor]:
        """Measure a child on the test images: plain numbers, and its divergence from the dense output of each image."""
        logits = logits_of(child.eval(), self.test.split(self.batch))
        apart = divergences(self.dense, logits)
        root = len(apart) ** 0.5
        known: dict[str, Any] = {
            "kl": float(apart.mean()),
            "kl_error": float(apart.std()) / root,
            "agreement": 100 * float((logits.argmax(-1) == self.dense.argmax(-1)).double().mean()),
        }
        if bool((self.labels >= 0).all()):
            hits, before = ((x.argmax(-1) == self.labels).double() * 100 for x in (logits, self.dense))
            known |= {
                "top1": float(hits.mean()),
                "top1_dense": float(before.mean()),
                "change": float((hits - before).mean()),
                "change_error": float((hits - before).std()) / root,
            }
        return known, apart

    def distilled(self, row: str, text: str, draw: int, minutes: float) -> dict[str, Any]:
        """Distil a child that was stored, and measure it before and after."""
        child = vitrim.load(self.out / f"{row.replace(' ', '_')}-{text}-{draw}.safetensors")
        before, apart = self.apart(child)
        first, _, others = self.parts(draw)
        images = self.train.pick(sorted(first + others))
        settings = load(Train, {**DISTILLED, "minutes": minutes})
        fitted = fit(child, images, settings, input=self.input, seed=draw, teacher=self.model)
        after, now = self.apart(fitted.model)
        gain = apart - now
        about = {"row": row, "budget": text, "draw": draw, "minutes": minutes, "steps": fitted.steps}
        about |= {f"{name}_before": before[name] for name in ("kl", "change") if name in before}
        return about | after | {"gain": float(gain.mean()), "gain_error": float(gain.std()) / len(gain) ** 0.5}

    def found(
        self, method: methods.Method, data: Data, budget: Budget, draw: int
    ) -> tuple[Found, nn.Module, float | None]:
        """The result, the child, and its time over the dense model's for a budget of time."""
        if budget.latency is None:
            found = method.search(self.model, data, budget, seed=draw)
            return found, apply(found.parent, found.plan, grafts=found.grafts), None
        met = meet(
            self.model,
            budget.model_copy(update={"table": table_for(self.model, self.measure)}),
            lambda asked: method.search(self.model, data, asked, seed=draw),
            lambda one: apply(one.parent, one.plan, grafts=one.grafts),
            lambda child: time_child(child.eval(), self.model, self.measure),
            plans_by_time=True,
        )
        return met.found, met.child, met.ratio

    def times(self) -> None:
        """Time all children that were stored, in turns with the dense model."""
        for path in sorted(self.out.glob("*-*=*-*.safetensors")):
            row, text, draw = path.stem.rsplit("-", 2)
            found = time_child(vitrim.load(path).eval(), self.model, self.measure)
            line = {"row": row.replace("_", " "), "budget": text, "draw": int(draw)} | {
                "time_ratio": found.ratio,
                "low": found.ratio_low,
                "high": found.ratio_high,
                "batch": self.measure.batch,
                "threads": self.measure.threads,
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            }
            with (self.out / "times.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def versions(**about: Any) -> dict[str, Any]:
    """What a figure was taken with."""
    return {
        **about,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "vitrim": vitrim.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The records as Markdown: means over draws, with the mean of the standard errors."""
    text = [
        "| budget | cuts | draws | MACs | time | KL, nats | KL over joint | top-1 change |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for budget in dict.fromkeys(line["budget"] for line in lines):
        for row in ROWS:
            here = [line for line in lines if (line["budget"], line["row"]) == (budget, row)]
            done = [line for line in here if "kl" in line]
            if not here:
                continue
            cells = [_mean(done, "macs_ratio"), _mean(done, "time_ratio")]
            cells += [_mean(done, key, f"{key}_error") for key in ("kl", "kl_over_joint", "change")]
            text.append(f"| {budget} | {row} | {len(here)} | {' | '.join(cells) if done else 'out of reach | | | |'} |")
    return "\n".join(text)


def _mean(lines: Sequence[Mapping[str, Any]], key: str, error: str | None = None) -> str:
    values = [line[key] for line in lines if line.get(key) is not None]
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if error is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {sum(line[error] for line in lines if error in line) / len(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("train", nargs="?")
    parser.add_argument("test", nargs="?")
    parser.add_argument("--weights")
    parser.add_argument("--out", type=Path, default=Path("joint"))
    parser.add_argument("--budgets", nargs="+", default=["macs=0.7", "macs=0.5", "macs=0.4"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--draws", nargs="+", type=int, default=[0])
    parser.add_argument("--class-map", default="", help="text file with one class name per line")
    parser.add_argument("--images", type=int, help="calibration images; what the method asks for if not given")
    parser.add_argument("--probe", type=int, default=80)
    parser.add_argument("--limit", type=int, help="number of TEST images; all if not given")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--mean", type=float)
    parser.add_argument("--std", type=float)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--swaps", type=int, default=8)
    parser.add_argument("--time-batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--minutes", type=float, help="distil the stored children for so long")
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table is not None:
        print(table([json.loads(line) for line in args.table.read_text(encoding="utf-8").splitlines()]))
        return
    if args.test is None:
        parser.error("MODEL, TRAIN and TEST must be given, or --table RECORD.jsonl")
    bench, path = Bench(args), args.out / ("joint.jsonl" if args.minutes is None else "minutes.jsonl")
    if args.times:
        bench.times()
        return
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    done = {(line["row"], line["budget"], line["draw"], line.get("minutes")) for line in lines}
    for draw in args.draws:
        for budget in args.budgets:
            for row in args.rows:
                if (row, budget, draw, args.minutes) in done:
                    continue
                if args.minutes is None:
                    line = bench.record(row, budget, draw)
                else:
                    line = bench.distilled(row, budget, draw, args.minutes)
                line |= versions(images=bench.size[0], probe=args.probe, test=args.limit)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                lines.append(line)
                print(json.dumps(line), flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
