"""The two smallest packages of the default mix, from whatever index this machine has."""

from pathlib import Path

import pytest
import yaml

from moe_testbed.data.build import build_store
from moe_testbed.data.config import MixConfig
from moe_testbed.data.errors import DataError

MIX = Path(__file__).parents[2] / "configs" / "mixes" / "packages8.yaml"


@pytest.mark.network
def test_two_packages_become_a_store(tmp_path: Path):
    settings = yaml.safe_load(MIX.read_text(encoding="utf-8"))
    settings["domains"] = {name: settings["domains"][name] for name in ("chinese", "ukrainian")}
    settings |= {"name": "network", "vocab_size": 1024, "max_bytes_per_domain": 3_000_000, "strict": True}
    mix = MixConfig.model_validate(settings)
    try:
        store = build_store(mix, tmp_path, lambda _: None)
    except DataError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(f"no package index answers: {error}")
    assert store.domains == ("chinese", "ukrainian")
    assert min(len(store.tokens_of("train", domain)) for domain in store.domains) > 100_000
