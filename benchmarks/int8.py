"""Eight bits on a real model: of which tensors, how wide the scales of activations, and what it costs in accuracy.

    python benchmarks/int8.py WEIGHTS TRAIN TEST --out benchmarks/int8.jsonl

WEIGHTS are those of timm's vit_tiny_patch16_224 (mean and std 0.5), TRAIN and TEST sources of ImageNet images. One
line a row: a percentile that scales of activations cover, or `weights`; `xml` is OpenVINO. Then, on a quiet machine,
the time of both files (one is kept by --keep, the other made by `vitrim export`):
`vitrim bench float.onnx int8.onnx --runtimes onnxruntime,openvino`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from vitrim.data import Input, eval_loader, split
from vitrim.deploy.parent import open_parent
from vitrim.deploy.quantize import quantize
from vitrim.words.plain import dump

ROWS = {
    "99.99": ("onnx", {"percentile": 99.99}),
    "100": ("onnx", {"percentile": 100}),
    "weights": ("onnx", {"weights_only": True}),
    "99.99 xml": ("xml", {"percentile": 99.99}),
    "weights xml": ("xml", {"weights_only": True}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--keep", type=Path, help="folder for the files of the first row")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    model = open_parent(asked.model, weights=asked.weights)
    fitting = Input.of(model, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    known = split(asked.train, asked.test, calibration=asked.calibration, validation=0, seed=0, classes=1000)
    images = eval_loader(known.calibration, fitting, batch=8)
    test = eval_loader(known.test, fitting, batch=50)
    for row in asked.rows:
        kind, how = ROWS[row]
        with tempfile.TemporaryDirectory() as folder:
            place = asked.keep if asked.keep is not None and row == asked.rows[0] else Path(folder)
            start = time.perf_counter()
            done = quantize(model, place / f"int8.{kind}", images, test=test, **how)
            record = {"row": row, "seconds": round(time.perf_counter() - start, 1), **dump(done)}
        record["path"] = f"int8.{kind}"
        with asked.out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
