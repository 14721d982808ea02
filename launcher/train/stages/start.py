"""The first weights of a training that starts from another one.

Shape legend: M model width, V token ids.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_testbed.data.objectives import SpecialIds
from moe_testbed.launcher.checkpoint.weights import digest_of
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import special_ids
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import StartRecord
from moe_testbed.launcher.train.stages.parent import Parent
from moe_testbed.model.config import DECODER, ENCODER
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.model.moe import MoELayer

_EMBEDDING = "embedding.weight"
_EXPERT_WEIGHTS = "gate_up", "down"


def begin(model: LanguageModel, config: ExperimentConfig, parent: Parent, folder: RunFolder, pieces: int) -> None:
    """Gives a new model its first weights, see `start_from`, and notes in its run's folder where they are from."""
    state = parent.state()
    start_from(model, config, parent, state, pieces)
    folder.write_start(StartRecord(str(parent.path), parent.step, digest_of(state), parent.ledger, parent.stamp))


@torch.no_grad()
def start_from(
    model: LanguageModel, config: ExperimentConfig, parent: Parent, state: Mapping[str, Tensor], pieces: int
) -> None:
    """Gives a new model the first weights that its config names; the others stay as they were drawn.

    Args:
        state: weights and buffers of the parent.
        pieces: ids of the tokenizer.

    Raises:
        ConfigError: the parent's encoder has other sizes or another router.
    """
    assert config.start.encoder is not None, "a model that starts from its seed has no parent"
    take = config.start.encoder.take
    if take != "blocks":
        theirs, ours = special_ids(parent.config, pieces), special_ids(config, pieces)
        _take_embedding(model, state[_EMBEDDING], theirs, ours, config)
    if take != "tables":
        _take_encoder(model, state, parent)
    if config.start.decoder != "random":
        _start_decoder(model, interleaved=config.start.decoder == "interleaved")


def _take_embedding(
    model: LanguageModel, table_VM: Tensor, theirs: SpecialIds, ours: SpecialIds, config: ExperimentConfig
) -> None:
    """Takes the rows of the pieces, and of the special ids that both have. Marks that the other model has never read
    keep their draw: rows that were only ever pushed away are all alike."""
    if table_VM.shape[1] != config.model.hidden_size:
        raise ConfigError(
            f"start.encoder.run has model.hidden_size {table_VM.shape[1]}, and this model {config.model.hidden_size}; "
            "make them alike"
        )
    tables = [model.embedding]
    if config.model.embeddings == "equal_start":
        tables += [getattr(model, "decoder_embedding", model.embedding), model.output_embedding]
    for table in tables:
        table.weight[: ours.pieces] = table_VM[: ours.pieces]
        table.weight[ours.mask] = table_VM[theirs.mask]
        table.weight[ours.start] = table_VM[theirs.start]


def _take_encoder(model: LanguageModel, state: Mapping[str, Tensor], parent: Parent) -> None:
    """Takes the encoder's weights and what its routers and balancers keep."""
    prefix = f"{ENCODER}."
    theirs = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    for name, own in _own_state(model).items():
        if not name.startswith(prefix):
            continue
        found = theirs.get(name)
        is_weight = isinstance(own, torch.nn.Parameter) or ".deepspeed_experts." in name
        if found is not None and found.shape == own.shape:
            own.copy_(found)
        elif is_weight:
            what = "is missing" if found is None else f"has shape {tuple(found.shape)} and not {tuple(own.shape)}"
            raise ConfigError(
                f"start.encoder.run: the encoder of {parent.path} does not fit this model's: {name} {what}; "
                "make layers, widths, experts and routing alike"
            )
    surplus = [name for name in theirs if ".blocks." in name and name not in _names(model)]
    if surplus:
        raise ConfigError(
            f"start.encoder.run: the encoder of {parent.path} does not fit this model's, which has no "
            f"{surplus[0]}; make layers, widths, experts and routing alike"
        )


def _own_state(model: LanguageModel) -> dict[str, Tensor]:
    """Returns this rank's weights and buffers as views, its experts under their numbers among those of all ranks."""
    views = {name: tensor for name, tensor in model.state_dict().items() if ".deepspeed_experts." not in name}
    views |= dict(model.named_parameters())
    for layer, module in model.named_modules():
        if isinstance(module, MoELayer):
            for weight in _EXPERT_WEIGHTS:
                stacked = views.pop(f"{layer}.deepspeed_moe.experts.{weight}")
                for index in range(module.experts.num_experts):
                    views[_expert_name(layer, module.first_expert + index, weight)] = stacked[index]
    return views


def _names(model: LanguageModel) -> set[str]:
    """Returns the names of all weights and buffers, those of experts of other ranks included."""
    names = set(_own_state(model))
    for layer, module in model.named_modules():
        if isinstance(module, MoELayer):
            numbers = range(module.num_ffn_experts)
            names |= {_expert_name(layer, number, weight) for number in numbers for weight in _EXPERT_WEIGHTS}
    return names


def _expert_name(layer: str, number: int, weight: str) -> str:
    return f"{layer}.deepspeed_moe.experts.deepspeed_experts.{number}.{weight}"


def _start_decoder(model: LanguageModel, interleaved: bool) -> None:
    """Gives the decoder's layers the weights of the encoder's, see `StartConfig.decoder`. Cross-attention has none to
    take but in the interleaved form (after DeltaLM, arXiv 2106.13736), where another layer's self-attention serves."""
    encoder, decoder = model.stacks[ENCODER], model.stacks[DECODER]
    sources = encoder.layers
    for number, block in enumerate(decoder.layers):
        first = sources[2 * number if interleaved else number]
        last = sources[2 * number + 1] if interleaved else first
        block.attention.load_state_dict(first.attention.state_dict())
        block.attention_norm.load_state_dict(first.attention_norm.state_dict())
        for part in ("feed_forward_norm", "dense", "shared", "moe"):
            if getattr(block, part, None) is not None:
                getattr(block, part).load_state_dict(getattr(last, part).state_dict())
        if block.routing is not None and last.routing is not None:
            _copy_alike(last.routing, block.routing)
        if interleaved and block.cross_attention is not None:
            projected = last.attention.query_key_value.weight
            width = projected.shape[1]
            block.cross_attention.query.weight.copy_(projected[:width])
            block.cross_attention.key_value.weight.copy_(projected[width:])
            block.cross_attention.output.weight.copy_(last.attention.output.weight)
            block.cross_attention_norm.load_state_dict(last.attention_norm.state_dict())
    decoder.final_norm.load_state_dict(encoder.final_norm.state_dict())


def _copy_alike(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copies the weights of a router into another one, unless they are of different kinds."""
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name in theirs and theirs[name].shape == parameter.shape:
            parameter.copy_(theirs[name])
