"""What an experiment is: the typed content of configs/experiments/*.yaml and of every run's config.yaml.

Layers, from low to high: defaults, included files, the file itself, a suite's overrides, the command line. A layer that
changes a router or a balancer (its ``name``) drops the options that lower layers gave to the former one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, model_validator

from moe_testbed.data.config import MixConfig
from moe_testbed.data.objectives import NextToken, Objective, objective_names
from moe_testbed.launcher.config.messages import Variants, validate
from moe_testbed.launcher.config.mix import VARIANTS as MIX_VARIANTS
from moe_testbed.launcher.config.names import NAME_PATTERN, training_name
from moe_testbed.launcher.config.renamed import RENAMED
from moe_testbed.launcher.config.stages import (
    FreezeConfig,
    StartConfig,
    refuse_objective,
    refuse_routing,
    refuse_stages,
)
from moe_testbed.launcher.config.yaml_text import Keys, is_block, to_yaml
from moe_testbed.launcher.config.yaml_tree import (
    ANY,
    Node,
    Rules,
    lookup,
    parse_overrides,
    read_layers,
    to_plain,
)
from moe_testbed.model.config import ModelConfig
from moe_testbed.routing.balance.balancer import BALANCERS, BalancerConfig
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.router import ROUTERS, RouterConfig
from moe_testbed.routing.routers.parts.groups import group_sizes, refuse_unknown_domains
from moe_testbed.routing.routers.reference import ReferenceConfig

_READABLE = 40  # characters of a run's name that tell the overrides
RULES = Rules(
    references=frozenset({("data", "mix")}),
    variants=(
        (("routing", "router"), "name"),
        (("routing", "balance", ANY), "name"),
        (("routing", "encoder", "router"), "name"),
        (("routing", "encoder", "balance", ANY), "name"),
        (("objective",), "name"),
    ),
    renamed=RENAMED,
)
VARIANTS: Variants = {
    RouterConfig: lambda options, _: ROUTERS.get(str(options["name"])).Config,
    BalancerConfig: lambda options, label: BALANCERS.get(str(options.get("name", label))).Config,
    Objective: lambda options, _: objective_names.get(options["name"] if isinstance(options, dict) else options),
    **MIX_VARIANTS,
}


class DataConfig(BaseModel, extra="forbid", frozen=True):
    """Says what the model reads."""

    mix: MixConfig = Field(description="the mix, or the path of its YAML file")
    sequence_length: int = Field(256, gt=1, description="tokens (L)")
    packing: Literal["single_domain", "packed"] = Field(
        "single_domain",
        description="single_domain: a sequence has one domain; packed: several documents of any domains",
    )
    pieces_per_sequence: int = Field(
        4, gt=0, description="packed only: documents' pieces, of equal length, in a sequence"
    )
    cache_dir: str = Field("data_cache", min_length=1, description="downloads and token stores, shared by all runs")

    @model_validator(mode="after")
    def _pieces_fit(self) -> DataConfig:
        if self.packing == "packed" and self.sequence_length % self.pieces_per_sequence:
            raise ValueError(
                f"data.sequence_length is {self.sequence_length}, which {self.pieces_per_sequence} equal pieces "
                f"(data.pieces_per_sequence) cannot fill; make it a multiple of {self.pieces_per_sequence}"
            )
        return self


class TrainingConfig(BaseModel, extra="forbid", frozen=True):
    """Says how the model is trained: by AdamW with linear warm-up and cosine decay."""

    steps: int = Field(gt=0, description="optimizer steps")
    global_batch_size: int = Field(gt=0, description="sequences of one optimizer step, over all ranks")
    micro_batch_size: int = Field(
        gt=0, description="most sequences that a rank computes at once; fewer where its share of a step is less"
    )
    learning_rate: float = Field(gt=0, allow_inf_nan=False, description="the highest, at the end of the warm-up")
    final_learning_rate_ratio: float = Field(0.1, ge=0, le=1, description="last one, relative to learning_rate")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of Adam's two moments")
    gradient_clipping: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="largest norm of the gradient; 0 for no limit"
    )
    max_skipped_steps: int = Field(
        0, ge=0, description="most steps that are skipped because their gradient is not finite; one more ends the run"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of weights and activations; in bfloat16 the optimizer keeps float32 copies of the weights, and "
        "gradients are added up in float32",
    )
    zero_stage: Literal[0, 1, 2] = Field(
        1, description="what DeepSpeed's ZeRO shards: nothing, optimizer state, gradients too"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass to save memory"
    )

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size is {self.global_batch_size}, which is no multiple of "
                f"training.micro_batch_size = {self.micro_batch_size}; change one of them"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas is {list(self.betas)}; both must be at least 0 and less than 1")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"training.steps is {self.steps}, fewer than training.warmup_steps = {self.warmup_steps}; "
                "train longer or warm up for fewer steps"
            )
        if self.zero_stage == 0 and self.precision == "bfloat16":
            raise ValueError(
                "training.zero_stage is 0 with training.precision bfloat16: DeepSpeed clips by the norm of the shared "
                "weights alone then, and decays all weights once before the first step; set training.zero_stage to 1 "
                "or 2, or training.precision to float32"
            )
        if self.zero_stage == 0 and self.max_skipped_steps:
            raise ValueError(
                f"training.max_skipped_steps is {self.max_skipped_steps} with training.zero_stage 0, where DeepSpeed "
                "skips no step; set training.zero_stage to 1 or 2, or training.max_skipped_steps to 0"
            )
        return self


class ParallelConfig(BaseModel, extra="forbid", frozen=True):
    """Says how a model is spread over ranks."""

    expert_parallel_size: int = Field(1, gt=0, description="ranks that share one set of experts")
    expert_parallel_across_nodes: bool = Field(
        False, description="true: these ranks may lie on several nodes, whose connection is slow"
    )
    timeout_seconds: float = Field(
        45.0, gt=0, allow_inf_nan=False, description="how long ranks wait for one another in a step before all end"
    )
    slow_timeout_seconds: float = Field(
        1800.0,
        gt=0,
        allow_inf_nan=False,
        description="the same while they start, and write or read a checkpoint",
    )


class EvaluationConfig(BaseModel, extra="forbid", frozen=True):
    """Says when loss and routing counts are taken on held-out documents, and on how many."""

    every: int = Field(0, ge=0, description="optimizer steps between two evaluations; 0: only at the end")
    sequences_per_domain: int = Field(64, gt=0)
    split: Literal["validation", "tuning"] = Field(
        "validation", description="tuning: for choosing settings, so that validation stays unseen until the report"
    )


class ProbeConfig(BaseModel, extra="forbid", frozen=True):
    """The probe tells how the routing develops over the training: it records the experts of the same few held-out
    tokens at several points, and the load of the batch just trained on."""

    points: int = Field(
        32,
        ge=0,
        description="how often the probe is routed, evenly spaced, the last time after the last step; in a run that "
        "starts from another one also before the first; 0: never",
    )
    sequences_per_domain: int = Field(1, gt=0, description="evaluation sequences of each domain in it, the first ones")


class AblationConfig(BaseModel, extra="forbid", frozen=True):
    """The ablation measures what the experts cause, after training: the loss without each of them, and how alike they
    are. It costs two forward passes over the sample for every expert of every layer (of at most 256 experts in all)."""

    sequences_per_domain: int = Field(
        4, ge=0, description="evaluation sequences of each domain in the sample, the first ones; 0: no ablation"
    )


class CheckpointConfig(BaseModel, extra="forbid", frozen=True):
    """Says when a run writes what it continues from if it is cut off."""

    every: int = Field(0, ge=0, description="optimizer steps between two checkpoints; 0: only at the end")
    keep: int = Field(1, gt=0, description="newest checkpoints that stay on disk")


class TrackingConfig(BaseModel, extra="forbid", frozen=True):
    """Says whether MLflow is told; the store is MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""

    mlflow: bool = True
    experiment: str = Field("moe-testbed", min_length=1, description="name of the MLflow experiment")


class RuntimeConfig(BaseModel, extra="forbid", frozen=True):
    """Says where a run computes."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if torch sees one")
    threads: int = Field(
        0, ge=0, description="threads of torch on the CPU; 0: its own choice, which OMP_NUM_THREADS decides"
    )


class ExperimentConfig(BaseModel, extra="forbid", frozen=True):
    """Describes one training: data, model, routing and how it is trained."""

    name: str = Field(pattern=NAME_PATTERN, description="part of the run folder's name")
    seed: int = Field(
        1, ge=0, le=2**31 - 1, description="decides the initial weights, the order of the data and random routers"
    )
    data: DataConfig
    model: ModelConfig
    routing: RoutingConfig
    objective: SerializeAsAny[Annotated[Objective, BeforeValidator(objective_names.parse)]] = Field(
        NextToken(), description="what the model reads of a sequence, and what it is to predict"
    )
    start: StartConfig = StartConfig()
    freeze: FreezeConfig = FreezeConfig()
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    probe: ProbeConfig = ProbeConfig()
    ablation: AblationConfig = AblationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def causal(self) -> bool:
        """Whether no evaluation loss of a token depends on tokens that only its routing sees."""
        return self.model.architecture != "causal" or self.model.dense_baseline or self.routing.causal

    @model_validator(mode="after")
    def _parts_fit_architecture(self) -> ExperimentConfig:
        refuse_objective(self.objective, self.model, self.data.sequence_length)
        refuse_stages(self.start, self.freeze, self.model)
        refuse_routing(self.routing, self.model)
        return self

    @model_validator(mode="after")
    def _experts_are_shared_evenly(self) -> ExperimentConfig:
        ranks, experts = self.parallel.expert_parallel_size, self.model.moe.num_ffn_experts
        if experts % ranks:
            split = " times model.moe.split" if self.model.moe.split > 1 else ""
            raise ValueError(
                f"parallel.expert_parallel_size is {ranks}, which does not divide model.moe.num_experts{split} = "
                f"{experts}; use one of {', '.join(str(n) for n in range(1, experts + 1) if experts % n == 0)}"
            )
        if ranks > 1 and self.training.zero_stage == 0 and self.training.gradient_clipping > 0:
            raise ValueError(
                f"training.zero_stage is 0 with training.gradient_clipping {self.training.gradient_clipping:g} and "
                f"parallel.expert_parallel_size {ranks}: DeepSpeed clips wrongly then; "
                "set training.zero_stage to 1 or 2, or training.gradient_clipping to 0"
            )
        return self

    @model_validator(mode="after")
    def _domains_have_experts(self) -> ExperimentConfig:
        for name in self.model.stacks:
            if self.model.of_stack(name).num_moe_layers and self.routing.of_stack(name).needs_domains:
                self._labels_will_do(self.routing.of_stack(name))
        return self

    def _labels_will_do(self, routing: RoutingConfig) -> None:
        router = routing.router
        unlabelled = [name for name, domain in self.data.mix.domains.items() if not domain.labelled]
        if unlabelled:
            key, value = ("router.name", router.name) if router.needs_domains else ("input", routing.input.value)
            raise ValueError(
                f"routing.{key} is {value}, which needs a label for every token, but data.mix.domains.{unlabelled[0]} "
                "is not labelled; set its `labelled` to true, leave it out, or choose another "
                f"{key.partition('.')[0]}"
            )
        if isinstance(router, ReferenceConfig):
            self._groups_have_experts(router)

    def _groups_have_experts(self, router: ReferenceConfig) -> None:
        moe, domains = self.model.moe, list(self.data.mix.domains)
        if moe.num_zero_computation_experts:
            raise ValueError(
                f"routing.router.name is {router.name}, whose groups would hold the zero-computation experts of "
                "model.moe unevenly; set model.moe.num_zero_experts, num_copy_experts and num_constant_experts to 0, "
                "or choose another router"
            )
        if router.partition is not None:
            refuse_unknown_domains(domains, router.partition)
        group_sizes(moe.num_ffn_experts, (1.0,) * router.groups_of(domains).num_groups, moe.choices)


def load_experiment(path: str | Path, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Returns the experiment in a YAML file, under overrides like ``training.steps=100``.

    Args:
        path: the path of the file; one that is not there is looked for among the embedded configs.

    Raises:
        ConfigError: one line that says what is wrong, where, what is allowed and how to mend it.
    """
    return check_experiment(experiment_tree(path, overrides))


def experiment_tree(path: str | Path, overrides: Iterable[str] = ()) -> Node:
    """Returns the layers of `load_experiment`, merged but not yet checked."""
    return read_layers(path, overrides, RULES)


def check_experiment(tree: Node) -> ExperimentConfig:
    """Returns the typed experiment of a merged tree. Raises ConfigError."""
    return validate(ExperimentConfig, tree, VARIANTS)


def run_name(config: ExperimentConfig, overrides: Iterable[str] = ()) -> str:
    """Returns the name of the folder of an experiment trained by itself: NAME-seedSEED, and what else was overridden.

    The same overrides, in whatever order, give the same name. A digest keeps apart what the readable part does not.
    """
    tree = to_plain(parse_overrides(overrides, Rules()))
    others = {key: value for key, value in tree.items() if key not in ("name", "seed")}
    name = training_name(config.name, config.seed)
    if not others:
        return name
    text = json.dumps(others, sort_keys=True)
    words = re.sub(r"[^\w.]+", "-", text)[:_READABLE].strip("-")
    return f"{name}-{words}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def dump_config(config: BaseModel) -> str:
    """Returns the whole config as YAML, defaults written out; loads back to an equal object."""
    return to_yaml(config.model_dump(mode="json"))


def explain_experiment(path: str | Path, overrides: Iterable[str] = ()) -> str:
    """Returns the whole config as YAML, each value with a comment that says where it comes from. Raises ConfigError."""
    tree = experiment_tree(path, overrides)
    plain = check_experiment(tree).model_dump(mode="json")
    return to_yaml(plain, {keys: _source(tree, keys) for keys in _leaves(plain, ())})


def _source(tree: Node, keys: Keys) -> str:
    node = lookup(tree, [int(key) if key.isdigit() else key for key in keys])
    return "default" if node is None else str(node.origin)


def _leaves(value: Any, at: Keys) -> list[Keys]:
    if not is_block(value):
        return [at]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [keys for key, child in items for keys in _leaves(child, (*at, str(key)))]
