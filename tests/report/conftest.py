"""Constructed suites: run folders as training writes them, with counts and losses whose right answers are known."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.report.answers import alike_once, answers, forget

__all__ = ["alike_once", "answers", "forget"]

DOMAINS = ("legal_english", "ukrainian", "arabic", "chinese", "python", "cpp", "protein", "music")
DIFFICULTY = np.array([2.9, 3.4, 3.1, 3.6, 2.6, 2.4, 3.9, 2.2])


@dataclass(frozen=True)
class FakeRun:
    """What to construct: the final loss above the domains' difficulty, and how the experts are used.

    ``drops`` is the share of assignments dropped, ``drops_first`` that of the first domain where it differs.
    """

    router: str
    gap: float
    specialization: float = 0.0
    skew: float = 0.0
    state: str = "finished"
    reason: str | None = None
    drops: float = 0.0
    drops_first: float | None = None
    causal: bool = True
    learned: bool = True
    dense: bool = False
    description: str = ""


def write_suite(
    folder: Path,
    runs: dict[str, FakeRun],
    seeds: tuple[int, ...] = (1,),
    reference: tuple[str, ...] = ("reference",),
    control: str | None = "permuted_reference",
    domains: tuple[str, ...] = DOMAINS,
    num_layers: int = 2,
    num_experts: int = 32,
    sequences_per_domain: int = 16,
    noise: float = 0.01,
    recorded: bool = True,
) -> Path:
    """Write a suite's folder; `missing` runs get no folder at all.

    recorded: with all that an evaluation can hold, statistics and analysis.npz; else as runs of old had it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "name": folder.name,
        "experiment": "tiny.yaml",
        "seeds": list(seeds),
        "reference": list(reference),
        "control": control,
        "runs": {label: {"description": run.description, "overrides": {}} for label, run in runs.items()},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    shape = (num_layers, len(domains), num_experts)
    for label, run in runs.items():
        for seed in seeds:
            if run.state != "missing":
                files = _files_of_run(label, run, seed, domains, shape, sequences_per_domain, noise, recorded)
                (folder / f"{label}-seed{seed}" / "evaluations").mkdir(parents=True)
                for name, content in files.items():
                    path = folder / f"{label}-seed{seed}" / name
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(content)
    return folder


@functools.cache
def _files_of_run(
    label: str,
    run: FakeRun,
    seed: int,
    domains: tuple[str, ...],
    shape: tuple[int, int, int],
    sequences_per_domain: int,
    noise: float,
    recorded: bool,
) -> dict[str, bytes]:
    """The files of a run by their names in its folder: the same in every suite that has it."""
    number = zlib.crc32(label.encode())
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        write_run(
            run_dir, run, seed, np.random.default_rng([number, seed]), domains, shape, sequences_per_domain, noise
        )
        if recorded and run.state == "finished" and not run.dense and shape[0]:
            record(run_dir, run, np.random.default_rng([number, seed, 1]))
        return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def write_run(
    folder: Path,
    run: FakeRun,
    seed: int,
    rng: np.random.Generator,
    domains: tuple[str, ...],
    shape: tuple[int, int, int],
    sequences_per_domain: int,
    noise: float,
) -> None:
    """Write one run's folder."""
    (folder / "evaluations").mkdir(parents=True)
    steps, finished = 400, run.state == "finished"
    last = steps if finished else 220
    config = {
        "name": "tiny",
        "seed": seed,
        "model": {"num_layers": 4, "dense_baseline": run.dense, "moe": {"num_experts": shape[2], "top_k": 2}},
        "routing": {"router": {"name": run.router}, "balance": {}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    status = {"state": run.state, "step": last, "steps": steps, "reason": run.reason}
    (folder / "status.json").write_text(json.dumps(status))
    difficulty = np.resize(DIFFICULTY, len(domains))
    final = difficulty + run.gap + 0.02 * rng.standard_normal(len(domains)) * noise / 0.01
    lines = []
    for step in range(1, last + 1):
        loss = final.mean() + 4.5 * np.exp(-step / 60) + 0.03 * rng.standard_normal()
        train = {"kind": "train", "step": step, "seconds": step * 0.2, "loss": loss + 0.01, "cross_entropy": loss}
        lines.append({**train, "learning_rate": 1e-3, "tokens_per_second": 20000.0})
        if step % 50 == 0:
            per_domain = final + 4.5 * np.exp(-step / 60) * (step < steps)
            values = {f"cross_entropy/{name}": value for name, value in zip(domains, per_domain, strict=True)}
            lines.append({"kind": "evaluation", "step": step, "cross_entropy": per_domain.mean(), **values})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        write_evaluation(folder, run, rng, domains, final, shape, sequences_per_domain, steps)
        summary = {
            "parameters": 5_200_000,
            "active_parameters": 1_300_000,
            "flops_per_token": 7_800_000,
            "learned": run.learned,
            "tokens": 6_553_600,
            "seconds": 80.0,
            "tokens_per_second": float(20000 + 1000 * rng.standard_normal()),
            "peak_memory_bytes": 700_000_000,
            "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"},
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "hardware": "2 CPU cores, 8 GB",
            "command": f"moe-testbed train configs/experiments/tiny.yaml seed={seed}",
            "causal": run.causal,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    manifest = {
        "name": "packages8",
        "vocabulary": 2048,
        "domains": {
            name: {
                "sources": [{"package": f"{name}-corpus", "version": "1.0.0", "sha256": "ab" * 32}],
                "licence": "MIT <permissive>",
                "splits": {"train": {"tokens": 3_400_000 + 1000 * d}, "validation": {"tokens": 120_000}},
            }
            for d, name in enumerate(domains)
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_evaluation(
    folder: Path,
    run: FakeRun,
    rng: np.random.Generator,
    domains: tuple[str, ...],
    final: np.ndarray,
    shape: tuple[int, int, int],
    sequences_per_domain: int,
    step: int,
) -> None:
    """Write the last evaluation; 4,096 tokens a domain, two choices a token."""
    num_layers, num_domains, num_experts = (0, *shape[1:]) if run.dense else shape
    tokens = 4096
    drops_D1 = np.full((num_domains, 1), run.drops)
    if run.drops_first is not None:
        drops_D1[0] = run.drops_first
    sequence_domain = np.repeat(np.arange(num_domains), sequences_per_domain)
    shared = np.random.default_rng(7).normal(0, 0.3, (num_domains, sequences_per_domain))
    deviation = shared + 0.02 * rng.standard_normal(shared.shape)
    deviation -= deviation.mean(axis=1, keepdims=True)
    owner = np.arange(num_experts) * num_domains // num_experts
    counts = np.zeros((num_layers, num_domains, num_experts), dtype=np.int64)
    shuffled = np.zeros_like(counts)
    for layer in range(num_layers):
        order = np.arange(num_experts) if run.router == "reference" else rng.permutation(num_experts)
        preference = np.full((num_domains, num_experts), (1 - run.specialization) / num_experts)
        own = owner[None, :] == np.arange(num_domains)[:, None]
        preference += own / own.sum(axis=1, keepdims=True) * run.specialization
        preference = preference[:, order] * np.exp(run.skew * rng.standard_normal(num_experts))
        preference /= preference.sum(axis=1, keepdims=True)
        counts[layer] = [rng.multinomial(2 * tokens, row) for row in preference]
        shuffled[layer] = rng.multinomial(2 * tokens, preference.mean(axis=0), size=num_domains)
    np.savez(
        folder / "evaluations" / f"step_{step:08d}.npz",
        step=step,
        domains=np.array(domains),
        tokens_D=np.full(num_domains, tokens),
        loss_sum_D=final * tokens,
        sequence_loss_N=(final[:, None] + deviation).reshape(-1),
        sequence_domain_N=sequence_domain,
        counts_top_1_YDE=counts // 2,
        counts_top_k_YDE=counts,
        dropped_YDE=(counts * drops_D1).astype(np.int64),
        shuffled_counts_top_k_YDE=shuffled,
    )


def edit(path: Path, **changes: object) -> None:
    """Change arrays of an .npz file, or add some; None removes one."""
    with np.load(path) as arrays:
        content = {**{name: arrays[name] for name in arrays.files}, **changes}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})


def record(folder: Path, run: FakeRun, rng: np.random.Generator) -> None:
    """Add what a finished run records beside its counts: more of the evaluation, statistics and an analysis."""
    path = next((folder / "evaluations").glob("*.npz"))
    with np.load(path) as arrays:
        counts_YDE, domain_N, domains = (arrays[n] for n in ("counts_top_k_YDE", "sequence_domain_N", "domains"))
        tokens_D, loss_N, step = arrays["tokens_D"], arrays["sequence_loss_N"], int(arrays["step"])
    num_layers, num_domains, num_experts = counts_YDE.shape
    per_domain = len(domain_N) // num_domains
    documents = max(1, per_domain // 2)
    split_YDEC = rng.multinomial(counts_YDE, np.full(documents, 1 / documents))
    load_YE = counts_YDE.sum(1)
    together_YEE = np.zeros((num_layers, num_experts, num_experts), dtype=np.int64)
    for e in range(num_experts - num_experts % 2):  # neighbours share half of what the lesser of them has
        together_YEE[:, e, e ^ 1] = np.minimum(load_YE[:, e], load_YE[:, e ^ 1]) // 2
    together_YEE[:, np.arange(num_experts), np.arange(num_experts)] = load_YE
    scores = {
        "entropy_sum_YD": np.tile(tokens_D * np.log(num_experts) * (1 - run.specialization), (num_layers, 1)),
        "probability_sum_YDE": counts_YDE / 2,
        "margin_sum_YD": np.tile(tokens_D * 0.25 * run.specialization, (num_layers, 1)),
        "router_cosine_YEE": np.tile(np.eye(num_experts) * 0.9 + 0.1, (num_layers, 1, 1)).astype(np.float32),
    }
    edit(
        path,
        sequence_cluster_N=np.arange(num_domains * per_domain) // per_domain * documents
        + np.arange(num_domains * per_domain) % per_domain * documents // per_domain,
        cluster_domain_C=np.repeat(np.arange(num_domains), documents),
        cluster_counts_YCE=split_YDEC.transpose(0, 1, 3, 2).reshape(num_layers, -1, num_experts),
        weight_YDE=counts_YDE / 2,
        coactivation_YEE=together_YEE,
        vocabulary_ids_V=np.arange(40),
        vocabulary_counts_YVE=rng.multinomial(50, load_YE / load_YE.sum(1, keepdims=True), size=(40, num_layers))
        .transpose(1, 0, 2)
        .astype(np.int64),
        **(scores if run.learned else {}),
    )
    write_statistics(folder, counts_YDE, domains, step, rng)
    write_analysis(folder, run, counts_YDE, domains, loss_N.reshape(num_domains, -1)[:, :2])


def write_statistics(
    folder: Path, counts_YDE: np.ndarray, domains: np.ndarray, last_step: int, rng: np.random.Generator
) -> None:
    """Eight looks at 64 tokens, of which t eighths have their final experts at look t, and choices of which hold a half
    of an even load at first and none at the end."""
    (folder / "statistics").mkdir()
    num_layers, num_domains, num_experts = counts_YDE.shape
    tokens = 64 * num_domains
    final_YTW = rng.integers(0, num_experts, (num_layers, tokens, 2)).astype(np.int16)
    final_YTW[..., 1] = (final_YTW[..., 0] + 1) % num_experts
    for look in range(1, 9):
        step = last_step * look // 8
        undecided_T = np.arange(tokens) % 8 >= look
        ids_YTW = final_YTW.copy()
        ids_YTW[:, undecided_T] = (ids_YTW[:, undecided_T] + 2 + look % 2 * 2) % num_experts
        np.savez(
            folder / "statistics" / f"step_{step:08d}.npz",
            step=step,
            domains=domains,
            domain_T=np.repeat(np.arange(num_domains, dtype=np.int16), 64),
            expert_ids_YTW=ids_YTW,
            counts_top_k_YDE=counts_YDE // 16 + (8 - look) * 16,
        )


def write_analysis(
    folder: Path, run: FakeRun, counts_YDE: np.ndarray, domains: np.ndarray, loss_DN: np.ndarray
) -> None:
    """Two sequences a domain. Without an expert its owner's domain loses 0.01 + 0.1 x specialization, the others 0.01;
    one's own group alone costs 0.02, another's 0.02 + specialization. Experts are alike by a quarter."""
    num_layers, num_domains, num_experts = counts_YDE.shape
    baseline_N, domain_N = loss_DN.reshape(-1), np.repeat(np.arange(num_domains), loss_DN.shape[1])
    owner_YE = (counts_YDE / counts_YDE.sum(2, keepdims=True)).argmax(1)
    own_YEN = owner_YE[:, :, None] == domain_N
    damage_YEN = 0.01 + 0.1 * run.specialization * own_YEN
    own_DN = np.arange(num_domains)[:, None] == domain_N
    alike_YEE = np.tile(np.eye(num_experts) * 0.75 + 0.25, (num_layers, 1, 1))
    np.savez(
        folder / "analysis.npz",
        domains=domains,
        sequence_domain_N=domain_N,
        baseline_loss_N=baseline_N,
        owner_YE=owner_YE,
        group_YE=owner_YE,
        ablation_loss_YEN=baseline_N + damage_YEN,
        mean_loss_YEN=baseline_N + damage_YEN / 2,
        forced_loss_DN=baseline_N + 0.02 + run.specialization * ~own_DN,
        expert_cosine_YEE=alike_YEE,
        expert_cka_YEE=alike_YEE,
        effective_rank_Y=np.full(num_layers, num_experts / 2),
        weight_cosine_YEE=alike_YEE,
        redundancy_tokens=512,
    )


DEMO = {
    "reference": FakeRun("reference", 0.0, 1.0, 0.1, description="oracle groups, learned top-2 inside"),
    "reference_hash": FakeRun("reference", -0.03, 1.0, 0.05, description="oracle groups, hashed inside"),
    "permuted_reference": FakeRun("permuted_reference", 0.38, 0.0, 0.1, description="reference, labels permuted"),
    "top_k_global": FakeRun("top_k", 0.06, 0.55, 0.25, description="top-2, global-batch balance"),
    "top_k_sequence": FakeRun("top_k", 0.12, 0.14, 0.1, description="top-2, sequence balance"),
    "sigmoid_bias": FakeRun(
        "sigmoid", 0.08, 0.48, 0.5, drops=0.03, drops_first=0.4, description="sigmoid, loss-free bias"
    ),
    "hash": FakeRun("hash", 0.01, 0.1, 0.2, learned=False, description="token-id hash"),
    "random": FakeRun("random", 0.45, 0.0, 0.0, learned=False, description="random experts"),
    "expert_choice": FakeRun("expert_choice", 0.05, 0.6, 0.0, causal=False, description="experts choose; not causal"),
    "dense": FakeRun("none", 0.22, dense=True, learned=False, description="dense, equal active parameters"),
    "collapsed": FakeRun("top_k", 0.3, 0.1, 2.5, description="no balancing"),
    "broken": FakeRun("top_k", 0, state="failed", reason="loss became nan at step 220 <script>alert(1)</script>"),
    "late": FakeRun("top_k", 0, state="missing"),
}


@pytest.fixture(scope="session")
def written_suite(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a suite at the first call with these arguments, and gives the same folder at every later one."""

    @functools.cache
    def written(name: str, labels: tuple[str, ...], **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("suites") / name
        return write_suite(folder, {label: DEMO[label] for label in labels}, **options)

    return written


@pytest.fixture
def make_suite(written_suite: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Puts a suite of the runs of DEMO, or of those with these labels, into a fresh folder of this name."""

    def make(name: str = "demo", labels: tuple[str, ...] = tuple(DEMO), **options: Any) -> Path:
        return Path(shutil.copytree(written_suite(name, labels, **options), tmp_path / name))

    return make
