#!/usr/bin/env bash
# torch.set_flush_denormal(True) holds for threads that start later, and not for those that torch has already.
#
# Seen with    torch 2.13.0, Python 3.11, Linux on x86-64, two threads, 2026-11-30
# Input        a product of a million numbers 1e-20 with 1e-20, which is denormal in float32
# Expected     0 everywhere once the flag is set; its documentation speaks of no threads
# Seen         0 everywhere if it is set before the first operator that runs on two threads; if it is set after one, the half
#              of the product that the other thread makes stays denormal, and the call returns True all the same
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet torch==2.13.0 || exit 2

cat > try.py <<'PY'
import sys

import torch

torch.set_num_threads(2)
when = sys.argv[1]
if when == "before":
    assert torch.set_flush_denormal(True)
(torch.ones(1_000_000) * 2.0).sum()
if when == "after":
    assert torch.set_flush_denormal(True)
product = torch.full((1_000_000,), 1e-20) * 1e-20
print(f"set {when} the first operator on two threads: {int((product != 0).sum()):,} of 1,000,000 are not 0")
PY
for when in before after; do
  env -u OMP_NUM_THREADS venv/bin/python try.py "$when" >> seen 2> log || { cat log >&2; exit 1; }
done

diff -u - seen <<'SEEN'
set before the first operator on two threads: 0 of 1,000,000 are not 0
set after the first operator on two threads: 500,000 of 1,000,000 are not 0
SEEN
