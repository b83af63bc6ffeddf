#!/usr/bin/env bash
# Fine-tune on six shards while two workers are killed, compose, forget a shard, take the model out.
#
#   examples/shards.sh PRIVATE PUBLIC TEST OUT [local|ray] [options of tangent-ops finetune]
#
# PRIVATE, PUBLIC and TEST are folders with a folder of images for each class; OUT is a new one.
set -euo pipefail
private=$1 public=$2 test=$3 out=$4 executor=${5:-local}
shift 5 || shift $#
mkdir -p "$out"
say() { echo "\$ $*"; "$@"; }

say tangent-ops finetune "$private" --public "$public" --out "$out/run" --shards 6 \
    --executor "$executor" --workers 2 --retries 20 "$@" &
training=$!

descendants() {
    local child
    for child in $(pgrep -P "$1"); do
        echo "$child"
        descendants "$child"
    done
}

# As soon as a shard is done, the next two workers of this run that are at one are killed.
[ "$executor" = ray ] && worker=ray::attempt || worker=tangent_ops.shards.worker
until compgen -G "$out/run/deltas/*.safetensors" > /dev/null; do
    kill -0 $training
    sleep 0.05
done
killed=0
while [ $killed -lt 2 ] && kill -0 $training 2> /dev/null; do
    ours=$(descendants $training)
    victim=$(pgrep -f "$worker" | grep -Fx "$ours" | tail -n 1) || continue
    if kill -9 "$victim" 2> /dev/null; then killed=$((killed + 1)) && echo "killed a worker"; fi
    sleep 0.3
done
wait $training

say tangent-ops compose "$out/run" --out "$out/composed.safetensors"
say tangent-ops evaluate "$out/run" "$test"
say tangent-ops forget "$out/run" --shard shard-3 --yes
say tangent-ops compose "$out/run" --out "$out/without.safetensors"
say tangent-ops evaluate "$out/run" "$test"
say tangent-ops export "$out/run" "$out/model.pt2" --task-vector "$out/task.safetensors"

# Plain PyTorch: neither this library nor timm can be imported.
python - "$out/model.pt2" << 'END'
import sys

sys.modules["tangent_ops"] = sys.modules["timm"] = None
import torch

program = torch.export.load(sys.argv[1])
size = (2, *program.example_inputs[0][0].shape[1:])  # two images as large as it takes them
images = torch.linspace(-1, 1, torch.Size(size).numel()).reshape(size)
logits = program.module()(images)
print("logits of the exported model:", logits.flatten().tolist())
END
