"""The command `probe`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_testbed.launcher.cli.parts import OVERRIDES_HELP, Commands, add_command, add_trust


def add_probe_command(commands: Commands) -> None:
    """Adds `probe` to the command line."""
    command = add_command(
        commands,
        "probe",
        "ask what the encoders of runs have learned",
        "Learn a labelled task from the states of a run's encoder, by a linear layer and by fine-tuning, and score it "
        "beside what is found without pre-training: by a random table, a random model, words alone and the most "
        "frequent class. Models with a decoder also write texts. What is found is written into the folders of the "
        "runs, and the report of their suite shows it.",
        """
        moe-testbed probe runs/mlm-seed1 --task brown_pos
        moe-testbed probe runs/mlm-seed1 runs/scratch-seed1 --task brown_genre learning.seeds=[1]
        """,
        _probe,
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; behind them KEY=VALUE, see below")
    command.add_argument(
        "--task", required=True, metavar="TASK", help="a task of configs/probes, such as brown_pos, or a YAML file"
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    command.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="downloads and token stores (default: the runs' own)"
    )
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help=OVERRIDES_HELP.format("limits.train=1000")
    )
    add_trust(command)


def _probe(arguments: argparse.Namespace) -> None:
    """Runs the command. Raises what `Prober` does."""
    from moe_testbed.launcher.config.mix import load_task

    runs = [text for text in arguments.runs if "=" not in text or Path(text).is_dir()]
    overrides = [text for text in arguments.runs if text not in runs] + arguments.overrides
    task = load_task(arguments.task, overrides)

    from moe_testbed.launcher.probing.probe import Prober
    from moe_testbed.launcher.probing.table import probing_text
    from moe_testbed.launcher.ranks.rendezvous import choose_device

    def log(text: str) -> None:
        print(text, file=sys.stderr)

    probe = Prober(task, arguments.cache_dir, choose_device(arguments.device), log, arguments.trust)
    print(probing_text([probe(Path(run)) for run in runs]))
