"""The tests of training share the ranks and the data of the distributed ones."""

from tests.distributed.conftest import data, make_experiment, run_on_ranks, run_until_killed

__all__ = ["data", "make_experiment", "run_on_ranks", "run_until_killed"]
