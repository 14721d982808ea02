"""Ends a training that diverges: on all ranks together, in the step in which it shows, and with no sick checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch.nn.utils import get_total_norm

from moe_testbed.launcher.checkpoint import checkpoints
from moe_testbed.launcher.config.experiment import ExperimentConfig, TrainingConfig
from moe_testbed.launcher.errors import DivergedError
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.ranks.session import Session
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.train.divergence.origin import (
    MicroBatch,
    origin_of_gradient,
    origin_of_loss,
    origin_of_weights,
)
from moe_testbed.launcher.train.evaluation_set import EvaluationSet
from moe_testbed.launcher.train.inputs import MicroBatches
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.errors import NotFiniteError

FindOrigin = Callable[[LanguageModel, Iterable[MicroBatch], Ranks], str]


class DivergenceWatch:
    """Looks at what each step tells. All ranks are told the same, and so come to the same end.

    A checkpoint is known to be healthy when the step after it has gone well. Until then the one before it stays; if the
    loss of that step is not finite, the newer one goes instead.

    Args:
        config: the experiment as the ranks share it.
        inputs: this rank's micro-batches of each step.
        held_out: the sequences of the evaluation.
        first_step: optimizer steps completed before this start.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: LanguageModel,
        inputs: MicroBatches,
        held_out: EvaluationSet,
        folder: RunFolder,
        session: Session,
        first_step: int,
    ) -> None:
        self._training, self._keep = config.training, config.checkpoint.keep
        self._model, self._inputs, self._held_out = model, inputs, held_out
        self._checkpoints, self._session, self._ranks = folder.checkpoints, session, session.ranks
        self._unproven = first_step  # of the newest checkpoint, 0 if it is known to be healthy

    def after_step(self, done: int, line: Mapping[str, float], skipped_steps: int) -> None:
        """Looks at the metrics of a step.

        Args:
            done: optimizer steps completed.
            skipped_steps: those of them that have left the weights as they were, since their gradient was not finite.

        Raises:
            DivergedError: the loss is not finite, or the gradient is not and too many steps have been skipped.
        """
        if not math.isfinite(line["loss"]):
            sick = [name for name, value in line.items() if name != "gradient_norm" and not math.isfinite(value)]
            if self._ranks.rank == 0 and self._unproven == done - 1:
                checkpoints.remove(self._checkpoints, done - 1)
            what = f"at step {done}: {', '.join(sick)} {'are' if len(sick) > 1 else 'is'} not finite"
            self._end(what, origin_of_loss, self._inputs.of_step(done - 1))
        # DeepSpeed without ZeRO skips none and counts none.
        may_skip = 0 < skipped_steps <= self._training.max_skipped_steps
        if not math.isfinite(line["gradient_norm"]) and not may_skip:
            what = f"at step {done}: the gradient is not finite, the loss {line['loss']:.4g}"
            self._end(what, origin_of_gradient, self._inputs.of_step(done - 1))
        if self._unproven:
            self.remove_old_checkpoints()

    @contextmanager
    def evaluation(self, done: int) -> Iterator[None]:
        """Raises DivergedError where a router is the first to meet numbers that are not finite."""
        try:
            yield
        except NotFiniteError as error:
            raise self._error(f"in the evaluation after step {done}: {error}") from error

    def after_evaluation(self, done: int, loss: float) -> None:
        """Looks at the mean loss of an evaluation. Raises DivergedError if it is not finite."""
        if not math.isfinite(loss):
            self._model.eval()
            shares = self._held_out.shares(self._ranks, self._training.micro_batch_size, done)
            batches = ((share.context, share.targets_BL) for share in shares)
            self._end(f"in the evaluation after step {done}: cross_entropy is not finite", origin_of_loss, batches)

    def before_use(self, done: int) -> None:
        """Looks at the weights that are to be evaluated or saved. Raises DivergedError if one is not finite."""
        largest = get_total_norm(self._model.parameters(), math.inf)
        sick = (~largest.isfinite()).float()
        if self._ranks.group is not None:
            dist.all_reduce(sick, group=self._ranks.group)
        if sick:
            self._end(f"in the update of step {done}: weights are not finite", origin_of_weights, ())

    def after_checkpoint(self, done: int) -> None:
        """Notes that there is a checkpoint after so many steps."""
        self._unproven = done

    def remove_old_checkpoints(self) -> None:
        """Removes those before the newest ones, which are healthy."""
        with self._session.slow():
            if self._ranks.rank == 0:
                checkpoints.remove_old(self._checkpoints, self._keep)
        self._unproven = 0

    def _end(self, what: str, find: FindOrigin, batches: Iterable[MicroBatch]) -> None:
        with self._session.slow():
            where = find(self._model, batches, self._ranks)
        raise self._error(f"{what}; it began in {where}")

    def _error(self, what: str) -> DivergedError:
        return DivergedError(f"diverged {what}; {advice(self._training)}")


def advice(training: TrainingConfig) -> str:
    """Returns what may help against divergence, of what the training does not do yet."""
    tries = [f"a training.learning_rate below {training.learning_rate:g}"]
    if training.warmup_steps < training.steps // 10:
        tries.append(f"training.warmup_steps {training.steps // 10}")
    if not training.gradient_clipping:
        tries.append("training.gradient_clipping 1")
    if training.precision == "bfloat16":
        tries.append("training.precision float32")
    first = f"{', '.join(tries[:-1])} or " if len(tries) > 1 else ""
    return f"train with {first}{tries[-1]}, in another folder"
