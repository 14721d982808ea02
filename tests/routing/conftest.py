"""Every test of routing starts from the same random state, on one thread."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_draws() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # That of the CPU alone: `torch.manual_seed` also writes down for CUDA who has called it, 1 ms a test.
    torch.default_generator.manual_seed(1)
    yield
    torch.set_num_threads(threads)
