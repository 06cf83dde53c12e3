#!/usr/bin/env bash
# A real ImageNet ViT-Ti, searched shortly by SPViT: benchmarks/spvit_imagenet_vit_tiny.sh WEIGHTS TRAIN TEST OUT
#   WEIGHTS, TRAIN, TEST as in imagenet_vit_tiny.sh
# SPViT's two epochs of search train its weights too (dense model as teacher, no labels' loss), so the same budget by
# whole heads and neurons (`taylor`) is trained for two epochs in the same way, and shown without as well. Both are clipped at 1,
# which the published search is not. SPViT searches twice: with the published start and penalty, and from closed forms with a ramp (and prefix tokens that
# keep the attention); from those, once with the weights of the search and once fitted to the dense weights.
# Ends with a Markdown table of all runs on the screen. The searches and the training take about a quarter of an hour each.
set -euo pipefail
weights=$1 train=$2 test=$3 out=$4
common=(vit_tiny_patch16_224 --weights "$weights" --data "$train" --test "$test" --budget macs=0.8
  --set 'data.mean=[0.5,0.5,0.5]' --set 'data.std=[0.5,0.5,0.5]' --set measure.seconds=6)
short() { # the same short training, under the name of the table that it stands in
  echo "--set $1.epochs=2 --set $1.batch=16 --set $1.lr=2e-5 --set $1.schedule=constant --set $1.mixup=0 --set $1.cutmix=0
    --set $1.smoothing=0 --set $1.drop_path=0 --set $1.warmup_epochs=0 --set $1.clip=1 --set $1.augment.kind=light
    --set $1.distill.kind=soft --set $1.distill.alpha=1"
}
vitrim compress "${common[@]}" --method spvit --out "$out/spvit" $(short method.train) \
  --set method.gate_lr=0.02 --set method.inherit=search --set method.stop=false --set method.start=1.5 --set method.closing=penalty
vitrim compress "${common[@]}" --method spvit --out "$out/spvit-closed" $(short method.train) \
  --set method.init=closed_form --set method.inherit=search
vitrim compress "${common[@]}" --method spvit --out "$out/spvit-refitted" $(short method.train) \
  --set method.init=closed_form --set method.inherit=dense
vitrim compress "${common[@]}" --method taylor --out "$out/heads" --set method.choice=heads
vitrim compress "${common[@]}" --method taylor --out "$out/heads-trained" --set method.choice=heads $(short train)
vitrim report "$out"/*/
