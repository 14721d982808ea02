#!/usr/bin/env bash
# DeepSpeed's get_global_grad_norm() is None in every step of ZeRO stage 0 in float32, though it clips by that norm.
#
# Seen with    deepspeed 0.19.8, torch 2.13.0, Python 3.11, Linux, 2026-11-30
# Input        one process on a CPU, float32, gradient clipping on; a gradient whose norm is 5
# Expected     5 after a step, whatever the stage; the docstring names None for stages 1 and 2 with the norm disabled only
# Seen         None in stage 0, 5 in stages 1 and 2
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet setuptools==84.2.1 wheel==0.48.0 torch==2.13.0 numpy==2.2.6 || exit 2
DS_BUILD_OPS=0 venv/bin/pip install --quiet --no-build-isolation deepspeed==0.19.8 || exit 2

cat > try.py <<'PY'
import sys

import deepspeed
import torch

deepspeed.init_distributed(dist_backend="gloo")
model = torch.nn.Linear(2, 1, bias=False)
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    config={
        "train_batch_size": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": int(sys.argv[1])},
        "zero_allow_untested_optimizer": True,
    },
)
engine.backward(engine(torch.tensor([[3.0, 4.0]])).sum())
engine.step()
norm = engine.get_global_grad_norm()
with open("seen", "a") as file:
    print(f"stage {sys.argv[1]}:", norm if norm is None else round(float(norm), 4), file=file)
PY
for stage in 0 1 2; do
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29671 \
        venv/bin/python try.py "$stage" > log 2>&1 || { cat log >&2; exit 1; }
done

diff -u - seen <<'SEEN'
stage 0: None
stage 1: 5.0
stage 2: 5.0
SEEN
