"""What a child does that crashes."""

from __future__ import annotations

import os
import signal


def crash() -> None:
    """Ends as a fault in compiled code does."""
    os.kill(os.getpid(), signal.SIGSEGV)
