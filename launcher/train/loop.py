"""The training loop."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.checkpoint import checkpoints
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks, mean_over_ranks
from moe_testbed.launcher.ranks.sharing import accumulation_steps, shared_among
from moe_testbed.launcher.ranks.stopping import Stopping
from moe_testbed.launcher.ranks.watchdog import Watchdog
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import MetricsLine, Status
from moe_testbed.launcher.run.system_metrics import SystemMetrics
from moe_testbed.launcher.train.ablated_model import examine_model
from moe_testbed.launcher.train.engine import build_engine, build_model, learning_rate, set_learning_rate
from moe_testbed.launcher.train.evaluation import Evaluator, evaluation_values
from moe_testbed.launcher.train.evaluation_set import EvaluationSet
from moe_testbed.launcher.train.inputs import MicroBatches
from moe_testbed.launcher.train.probe import Statistics
from moe_testbed.launcher.train.summary import announce, summary
from moe_testbed.model.config import model_size


def run_loop(
    config: ExperimentConfig,
    run_dir: Path,
    folder: RunFolder | None,
    store: Store,
    ranks: Ranks,
    stopping: Stopping,
    watchdog: Watchdog,
) -> str | None:
    """Trains on all ranks. Rank 0 writes the run's folder; checkpoints are written by all.

    Args:
        run_dir: of the run; its newest whole checkpoint is where training begins.
        folder: the same on rank 0, None elsewhere.

    Returns:
        Why it has stopped after a checkpoint before the end; None at the end.
    """
    # 1. Build everything, and go back to where the last process stopped.
    config = shared_among(config, ranks.size)
    training, steps = config.training, config.training.steps
    micro_batch, accumulation = MicroBatches(config, store, ranks), accumulation_steps(config, ranks.size)
    held_out = EvaluationSet.of(
        store, config.evaluation.split, config.data.sequence_length, config.evaluation.sequences_per_domain
    )
    evaluator, statistics = Evaluator(config, held_out, ranks), Statistics(config, held_out, ranks)
    model = build_model(config, store, ranks)
    size = model_size(config.model, store.vocab_size, config.data.sequence_length, model.router_parameters())
    engine = build_engine(model, config, ranks)
    saved = RunFolder(run_dir).checkpoints
    expert_parallel = config.parallel.expert_parallel_size
    first_step = checkpoints.restore(engine, saved, ranks, expert_parallel)
    spent = 0.0
    if folder:
        spent = folder.rewind(first_step)
        announce(config, size, first_step)
    started, system = time.perf_counter() - spent, SystemMetrics()
    tokens_per_step = training.global_batch_size * config.data.sequence_length

    bar = tqdm(
        range(first_step, steps), initial=first_step, total=steps, unit="step", disable=not folder, mininterval=1.0
    )
    evaluated = None
    stopping.hold()
    for step in bar:
        # 2. One optimizer step: forward and backward for each micro-batch, then the update.
        step_started = time.perf_counter()
        rate = learning_rate(training, step)
        set_learning_rate(engine, rate)
        sums: dict[str, Tensor] = {}
        looking = statistics.is_due(step + 1)
        if model.reads_counts_ahead and accumulation > 1:
            model.begin_step(micro_batch(step, micro)[0] for micro in range(accumulation))
        for micro in range(accumulation):
            context, targets_BL = micro_batch(step, micro)
            output = engine(context, targets_BL)
            engine.backward(output.loss)
            engine.step()
            values = {"loss": output.loss, "cross_entropy": output.cross_entropy_BL.mean()}
            values |= {f"balance/{label}": value for label, value in output.balance.items()}
            for name, value in values.items():
                sums[name] = sums.get(name, torch.zeros((), device=ranks.device)) + value.detach() / accumulation
            if looking:
                statistics.add(output.layers, context)
        model.finish_step()

        # 3. Tell how it went.
        done, now = step + 1, time.perf_counter()
        line = mean_over_ranks(sums | stopping.wishes(ranks), ranks)
        asked = stopping.agreed(line, ranks)
        watchdog.passed(done)
        line |= {"learning_rate": rate, "tokens_per_second": tokens_per_step / (now - step_started)}
        # DeepSpeed does not tell it with ZeRO 0.
        if (norm := engine.get_global_grad_norm()) is not None:
            line["gradient_norm"] = float(norm)
        if folder:
            folder.append_metrics(MetricsLine("train", done, now - started, line))
            if usage := system.due():
                folder.append_metrics(MetricsLine("system", done, now - started, usage))
            folder.write_status(Status("running", done, steps))
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s", refresh=False)

        # 4. Look, evaluate and save when it is time; the last step always is.
        if looking:
            arrays = statistics.look(engine, done)
            if folder:
                folder.write_statistics(done, arrays)
        if _is_time(done, steps, config.evaluation.every):
            evaluated = evaluator.run(engine, done)
            if folder:
                folder.write_evaluation(done, evaluated)
                values = evaluation_values(evaluated)
                folder.append_metrics(MetricsLine("evaluation", done, time.perf_counter() - started, values))
        if asked or _is_time(done, steps, config.checkpoint.every):
            with watchdog.slow():
                checkpoints.save(engine, saved, done, config.checkpoint.keep, ranks, expert_parallel)
        if asked:
            return f"asked to stop by {asked.name} after step {done}"

    stopping.let_go()
    seconds = time.perf_counter() - started

    # 5. Bar and compare the experts. What was evaluated last is gone if the last process stopped after the last step.
    if config.model.num_moe_layers and config.ablation.sequences_per_domain:
        evaluated = evaluated or evaluator.run(engine, steps)
        counts_YDE, sample = evaluated["counts_top_k_YDE"], held_out.first(config.ablation.sequences_per_domain)
        analysis = examine_model(model, sample, counts_YDE, training.micro_batch_size, steps, ranks, bool(folder))
        if folder:
            folder.write_analysis(analysis)

    if folder:
        folder.write_summary(summary(config, size, ranks, seconds))
        folder.write_status(Status("finished", steps, steps))
    return None


def _is_time(done: int, steps: int, every: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)
