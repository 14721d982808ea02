"""How long does a training step take beside one of a Hugging Face OLMoE of the same sizes?

    python benchmarks/olmoe_step.py [EXPERIMENT] [OVERRIDE ...] [--steps 30]

Both train in one process and in turn, a step of ours and a step of theirs, on the same tokens, so that what else the
machine does falls on both; the ratio is the median over the steps, of processor time, on one thread. OLMoE runs with
transformers' grouped matrix products, its balancing loss, clipping, and torch's AdamW. The first steps are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_testbed.launcher.config.experiment import ExperimentConfig, load_experiment
from moe_testbed.launcher.train import loop
from moe_testbed.launcher.train.inputs import MicroBatches
from moe_testbed.launcher.train.step import train_step
from moe_testbed.launcher.train.train import train

_WARM = 8


class Peer:
    """OLMoE with as many layers, experts and token ids as the experiment's model, and its optimizer."""

    def __init__(self, config: ExperimentConfig) -> None:
        model, moe, training = config.model, config.model.moe, config.training
        self.model = OlmoeForCausalLM(
            OlmoeConfig(
                vocab_size=config.data.mix.vocab_size,
                hidden_size=model.hidden_size,
                intermediate_size=moe.expert_hidden_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_heads,
                max_position_embeddings=config.data.sequence_length,
                num_experts=moe.num_experts,
                num_experts_per_tok=moe.top_k,
                output_router_logits=True,
                tie_word_embeddings=True,
                use_cache=False,
                experts_implementation="grouped_mm",
            )
        )
        self.clipping = training.gradient_clipping
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )

    def step(self, inputs: MicroBatches, step: int) -> None:
        """Makes one optimizer step on the tokens of this step."""
        for context, targets_BL in inputs.of_step(step):
            # It shifts labels by one itself: the targets are the tokens from the second one on, and one more.
            tokens_BL = torch.cat([context.token_ids_BL[:, :1], targets_BL], dim=1)
            output = self.model(input_ids=tokens_BL[:, :-1], labels=tokens_BL[:, :-1])
            (output.loss / inputs.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("experiment", nargs="?", default="configs/experiments/tiny.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    short = [f"training.steps={arguments.steps}", "training.warmup_steps=1", "evaluation.sequences_per_domain=1"]
    short += ["tracking.mlflow=false", "runtime.threads=1", "runtime.device=cpu", "ablation.sequences_per_domain=0"]
    config = load_experiment(arguments.experiment, [*short, *arguments.overrides])
    peer = Peer(config)
    seconds: list[tuple[float, float]] = []

    def both(engine: Any, model: Any, inputs: MicroBatches, step: int, *others: Any) -> Any:
        started = time.process_time()
        values = train_step(engine, model, inputs, step, *others)
        between = time.process_time()
        peer.step(inputs, step)
        seconds.append((between - started, time.process_time() - between))
        return values

    loop.train_step = both
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder))
    ours, theirs = zip(*seconds[_WARM:], strict=True)
    ratio = statistics.median(own / other for own, other in seconds[_WARM:])
    print(f"ours {1000 * statistics.median(ours):.1f} ms, OLMoE {1000 * statistics.median(theirs):.1f} ms a step")
    said = f"{ratio:.2f} x a Hugging Face OLMoE of the same sizes"
    print(json.dumps({"figures": {"olmoe_step": said}}))


if __name__ == "__main__":
    main()
