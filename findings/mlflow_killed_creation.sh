#!/usr/bin/env bash
# A SQLite store whose creation is killed can never be used again: MLflow finds its own half made table and gives up.
#
# Seen with    mlflow 3.17.2, Python 3.11, Linux, 2026-11-30
# Input        a new store, whose first process is killed while it copies a table; then another process
# Expected     the second process makes what is missing, or says what to do
# Seen         sqlite3.OperationalError: table _alembic_tmp_experiments already exists, for `mlflow db upgrade` as well
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet mlflow==3.17.2 || exit 2
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_TRACKING_URI=sqlite:///mlflow.db

cat > killed.py <<'PY'
import os
import signal

import sqlalchemy
from mlflow import MlflowClient


def kill(connection, cursor, statement, *others):
    if statement.startswith("INSERT INTO _alembic_tmp_experiments"):
        os.kill(os.getpid(), signal.SIGKILL)


sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", kill)
MlflowClient().search_experiments()
PY
venv/bin/python killed.py > log 2>&1 && exit 1
venv/bin/python -c "from mlflow import MlflowClient; MlflowClient().search_experiments()" > log 2>&1 && exit 1
grep -o "OperationalError) table _alembic_tmp_experiments already exists" log | sort -u > seen
venv/bin/mlflow db upgrade "$MLFLOW_TRACKING_URI" > log 2>&1 && exit 1
grep -o "OperationalError) table _alembic_tmp_experiments already exists" log | sort -u >> seen

diff -u - seen <<'SEEN'
OperationalError) table _alembic_tmp_experiments already exists
OperationalError) table _alembic_tmp_experiments already exists
SEEN
