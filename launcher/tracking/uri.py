"""Where the tracking store is. Nothing here knows MLflow."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

DEFAULT_STORE = "sqlite:///mlflow.db"
_FILE_STORE_ID_LENGTH = 18
_ELSEWHERE = re.compile(r"[\w+]+:|databricks$|uc$")


def store_uri() -> str:
    """Returns the store's URI, with an absolute path if it is on disk: MLFLOW_TRACKING_URI, or else
    sqlite:///mlflow.db in the working directory."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
    path = path_of(uri)
    if path is None:
        return uri
    return f"sqlite:///{path}" if _is_sqlite(uri) else path.as_uri()


def path_of(uri: str) -> Path | None:
    """Returns the file of a SQLite store or the folder of a store of files; None for one elsewhere."""
    if _is_sqlite(uri):
        return Path(uri.removeprefix("sqlite:///")).absolute()
    if uri.startswith("file:"):
        return Path(unquote(uri.removeprefix("file:").removeprefix("//"))).absolute()
    return None if _ELSEWHERE.match(uri) else Path(uri).absolute()


def keeps_files(uri: str, experiment_id: str = "") -> bool:
    """Tells whether a store keeps every key of a run as a file. One behind a server is known by the numbers that it
    gives its experiments (`mlflow.utils.name_utils`); a database counts from one."""
    on_disk = path_of(uri) is not None and not _is_sqlite(uri)
    return on_disk or len(experiment_id) == _FILE_STORE_ID_LENGTH


def _is_sqlite(uri: str) -> bool:
    return uri.startswith("sqlite:///")
