"""The picture of the README: ``python benchmarks/picture.py [--out docs/accuracy_time.svg]``.

Top-1 on 500 ImageNet validation images against measured time, from committed records: ``joint_estimates.jsonl``
and ``joint_times.jsonl`` (benchmarks/joint.py), and for widths alone ``post_training.jsonl`` and
``post_training_latency.jsonl`` (benchmarks/post_training.py). Points are means over the draws of images; bars
are the standard error of one paired difference to the dense model on these images.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
KINDS = {
    ("joint", "joint_estimates.jsonl", "joint_times.jsonl"): ("vitrim, post_training", "#3949ab", "o"),
    ("widths", "post_training.jsonl", "post_training_latency.jsonl"): ("widths alone", "#9e9e9e", "s"),
}
"""By kind, its records and those of its times."""


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def points(kind: str, records: str, timed: str) -> list[tuple[float, float, float]]:
    """Return (time, top-1 in %, standard error) of each budget of `kind` that was timed."""
    lines = [r for r in read(timed) if r.get("threads", 1) == 1]
    times = {(r.get("row", r.get("kind")), r["budget"]): r.get("time_ratio", r.get("latency_ratio")) for r in lines}
    scores = [r for r in read(records) if r.get("row", r.get("kind")) == kind]
    found = []
    for budget in sorted({r["budget"] for r in scores}):
        runs = [r for r in scores if r["budget"] == budget]
        if (kind, budget) in times:
            top1, error = (mean(r[key] for r in runs) for key in ("top1", "change_error"))
            found.append((times[kind, budget], top1, error))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "accuracy_time.svg")
    args = parser.parse_args()
    plt.rcParams.update({"svg.hashsalt": "vitrim", "svg.fonttype": "path", "font.size": 10})
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    dense = read("post_training.jsonl")[0]["top1_dense"]
    axes.plot([1], [dense], marker="D", color="black", linestyle="none", label="dense ViT-Ti")
    axes.axhline(dense, color="black", linewidth=0.6, linestyle=":")
    for kind, (label, color, marker) in KINDS.items():
        x, y, error = zip(*points(*kind), strict=True)
        axes.errorbar(x, y, error, marker=marker, color=color, capsize=3, label=label)
    axes.set_xlabel("time per image, dense = 1 (CPU, one thread, batch 8)")
    axes.set_ylabel("ImageNet top-1, % (500 images)")
    axes.set_xlim(0.4, 1.05)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(args.out, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
