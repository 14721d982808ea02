"""The model card: what a model is, what it was made of, under which licences, and what it is not good for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_testbed.launcher.checkpoint.own_run import OwnRun
from moe_testbed.launcher.config.model_size import ModelSize
from moe_testbed.launcher.export.tokenizer import END, MASK, PADDING, START
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import DomainManifest, LedgerRecord, Manifest

TASKS = {"encoder": "fill-mask", "causal": "text-generation", "encoder_decoder": "text2text-generation"}
_AUTO = {"encoder": "MaskedLM", "causal": "CausalLM", "encoder_decoder": "Seq2SeqLM"}


def auto_class(architecture: str) -> str:
    """Returns the name of the class of transformers that loads models of an architecture."""
    return f"AutoModelFor{_AUTO[architecture]}"


def model_card(run: OwnRun, size: ModelSize, class_name: str, is_own: bool) -> str:
    """Returns the card, in Markdown with the hub's head.

    Args:
        class_name: of the model in transformers.
        is_own: the class lies beside the weights.
    """
    config, manifest = run.config, Manifest(run.store.manifest)
    architecture = config.model.architecture
    trust = ", trust_remote_code=True" if is_own else ""
    summary = RunFolder(run.folder).read_summary()
    steps = config.training.steps
    whole = "" if run.step == steps else f" The training was not finished: it is meant to take {steps:,} steps."
    parts = [
        _head(architecture),
        f"# {config.name}",
        f"A language model of moe-testbed: {_described(run)}. "
        f"{size.parameters:,} parameters, of which a token uses {size.active_parameters:,}; "
        f"{size.flops_per_token:,} FLOPs of forward and backward per token of text.",
        f"```python\nfrom transformers import {auto_class(architecture)}, AutoTokenizer\n\n"
        f'model = {auto_class(architecture)}.from_pretrained("FOLDER"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})\n```',
        f"The class is `{class_name}`"
        + (", in `modeling_moe_testbed.py` beside the weights." if is_own else " of transformers."),
        "## Training",
        f"Objective `{config.objective.name}`, {run.step:,} steps of {config.training.global_batch_size} sequences of "
        f"{config.data.sequence_length} tokens, AdamW with a highest learning rate of "
        f"{config.training.learning_rate:g}, seed {config.seed}, in {config.training.precision}. The whole config is "
        f"in `testbed.json`.{whole}",
        _ledger(LedgerRecord.of(summary.ledger)),
        "## Text",
        f"The mix `{config.data.mix.name}`, {run.store.vocab_size:,} pieces. Whether and how the licences of the text "
        "reach the model is not settled; they are named here so that you can judge.",
        _domains(manifest.domains),
        "## Limits",
        _limits(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(architecture: str) -> str:
    return (
        "---\nlibrary_name: transformers\n"
        f"pipeline_tag: {TASKS[architecture]}\n"
        "license: other\nlicense_name: licences-of-the-text\ntags:\n- moe-testbed\n---"
    )


def _described(run: OwnRun) -> str:
    model = run.config.model
    words = {
        "encoder": "an encoder for masked tokens",
        "causal": "a decoder that continues a text",
        "encoder_decoder": "an encoder, and a decoder that writes a text about what the encoder reads",
    }
    layers = " and ".join(f"{model.of_stack(name).num_layers} layers ({name})" for name in model.stacks)
    experts = ""
    if model.num_moe_layers:
        experts = (
            f", {model.num_moe_layers} of them with {model.moe.num_routed_experts} experts, of which the router "
            f"`{run.config.routing.router.name}` gives {model.moe.choices} to each token"
        )
    return f"{words[model.architecture]}, {layers} of width {model.hidden_size}{experts}"


def _ledger(ledger: LedgerRecord | None) -> str:
    """What the training took, of its own and of those that it has started from."""
    if ledger is None:
        return ""
    rows = [f"| {part} | {flops:.4g} |" for part, flops in ledger.flops_by_part.items()]
    inherited, total = (
        "not known" if flops is None else f"{flops:.4g}" for flops in (ledger.inherited_flops, ledger.total_flops)
    )
    rows.append(f"| inherited from the training that this one started from | {inherited} |")
    rows.append(f"| all | {total} |")
    return "\n".join(["| compute | FLOPs |", "| --- | --- |", *rows])


def _domains(domains: Mapping[str, DomainManifest]) -> str:
    rows = [
        f"| {name} | {about.licence or 'not known'} | {', '.join(map(_source, about.sources))} | "
        f"{_number(about.tokens.get('train'))} |"
        for name, about in domains.items()
    ]
    return "\n".join(["| domain | licence | source | tokens |", "| --- | --- | --- | --- |", *rows])


def _source(source: Mapping[str, Any]) -> str:
    name = next((str(source[key]) for key in ("package", "dataset", "repository", "glob") if key in source), "")
    name = name.rsplit("/", 1)[-1] if "glob" in source else name
    parts = [str(source[key]) for key in ("index",) if source.get(key)]
    return " ".join([*parts, name or str(source.get("kind", "")), str(source.get("version") or "")]).strip()


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _limits(run: OwnRun) -> str:
    config = run.config
    lengths = config.objective.lengths(config.data.sequence_length)
    longest = ", ".join(f"{length} ({name})" for name, length in lengths.items())
    special = [PADDING, END] + ([] if config.model.architecture == "causal" else [START, MASK])
    lines = [
        "It was made to compare how models are trained, not to be used: it is small, it knows the texts of the mix "
        "alone, and nothing was done against false or harmful text.",
        f"It has seen texts of at most so many tokens: {longest}. Most of them begin and end amid a document.",
        f"The tokenizer splits {', '.join(f'`{token}`' for token in special)} off wherever they stand in a text, and "
        "takes U+2581 for a space; all else is kept as it is, and comes back when it is decoded.",
    ]
    if config.model.architecture == "encoder_decoder":
        lines.append("It keeps no keys and values between the steps of `generate`: a long text takes long.")
    return "\n".join(f"- {line}" for line in lines)
