"""What objectives make of text, against what can be read off the result: the text must come back from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from moe_testbed.data.objectives import NO_TARGET, Objective, SpecialIds, Task, objective_names
from moe_testbed.data.tokens.sampler import Batch

PIECES, LENGTH = 50, 40
ALL: list[dict[str, Any]] = [
    {"name": "next_token"},
    {"name": "masked"},
    {"name": "masked", "rate": 0.15, "masked": 0.5, "random": 0.5},
    {"name": "denoising"},
    {"name": "denoising", "rate": 0.3, "mean_span": 1, "mark": "mask"},
    {"name": "denoising", "rate": 0.5, "mean_span": 5, "mark": "sentinel"},
    {"name": "denoising", "mark": "sentinel", "target": "spans"},
    {"name": "prefix"},
]
DENOISING = [options for options in ALL if options["name"] == "denoising"]


def batch_of(sequences: int, first: int = 0, length: int = LENGTH) -> Batch:
    """Tokens that tell their place: at place l of sequence b there is (3 b + l) modulo the number of pieces."""
    numbers_B = np.arange(first, first + sequences)
    tokens_BL = (3 * numbers_B[:, None] + np.arange(length + 1)) % PIECES
    shape = (sequences, length)
    return Batch(
        token_ids_BL=tokens_BL[:, :-1],
        targets_BL=tokens_BL[:, 1:],
        domain_BL=np.broadcast_to(numbers_B[:, None] % 3, shape),
        document_BL=np.broadcast_to(numbers_B[:, None], shape),
        position_BL=np.broadcast_to(np.arange(length), shape),
        sequence_B=numbers_B,
    )


def objective_of(options: dict[str, Any]) -> Objective:
    found = objective_names.parse(options)
    assert isinstance(found, Objective)
    return found


def task_of(options: dict[str, Any], batch: Batch, seed: int = 1) -> tuple[Task, SpecialIds]:
    objective = objective_of(options)
    ids = objective.special_ids(PIECES, LENGTH)
    return objective.apply(batch, (1, seed), ids), ids


def rows(task: Task, stack: str) -> list[list[int]]:
    """What a stack reads, without padding."""
    reading = task.readings[stack]
    valid_BX = np.ones_like(reading.token_ids_BX, dtype=bool) if reading.valid_BX is None else reading.valid_BX
    for valid_X in valid_BX:
        assert not np.any(np.diff(valid_X.astype(int)) > 0), "padding comes last"
    return [ids_X[valid_X].tolist() for ids_X, valid_X in zip(reading.token_ids_BX, valid_BX, strict=True)]


def equal(one: Task, other: Task, part: slice) -> bool:
    same = np.array_equal(one.targets_BX[part], other.targets_BX)
    for stack, reading in one.readings.items():
        for name, values in vars(reading).items():
            if values is not None:
                same &= np.array_equal(values[part], getattr(other.readings[stack], name))
    return bool(same)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_sequence_is_given_alike_whatever_it_is_batched_with(options: dict[str, Any]) -> None:
    whole, _ = task_of(options, batch_of(12))
    for first, size in ((0, 12), (0, 5), (5, 7), (11, 1)):
        part, _ = task_of(options, batch_of(size, first))
        assert equal(whole, part, slice(first, first + size))


@pytest.mark.parametrize("options", ALL[1:], ids=str)
def test_seeds_and_sequences_draw_by_themselves(options: dict[str, Any]) -> None:
    same_text = batch_of(1)
    others = [Batch(**{**vars(same_text), "sequence_B": np.array([number])}) for number in range(6)]
    given = [task_of(options, batch) for batch in others]
    assert len({str(task.readings) for task, _ in given}) == 6
    assert str(task_of(options, same_text, seed=2)[0].readings) != str(given[0][0].readings)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_every_token_stands_for_its_place_in_the_text(options: dict[str, Any]) -> None:
    """Ids that are pieces come from the place that is said, but for those that a masked model gets at random."""
    batch = batch_of(20)
    task, _ = task_of(options, batch)
    objective = objective_of(options)
    wrong = total = 0
    for stack, reading in task.readings.items():
        assert reading.token_ids_BX.shape == (20, objective.lengths(LENGTH)[stack])
        text_BX = np.take_along_axis(batch.token_ids_BL, reading.source_BX, axis=1)
        piece_BX = reading.token_ids_BX < PIECES
        if reading.valid_BX is not None:
            piece_BX &= reading.valid_BX
            assert reading.valid_BX.sum(1).min() >= objective.shortest(LENGTH)
        wrong += int((text_BX != reading.token_ids_BX)[piece_BX].sum())
        total += int(piece_BX.sum())
    assert wrong <= (total * 0.2 if options["name"] == "masked" else 0)


def test_next_token_is_the_text_as_it_is() -> None:
    batch = batch_of(4)
    task, _ = task_of({"name": "next_token"}, batch)
    assert np.array_equal(task.readings["decoder"].token_ids_BX, batch.token_ids_BL)
    assert np.array_equal(task.targets_BX, batch.targets_BL)


def test_masked_places_are_as_many_in_every_sequence_and_treated_in_the_shares_asked_for() -> None:
    batch = batch_of(3_000)
    task, ids = task_of({"name": "masked", "rate": 0.3, "masked": 0.7, "random": 0.2}, batch)
    read_BL, wanted_BL = task.readings["encoder"].token_ids_BX, task.targets_BX != NO_TARGET
    assert set(wanted_BL.sum(1)) == {12}
    assert np.array_equal(task.targets_BX[wanted_BL], batch.token_ids_BL[wanted_BL])
    assert np.array_equal(read_BL[~wanted_BL], batch.token_ids_BL[~wanted_BL])
    # 36,000 places: three standard deviations of a share are below 0.008.
    assert abs(np.mean(read_BL[wanted_BL] == ids.mask) - 0.7) < 0.008
    kept = np.mean(read_BL[wanted_BL] == batch.token_ids_BL[wanted_BL])
    assert abs(kept - (0.1 + 0.2 / PIECES)) < 0.008
    assert abs(wanted_BL.mean(0) - 0.3).max() < 0.03, "every place alike"
    replaced = read_BL[wanted_BL & (read_BL != ids.mask) & (read_BL != batch.token_ids_BL)]
    assert len(set(replaced.tolist())) == PIECES


@pytest.mark.parametrize("options", DENOISING, ids=str)
def test_the_whole_text_comes_back_from_what_was_left_and_what_was_taken(options: dict[str, Any]) -> None:
    """Puts the pieces of every gap back to where the encoder's text has it, token by token."""
    batch = batch_of(200)
    task, ids = task_of({**options, "target": options.get("target", "whole")}, batch)
    encoder, decoder = rows(task, "encoder"), rows(task, "decoder")
    spans_alone = options.get("target") == "spans"
    for text_L, read, written, target_X, kind_X in zip(
        batch.token_ids_BL.tolist(), encoder, decoder, task.targets_BX, task.kinds_BX, strict=True
    ):
        target = [int(token) for token in target_X if token != NO_TARGET]
        assert written == [ids.start, *target[:-1]]
        kinds = kind_X[target_X != NO_TARGET].tolist()
        if spans_alone:
            restored: list[int] = []
            spans = spans_by_mark(target, kinds)
            for token in read:
                restored += spans.pop(token) if token >= PIECES else [token]
            assert restored == text_L
            assert list(spans.values()) == [[]], "the last mark ends the text"
        else:
            assert target == text_L
            kept = [token for token, kind in zip(target, kinds, strict=True) if kind == 0]
            assert [token for token in read if token < PIECES] == kept
            gaps = sum(kind == 1 for kind in kinds)
            marks = [token for token in read if token >= PIECES]
            expected = {"none": [], "mask": [ids.mask] * gaps, "sentinel": list(range(PIECES, PIECES + gaps))}
            assert marks == expected[options.get("mark", "none")]
            # A gap's first token follows one that was kept, and its others follow a token of the gap.
            for before, kind in zip([0, *kinds[:-1]], kinds, strict=True):
                assert (kind == 1) <= (before == 0) and (kind == 2) <= (before in (1, 2))


def spans_by_mark(target: list[int], kinds: list[int]) -> dict[int, list[int]]:
    spans: dict[int, list[int]] = {}
    for token, kind in zip(target, kinds, strict=True):
        if token >= PIECES:
            assert kind == 3
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
            assert kind == (1 if len(spans[list(spans)[-1]]) == 1 else 2)
    return spans


def test_what_is_missing_is_drawn_evenly_around_the_rate() -> None:
    task, _ = task_of({"name": "denoising", "rate": 0.2, "mean_span": 2}, batch_of(4_000))
    assert task.kinds_BX is not None
    missing_B = (task.kinds_BX > 0).sum(1)
    counts = Counter(missing_B.tolist())
    assert sorted(counts) == list(range(4, 13))
    # 4,000 draws of nine numbers: 444 each, with a standard deviation of 20.
    assert all(abs(count - 4_000 / 9) < 90 for count in counts.values())
    share_L = (task.kinds_BX > 0).mean(0)
    assert abs(share_L[5:-5] - share_L.mean()).max() < 0.05


def test_lengths_of_spans_are_those_of_poisson() -> None:
    """But none is empty, and the last of a sequence is cut to what is missing; so the first one is looked at."""
    task, _ = task_of({"name": "denoising", "rate": 0.5, "mean_span": 2}, batch_of(6_000))
    assert task.kinds_BX is not None
    firsts = []
    for kinds in task.kinds_BX.tolist():
        start = kinds.index(1)
        if kinds.count(1) > 1:
            firsts.append(next(n for n in range(1, LENGTH) if start + n == LENGTH or kinds[start + n] != 2))
    counts = Counter(firsts)
    expected = {1: 0.1353 + 0.2707, 2: 0.2707, 3: 0.1804, 4: 0.0902}
    for length, share in expected.items():
        assert abs(counts[length] / len(firsts) - share) < 0.03


def test_prefix_and_rest_are_the_text() -> None:
    batch = batch_of(300)
    task, ids = task_of({"name": "prefix", "shortest_share": 0.25}, batch)
    cuts = []
    for text, read, written, target_X in zip(
        batch.token_ids_BL.tolist(), rows(task, "encoder"), rows(task, "decoder"), task.targets_BX, strict=True
    ):
        target = [int(token) for token in target_X if token != NO_TARGET]
        assert read + target == text and written == [ids.start, *target[:-1]]
        cuts.append(len(read))
    assert (min(cuts), max(cuts)) == (10, 30)


def test_special_ids_follow_the_pieces_and_leave_the_embedding_a_multiple_of_eight() -> None:
    ids = SpecialIds(2048)
    assert (ids.start, ids.mask, ids.rows) == (2048, 2049, 2056)
    ids = SpecialIds(2046, 9)
    assert (ids.start, ids.mask, ids.rows) == (2055, 2056, 2064)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_the_mean_number_of_targets_is_near_what_is_said(options: dict[str, Any]) -> None:
    task, _ = task_of(options, batch_of(2_000))
    counted = (task.targets_BX != NO_TARGET).sum(1).mean()
    assert objective_of(options).mean_targets(LENGTH) == pytest.approx(counted, rel=0.08)


def test_bad_options_are_told_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"Unknown objective 'maskd'\. Did you mean 'masked'\?"):
        objective_names.parse("maskd")
    with pytest.raises(ValueError, match=r"objective\.target is spans with objective\.mark none"):
        objective_names.parse({"name": "denoising", "target": "spans"})
    with pytest.raises(ValueError, match=r"objective\.masked is 0\.9 and objective\.random 0\.2"):
        objective_names.parse({"name": "masked", "masked": 0.9, "random": 0.2})
    refusal = objective_of({"name": "denoising"}).refusal(8)
    assert refusal is not None and "use at least 14 tokens" in refusal
