"""The training loop."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.checkpoint import checkpoints
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import size_of
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.ranks.session import Session
from moe_testbed.launcher.ranks.sharing import shared_among
from moe_testbed.launcher.ranks.system_metrics import SystemMetrics
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import MetricsLine, MoELayers
from moe_testbed.launcher.train.ablated_model import ablate_model
from moe_testbed.launcher.train.divergence.watch import DivergenceWatch
from moe_testbed.launcher.train.engine import build_engine, build_model
from moe_testbed.launcher.train.evaluation import Evaluator, evaluation_values
from moe_testbed.launcher.train.evaluation_set import EvaluationSet
from moe_testbed.launcher.train.inputs import InputMaker, MicroBatches
from moe_testbed.launcher.train.probe import Probe
from moe_testbed.launcher.train.stages.ledger import Ledger
from moe_testbed.launcher.train.stages.parent import Parent
from moe_testbed.launcher.train.stages.start import begin
from moe_testbed.launcher.train.step import train_step
from moe_testbed.launcher.train.summary import announcement, summary


def run_loop(
    config: ExperimentConfig, store: Store, folder: RunFolder, session: Session, parent: Parent | None = None
) -> None:
    """Trains on all ranks, from the newest whole checkpoint in the run's folder or from the start.

    Args:
        folder: the run's folder, which only rank 0 writes; the checkpoints in it are written by all ranks.
        session: the ranks, which have met.
        parent: what it starts from; None if it starts from its seed.

    Raises:
        AskedToStop: by a signal, after a checkpoint.
        DivergedError: a loss, a gradient or a weight is not finite.
    """
    # Build everything, and go back to where the last process stopped.
    ranks, steps = session.ranks, config.training.steps
    config = shared_among(config, ranks.size)
    training, saving, expert_parallel = config.training, config.checkpoint, config.parallel.expert_parallel_size
    inputs = MicroBatches(config, store, ranks)
    held_out = EvaluationSet.of(
        store,
        config.evaluation.split,
        config.data.sequence_length,
        config.evaluation.sequences_per_domain,
        InputMaker.for_evaluation(config, store),
    )
    evaluator, probe = Evaluator(config, held_out, ranks), Probe(config, held_out, ranks)
    layers = MoELayers.of_model(config.model)
    model = build_model(config, store, ranks)
    size = size_of(model, config.data.sequence_length, config.objective)
    if parent:
        begin(model, config, parent, folder, store.vocab_size)
    engine = build_engine(model, config, ranks)
    first_step = checkpoints.restore(engine, folder.checkpoints, ranks, expert_parallel)
    started, system, evaluated = time.perf_counter() - folder.rewind(first_step), SystemMetrics(), None
    ledger = Ledger(config, model, folder, first_step, ranks.size)
    watch = DivergenceWatch(config, model, inputs, held_out, folder, session, first_step)
    session.say(announcement(config, size, first_step, parent))

    with session.steps():
        if parent and probe.points:
            folder.write_probe(probe.run(engine, 0))
        for step in (bar := _progress_bar(first_step, steps, ranks)):
            values = train_step(engine, model, inputs, step, config, probe)
            done, seconds = step + 1, time.perf_counter() - started
            line = session.after_step(done, values.means) | values.others
            line["flops"] = ledger.after_step(line.pop("targets", None))
            if training.max_skipped_steps:
                line["skipped_steps"] = engine.skipped_steps
            folder.append_metrics(MetricsLine("train", done, seconds, line))
            if ranks.rank == 0 and (usage := system.due()):
                folder.append_metrics(MetricsLine("system", done, seconds, usage))
            session.note_progress()
            watch.after_step(done, line, engine.skipped_steps)
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s", refresh=False)

            evaluates = _is_time(done, steps, config.evaluation.every)
            saves = session.asked_to_stop or _is_time(done, steps, saving.every)
            if probe.is_due(done) or evaluates or saves:
                watch.before_use(done)
            with watch.evaluation(done):
                if probe.is_due(done):
                    folder.write_probe(probe.run(engine, done))
                if evaluates:
                    evaluated = evaluator.run(engine, done)
                    folder.write_evaluation(evaluated)
                    seconds, line = time.perf_counter() - started, evaluation_values(evaluated, layers)
                    folder.append_metrics(MetricsLine("evaluation", done, seconds, line))
                    watch.after_evaluation(done, line["cross_entropy"])
            if saves:
                with session.slow():
                    checkpoints.save(engine, folder.checkpoints, done, ranks, expert_parallel)
                watch.after_checkpoint(done)
            session.stop_if_asked()
        # The evaluation has shown that the last one is healthy.
        watch.remove_old_checkpoints()

    seconds = time.perf_counter() - started
    if config.model.num_moe_layers and config.ablation.sequences_per_domain:
        # What was evaluated last is gone if the last process stopped after the last step.
        counts_YDE = (evaluated or evaluator.run(engine, steps)).counts_top_k_YDE
        sample = held_out.first(config.ablation.sequences_per_domain)
        folder.write_ablation(ablate_model(model, sample, counts_YDE, training.micro_batch_size, steps, ranks))
    folder.write_summary(summary(config, size, ledger.record(), ranks, seconds))


def _progress_bar(first_step: int, steps: int, ranks: Ranks) -> Any:
    """Returns the steps that are left, with a bar on stderr, once for all ranks."""
    numbers, quiet = range(first_step, steps), ranks.rank != 0
    return tqdm(numbers, initial=first_step, total=steps, unit="step", disable=quiet, mininterval=1.0)


def _is_time(done: int, steps: int, every: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)
