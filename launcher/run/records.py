"""What stands in the small files of a run's folder: one frozen record for each, read without trust."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from moe_testbed.launcher.run.files import value_at
from moe_testbed.model.config import ModelConfig

FAILED_STATES = ("failed", "diverged")
"""The states of a run that has come to a bad end."""

MISSING = "missing"
"""The state of a run whose folder has no status that can be read."""


@dataclass(frozen=True)
class Status:
    """How a run stands.

    Attributes:
        state: running, finished, stopped (it was asked to, and has written a checkpoint), diverged (a loss, a gradient
            or a weight is not finite) or failed; else `MISSING`.
        step: optimizer steps completed.
        steps: optimizer steps of the whole training.
        reason: why it has stopped or failed.
    """

    state: str = MISSING
    step: int = 0
    steps: int = 0
    reason: str | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Status:
        """Returns the status in the content of its file; what is missing or of another kind is left at its default."""
        step, steps = (value if isinstance(value := content.get(key), int) else 0 for key in ("step", "steps"))
        reason = content.get("reason")
        return cls(str(content.get("state", MISSING)), step, steps, None if reason is None else str(reason))

    def content(self) -> dict[str, Any]:
        """Returns what is written into the file."""
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """How far a run is: completed optimizer steps, steps of the whole training, and the last training loss (None
    before the first)."""

    step: int
    steps: int
    loss: float | None


@dataclass(frozen=True)
class MetricsLine:
    """One line of the metrics: what was measured after an optimizer step.

    Attributes:
        kind: train, evaluation or system.
        step: optimizer steps completed.
        seconds: seconds of training up to here, over all starts.
        values: name of each metric -> value.
    """

    kind: str
    step: int
    seconds: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> MetricsLine | None:
        """Returns the line in a JSON object; None if that does not say of which step it is."""
        step, seconds = content.get("step"), content.get("seconds")
        if not isinstance(step, int):
            return None
        values = dict(content)
        for key in ("kind", "step", "seconds"):
            values.pop(key, None)
        return cls(str(content.get("kind")), step, float(seconds) if isinstance(seconds, int | float) else None, values)

    @classmethod
    def of_text(cls, text: bytes) -> MetricsLine | None:
        """Returns the line in a text; None if it is no JSON object, or one that does not say of which step it is."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return cls.of(content) if isinstance(content, dict) else None

    def content(self) -> dict[str, Any]:
        """Returns the JSON object that is written."""
        seconds = {} if self.seconds is None else {"seconds": self.seconds}
        return {"kind": self.kind, "step": self.step, **seconds, **self.values}


@dataclass(frozen=True)
class MoELayers:
    """The MoE layers of a run, as its evaluations and probes number them.

    Attributes:
        stacks: name of the stack of each layer; empty for a causal model, whose layers are all of one stack.
    """

    stacks: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> MoELayers:
        """Returns the layers of a run by its config; those of a causal model where the config does not tell."""
        try:
            return cls.of_model(ModelConfig.model_validate(config.get("model")))
        except ValueError:
            return cls()

    @classmethod
    def of_model(cls, model: ModelConfig) -> MoELayers:
        """Returns the layers of a model."""
        return cls() if model.architecture == "causal" else cls(model.stack_of_layer)

    @property
    def names(self) -> list[str]:
        """Name of each layer, counted from 0 in its stack, such as `encoder 1`; empty for a causal model."""
        return [f"{stack} {self.stacks[:layer].count(stack)}" for layer, stack in enumerate(self.stacks)]

    @property
    def by_stack(self) -> dict[str, list[int]]:
        """Name of each stack that has MoE layers -> their numbers; empty for a causal model."""
        return {
            stack: [layer for layer, of_layer in enumerate(self.stacks) if of_layer == stack]
            for stack in dict.fromkeys(self.stacks)
        }


ONE_STACK = MoELayers()
"""The MoE layers of a causal model."""


@dataclass(frozen=True)
class LedgerRecord:
    """What a training has taken, in two currencies, see `train.ledger`.

    Attributes:
        flops, flops_by_part: its own.
        layer_units, layer_units_by_part: its own; by part empty in the files of earlier versions.
        inherited_flops, inherited_layer_units: those of the runs that it starts from; None if that is not known.
    """

    flops: int
    flops_by_part: Mapping[str, int]
    layer_units: float
    inherited_flops: int | None = 0
    inherited_layer_units: float | None = 0.0
    layer_units_by_part: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Any) -> LedgerRecord | None:
        """Returns the ledger in a JSON value; None if it is none."""
        if not isinstance(content, dict):
            return None
        values: dict[str, Any] = {"layer_units_by_part": {}} | content
        by_part = [values.get(name) for name in ("flops_by_part", "layer_units_by_part")]
        numbers = [values.get(name) for name in ("flops", "layer_units")]
        for parts in by_part:
            if not isinstance(parts, dict):
                return None
            numbers += parts.values()
        inherited = [values.get(name, "") for name in ("inherited_flops", "inherited_layer_units")]
        if not all(isinstance(number, int | float) for number in numbers):
            return None
        if not all(isinstance(number, int | float | None) for number in inherited):
            return None
        return cls(**{part.name: values[part.name] for part in fields(cls)})

    @property
    def total_flops(self) -> int | None:
        """The FLOPs with those that are inherited; None if these are not known."""
        return None if self.inherited_flops is None else self.flops + self.inherited_flops

    @property
    def total_layer_units(self) -> float | None:
        """The layer units with those that are inherited; None if these are not known."""
        return None if self.inherited_layer_units is None else self.layer_units + self.inherited_layer_units


@dataclass(frozen=True)
class StartRecord:
    """What a training has started from.

    Attributes:
        run: the folder of that run, or of an export, as the path was given.
        step: optimizer steps completed in it.
        digest: of the weights that it had.
        ledger: what it had taken; None if that is not known.
        stamp: of the files that held the weights, by which they are known without being read; empty if there is none.
    """

    run: str
    step: int
    digest: str
    ledger: LedgerRecord | None = None
    stamp: str = ""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> StartRecord | None:
        """Returns the start in the content of its file; None if it is none."""
        run, step, digest = (content.get(key) for key in ("run", "step", "digest"))
        if not (isinstance(run, str) and isinstance(step, int) and isinstance(digest, str)):
            return None
        return cls(run, step, digest, LedgerRecord.of(content.get("ledger")), str(content.get("stamp", "")))

    def content(self) -> dict[str, Any]:
        """Returns what is written into the file."""
        return asdict(self)


def _known(*kinds: type) -> Any:
    """A part of the summary that a run may lack, which counts only if it is of one of these kinds."""
    return field(default=None, metadata={"kinds": kinds})


@dataclass(frozen=True)
class Summary:
    """What is told of a run after its end; None for what it does not say.

    Attributes:
        parameters, active_parameters, flops_per_token: the size of the model, see `config.model_size.ModelSize`.
        tokens, seconds, tokens_per_second: of the training.
        learned: whether the router learns, True where that is not said.
        causal: whether the router sees no later tokens, True where that is not said.
        ranks: number of processes that trained.
        peak_memory_bytes: of the process, or of its GPU.
        versions: name of each package -> its version.
        commit: of the code; None outside of a checkout.
        hardware, command: on what, and how the run was made.
        evaluated_tokens: of the text that an analysis read.
        tokenizer: digest of the tokenizer by which an analysis counted tokens.
        cut_passages: name of each domain -> the share of its passages that an analysis has cut.
        dtype: precision in which an analysis had the model.
        ledger: what the training has taken, as `LedgerRecord` writes it.
    """

    parameters: int | None = _known(int, float)
    active_parameters: int | None = _known(int, float)
    flops_per_token: int | None = _known(int, float)
    tokens: int | None = _known(int, float)
    seconds: float | None = _known(int, float)
    tokens_per_second: float | None = _known(int, float)
    learned: bool = field(default=True, metadata={"kinds": (bool,)})
    causal: bool = field(default=True, metadata={"kinds": (bool,)})
    ranks: int | None = _known(int)
    peak_memory_bytes: int | None = _known(int, float)
    versions: Mapping[str, str] = field(default_factory=dict, metadata={"kinds": (dict,)})
    commit: str | None = _known(str)
    hardware: str | None = _known(str)
    command: str | None = _known(str)
    evaluated_tokens: int | None = _known(int)
    tokenizer: str | None = _known(str)
    cut_passages: Mapping[str, float] | None = _known(dict)
    dtype: str | None = _known(str)
    ledger: Mapping[str, Any] | None = _known(dict)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Summary:
        """Returns the summary in the content of its file; what is missing or of another kind is left at its default."""
        known = {part.name: content.get(part.name) for part in fields(cls)}
        kinds = {part.name: part.metadata["kinds"] for part in fields(cls)}
        return cls(**{name: value for name, value in known.items() if isinstance(value, kinds[name])})

    def content(self) -> dict[str, Any]:
        """Returns what is written into the file: what the run says."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class DomainManifest:
    """What the manifest says of one domain.

    Attributes:
        licence: of the text; None if it is not known.
        sources: what is known of each source: package, version, digest and so on.
        tokens: name of each split -> its tokens; None where the text was not tokenised.
    """

    licence: str | None = None
    sources: tuple[Mapping[str, Any], ...] = ()
    tokens: Mapping[str, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> DomainManifest:
        """Returns the part of a domain; what is missing or of another kind is left out."""
        licence, sources, splits = (content.get(key) for key in ("licence", "sources", "splits"))
        return cls(
            licence if isinstance(licence, str) else None,
            tuple(source for source in sources if isinstance(source, dict)) if isinstance(sources, list) else (),
            {split: value if isinstance(value := value_at(splits, split, "tokens"), int) else None for split in splits}
            if isinstance(splits, dict)
            else {},
        )


@dataclass(frozen=True)
class Manifest:
    """What a run's data is: the manifest of the token store that it reads, or what an analysis has read.

    Attributes:
        content: what stands in the file; empty if there is none. Two runs are on the same data if it is equal.
    """

    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def domains(self) -> dict[str, DomainManifest]:
        """Each domain by its name, as far as it can be read."""
        domains = self.content.get("domains")
        known = domains.items() if isinstance(domains, dict) else ()
        return {str(name): DomainManifest.of(about) for name, about in known if isinstance(about, dict)}

    @property
    def dropped(self) -> dict[str, str]:
        """Name of each domain that was left out of the mix -> why."""
        dropped = self.content.get("dropped")
        return {str(name): str(reason) for name, reason in dropped.items()} if isinstance(dropped, dict) else {}

    @property
    def digest(self) -> str:
        """Tells data apart, in 16 characters."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class JobEnds:
    """How the jobs of SLURM that trained a run have ended since it was submitted.

    Attributes:
        failures: reasons of those that failed.
        stops: step of the newest checkpoint at the end of each that was asked to stop.
    """

    failures: tuple[str, ...] = ()
    stops: tuple[int, ...] = ()

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> JobEnds:
        """Returns the ends in the content of their file."""
        failures, stops = (
            value if isinstance(value := content.get(key), list) else () for key in ("failures", "stops")
        )
        return cls(tuple(map(str, failures)), tuple(step for step in stops if isinstance(step, int)))

    def content(self) -> dict[str, Any]:
        """Returns what is written into the file: the kinds of ends that there were."""
        return {kind: list(ends) for kind, ends in asdict(self).items() if ends}
