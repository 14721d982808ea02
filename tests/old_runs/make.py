"""Makes runs.tar.xz; see README.md. To be run with the code of the commit whose runs the archive is to hold."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from textwrap import dedent

ALPHABETS = {"latin": "abcdefgh", "greek": "αβγδεζηθ", "digits": "01234567"}
WRITTEN_AT = 1_700_000_000

EXPERIMENT = """
    name: old
    data:
      mix: mix.yaml
      sequence_length: 16
      cache_dir: cache
    model:
      num_layers: 2
      hidden_size: 8
      num_heads: 2
      moe: {num_experts: 4, top_k: 2, expert_hidden_size: 8, capacity_factor: 4.0}
    routing:
      router: {name: top_k}
      unit: sequence
      pool: first_m
      first_tokens: 4
      balance:
        load_balancing_loss: {coefficient: 0.1, scope: global_batch, estimator: previous}
        loss_free_bias: {update_rate: 0.01}
        z_loss: {}
    training:
      steps: 12
      global_batch_size: 8
      micro_batch_size: 4
      learning_rate: 0.02
      warmup_steps: 2
      gradient_clipping: 0.5
    evaluation: {every: 4, sequences_per_domain: 4}
    statistics: {points: 6, sequences_per_domain: 2}
    examination: {sequences_per_domain: 2}
    checkpoint: {every: 4}
    tracking: {mlflow: false}
    runtime: {device: cpu, threads: 1}
"""
SUITE = """
    name: suite
    experiment: old.yaml
    overrides:
      routing.unit: token
      routing.pool: prefix_mean
      model.moe.num_experts: 6
      training.steps: 24
      statistics.points: 3
      evaluation.every: 0
      checkpoint.every: 0
    seeds: [1, 2]
    reference: [reference]
    control: permuted_reference
    runs:
      reference:
        description: A group of experts for each domain
        overrides: {routing.router: {name: reference}, routing.balance: none}
      permuted_reference:
        description: The same for domains that say nothing
        overrides: {routing.router: {name: permuted_reference}, routing.balance: none}
      top_k: {description: Softmax and the two best}
"""
# A training that dies after the sixth step, two after its checkpoint.
DYING = """
import os, sys
from moe_testbed.launcher.run_folder import RunFolder
append = RunFolder.append_metrics
def dying(self, line):
    append(self, line)
    if line["step"] == 6:
        self.write_status("running", 6, 12)
        os._exit(9)
RunFolder.append_metrics = dying
from moe_testbed.launcher.cli import main
sys.exit(main(sys.argv[1:]))
"""


def write_corpus() -> None:
    """Three invented languages."""
    generator = random.Random(1)

    def paragraph(alphabet: str) -> str:
        return " ".join("".join(generator.choices(alphabet, k=generator.randint(2, 6))) for _ in range(20)) + "."

    lines = ["name: old", "vocab_size: 512", "validation_fraction: 0.1", "tuning_fraction: 0.1", "domains:"]
    for name, alphabet in ALPHABETS.items():
        folder = Path("texts") / name
        folder.mkdir(parents=True)
        for number in range(24):
            path = folder / f"{number:02}.txt"
            path.write_text("\n\n".join(paragraph(alphabet) for _ in range(generator.randint(1, 5))), encoding="utf-8")
            # The name of the token store depends on it.
            os.utime(path, (WRITTEN_AT, WRITTEN_AT))
        lines.append(f"  {name}: {{sources: [{{kind: files, glob: texts/{name}/*.txt}}]}}")
    Path("mix.yaml").write_text("\n".join(lines) + "\n")


def command(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "moe_testbed.launcher", *arguments], check=True, env=environment)


def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The member of an archive without the names of the machine's users."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def main(archive: Path) -> None:
    """Writes everything into the working directory, which is empty, and what the test needs into the archive."""
    write_corpus()
    Path("old.yaml").write_text(dedent(EXPERIMENT))
    Path("suite.yaml").write_text(dedent(SUITE))
    command("train", "old.yaml", "--run-dir", "finished")
    subprocess.run([sys.executable, "-c", DYING, "train", "old.yaml", "--run-dir", "stopped"])
    command("compare", "suite.yaml", "--jobs", "1", "--runs-dir", ".")
    for folder in (
        Path("cache/datasets"),
        Path("suite/figures"),
        Path("suite/tables"),
        *Path().glob("suite/*/checkpoints"),
    ):
        shutil.rmtree(folder)
    # Of the run that came to its end, the test needs the metrics and the weights.
    unneeded = ("**/*.lock", "**/.lock", "**/log.txt", "suite/report.html", "suite/results.csv", "finished/**/*optim*")
    for path in [path for pattern in unneeded for path in Path().glob(pattern)]:
        path.unlink(missing_ok=True)
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for name in ("texts", "cache", "mix.yaml", "old.yaml", "suite.yaml", "finished", "stopped", "suite"):
            tar.add(name, filter=without_owner)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
