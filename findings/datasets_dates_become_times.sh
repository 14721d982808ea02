#!/usr/bin/env bash
# `datasets` reads a JSON field of strings as times if the first block of rows holds nothing but dates.
#
# Seen with    datasets 5.2.0, Python 3.11, Linux, 2026-11-30
# Input        JSON Lines whose field "text" is a string in every row
# Expected     a column of strings, with the texts as they are in the file
# Seen         rows that all look like dates become timestamps, so that "2020-01-01" comes back as a datetime; with one
#              ordinary sentence among the first rows the column is text; with the sentence far enough behind (some
#              megabytes) the file is not read at all, although every row is valid. Naming the type with
#              features=Features({"text": Value("string")}) reads the file and gives "2020-01-01 00:00:00", another text
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet datasets==5.2.0 || exit 2

cat > try.py <<'PY'
import json

from datasets import Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError


def read(name, texts, **options):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    try:
        rows = load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache", **options)
    except DatasetGenerationError as error:
        return f"{type(error.__cause__).__name__}: {error.__cause__}"
    return f"{rows.features['text']}, the first row is {rows[0]['text']!r}"


late = ["2020-01-01"] * 2_000_000 + ["hello"]
print("dates:", read("dates", ["2020-01-01", "2021-05-06"]))
print("dates and a sentence:", read("mixed", ["2020-01-01", "2021-05-06", "hello"]))
print("a sentence after many dates:", read("late", late))
print("the same, type named:", read("named", late, features=Features({"text": Value("string")})))
PY
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python try.py > seen 2> log || { cat log >&2; exit 1; }

diff -u - seen <<'SEEN'
dates: Value('timestamp[s]'), the first row is datetime.datetime(2020, 1, 1, 0, 0)
dates and a sentence: Value('string'), the first row is '2020-01-01'
a sentence after many dates: ArrowInvalid: Failed to parse string: 'hello' as a scalar of type timestamp[s]
the same, type named: Value('string'), the first row is '2020-01-01 00:00:00'
SEEN
