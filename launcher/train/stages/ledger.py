"""The ledger: the floating point operations that a training takes, by part, its own and those that it has inherited.

Two currencies: FLOPs of the matrix products, see `config.flops`, and layer units. A unit is one layer run forward and
backward on one step; a layer that only runs forward, as a frozen one does, counts a third.
"""

from __future__ import annotations

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.flops import StepFlops
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import LedgerRecord
from moe_testbed.model.language_model import LanguageModel


class Ledger:
    """Adds up what the steps of a training take.

    Args:
        config: the experiment as the ranks share it.
        model: its model; on several ranks it may hold its rank's experts alone.
        folder: the folder of the run, which says what its first steps have taken and what it has inherited.
        first_step: optimizer steps completed before this start.
        num_ranks: number of processes that train.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: LanguageModel,
        folder: RunFolder,
        first_step: int,
        num_ranks: int,
    ) -> None:
        self._config, self._model, self._num_ranks = config, model, num_ranks
        self._of_step = StepFlops(
            model, config.objective, config.data.sequence_length, config.training.global_batch_size
        )
        self._start = folder.read_start()
        self._flops = 0
        if first_step:
            known = (line.values.get("flops") for line in folder.read_metrics() if line.step == first_step)
            self._flops = next((int(flops) for flops in known if isinstance(flops, int | float)), 0)

    def after_step(self, targets: float | None) -> int:
        """Adds one optimizer step, and returns the FLOPs of this training so far.

        Args:
            targets: how many tokens of a rank were to be predicted in it, the mean over the ranks; None: all.
        """
        frozen = self._model.frozen
        places = self._of_step.tokens if targets is None else round(targets * self._num_ranks)
        self._flops += sum(self._of_step.stacks(frozen).values()) + self._of_step.output(frozen, places)
        return self._flops

    def record(self) -> LedgerRecord:
        """Returns what the whole training has taken."""
        parts, units_of = dict.fromkeys(self._model.stacks, 0), dict.fromkeys(self._model.stacks, 0.0)
        units = 0.0
        steps = self._config.training.steps
        for step in range(steps):
            frozen = self._config.freeze.frozen_at(step, steps)
            for name, flops in self._of_step.stacks(frozen).items():
                parts[name] += flops
                of_step = len(self._model.stacks[name].blocks) * (1 / 3 if name in frozen else 1.0)
                units_of[name] += of_step
                units += of_step
        flops_before, units_before = self._inherited()
        return LedgerRecord(
            flops=self._flops,
            flops_by_part={**parts, "output": self._flops - sum(parts.values())},
            layer_units=units,
            layer_units_by_part=units_of,
            inherited_flops=flops_before,
            inherited_layer_units=units_before,
        )

    def _inherited(self) -> tuple[int | None, float | None]:
        """FLOPs and layer units of what the training has started from; None for what that does not tell."""
        if self._start is None:
            return 0, 0.0
        before = self._start.ledger
        return (None, None) if before is None else (before.total_flops, before.total_layer_units)
