"""The command `analyze`."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_testbed.launcher.cli.parts import Commands, add_command, add_trust


def add_analyze_command(commands: Commands) -> None:
    """Adds `analyze` to the command line."""
    command = add_command(
        commands,
        "analyze",
        "analyse the routing of existing checkpoints",
        "Record how checkpoints route the labelled text of a mix, and write the same report as for a suite. Ends with "
        "status 1 if a checkpoint failed and others did not.",
        """
        moe-testbed analyze --checkpoint models/OLMoE-1B-7B --mix configs/mixes/packages8.yaml
        moe-testbed analyze --checkpoint runs/demo/top_k_global-seed1 --mix configs/mixes/languages_udhr.yaml
        """,
        _analyze,
    )
    command.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar="PATH",
        help="folder of an MoE model of the Hugging Face hub's format, its name on the hub, or folder of a run; may be "
        "given several times",
    )
    command.add_argument("--mix", required=True, metavar="MIX", help="YAML file of a mix, such as the ones above")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder of the report (default: runs/analysis-MIX)")
    command.add_argument(
        "--split",
        choices=("validation", "tuning", "train", "all"),
        help="documents that are read (default: validation, or a run's own; all of a mix that is for evaluation only)",
    )
    command.add_argument("--sequences-per-domain", type=at_least_one, metavar="N", help="(default: 64, or a run's own)")
    command.add_argument("--sequence-length", type=at_least_one, metavar="L", help="(default: 512, or a run's own)")
    command.add_argument("--batch-size", type=at_least_one, metavar="B", help="(default: 8, or a run's own)")
    command.add_argument(
        "--examined-sequences",
        type=whole_number,
        metavar="N",
        help="of each domain, for the causal measures, which runs get and models of the hub's format do not; 0: none "
        "(default: a run's own)",
    )
    command.add_argument("--tokenizer", metavar="PATH", help="another tokenizer than the checkpoint's own")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    command.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: as in the checkpoint)"
    )
    command.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="downloads and token stores (default: data_cache, or a run's own)",
    )
    add_trust(command)


def whole_number(text: str) -> int:
    """Reads a whole number from 0 on, for argparse."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{text}'")
    return int(text)


def at_least_one(text: str) -> int:
    """Reads a whole number from 1 on, for argparse."""
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got '{text}'")
    return number


def _analyze(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status. Raises what `analyze.analyze` does."""
    from moe_testbed.launcher.config.mix import load_mix

    mix = load_mix(arguments.mix)

    from moe_testbed.launcher.analyze.analyze import analyze
    from moe_testbed.launcher.analyze.request import Request
    from moe_testbed.launcher.ranks.rendezvous import choose_device

    request = Request(
        mix=mix,
        device=choose_device(arguments.device),
        split=arguments.split,
        sequences_per_domain=arguments.sequences_per_domain,
        sequence_length=arguments.sequence_length,
        batch_size=arguments.batch_size,
        examined_sequences=arguments.examined_sequences,
        tokenizer=arguments.tokenizer,
        cache_dir=arguments.cache_dir,
        dtype=arguments.dtype,
        trust=arguments.trust,
    )
    return analyze(arguments.checkpoint, request, arguments.out or Path("runs") / f"analysis-{mix.name}")
