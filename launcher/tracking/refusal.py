"""What a tracking store refuses for good, in words: waiting does not mend it, so each message says what does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


class Refused(Exception):
    """The store answers and does not take what it is sent. The message says why, and what helps."""


def deleted_run(folder: Path, uri: str, run_id: str) -> Refused:
    """The folder's run lies in the store's trash."""
    return Refused(
        f"MLflow run {run_id} was deleted, and what is new stays in {folder}; restore it "
        f"({_mlflow(uri)} runs restore --run-id {run_id}) and run `moe-testbed sync {_quoted(folder)}`, or make a new "
        f"one with `moe-testbed sync --new-runs {_quoted(folder)}`"
    )


def deleted_experiment(uri: str, name: str, experiment_id: str) -> Refused:
    """The experiment of a folder's run, or the one in which it would be made, lies in the store's trash."""
    return Refused(
        f"MLflow experiment {name!r} was deleted, and what is new stays in the folders of its runs; restore it "
        f"({_mlflow(uri)} experiments restore --experiment-id {experiment_id}) and run `moe-testbed sync FOLDER`, or "
        "take another with `moe-testbed sync --new-runs --experiment NAME FOLDER`"
    )


def store_of_files(uri: str) -> Refused:
    """This version of MLflow opens no store of files unless it is told to."""
    return Refused(
        f"MLflow no longer opens stores made of files, such as {uri}; set MLFLOW_TRACKING_URI to a database "
        "(sqlite:///mlflow.db; `mlflow migrate-filestore` makes one of the files), or MLFLOW_ALLOW_FILE_STORE=true"
    )


def half_made_store(uri: str) -> Refused:
    """MLflow cannot go on with the tables of a database on disk where a process that made them was killed."""
    return Refused(
        f"the tables of MLflow's database {uri} are half made, and if no process is making them now, MLflow cannot use "
        "it any more; move the file away and run `moe-testbed sync FOLDER`, which puts everything into a new one"
    )


def refused_for(uri: str, error: Exception) -> Refused:
    """The store gave a reason of its own."""
    return Refused(
        f"MLflow at {without_password(uri)} refuses what it is sent, which stays in the folder; mend the cause and run "
        f"`moe-testbed sync FOLDER`: {in_short(error, 600)}"
    )


def in_short(error: Exception, length: int = 250) -> str:
    """Returns one line with both ends of a long message: what was tried, and the cause."""
    text = without_password(" ".join(str(error).split())) or type(error).__name__
    first = length * 2 // 5
    return text if len(text) <= length else f"{text[:first]} … {text[first - length :]}"


def without_password(text: str) -> str:
    """Returns the text without the names and passwords of its URLs."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _mlflow(uri: str) -> str:
    return f"MLFLOW_TRACKING_URI={shlex.quote(without_password(uri))} mlflow"


def _quoted(folder: Path) -> str:
    return shlex.quote(str(folder))
