"""The sampler against a definition that draws one piece after the other, and the properties that it promises."""

from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest

from moe_testbed.data.errors import DataError
from moe_testbed.data.tokens.held_out import evaluation_batches
from moe_testbed.data.tokens.pattern import largest_remainder, make_pattern
from moe_testbed.data.tokens.permutation import key_of, permute, shuffled
from moe_testbed.data.tokens.sampler import Batch, Sampler
from moe_testbed.data.tokens.store import Store

LENGTH, ROWS = 16, 12
WEIGHTS = {"latin": 0.5, "greek": 0.3, "digits": 0.2}
FORMS = [{"packing": "single_domain"}, {"packing": "packed", "pieces_per_sequence": 4}]


def sampler_of(store: Store, seed: int = 1, **settings) -> Sampler:
    return Sampler(store, sequence_length=LENGTH, batch_size=ROWS, seed=seed, domain_weights=WEIGHTS, **settings)


def naive_pieces(store: Store, seed: int, step: int, pieces: int) -> list[tuple[int, int]]:
    """(domain, first token) of the pieces of a batch in row order, by counting all draws from the very first."""
    # With shares 5 : 3 : 2 the k-th of n slots of a domain lies at (k + 1/2) / n of the period.
    places = sorted((Fraction(2 * k + 1, 2 * n), d) for d, n in enumerate((5, 3, 2)) for k in range(n))
    period = [domain for _, domain in places]
    drawn: Counter[int] = Counter()
    length = LENGTH // pieces
    draws = []
    for number in range((step + 1) * ROWS * pieces):
        domain = period[number % len(period)]
        chunks = (len(store.tokens_of("train", domain)) - 1) // length
        epoch, index = divmod(drawn[domain], chunks)
        drawn[domain] += 1
        draws.append((domain, epoch, index, chunks))
    result = []
    for place in shuffled(ROWS * pieces, key_of(seed, step)):
        domain, epoch, index, chunks = draws[step * ROWS * pieces + int(place)]
        key = key_of(seed, domain, epoch)
        chunk = int(permute(np.array([index]), np.array([chunks]), key)[0])
        result.append((domain, store.region("train", domain).first_token + chunk * length))
    return result


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["packing"])
def test_chosen_rows_are_those_of_the_whole_batch(store: Store, form: dict):
    sampler, rows_B = sampler_of(store, **form), np.array([7, 2, 3, 11])
    whole, chosen = sampler.batch(5), sampler.rows(5, rows_B)
    for name, values in vars(whole).items():
        assert np.array_equal(vars(chosen)[name], values[rows_B]), name


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["packing"])
@pytest.mark.parametrize("step", [0, 1, 37])
def test_batches_are_as_defined(store: Store, form: dict, step: int):
    pieces = form.get("pieces_per_sequence", 1)
    batch = sampler_of(store, **form).batch(step)
    tokens = np.asarray(store.tokens).astype(np.int64)
    length = LENGTH // pieces
    for number, (domain, first) in enumerate(naive_pieces(store, 1, step, pieces)):
        row, column = divmod(number, pieces)
        place = (row, slice(column * length, (column + 1) * length))
        assert np.array_equal(batch.token_ids_BL[place], tokens[first : first + length])
        assert np.array_equal(batch.targets_BL[place], tokens[first + 1 : first + length + 1])
        assert (batch.domain_BL[place] == domain).all()
        for offset, document in enumerate(batch.document_BL[place]):
            start, end = store.document_starts[document : document + 2]
            assert start <= first + offset < end
    assert np.array_equal(batch.position_BL, np.tile(np.arange(LENGTH), (ROWS, 1)))
    assert np.array_equal(batch.sequence_B, step * ROWS + np.arange(ROWS))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["packing"])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 12])
def test_any_slicing_gives_the_same_rows(store: Store, form: dict, parts: int):
    whole = sampler_of(store, **form).batch(5)
    step = ROWS // parts
    slices = [sampler_of(store, **form).batch(5, start, start + step) for start in range(0, ROWS, step)]
    for name in Batch.__dataclass_fields__:
        assert np.array_equal(np.concatenate([getattr(part, name) for part in slices]), getattr(whole, name))
        assert getattr(whole, name).dtype == np.int64


def test_an_empty_slice_is_empty(store: Store):
    assert sampler_of(store).batch(0, 3, 3).token_ids_BL.shape == (0, LENGTH)


def test_each_epoch_visits_each_chunk_once(store: Store):
    sampler = sampler_of(store)
    visits: dict[int, list[int]] = defaultdict(list)
    draws = int(max(sampler.chunks_D)) * 3 * 10
    order = np.arange(draws)
    domain, draw = sampler.pattern.draw(order)
    epoch, index = np.divmod(draw, sampler.chunks_D[domain])
    chunk = permute(index, sampler.chunks_D[domain], key_of(sampler.seed, domain, epoch))
    for d, c in zip(domain.tolist(), chunk.tolist(), strict=True):
        visits[d].append(c)
    for d, chunks in enumerate(sampler.chunks_D.tolist()):
        epochs = [visits[d][first : first + chunks] for first in range(0, len(visits[d]) - chunks + 1, chunks)]
        assert len(epochs) >= 2
        assert all(sorted(visited) == list(range(chunks)) for visited in epochs)
        assert epochs[0] != epochs[1], "epochs have different orders"


def test_proportions_are_exact_over_a_period_and_near_in_every_batch(store: Store):
    sampler = sampler_of(store)
    counts = np.stack([np.bincount(sampler.batch(step).domain_BL[:, 0], minlength=3) for step in range(10)])
    assert counts.sum(axis=0).tolist() == [60, 36, 24]
    assert np.abs(counts - ROWS * np.array([0.5, 0.3, 0.2])).max() <= 1


def test_seeds_and_steps_differ(store: Store):
    first = sampler_of(store).batch(0).token_ids_BL
    assert not np.array_equal(first, sampler_of(store).batch(1).token_ids_BL)
    assert not np.array_equal(first, sampler_of(store, seed=2).batch(0).token_ids_BL)


def test_far_steps_cost_no_more(store: Store):
    assert sampler_of(store).batch(10**12).token_ids_BL.shape == (ROWS, LENGTH)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permute_is_a_permutation(size: int):
    index = np.arange(size)
    result = permute(index, np.full(size, size), np.repeat(key_of(7), size))
    assert sorted(result.tolist()) == index.tolist()


def test_permute_is_near_uniform():
    """Where 0 of 8 goes under 8,000 keys: a chi-squared of 7 degrees of freedom is above 30 once in 10,000 times."""
    trials = 8000
    images = permute(np.zeros(trials, dtype=np.int64), np.full(trials, 8), key_of(np.arange(trials)))
    counts = np.bincount(images, minlength=8)
    assert ((counts - trials / 8) ** 2 / (trials / 8)).sum() < 30


def test_numbers_are_the_same_everywhere():
    """Written down once: a change would give every run other batches."""
    assert [int(key) for key in key_of(1, np.array([0, 2]))] == [6791897765849424158, 13608149317741381227]
    assert shuffled(8, key_of(3)).tolist() == [2, 4, 7, 5, 6, 1, 3, 0]
    assert permute(np.arange(8), np.full(8, 10), np.repeat(key_of(5), 8)).tolist() == [6, 2, 4, 5, 1, 8, 9, 7]


@pytest.mark.parametrize(
    "weights, counts", [([1, 1, 1], [1, 1, 1]), ([0.5, 0.3, 0.2], [5, 3, 2]), ([2, 0, 1], [2, 0, 1])]
)
def test_patterns_are_as_short_as_they_can_be(weights: list[float], counts: list[int]):
    pattern = make_pattern(weights)
    assert pattern.counts_D.tolist() == counts
    assert len(pattern.domains_X) == sum(counts)


def test_a_pattern_spreads_its_slots_evenly():
    pattern = make_pattern([0.61, 0.27, 0.12])
    for length in range(1, len(pattern.domains_X) + 1):
        counts = np.bincount(pattern.domains_X[:length], minlength=3)
        assert np.abs(counts - length * np.array([0.61, 0.27, 0.12])).max() <= 1.5


def test_irrational_weights_fall_back_to_the_longest_period():
    pattern = make_pattern([3.14159265358979, 2.71828182845905])
    assert len(pattern.domains_X) == 4096
    assert pattern.counts_D[0] / 4096 == pytest.approx(3.14159265358979 / 5.85987448204884, abs=1 / 4096)


def test_largest_remainder():
    assert largest_remainder([Fraction(1, 3)] * 3, 4) == [2, 1, 1]
    assert largest_remainder([Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)], 7) == [4, 2, 1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sequence_length": 0}, "must be at least 1"),
        ({"sequence_length": 10, "packing": "packed", "pieces_per_sequence": 3}, "cannot be cut into 3 equal pieces"),
        ({"sequence_length": 10**6}, "tokens in the split 'train', too few for a sequence of 1000000"),
        ({"domain_weights": {"latin": 1, "greek": 1}}, r"missing: digits"),
        ({"domain_weights": {"latin": 1, "greek": 1, "digits": 1, "runes": 1}}, "unknown: runes"),
        ({"domain_weights": {"latin": 0, "greek": 0, "digits": 0}}, "one at least must be positive"),
        ({"domain_weights": {"latin": 1, "greek": 1, "digits": 1e-9}}, "less than one draw in 4096"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(store: Store, settings: dict, message: str):
    with pytest.raises(DataError, match=message):
        Sampler(store, **({"sequence_length": LENGTH, "batch_size": 4, "seed": 0} | settings))


def test_evaluation_batches_are_fixed_and_distinct(store: Store):
    batches = list(evaluation_batches(store, "validation", LENGTH, sequences_per_domain=5, batch_size=4))
    assert [len(batch.sequence_B) for batch in batches] == [4, 4, 4, 3]
    assert np.concatenate([batch.sequence_B for batch in batches]).tolist() == list(range(15))
    domains = np.concatenate([batch.domain_BL[:, 0] for batch in batches])
    assert domains.tolist() == [0, 1, 2] * 5
    rows = {tuple(row) for batch in batches for row in batch.token_ids_BL}
    assert len(rows) == 15
    first, end = store.regions["validation"][0].first_document, store.regions["validation"][-1].end_document
    assert all(((first <= batch.document_BL) & (batch.document_BL < end)).all() for batch in batches)


def test_evaluation_takes_what_there_is(store: Store):
    batches = list(evaluation_batches(store, "tuning", LENGTH, sequences_per_domain=10**6, batch_size=64))
    expected = sum((len(store.tokens_of("tuning", domain)) - 1) // LENGTH for domain in store.domains)
    assert sum(len(batch.sequence_B) for batch in batches) == expected
