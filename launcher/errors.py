"""Errors, the exit statuses that tell of them, and the one place where an error becomes a line on stderr."""

from __future__ import annotations

import errno
import re
import signal
import sys
from collections.abc import Callable

from moe_testbed.data.errors import DataError
from moe_testbed.routing.errors import RouterError

FAILED = 1
"""Exit status after a failure that is not the user's to mend, or after a command of which a part failed."""

WRONG_INPUT = 2
"""Exit status after one of the errors in `MENDABLE`."""

ASKED_TO_STOP = 75
"""Exit status of a training that a signal has stopped, and that the same command continues (EX_TEMPFAIL)."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C."""

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "make it writable or choose another folder",
    errno.EPERM: "make it writable or choose another folder",
    errno.EROFS: "make it writable or choose another folder",
}
"""What helps against an error of the operating system."""


class ConfigError(ValueError):
    """A configuration is wrong: the message names where, the value, what is allowed and how to mend it."""


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or does not fit the configuration."""


class DivergedError(ValueError):
    """A loss, a gradient or a weight is not finite; the message names the step, the layer where it began and what to
    try."""


class OtherRankError(RuntimeError):
    """Another rank ended for one of these errors, and this one cannot go on without it; the message is its reason."""


class LostRankError(RuntimeError):
    """A rank has died, hangs or cannot be reached; the message names it, its host and the step. Told already, by one
    of the others."""


class AskedToStop(Exception):
    """A signal has asked the training to stop; a checkpoint is written, and the same command continues."""


MENDABLE = (CheckpointError, ConfigError, DataError, DivergedError, RouterError)
"""What a user can mend, on the rank that meets it."""


_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; what a user can mend becomes one line on stderr."""
    try:
        return command()
    except (*MENDABLE, OtherRankError) as error:
        return _complain(str(error))
    except AskedToStop as stop:
        print(f"moe-testbed: {stop}; the same command continues", file=sys.stderr)
        return ASKED_TO_STOP
    except LostRankError:
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED
    except OSError as error:
        if error.errno is None or not (error.filename or error.errno in REMEDIES):
            raise
        where = f" ({error.filename})" if error.filename else ""
        remedy = REMEDIES.get(error.errno, "correct this path")
        return _complain(f"{error.strerror}{where}: {remedy}, then repeat the command; what is finished is kept")


def _complain(message: str) -> int:
    print(f"moe-testbed: {visible(' '.join(message.split()))}", file=sys.stderr)
    return WRONG_INPUT


def visible(text: str) -> str:
    r"""Returns a text in which control characters, marks that turn the direction of writing, and halves of surrogate
    pairs stand as escapes, such as \x1b or \u202e."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
