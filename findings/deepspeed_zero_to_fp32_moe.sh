#!/usr/bin/env bash
# DeepSpeed writes zero_to_fp32.py into checkpoints of its own MoE layer, and it cannot read them.
#
# Seen with    deepspeed 0.19.8, torch 2.13.0, Python 3.11, Linux, 2026-11-30
# Input        a model with deepspeed.moe.layer.MoE (4 experts), ZeRO stage 1, one process on a CPU: two steps, save_checkpoint,
#              then `python zero_to_fp32.py . out` in the checkpoint's folder, as the script's own head says
# Expected     the weights in float32, experts included
# Seen         ValueError: ...layer_0_expert_0_mp_rank_00_model_states.pt is not a model state checkpoint: the script takes
#              the experts' files for those of ranks. The same without the MoE layer works
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet setuptools==84.2.1 wheel==0.48.0 torch==2.13.0 numpy==2.2.6 huggingface-hub==2.4.0 || exit 2
DS_BUILD_OPS=0 venv/bin/pip install --quiet --no-build-isolation deepspeed==0.19.8 || exit 2

cat > try.py <<'PY'
import sys

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

deepspeed.init_distributed(dist_backend="gloo")


class Model(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.moe = MoE(8, torch.nn.Linear(8, 8), num_experts=4) if kind == "moe" else None

    def forward(self, x):
        x = self.first(x)
        return (x if self.moe is None else self.moe(x)[0]).square().mean()


model = Model(sys.argv[1])
groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(groups),
    config={
        "train_batch_size": 4,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    },
)
for _ in range(2):
    engine.backward(engine(torch.ones(4, 8)))
    engine.step()
engine.save_checkpoint(sys.argv[1])
PY
for kind in dense moe; do
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29672 \
        venv/bin/python try.py "$kind" > log 2>&1 || { cat log >&2; exit 1; }
    if (cd "$kind" && DS_ACCELERATOR=cpu ../venv/bin/python zero_to_fp32.py . out) > log 2>&1; then
        echo "$kind: $(ls "$kind/out")" >> seen
    else
        echo "$kind: $(tail -n 1 log)" >> seen
    fi
done

diff -u - <(sed -E 's#: [^ ]*/(layer_0)#: \1#' seen) <<'SEEN'
dense: pytorch_model.bin
moe: ValueError: layer_0_expert_0_mp_rank_00_model_states.pt is not a model state checkpoint
SEEN
