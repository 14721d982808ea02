"""Tells what an error of the store means: not this, not now, or nobody there. Nothing here imports MLflow.

Every error of MLflow has an ``error_code``; a server's own answer is a ``RestException``. Its client raises one with
the code INTERNAL_ERROR if it gets no answer, and if a server answers with status 500.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from moe_testbed.launcher.tracking.refusal import half_made_store, refused_for, store_of_files
from moe_testbed.launcher.tracking.uri import keeps_files, path_of

_ABOUT_CONTENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "ENDPOINT_NOT_FOUND", "FEATURE_DISABLED")
_LATER = ("TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED")
_NO_ANSWER = "INTERNAL_ERROR"
_TOO_LARGE = "failed with error code 413"
_HALF_MADE = re.compile(r"(table|index) \S+ already exists|duplicate column name")
_OF_ARTIFACTS = (
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    ImportError,
)


@contextlib.contextmanager
def refusals_of(uri: str) -> Iterator[None]:
    """Raises a `Refused` in the place of an error by which the store answers, unless it says to try again later."""
    try:
        yield
    except Exception as error:
        if keeps_files(uri) and "MLFLOW_ALLOW_FILE_STORE" in str(error):
            raise store_of_files(uri) from error
        if path_of(uri) is not None and _HALF_MADE.search(str(error)):
            raise half_made_store(uri) from error
        if _is_answer(error, uri):
            raise refused_for(uri, error) from error
        raise


def is_about_content(error: Exception) -> bool:
    """Tells whether an error says that what was sent is not taken, so that something else may be.

    Artifacts go to other places than the store, whose clients raise errors of the operating system, of HTTP, and of
    imports if their package is not installed.
    """
    code = getattr(error, "error_code", None)
    if code is not None:
        return code in _ABOUT_CONTENT or _TOO_LARGE in str(error)
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return isinstance(error, _OF_ARTIFACTS) or 400 <= status < 500


def is_servers_fault(error: Exception) -> bool:
    """Tells whether a server answered with status 500, such as one that cannot write artifacts. MLflow's client keeps
    its reason back."""
    return "too many 500 error responses" in str(error)


def _is_answer(error: Exception, uri: str) -> bool:
    code = getattr(error, "error_code", None)
    if code is None or code in _LATER:
        return False
    return path_of(uri) is not None or (type(error).__name__ == "RestException" and code != _NO_ANSWER)
