"""How long does the report of 50 runs take, and how large is it? (2 MoE layers, 8 domains, 32 experts, one seed)

    python benchmarks/report.py [--runs 50] [--keep FOLDER] [--against COMMIT] [--rounds 5]

The run folders are made up, with all that training records; the time is that of the command, start of Python included.
Against an earlier commit the two versions take turns on the same folders, and the ratios are medians over the rounds:
of the time that passes, and of the processor time of all processes, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from earlier_commit import lay_out, unpack

_ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("legal_english", "ukrainian", "arabic", "chinese", "python", "cpp", "protein", "music")
LAYERS, EXPERTS, STEPS, TOKENS = 2, 32, 2000, 8192
SEQUENCES, LOOKS, PROBE, VOCABULARY = 32, 32, 256, 2048


def write_suite(folder: Path, num_runs: int) -> None:
    """Writes a suite with a reference, a control and learned routers that specialise more and more."""
    labels = ["reference", "permuted_reference", *(f"top_k_{n:02d}" for n in range(num_runs - 2))]
    suite = {
        "name": folder.name,
        "seeds": [1],
        "reference": labels[0],
        "control": labels[1],
        "runs": {label: {"description": "made up"} for label in labels},
    }
    folder.mkdir(parents=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    for number, label in enumerate(labels):
        focus = {"reference": 1.0, "permuted_reference": 0.0}.get(label, number / num_runs)
        write_run(folder / f"{label}-seed1", label.rstrip("_0123456789"), focus, np.random.default_rng(number))


def write_run(folder: Path, router: str, focus: float, rng: np.random.Generator) -> None:
    """Writes a finished run; `focus` is the share of a domain's assignments that stays with its own experts."""
    for kind in ("evaluations", "statistics"):
        (folder / kind).mkdir(parents=True)
    D, E = len(DOMAINS), EXPERTS
    config = {"name": router, "seed": 1, "model": {"moe": {"num_experts": E}}, "routing": {"router": {"name": router}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, content in (
        ("status", {"state": "finished", "step": STEPS, "steps": STEPS}),
        ("summary", {"parameters": 5_200_000, "active_parameters": 1_300_000, "tokens_per_second": 2e4}),
        ("manifest", {"name": "made up", "domains": {}}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    final_D = 3 - 0.4 * focus + 0.1 * rng.standard_normal(D)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            loss = float(final_D.mean() + 4 * np.exp(-step / 200) + 0.03 * rng.standard_normal())
            file.write(json.dumps({"kind": "train", "step": step, "cross_entropy": loss}) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"kind": "evaluation", "step": step, "cross_entropy": loss}) + "\n")
    own_DE = np.arange(E) * D // E == np.arange(D)[:, None]
    preference_DE = (1 - focus) / E + focus * own_DE / own_DE.sum(1, keepdims=True)
    clusters = SEQUENCES // 2
    split_YDCE = rng.multinomial(
        2 * TOKENS // clusters, np.tile(preference_DE[None, :, None], (LAYERS, 1, clusters, 1))
    )
    counts_YDE = split_YDCE.sum(2)
    domain_N = np.repeat(np.arange(D), SEQUENCES)
    loss_N = final_D[domain_N] + 0.1 * rng.standard_normal(len(domain_N))
    total_YE = counts_YDE.sum(1)
    alike_YEE = np.tile(np.eye(E) * 0.8 + 0.2, (LAYERS, 1, 1))
    save(
        folder / "evaluations" / f"step_{STEPS:08d}.npz",
        step=STEPS,
        domains=DOMAINS,
        tokens_D=np.full(D, TOKENS),
        loss_sum_D=np.bincount(domain_N, loss_N) / SEQUENCES * TOKENS,
        sequence_loss_N=loss_N,
        sequence_domain_N=domain_N,
        sequence_cluster_N=np.arange(len(domain_N)) // 2,
        cluster_domain_C=np.repeat(np.arange(D), clusters),
        cluster_counts_YCE=split_YDCE.reshape(LAYERS, -1, E),
        counts_top_1_YDE=counts_YDE // 2,
        counts_top_k_YDE=counts_YDE,
        dropped_YDE=np.zeros_like(counts_YDE),
        shuffled_counts_top_k_YDE=rng.multinomial(2 * TOKENS, preference_DE.mean(0), size=(LAYERS, D)),
        weight_YDE=counts_YDE / 2,
        coactivation_YEE=np.minimum(total_YE[:, :, None], total_YE[:, None]) // 4 * (1 - np.eye(E, dtype=np.int64))
        + total_YE[:, :, None] * np.eye(E, dtype=np.int64),
        entropy_sum_YD=np.full((LAYERS, D), 2.0 * TOKENS),
        probability_sum_YDE=counts_YDE / 2,
        margin_sum_YD=np.full((LAYERS, D), 0.1 * TOKENS),
        router_cosine_YEE=alike_YEE,
        vocabulary_ids_V=np.arange(VOCABULARY),
        vocabulary_counts_YVE=rng.multinomial(30, preference_DE[np.arange(VOCABULARY) % D], size=(LAYERS, VOCABULARY)),
    )
    final_YTW = rng.integers(0, E, (LAYERS, D * PROBE, 2)).astype(np.int16)
    for look in range(1, LOOKS + 1):
        step = STEPS * look // LOOKS
        moved_YT1 = rng.random((LAYERS, D * PROBE, 1)) > look / LOOKS
        save(
            folder / "statistics" / f"step_{step:08d}.npz",
            step=step,
            domains=DOMAINS,
            domain_T=np.repeat(np.arange(D, dtype=np.int16), PROBE),
            expert_ids_YTW=np.where(moved_YT1, (final_YTW + look) % E, final_YTW).astype(np.int16),
            counts_top_k_YDE=counts_YDE // 8,
        )
    few_N = np.flatnonzero(np.arange(len(domain_N)) % SEQUENCES < 4)
    owner_YE = counts_YDE.argmax(1)
    own_YEN = owner_YE[:, :, None] == domain_N[few_N]
    damage_YEN = 0.01 * rng.standard_normal(own_YEN.shape) + 0.1 * focus * own_YEN
    save(
        folder / "analysis.npz",
        domains=DOMAINS,
        sequence_domain_N=domain_N[few_N],
        baseline_loss_N=loss_N[few_N],
        owner_YE=owner_YE,
        group_YE=owner_YE,
        ablation_loss_YEN=loss_N[few_N] + damage_YEN,
        mean_loss_YEN=loss_N[few_N] + damage_YEN / 2,
        forced_loss_DN=loss_N[few_N] + focus * (np.arange(D)[:, None] != domain_N[few_N]),
        expert_cosine_YEE=alike_YEE,
        expert_cka_YEE=alike_YEE,
        effective_rank_Y=np.full(LAYERS, E / 2),
        weight_cosine_YEE=alike_YEE,
        redundancy_tokens=np.array(512),
    )


def save(path: Path, **arrays: Any) -> None:
    """Writes arrays as training does."""
    np.savez_compressed(path, **{name: np.asarray(array) for name, array in arrays.items()})


def report_seconds(suite: Path, path: Path | None = None) -> tuple[float, float]:
    """Returns the time that a report takes, and its processor time, by the version at ``path`` or the installed one."""
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "moe_testbed.launcher", "report", str(suite)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(suite: Path, commit: str, rounds: int) -> None:
    """Prints the ratios to an earlier commit."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        now = lay_out(_ROOT, Path(folder) / "now")
        then = lay_out(unpack(commit, Path(folder) / "files"), Path(folder) / "then")
        for number in range(rounds):
            # Each is first in every other round.
            order = [now, then] if number % 2 == 0 else [then, now]
            found = {path: report_seconds(suite, path) for path in order}
            ratios.append([mine / theirs for mine, theirs in zip(found[now], found[then], strict=True)])
            print("round {}: {:.1f} s ({:.1f} s of processors) now, ".format(number + 1, *found[now]), end="")
            print("{:.1f} s ({:.1f} s) then".format(*found[then]), flush=True)
    wall, cpu = map(statistics.median, zip(*ratios, strict=True))
    print(f"report now: {wall:.2f} x the time of {commit}, {cpu:.2f} x its processor time")


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and megabytes of a report.")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--against", metavar="COMMIT", help="an earlier commit to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="with --against: reports of each version")
    parser.add_argument("--keep", type=Path, help="folder for the made-up suite; by default it is removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        suite = (arguments.keep or Path(temporary)) / "report_benchmark"
        write_suite(suite, arguments.runs)
        if arguments.against:
            compare(suite, arguments.against, arguments.rounds)
            return
        seconds, _ = report_seconds(suite)
        megabytes = (suite / "report.html").stat().st_size / 1e6
        print(f"{arguments.runs} runs: {seconds:.1f} s, report.html {megabytes:.1f} MB")
        print(json.dumps({"figures": {"report": f"{seconds:.0f} s, {megabytes:.1f} MB"}}))


if __name__ == "__main__":
    main()
