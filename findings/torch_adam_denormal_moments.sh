#!/usr/bin/env bash
# The moments of torch's AdamW never become 0 again: without gradient they decay to denormal numbers and stay there.
#
# Seen with    torch 2.13.0, Python 3.11, Linux, 2026-11-30
# Input        a weight with a gradient of 0.5 in one step and of 0 in the 4,000 steps after it, as an expert has that no
#              token chooses any more; betas 0.9 and 0.95
# Expected     both moments are 0: 0.9 to the power of 4,000 is less than any float32
# Seen         the first moment is 4, the second 9 times the smallest float32 above 0, for good, since 0.9 * 4 and 0.95 * 9
#              are rounded to 4 and 9; so it is in the plain, the foreach and the fused form. On a CPU an update of such
#              numbers takes ten times as long as of others, unless torch.set_flush_denormal(True) has been called
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet torch==2.13.0 || exit 2

cat > try.py <<'PY'
import torch

SMALLEST = 2.0**-149
for form in ({"foreach": False}, {"foreach": True}, {"fused": True}):
    weight = torch.nn.Parameter(torch.ones(8))
    adam = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.95), **form)
    for step in range(4_001):
        weight.grad = torch.full_like(weight, 0.0 if step else 0.5)
        adam.step()
    first, second = (float(adam.state[weight][name].double()[0]) for name in ("exp_avg", "exp_avg_sq"))
    print(f"{form}: {first / SMALLEST:g} and {second / SMALLEST:g} times the smallest number above 0")
PY
venv/bin/python try.py > seen 2> log || { cat log >&2; exit 1; }

diff -u - seen <<'SEEN'
{'foreach': False}: 4 and 9 times the smallest number above 0
{'foreach': True}: 4 and 9 times the smallest number above 0
{'fused': True}: 4 and 9 times the smallest number above 0
SEEN
