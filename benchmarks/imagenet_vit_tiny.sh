#!/usr/bin/env bash
# A real ImageNet ViT-Ti, cut by every method: benchmarks/imagenet_vit_tiny.sh WEIGHTS TRAIN TEST OUT
#   WEIGHTS  a ViT-Ti/16 224 state dict (AugReg; input scaled to mean 0.5, std 0.5)
#   TRAIN    ImageNet images in wnid folders or a tar of them (calibration, search)
#   TEST     other ImageNet images, the same way
# Ends with a Markdown table of all runs on the screen. Half an hour on two cores.
set -euo pipefail
weights=$1 train=$2 test=$3 out=$4
common=(vit_tiny_patch16_224 --weights "$weights" --data "$train" --test "$test"
  --set 'data.mean=[0.5,0.5,0.5]' --set 'data.std=[0.5,0.5,0.5]' --set measure.seconds=12)
for budget in 0.9 0.8 0.7; do
  for method in taylor magnitude random; do
    vitrim compress "${common[@]}" --method "$method" --budget "macs=$budget" --out "$out/$method-$budget"
  done
done
# ViT-Slim: one epoch of search on the 1,000 images against the dense model's output, no labels' loss, no retraining. Cosine, decay and
# clipping are not the published search's (constant, 1e-3, none); they are what the recorded figures were measured with.
for budget in 0.9 0.8 0.7; do
  vitrim compress "${common[@]}" --method vit_slim --budget "macs=$budget" --out "$out/vit_slim-$budget" \
    --set method.train.epochs=1 --set method.train.batch=16 --set method.train.lr=2e-5 \
    --set method.train.schedule=cosine --set method.train.weight_decay=0.05 --set method.train.clip=1 \
    --set method.train.mixup=0 --set method.train.cutmix=0 --set method.train.smoothing=0 \
    --set method.train.drop_path=0 --set method.train.augment.kind=light \
    --set method.train.distill.kind=soft --set method.train.distill.alpha=1 \
    --set method.penalty=published --set method.attention_l1=1e-3 --set method.mlp_l1=2.5e-4 --set method.gate_lr=0.02
done
vitrim report "$out"/*/
