"""What a training starts from, and which of its parts are still for a while. What does not go together with a model's
architecture is refused before anything is computed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from moe_testbed.data.objectives import Objective, objective_names
from moe_testbed.launcher.config.names import NAME_PATTERN, training_name
from moe_testbed.model.config import ModelConfig
from moe_testbed.routing.config import RoutingConfig


class StartFrom(BaseModel, extra="forbid", frozen=True):
    """Says where the first weights of a part come from."""

    run: str = Field(
        min_length=1,
        description="the label of another run of the same suite, the folder of a run, or a folder that "
        "`moe-testbed export` has written",
    )
    take: Literal["all", "tables", "blocks"] = Field(
        "all", description="all: embedding and layers; tables: the embedding alone; blocks: the layers alone"
    )

    def folder(self, run_dir: Path, seed: int) -> Path:
        """Returns the folder that is meant by a run in ``run_dir``: that of the suite's run of this label and the same
        seed if there is one beside it, else the path as it stands."""
        beside = run_dir.parent / training_name(self.run, seed)
        return beside if is_label(self.run) and beside.is_dir() else Path(self.run)


def is_label(run: str) -> bool:
    """Tells whether a text can be the label of a suite's run, and so no path with folders in it."""
    return re.fullmatch(NAME_PATTERN, run) is not None


class StartConfig(BaseModel, extra="forbid", frozen=True):
    """Says where the first weights come from; what is not named here is drawn from the seed."""

    encoder: StartFrom | None = None
    decoder: Literal["random", "copy", "interleaved"] = Field(
        "random",
        description="random: drawn; copy: layer i from layer i of the encoder; interleaved: self-attention of layer i "
        "from the encoder's layer 2i, cross-attention and feed-forward layer from its layer 2i + 1",
    )


class FreezePart(BaseModel, extra="forbid", frozen=True):
    """Says how long a part is still."""

    until: float = Field(ge=0, le=1, description="share of the steps; 0: never still, 1: still to the end")
    warmup_steps: int = Field(30, ge=0, description="steps over which the part's learning rate rises after that")

    def steps(self, steps: int) -> int:
        """Returns how many of so many steps the part is still."""
        return round(self.until * steps)


class FreezeConfig(BaseModel, extra="forbid", frozen=True):
    """Says which parts are still at first: their weights, routers, balancers and optimizer state do not change. The
    embedding that an encoder reads is still with it, also where a decoder shares it."""

    encoder: FreezePart | None = None
    decoder: FreezePart | None = None

    def parts(self) -> dict[str, FreezePart]:
        """Returns the parts that are still at first, by name."""
        return {name: part for name in ("encoder", "decoder") if (part := getattr(self, name)) and part.until}

    def frozen_at(self, step: int, steps: int) -> frozenset[str]:
        """Returns the parts that are still in the step that follows ``step`` completed ones of so many."""
        return frozenset(name for name, part in self.parts().items() if step < part.steps(steps))


def refuse_objective(objective: Objective, model: ModelConfig, sequence_length: int) -> None:
    """Raises ValueError if the objective trains another architecture, or will not do for sequences of this length."""
    if objective.architecture != model.architecture:
        names = objective_names.names()
        fitting = [name for name in names if objective_names.get(name).architecture == model.architecture]
        raise ValueError(
            f"objective.name is {objective.name}, which trains model.architecture {objective.architecture} and not "
            f"{model.architecture}; choose one of {', '.join(fitting)}, or another architecture"
        )
    if problem := objective.refusal(sequence_length):
        raise ValueError(problem)


def refuse_stages(start: StartConfig, freeze: FreezeConfig, model: ModelConfig) -> None:
    """Raises ValueError if a part is to start or to be still that the model does not have, or if nothing is trained."""
    if model.architecture == "causal" and start != StartConfig():
        raise ValueError(
            "start is given, but model.architecture is causal, which starts from its seed; leave it out, or choose "
            "another architecture"
        )
    if start.decoder != "random":
        _refuse_decoder_start(start, model)
    frozen = freeze.parts()
    for part in frozen:
        if part not in model.stacks:
            raise ValueError(
                f"freeze.{part} is given, but model.architecture is {model.architecture}, which has no such part; "
                f"leave it out, or freeze one of {', '.join(model.stacks)}"
            )
    if "decoder" in frozen and set(model.stacks) - set(frozen):
        raise ValueError(
            "freeze.decoder is given, but the encoder moves: what stands still passes no gradient on, so that the "
            "encoder would learn next to nothing; leave it out, or freeze the encoder in its place"
        )
    if set(frozen) == set(model.stacks):
        last = model.stacks[-1]
        raise ValueError(
            f"freeze.{last}.until is {frozen[last].until:g} and no other part is trained, so that the first step would "
            "change nothing; set it to 0"
        )


def _refuse_decoder_start(start: StartConfig, model: ModelConfig) -> None:
    if model.architecture != "encoder_decoder":
        raise ValueError(
            f"start.decoder is {start.decoder}, but model.architecture is {model.architecture}, which has no decoder "
            "beside an encoder; leave it out"
        )
    if start.encoder is None or start.encoder.take == "tables":
        raise ValueError(
            f"start.decoder is {start.decoder}, but start.encoder names no run whose layers an encoder starts from; "
            "set it, or start.decoder to random"
        )
    encoder, decoder = model.of_stack("encoder"), model.of_stack("decoder")
    needed = decoder.num_layers * (2 if start.decoder == "interleaved" else 1)
    if encoder.num_layers < needed:
        raise ValueError(
            f"start.decoder is {start.decoder}, which takes {needed} layers of an encoder for {decoder.num_layers} of "
            f"the decoder, and the encoder has {encoder.num_layers}; set model.decoder.num_layers to "
            f"{encoder.num_layers * decoder.num_layers // needed} or less, or start.decoder to random"
        )
    taken = range(1, needed, 2) if start.decoder == "interleaved" else range(needed)
    for layer, source in enumerate(taken):
        if _feed_forward(decoder, layer) != _feed_forward(encoder, source):
            raise ValueError(
                f"start.decoder is {start.decoder}, but layer {source + 1} of the encoder and layer {layer + 1} of the "
                "decoder differ in experts or width; make them alike, or set start.decoder to random"
            )


def _feed_forward(model: ModelConfig, layer: int) -> tuple[bool, int]:
    is_moe = model.is_moe_layer(layer)
    return is_moe, model.moe.expert_size if is_moe else model.dense_size(layer)


def refuse_routing(routing: RoutingConfig, model: ModelConfig) -> None:
    """Raises ValueError if a routing is given for a part that the model does not have, or if a decoder beside an
    encoder would be told by its routing what it is to predict."""
    if routing.encoder is not None:
        if "encoder" not in model.stacks:
            raise ValueError(
                f"routing.encoder is given, but model.architecture is {model.architecture}, which has no encoder; "
                "leave it out"
            )
        if routing.encoder.encoder is not None:
            raise ValueError("routing.encoder.encoder is given, but an encoder has one routing; leave it out")
    if model.architecture == "encoder_decoder" and model.of_stack("decoder").num_moe_layers and not routing.causal:
        key, value = ("pooling", "full_mean") if routing.router.causal else ("router.name", routing.router.name)
        raise ValueError(
            f"routing.{key} is {value}, which is not causal: in the decoder it would tell a token of those that it is "
            "to predict; choose another one, and give this one to the encoder by routing.encoder"
        )
