#!/usr/bin/env bash
# MLflow's SQLite store returns an infinite metric as the largest finite number, without a warning.
#
# Seen with    mlflow 3.17.2, Python 3.11, Linux, 2026-11-30
# Input        a metric logged as inf, -inf and nan, as a training loss that diverges is
# Expected     the history gives inf, -inf and nan back
# Seen         1.7976931348623157e+308, -1.7976931348623157e+308 and nan: a search for infinite losses finds none, and
#              a mean over runs overflows only later
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet mlflow==3.17.2 || exit 2

cat > try.py <<'PY'
import mlflow

mlflow.set_tracking_uri("sqlite:///mlflow.db")
mlflow.set_experiment("diverging")
with mlflow.start_run() as run:
    for step, value in enumerate([2.5, float("inf"), float("-inf"), float("nan")]):
        mlflow.log_metric("loss", value, step=step)
for metric in mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss"):
    print(metric.step, metric.value)
PY
MLFLOW_DISABLE_TELEMETRY=true venv/bin/python try.py > seen 2> log || { cat log >&2; exit 1; }

diff -u - seen <<'SEEN'
0 2.5
1 1.7976931348623157e+308
2 -1.7976931348623157e+308
3 nan
SEEN
