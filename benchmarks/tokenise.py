"""How fast is all text of a mix tokenised? `python benchmarks/tokenise.py [MIX] [CACHE_DIR]`.

The benchmark takes the path that `moe-testbed data build` takes, hashing and writing of its cache included; it builds
the store first if that is not there, and prints one line for each repeat and the median.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from moe_testbed.data.build import build_store
from moe_testbed.data.inspect import decoded_documents
from moe_testbed.data.loading import tokenise
from moe_testbed.data.splits import SPLITS
from moe_testbed.launcher.config.mix import load_mix

REPEATS = 5


def main(mix_path: str = "configs/mixes/packages8.yaml", cache_dir: str = "data_cache") -> None:
    store = build_store(load_mix(mix_path), Path(cache_dir), print)
    texts = [text for domain in store.domains for split in SPLITS for text in decoded_documents(store, split, domain)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    speeds = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as empty_cache:
            started = time.perf_counter()
            tokenise(texts, store.tokenizer_path, Path(empty_cache))
            speeds.append(megabytes / (time.perf_counter() - started))
        print(f"{speeds[-1]:.2f} MB/s")
    print(f"median {statistics.median(speeds):.2f} MB/s over {megabytes:.1f} MB, vocabulary {store.vocab_size}")
    print(json.dumps({"figures": {"tokenise": f"{statistics.median(speeds):.1f} MB/s"}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
