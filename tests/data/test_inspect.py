import numpy as np

from moe_testbed.data.inspect import DomainCheck, check_domains, describe_store
from moe_testbed.data.tokens.store import Store


def test_description_names_every_domain_with_a_sample(store: Store):
    text = describe_store(store)
    for domain in store.domains:
        assert f"--- {domain}" in text
        assert f"{store.manifest['domains'][domain]['splits']['train']['tokens']:,}" in text


def test_distinct_alphabets_are_told_apart(store: Store):
    check = check_domains(store)
    assert check.domains == store.domains
    assert check.accuracy == 1.0
    assert "no chunk is confused" in str(check)


def test_the_most_confused_pairs_come_first():
    confusion = np.array([[8, 2, 0], [1, 9, 0], [0, 5, 5]])
    check = DomainCheck(("a", "b", "c"), 0.0, np.diag(confusion) / 10, confusion)
    assert check.most_confused() == [("c", "b", 0.5), ("a", "b", 0.2), ("b", "a", 0.1)]
    assert "c taken for b: 50.00%" in str(check)
