"""What is told of ranks that fail."""

from __future__ import annotations

import pytest

from tests.processes.crash import crash
from tests.processes.ranks import run_on_ranks


def test_a_rank_that_crashes_says_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[-11\]"):
        run_on_ranks(crash, 1)
    told = capsys.readouterr().err
    assert "Fatal Python error: Segmentation fault" in told and "crash.py" in told
