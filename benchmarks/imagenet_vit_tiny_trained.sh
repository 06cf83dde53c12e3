#!/usr/bin/env bash
# A real ImageNet ViT-Ti, cut by every method and trained one epoch: benchmarks/imagenet_vit_tiny_trained.sh WEIGHTS TRAIN TEST OUT
#   arguments as of benchmarks/imagenet_vit_tiny.sh
# Every child, and the dense model as control, learns the dense model's output on TRAIN for the same epoch; ViT-Slim has
# one epoch of search before, for channels alone and for channels and tokens together. Its schedule, decay and clipping are not
# the published search's (constant, 1e-3, none); they are what the recorded figures were measured with. 45 minutes on one thread.
set -euo pipefail
weights=$1 train=$2 test=$3 out=$4
common=(vit_tiny_patch16_224 --weights "$weights" --data "$train" --test "$test"
  --set 'data.mean=[0.5,0.5,0.5]' --set 'data.std=[0.5,0.5,0.5]' --set measure.seconds=8
  --epochs 1 --set train.batch=16 --set train.lr=1e-4 --set train.warmup_epochs=0.1 --set train.weight_decay=0.01
  --set train.distill.kind=soft --set train.distill.alpha=1 --set train.augment.kind=light)
search=(--method vit_slim
  --set method.train.epochs=1 --set method.train.batch=16 --set method.train.lr=2e-5
  --set method.train.schedule=cosine --set method.train.weight_decay=0.05 --set method.train.clip=1
  --set method.train.mixup=0 --set method.train.cutmix=0 --set method.train.smoothing=0
  --set method.train.drop_path=0 --set method.train.augment.kind=light
  --set method.train.distill.kind=soft --set method.train.distill.alpha=1
  --set method.penalty=published --set method.attention_l1=1e-3 --set method.mlp_l1=2.5e-4 --set method.gate_lr=0.02)
vitrim compress "${common[@]}" --method magnitude --budget macs=1.0 --out "$out/dense"
for budget in 0.7 0.5; do
  vitrim compress "${common[@]}" "${search[@]}" --budget "macs=$budget" --out "$out/vit_slim-$budget"
  vitrim compress "${common[@]}" "${search[@]}" --set method.token_l1=5e-4 --budget "macs=$budget" \
    --out "$out/vit_slim_tokens-$budget"
  for method in taylor magnitude random; do
    vitrim compress "${common[@]}" --method "$method" --budget "macs=$budget" --out "$out/$method-$budget"
  done
done
vitrim report "$out"/*/
