#!/usr/bin/env bash
# torch's FlopCounterMode leaves attention out on a CPU, unless the math kernel is chosen.
#
# Seen with    torch 2.13.0, Python 3.11, Linux, 2026-11-30
# Input        scaled_dot_product_attention of 4 heads, 128 tokens, 16 numbers a head, forward and backward
# Expected     6 x 2 x 4 x 128 x 128 x 16 = 12,582,912: two matrix products forward, four backward
# Seen         0 with the kernel that torch takes by itself on a CPU; 12,582,912 with the math kernel. A model's count is
#              too low without a warning, by more the longer its sequences are
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet torch==2.13.0 numpy==2.2.6 || exit 2

cat > try.py <<'PY'
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

x = torch.randn(1, 4, 128, 16, requires_grad=True)
for name, kernel in (("by itself", nullcontext()), ("math", sdpa_kernel(SDPBackend.MATH))):
    with kernel, FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(x, x, x).sum().backward()
    print(f"{name}: {counter.get_total_flops():,}")
PY
venv/bin/python try.py > seen 2> log || { cat log >&2; exit 1; }

diff -u - seen <<'SEEN'
by itself: 0
math: 12,582,912
SEEN
