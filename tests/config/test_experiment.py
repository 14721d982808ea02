"""Experiments: layers, defaults, and one clear line for everything that can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.launcher.config.experiment import (
    ExperimentConfig,
    dump_config,
    explain_experiment,
    load_experiment,
    run_name,
)
from moe_testbed.launcher.config.renamed import RENAMED, with_new_names
from moe_testbed.launcher.config.yaml_tree import embedded_configs
from moe_testbed.launcher.errors import ConfigError

Write = Callable[[str, str], Path]
EMBEDDED = sorted(
    path.relative_to(embedded_configs()).as_posix() for path in embedded_configs().glob("experiments/*.yaml")
)


def line_of(text: str, path: Path) -> int:
    """Number of the only line with a text, from 1."""
    (line,) = [number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return line


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_experiments_load_from_any_folder(write: Write, name: str) -> None:
    write("empty.yaml", "")
    config = load_experiment(f"configs/{name}")
    assert config == load_experiment(name)
    write("runs/config.yaml", dump_config(config))
    assert load_experiment("runs/config.yaml") == config


def test_layers(experiment: Path) -> None:
    overrides = [
        "training.steps=9",
        "routing.balance.load_balancing_loss.scope=global_batch",
        "training.betas=[0.8, 0.9]",
    ]
    config = load_experiment(experiment, overrides)
    assert config.training.steps == 9 and config.training.betas == (0.8, 0.9)
    assert config.training.weight_decay == 0.1
    loss = config.routing.balance["load_balancing_loss"]
    assert loss.model_dump(mode="json") == {
        "name": "load_balancing_loss",
        "scope": "global_batch",
        "estimator": "online",
        "window_steps": 16,
        "coefficient": 0.02,
    }


def test_another_router_starts_from_its_own_defaults(experiment: Path) -> None:
    def router(*overrides: str) -> dict[str, object]:
        return load_experiment(experiment, overrides).routing.router.model_dump()

    assert router() == {"name": "top_k", "normalise": False}
    assert router("routing.router.name=top_k")["normalise"] is False
    assert router("routing.router.name=sigmoid")["normalise"] is None


def test_a_balancer_is_taken_out_with_null_and_all_with_none(experiment: Path) -> None:
    one = load_experiment(experiment, ["routing.balance.load_balancing_loss=null", "routing.balance.z_loss={}"])
    assert list(one.routing.balance) == ["z_loss"]
    assert load_experiment(experiment, ["routing.balance=none"]).routing.balance == {}


def test_the_mix_may_be_a_file_relative_to_the_yaml_or_to_the_working_directory(experiment: Path, write: Write) -> None:
    write("mixes/three.yaml", "name: three\ndomains: {only: {sources: [{kind: files, glob: '*.txt'}]}}")
    write("deep/a.yaml", "include: ../small.yaml\ndata: {mix: ../mixes/three.yaml}")
    assert list(load_experiment("deep/a.yaml").data.mix.domains) == ["only"]
    assert load_experiment("small.yaml", ["data.mix=mixes/three.yaml"]).data.mix.name == "three"


def test_config_show_tells_where_each_value_comes_from_and_loads_back(experiment: Path, write: Write) -> None:
    write("big.yaml", "include: small.yaml\nmodel:\n  num_layers: 4\n")
    text = explain_experiment("big.yaml", ["training.steps=9"])
    comments = {
        tuple(line.split("#")[0].split()): line.rpartition("# ")[2] for line in text.splitlines() if "# " in line
    }
    assert comments["num_layers:", "4"] == "big.yaml:3"
    assert comments["hidden_size:", "16"] == f"small.yaml:{line_of(' hidden_size', experiment)}"
    assert comments["steps:", "9"] == "command line"
    assert comments["weight_decay:", "0.1"] == "default"
    assert comments["scope:", "sequence"] == f"small.yaml:{line_of('scope', experiment)}"
    write("shown.yaml", text)
    assert load_experiment("shown.yaml") == load_experiment("big.yaml", ["training.steps=9"])


BAD_INPUT = [
    (
        ["training.stepz=3"],
        "command line: unknown key 'training.stepz'. Did you mean 'steps'? Allowed in training: "
        "activation_checkpointing, betas, final_learning_rate_ratio, global_batch_size, gradient_clipping, "
        "learning_rate, max_skipped_steps, micro_batch_size, precision, steps, warmup_steps, weight_decay, zero_stage",
    ),
    (
        ["training.max_skipped_steps=3", "training.zero_stage=0"],
        "training.max_skipped_steps is 3 with training.zero_stage 0, where DeepSpeed skips no step; set "
        "training.zero_stage to 1 or 2, or training.max_skipped_steps to 0",
    ),
    (
        ["modle.num_layers=3"],
        "command line: unknown key 'modle'. Did you mean 'model'? Allowed here: ablation, checkpoint, data, "
        "evaluation, freeze, model, name, objective, parallel, probe, routing, runtime, seed, start, tracking, "
        "training",
    ),
    (
        ["routing.router.normalize=true"],
        "unknown key 'routing.router.normalize'. Did you mean 'normalise'? Allowed in routing.router: name, normalise",
    ),
    (
        ["routing.balance.load_balancing_loss.scop=token"],
        "unknown key 'routing.balance.load_balancing_loss.scop'. Did you mean 'scope'? Allowed in "
        "routing.balance.load_balancing_loss: coefficient, estimator, name, scope, window_steps",
    ),
    (
        ["data.mix.domains.letters.sources=[{kind: files, glob: x, reader: {kind: jsonl, feild: t}}]"],
        "unknown key 'data.mix.domains.letters.sources.0.reader.feild'. Did you mean 'field'?",
    ),
    (
        ["routing.router.name=topk"],
        "command line: routing.router: Unknown router 'topk'. Did you mean 'top_k'? Available: ",
    ),
    (
        ["routing.balance.even={}"],
        "command line: routing.balance.even: Unknown balancer 'even'. Available: entropy, ",
    ),
    (
        ["data.mix.domains.digits.sources=[{kind: fils}]"],
        "data.mix.domains.digits.sources.0: Unknown source kind 'fils'. Did you mean 'files'? Available: ",
    ),
    (
        ["routing.balance.load_balancing_loss.scope=sequense"],
        "command line: routing.balance.load_balancing_loss.scope is \"sequense\": input should be 'token', ",
    ),
    (["training.precision=bfloat"], "Did you mean 'bfloat16'?"),
    (["training.steps=many"], 'command line: training.steps is "many": input should be a valid integer'),
    (["training.steps='4'"], 'command line: training.steps is "4": input should be a valid integer'),
    (["training.steps=true"], "command line: training.steps is true: input should be a valid integer"),
    (["training.steps=0"], "command line: training.steps is 0: input should be greater than 0"),
    (["training=null"], "command line: training is null: input should be an object"),
    (
        ["training.betas=[0.9, 1.0]"],
        "command line: training.betas is [0.9, 1.0]; both must be at least 0 and less than 1",
    ),
    (
        ["training.warmup_steps=30", "training.steps=20"],
        "command line: training.steps is 20, fewer than training.warmup_steps = 30; train longer or warm up",
    ),
    (
        ["training.zero_stage=0", "training.precision=bfloat16"],
        "command line: training.zero_stage is 0 with training.precision bfloat16: DeepSpeed clips by the norm of "
        "the shared weights alone then, and decays all weights once before the first step; set training.zero_stage",
    ),
    (
        ["routing.balance.load_balancing_loss.estimator=previous"],
        "routing.balance.load_balancing_loss: estimator is previous with scope sequence, which needs none; "
        "leave estimator out or set scope to global_batch",
    ),
    (["seed=2147483648"], "command line: seed is 2147483648: input should be less than or equal to 2147483647"),
    (["name=a/b"], 'command line: name is "a/b": string should match pattern'),
    (
        ["model.moe.top_k=9"],
        "command line: model.moe.top_k is 9 but model.moe.num_experts is only 8; a token can use each expert once",
    ),
    (
        ["model.num_heads=3"],
        "model.hidden_size is 16, which is no multiple of 2 * model.num_heads = 6",
    ),
    (
        ["parallel.expert_parallel_size=3"],
        "command line: parallel.expert_parallel_size is 3, which does not divide model.moe.num_experts = 8; "
        "use one of 1, 2, 4, 8",
    ),
    (
        ["training.micro_batch_size=3"],
        "training.global_batch_size is 8, which is no multiple of training.micro_batch_size = 3; change one of them",
    ),
    (
        ["data.packing=packed", "data.pieces_per_sequence=3"],
        "data.sequence_length is 16, which 3 equal pieces (data.pieces_per_sequence) cannot fill; "
        "make it a multiple of 3",
    ),
    (
        ["parallel.expert_parallel_size=2", "training.zero_stage=0"],
        "training.zero_stage is 0 with training.gradient_clipping 1 and parallel.expert_parallel_size 2: DeepSpeed "
        "clips wrongly then; set training.zero_stage to 1 or 2, or training.gradient_clipping to 0",
    ),
    (
        ["routing.balance=none", "routing.router.name=reference", "model.moe.top_k=5"],
        "2 groups with at least 5 experts each need 10 experts, but there are 8; raise model.moe.num_experts, lower "
        "model.moe.top_k, or have fewer groups (a mix with fewer domains, or a coarser routing.router.partition)",
    ),
    (
        ["routing.balance=none", "routing.router.name=reference", "routing.router.document_parts=3"],
        "6 groups with at least 2 experts each need 12 experts, but there are 8; raise model.moe.num_experts",
    ),
    (
        ["routing.balance=none", "routing.router={name: reference, partition: {all: [digit, letters]}}"],
        "routing.router.partition.all names 'digit', which is no domain of the mix. Did you mean 'digits'?",
    ),
    (
        ["routing.balance=none", "routing.router={name: reference, partition: {all: [digits]}}"],
        "routing.router.partition has no group for the domain 'letters'; add it to one of the groups",
    ),
    (
        ["routing.balance=none", "routing.router.name=reference", "model.moe.num_copy_experts=1"],
        "routing.router.name is reference, whose groups would hold the zero-computation experts of model.moe unevenly",
    ),
    (
        ["parallel.expert_parallel_size=3", "model.moe={split: 2, expert_hidden_size: 16}"],
        "parallel.expert_parallel_size is 3, which does not divide model.moe.num_experts times model.moe.split = 16; ",
    ),
    (
        ["routing.balance=none", "routing.router.name=reference", "data.mix.domains.digits.labelled=false"],
        "command line: routing.router.name is reference, which needs a label for every token, but data.mix.domains."
        "digits is not labelled; set its `labelled` to true, leave it out, or choose another router",
    ),
    (
        ["routing.router.name=hash"],
        "routing.balance.load_balancing_loss (load_balancing_loss) needs scores of all experts, which the router "
        "'hash' does not have",
    ),
    (["data.mix=nowhere.yaml"], "command line: there is no file 'nowhere.yaml', neither in . nor embedded."),
    (
        ["model.architecture=encoder_decoder", "objective={name: denoising}", "freeze.decoder.until=0.5"],
        "freeze.decoder is given, but the encoder moves: what stands still passes no gradient on",
    ),
    (
        [
            "model.architecture=encoder_decoder",
            "objective={name: denoising}",
            "freeze={encoder: {until: 0.5}, decoder: {until: 0.2}}",
        ],
        "freeze.decoder.until is 0.2 and no other part is trained",
    ),
    (["freeze.encoder.until=0.5"], "freeze.encoder is given, but model.architecture is causal, which has no such part"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), BAD_INPUT, ids=lambda value: value[0][:60] if isinstance(value, list) else ""
)
def test_bad_input_gets_one_clear_line(experiment: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(experiment, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_name_the_line_of_the_file_that_wrote_the_value(experiment: Path, write: Write) -> None:
    write("base.yaml", "include: small.yaml\ntraining:\n  steps: 5\n  stepz: 5\n")
    write("top.yaml", "include: base.yaml\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"^base\.yaml:4: unknown key 'training\.stepz'"):
        load_experiment("top.yaml")


def test_a_missing_key_is_told_with_its_meaning(write: Write, experiment: Path) -> None:
    write("short.yaml", experiment.read_text().replace("  steps: 4\n", ""))
    line = line_of("training:", experiment)
    message = rf"^short\.yaml:{line}: training\.steps is missing \(optimizer steps\); it has no default$"
    with pytest.raises(ConfigError, match=message):
        load_experiment("short.yaml")


def test_several_errors_are_counted_and_an_unknown_key_comes_first(experiment: Path, write: Write) -> None:
    write("typo.yaml", experiment.read_text().replace("  steps: 4\n", "  step: 4\n"))
    line = line_of("steps:", experiment)
    message = rf"^typo\.yaml:{line}: unknown key 'training\.step'.* \(1 more to mend after this\)$"
    with pytest.raises(ConfigError, match=message):
        load_experiment("typo.yaml")


def test_zero_stage_0_is_fine_where_it_is_right(experiment: Path) -> None:
    assert load_experiment(experiment, ["training.zero_stage=0"]).training.zero_stage == 0
    load_experiment(
        experiment, ["training.zero_stage=0", "parallel.expert_parallel_size=2", "training.gradient_clipping=0"]
    )


def test_a_coefficient_may_be_a_schedule(experiment: Path) -> None:
    override = "routing.balance.load_balancing_loss.coefficient={0: 0.1, 100: 0.01}"
    config = load_experiment(experiment, [override])
    assert config.routing.balance["load_balancing_loss"].coefficient == {0: 0.1, 100: 0.01}  # type: ignore[attr-defined]
    assert ExperimentConfig.model_validate_json(config.model_dump_json(), strict=True) == config


OLD_AND_NEW = [
    ("statistics", "probe", "points", 3),
    ("examination", "ablation", "sequences_per_domain", 0),
    ("routing.pool", "routing.pooling", None, "first_m"),
]


def dotted(config: object, place: str) -> object:
    for key in place.split("."):
        config = getattr(config, key)
    return config


@pytest.mark.parametrize(("old", "new", "option", "value"), OLD_AND_NEW, ids=lambda value: str(value))
def test_old_keys_load_from_files_includes_and_the_command_line(
    experiment: Path, write: Write, old: str, new: str, option: str | None, value: object
) -> None:
    def place(key: str) -> str:
        return f"{key}.{option}" if option else key

    expected = load_experiment(experiment, [f"{place(new)}={value}"])
    assert dotted(expected, place(new)) == value
    assert load_experiment(experiment, [f"{place(old)}={value}"]) == expected
    # As old run folders and users' files have it: nested, also in a file that is included.
    nested = "".join(f"{'  ' * depth}{key}:\n" for depth, key in enumerate(place(old).split("."))).rstrip("\n")
    write("old.yaml", f"include: small.yaml\n{nested} {value}\n" if "routing" not in old else "")
    if "routing" in old:
        write("old.yaml", f"include: small.yaml\nrouting: {{pool: {value}}}\n")
    write("top.yaml", "include: old.yaml\nseed: 1\n")
    assert load_experiment("old.yaml") == load_experiment("top.yaml") == expected
    # A higher layer wins, whichever name it uses.
    assert load_experiment("top.yaml", [f"{place(new)}={value}"]) == expected
    # What is written has the new name.
    assert "\nstatistics:" not in dump_config(expected) and "  pool:" not in dump_config(expected)
    assert " # old.yaml:" in explain_experiment("old.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["statistics.points=1", "probe.points=2"],
            "command line: statistics is the old name of probe, which is given too (command line); leave statistics "
            "out",
        ),
        (
            ["routing.pool=first_m", "routing.pooling=full_mean"],
            "command line: routing.pool is the old name of routing.pooling, which is given too",
        ),
        (["examination.sequences=1"], "command line: unknown key 'ablation.sequences'. Did you mean 'sequences_per_d"),
        (["probes.points=1"], "unknown key 'probes'. Did you mean 'probe'?"),
        (["routing.poolin=first_m"], "unknown key 'routing.poolin'. Did you mean 'pooling'?"),
    ],
)
def test_an_old_key_beside_its_new_one_is_an_error_and_new_ones_are_suggested(
    experiment: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(experiment, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_folder_keeps_the_name_that_its_command_always_gave_it(experiment: Path) -> None:
    # As commit 9340c6c named them, whose runs the same command is to continue.
    config = load_experiment(experiment, ["examination.sequences_per_domain=0", "seed=3"])
    name = "small-seed3-examination-sequences_per_domain-0-20c627"
    assert run_name(config, ["examination.sequences_per_domain=0", "seed=3"]) == name


def test_every_renamed_key_is_tried_here_and_told_to_users() -> None:
    page = (Path(__file__).parents[2] / "docs" / "run_folder.md").read_text(encoding="utf-8")
    renamed = {".".join(place): ".".join((*place[:-1], name)) for place, name in RENAMED.items()}
    assert renamed == {old: new for old, new, *_ in OLD_AND_NEW}
    assert all(f"`{old}`" in page and f"`{new}`" in page for old, new in renamed.items())


def test_configs_read_without_trust_have_the_new_names() -> None:
    old = {"statistics": {"points": 1}, "routing": {"pool": "first_m", "router": {"pool": "sequence"}}, "seed": 1}
    new = {"probe": {"points": 1}, "routing": {"pooling": "first_m", "router": {"pool": "sequence"}}, "seed": 1}
    assert with_new_names(old) == new == with_new_names(new)
    assert with_new_names({"probe": 1, "statistics": 2}) == {"probe": 1}
