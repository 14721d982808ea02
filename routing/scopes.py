"""The balancing scope: over which set of tokens the load must be even. `load` computes it."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, Field, model_validator


class Scope(str, Enum):
    """Over which tokens the load must be even.

    - ``token``: each token by itself.
    - ``sequence``: each sequence.
    - ``document``: each document's part of each sequence, where sequences hold several.
    - ``micro_batch``: the micro-batch of one rank.
    - ``data_parallel``: the current micro-batch over all data-parallel ranks.
    - ``global_batch``: the whole batch of an optimizer step, all ranks and all accumulated micro-batches.
    - ``window``: the last optimizer steps, by an exponential moving average.
    """

    TOKEN = "token"
    SEQUENCE = "sequence"
    DOCUMENT = "document"
    MICRO_BATCH = "micro_batch"
    DATA_PARALLEL = "data_parallel"
    GLOBAL_BATCH = "global_batch"
    WINDOW = "window"

    @property
    def inside_micro_batch(self) -> bool:
        """A balance set lies within the micro-batch of one rank."""
        return self in (Scope.TOKEN, Scope.SEQUENCE, Scope.DOCUMENT, Scope.MICRO_BATCH)

    @property
    def at_once(self) -> bool:
        """A balance set lies within what the ranks compute at the same moment."""
        return self.inside_micro_batch or self is Scope.DATA_PARALLEL


class Estimator(str, Enum):
    """What stands for the counts of the global batch while it is still being run.

    - ``online``: the counts of this step so far, the current micro-batch included. Exact without accumulation.
    - ``previous``: the counts of the step before; in the first step ``online``.
    - ``exact``: the counts of this step, from a routing pass over all its micro-batches before the first of them is
      trained. It costs one more forward pass without the output layer; nothing where there is no accumulation.
    """

    ONLINE = "online"
    PREVIOUS = "previous"
    EXACT = "exact"


class Counts(str, Enum):
    """Which counts a balance set that is wider than a rank's micro-batch is counted by.

    - ``now``: the counts of all ranks, up to the micro-batch that is running.
    - ``earlier``: the counts of completed steps; in the very first step ``now``.
    - ``ahead``: the counts of the whole step that is running; ``now`` where nobody has told them.
    """

    NOW = "now"
    EARLIER = "earlier"
    AHEAD = "ahead"


class ScopeConfig(BaseModel, extra="forbid", frozen=True):
    """A balancing scope with all that defines it."""

    scope: Scope = Field(Scope.GLOBAL_BATCH, description="over which tokens the load must be even")
    estimator: Estimator = Field(
        Estimator.ONLINE,
        description="global_batch only: counts of this step so far (online), of the last step (previous), or of this "
        "step by a routing pass ahead (exact)",
    )
    window_steps: int = Field(
        16, gt=0, description="window only: n of the moving average, whose newest step weighs 1 / n"
    )

    @model_validator(mode="after")
    def _options_have_a_use(self) -> ScopeConfig:
        if self.estimator is not Estimator.ONLINE and self.scope is not Scope.GLOBAL_BATCH:
            raise ValueError(
                f"estimator is {self.estimator.value} with scope {self.scope.value}, which needs none; "
                "leave estimator out or set scope to global_batch"
            )
        if "window_steps" in self.model_fields_set and self.scope is not Scope.WINDOW and self.window_steps != 16:
            raise ValueError(
                f"window_steps is {self.window_steps} with scope {self.scope.value}, which has no window; "
                "leave window_steps out or set scope to window"
            )
        return self

    @property
    def counts(self) -> Counts | None:
        """Which counts it takes; None inside a micro-batch, whose own are at hand."""
        if self.scope.inside_micro_batch:
            return None
        if self.scope is Scope.WINDOW or self.estimator is Estimator.PREVIOUS:
            return Counts.EARLIER
        return Counts.AHEAD if self.estimator is Estimator.EXACT else Counts.NOW

    @property
    def key(self) -> tuple[Scope, Estimator, int]:
        """Equal for configs of the same scope."""
        return self.scope, self.estimator, self.window_steps
