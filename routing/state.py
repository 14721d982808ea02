"""State that keeps its precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound="KeepsBufferDtype")


class KeepsBufferDtype(nn.Module):
    """A module whose buffers move between devices but never between dtypes.

    Parameters that are cast to bfloat16 have a float32 copy in the optimizer; the buffers of routers and balancers
    (biases, moving averages) have not, and ``model.bfloat16()`` would round away their steps of 1e-3.
    """

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        return self
