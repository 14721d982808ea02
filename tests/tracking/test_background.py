"""Nobody waits for the background thread; no test here measures time."""

from __future__ import annotations

import threading

import pytest

from moe_testbed.launcher.tracking.background import Background
from moe_testbed.launcher.tracking.refusal import Refused


def fail() -> bool:
    raise RuntimeError("no\n route")


def test_starting_waits_for_no_call_and_ending_for_none_that_is_stuck(capsys: pytest.CaptureFixture[str]) -> None:
    begun, never = threading.Event(), threading.Event()
    background = Background("the store is away", "runs/a")
    background.start(lambda: (begun.set(), never.wait()), interval=0.0)
    assert begun.wait(60)  # the call is under way and never returns; this thread goes on
    assert not background.end(lambda: True, seconds=0.1)
    assert capsys.readouterr().err == "the store is away: no end within 0.1 seconds\n"


def test_the_last_call_comes_after_the_others_and_gives_the_result() -> None:
    calls: list[str] = []
    repeated = threading.Event()

    def call() -> None:
        calls.append("again")
        if len(calls) == 3:
            repeated.set()

    background = Background("away", "runs/a")
    background.start(call, interval=0.0)
    assert repeated.wait(60)
    assert background.end(lambda: calls.append("last") is None, seconds=60)
    assert calls[-1] == "last" and set(calls[:-1]) == {"again"}
    assert not Background("away", "runs/a").end(lambda: False, seconds=60)


def test_the_first_call_can_be_at_once() -> None:
    called = threading.Event()
    background = Background("away", "runs/a")
    background.start(called.set, interval=3600.0, at_once=True)
    assert called.wait(60)
    assert background.end(lambda: True, seconds=60)


def test_a_call_that_fails_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[None] = []
    thrice = threading.Event()

    def call() -> None:
        calls.append(None)
        if len(calls) == 3:
            thrice.set()
        fail()

    background = Background("away", "runs/a")
    background.start(call, interval=0.0)
    assert thrice.wait(60)
    assert not background.end(fail, seconds=60)
    assert capsys.readouterr().err == "away: no route\n"


def test_of_many_failures_the_first_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    background = Background("away", "runs/a")
    assert background.attempt(lambda: None)
    assert not background.attempt(fail)
    assert background.attempt(lambda: None)
    assert not background.attempt(fail)
    assert capsys.readouterr().err == "away: no route\n"


def test_a_long_reason_keeps_both_ends_and_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        raise RuntimeError(f"asking http://me:secret@store/api failed {'x' * 900} connection refused")

    assert not Background("away", "runs/a").attempt(call)
    told = capsys.readouterr().err
    assert told.startswith("away: asking http://store/api failed x") and told.endswith("x connection refused\n")
    assert len(told) < 300


def test_a_refusal_is_not_told_as_a_store_that_is_away_and_each_is_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(reason: str) -> None:
        raise Refused(reason)

    background = Background("away", "runs/a")
    for reason in ("deleted", "deleted", "full"):
        assert not background.attempt(lambda reason=reason: refuse(reason))
        assert not background.away
    assert not background.attempt(fail) and background.away
    assert background.attempt(lambda: None) and not background.away
    assert capsys.readouterr().err == "runs/a: deleted\nruns/a: full\naway: no route\n"
