"""The second process of `drawing`: jobs come in by stdin, pictures go out by stdout."""

from __future__ import annotations

import pickle
import sys

from moe_testbed.launcher.report.drawing import draw_here

if __name__ == "__main__":
    jobs = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps(draw_here(jobs)))
