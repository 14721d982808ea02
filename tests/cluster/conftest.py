"""The tests of clusters share the ranks and the data of the distributed ones."""

from tests.distributed.conftest import data, make_experiment, run_on_ranks

__all__ = ["data", "make_experiment", "run_on_ranks"]
