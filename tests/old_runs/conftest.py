"""The tests of old runs share the ranks of the distributed ones."""

from tests.distributed.conftest import run_on_ranks

__all__ = ["run_on_ranks"]
