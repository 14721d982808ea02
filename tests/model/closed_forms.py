"""The size of a model in closed form, written down from its config: the oracle of what is counted from the model."""

from __future__ import annotations

from moe_testbed.model.config import ModelConfig


def model_size(config: ModelConfig, vocab_size: int, sequence_length: int, router_parameters: int) -> dict[str, int]:
    """Parameters, active parameters and FLOPs per token; a token uses the parameters of all routers."""
    width, moe = config.hidden_size, config.moe
    embedding = vocab_size * width
    attention = 4 * width * width
    norms = (2 * config.num_layers + 1) * width
    expert = 3 * width * moe.expert_size
    # A vector and two rows of mixing weights each, multiplied for every token.
    constant = moe.num_constant_experts * 3 * width
    total = active = embedding + norms + router_parameters
    for layer in range(config.num_layers):
        if config.is_moe_layer(layer):
            total += attention + constant + (moe.num_ffn_experts + moe.num_shared_experts) * expert
            active += attention + constant + (moe.choices + moe.num_shared_experts) * expert
        else:
            dense = 3 * width * config.dense_size(layer)
            total += attention + dense
            active += attention + dense
    flops = 6 * (active - norms) + config.num_layers * 6 * sequence_length * width
    return {"parameters": total, "active_parameters": active, "flops_per_token": flops}
