"""Fine-tune a real ViT-Ti on Caltech-101, to cut a second model with `joint.py`.

    python benchmarks/caltech.py DATA --out FOLDER
    python benchmarks/joint.py FOLDER/parent.safetensors FOLDER/images/train FOLDER/images/test --mean 0.5 --std 0.5 \
        --class-map FOLDER/images/classes.txt --out FOLDER/joint --threads 1 --rows joint "joint less tokens" \
        --budgets macs=0.7 macs=0.5 --draws 0 1 2

DATA is a folder with a ViT-Ti/16 state dict (``vit_tiny_patch16_224.safetensors``: AugReg, input scaled to mean 0.5 and
std 0.5) and ``caltech101_128.tar`` (class folders under train and test: 2,000 and 1,000 images of 100 classes).

128 px, 6 epochs, batch 32, AdamW at 1e-4 with a cosine, flips and shifts, seed 0; no distillation. Prints the top-1 on
the test images. Some minutes on one CPU core.
"""

import argparse
import tarfile
from pathlib import Path

import torch
from campaign import HALF, SIZES, training

from vitrim.data import Input, eval_loader, open_source
from vitrim.deploy import store
from vitrim.deploy.parent import open_parent
from vitrim.train import Train, fit
from vitrim.words.plain import load

TRAINING = training(SIZES["small"], 6, batch=32, lr=1e-4, distill={"kind": "none"}, smoothing=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    images = args.out / "images"
    if not images.exists():
        with tarfile.open(args.data / "caltech101_128.tar") as tar:
            tar.extractall(images, filter="data")
    weights = str(args.data / "vit_tiny_patch16_224.safetensors")
    model = open_parent("vit_tiny_patch16_224", weights=weights, arguments={"img_size": 128}, seed=0)
    torch.manual_seed(0)
    model.reset_classifier(100)
    given = Input.of(model, mean=HALF, std=HALF)
    train, test = (open_source(str(images / part), class_map=str(images / "classes.txt")) for part in ("train", "test"))
    fitted = fit(model, train, load(Train, TRAINING), input=given, seed=0, folder=args.out)
    found = fitted.model.cpu().eval()
    store.save(found, args.out / "parent.safetensors")
    with torch.no_grad():
        hits = torch.cat([found(x).argmax(1) == y for x, y in eval_loader(test, given, batch=64)])
    print(f"top-1 {100 * float(hits.double().mean()):.1f} % of {len(hits)} test images")


if __name__ == "__main__":
    main()
