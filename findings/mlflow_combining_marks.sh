#!/usr/bin/env bash
# MLflow takes letters of any script in the name of a metric, but not the marks without which many scripts cannot be written.
#
# Seen with    mlflow 3.17.2, Python 3.11, Linux, 2026-11-30
# Input        one metric each with the name of a language in its own script, in a SQLite store
# Expected     all of them are taken, or none beyond ASCII is
# Seen         Chinese, Russian, Greek, Arabic and Korean are taken; Hindi, Tamil, Burmese and pointed Hebrew are refused with
#              INVALID_PARAMETER_VALUE, and the message speaks of alphanumerics: vowel signs are no letters to Python's \w
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet mlflow==3.17.2 || exit 2

cat > try.py <<'PY'
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

NAMES = {
    "Chinese": "中文",
    "Russian": "русский",
    "Greek": "ελληνικά",
    "Arabic": "العربية",
    "Korean": "한국어",
    "Hindi": "हिन्दी",
    "Tamil": "தமிழ்",
    "Burmese": "မြန်မာ",
    "Hebrew with points": "עִבְרִית",
}
client = MlflowClient("sqlite:///mlflow.db")
run = client.create_run("0").info.run_id
for language, name in NAMES.items():
    try:
        client.log_metric(run, name, 1.0)
        print(f"{language}: taken")
    except MlflowException as error:
        print(f"{language}: {error.error_code}")
PY
MLFLOW_DISABLE_TELEMETRY=true PYTHONIOENCODING=utf-8 venv/bin/python try.py > seen 2> log || { cat log >&2; exit 1; }

diff -u - seen <<'SEEN'
Chinese: taken
Russian: taken
Greek: taken
Arabic: taken
Korean: taken
Hindi: INVALID_PARAMETER_VALUE
Tamil: INVALID_PARAMETER_VALUE
Burmese: INVALID_PARAMETER_VALUE
Hebrew with points: INVALID_PARAMETER_VALUE
SEEN
