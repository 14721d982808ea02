"""The folder of a run: what is written, what is read of damaged files, and what ranks other than the first write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_testbed.launcher.run.arrays import Ablation, Evaluation, RoutingProbe, read_probe
from moe_testbed.launcher.run.folder import RunFolder, SilentRunFolder
from moe_testbed.launcher.run.records import DomainManifest, Manifest, MetricsLine, Progress, Status, Summary


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def evaluation(step: int) -> Evaluation:
    """An evaluation of one domain, one layer and two experts."""
    counts_YDE = np.array([[[3, 1]]])
    return Evaluation(
        step=step,
        domains=("a",),
        counts_top_k_YDE=counts_YDE,
        sequence_loss_N=np.ones(1),
        tokens_D=np.array([4]),
        loss_sum_D=np.array([4.0]),
        sequence_domain_N=np.array([0]),
        counts_top_1_YDE=counts_YDE,
        dropped_YDE=np.zeros_like(counts_YDE),
        shuffled_counts_top_k_YDE=counts_YDE,
    )


def write_all(folder: RunFolder) -> None:
    """Calls everything that a training calls."""
    folder.create()
    folder.write_manifest(Manifest({"domains": {}}))
    folder.write_status(Status("running", 1, 2))
    folder.append_metrics(MetricsLine("train", 1, 0.5, {"loss": 3.0}))
    folder.write_evaluation(evaluation(1))
    folder.write_probe(RoutingProbe(step=1, expert_ids_YTW=np.zeros((1, 1, 1), dtype=np.int64)))
    folder.write_ablation(Ablation(("a",), np.ones(1), np.zeros(1, dtype=np.int64)))
    folder.write_summary(Summary(tokens=7))
    folder.note_end("failed", "the reason")


def test_what_a_training_writes_has_the_names_of_old(tmp_path: Path) -> None:
    write_all(RunFolder(tmp_path))
    files = written(tmp_path)
    assert set(files) == {
        "manifest.json",
        "status.json",
        "metrics.jsonl",
        "summary.json",
        "evaluations/step_00000001.npz",
        "statistics/step_00000001.npz",
        "analysis.npz",
    }
    assert files["metrics.jsonl"] == b'{"kind": "train", "step": 1, "seconds": 0.5, "loss": 3.0}\n'
    assert json.loads(files["status.json"]) == {"state": "failed", "step": 1, "steps": 2, "reason": "the reason"}


def test_ranks_other_than_the_first_read_and_write_nothing(tmp_path: Path) -> None:
    write_all(SilentRunFolder(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    write_all(RunFolder(tmp_path))
    before = written(tmp_path)
    silent = SilentRunFolder(tmp_path)
    assert silent.rewind(0) == 0.0
    assert silent.read_status() == Status("failed", 1, 2, "the reason")
    assert silent.read_progress(2) == Progress(1, 2, 3.0)
    silent.note_failure(2, "another")
    silent.release()
    assert written(tmp_path) == before


def test_the_first_reason_of_an_end_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status(Status("running", 3, 9))
    folder.note_end("stopped", "first")
    folder.note_end("failed", "second")
    assert folder.read_status() == Status("stopped", 3, 9, "first")


def test_going_back_forgets_what_came_later(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_all(folder)
    for step in (2, 3):
        folder.append_metrics(MetricsLine("train", step, float(step), {"loss": 1.0}))
        folder.write_evaluation(evaluation(step))
    (tmp_path / "evaluations" / "notes.txt").touch()
    assert folder.rewind(2) == 2.0
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "evaluations").iterdir()) == [
        "notes.txt",
        "step_00000001.npz",
        "step_00000002.npz",
    ]
    assert not (tmp_path / "analysis.npz").exists()


def test_arrays_are_of_the_steps_that_their_files_say(tmp_path: Path) -> None:
    """Files of other names are passed over, and so is what a file holds of another step."""
    folder = RunFolder(tmp_path)
    folder.create()
    for step in (100_000_000, 99_999_999, 2):
        folder.write_probe(RoutingProbe(step, np.zeros((1, 1, 1), dtype=np.int64)))
    first = folder.probes / "step_00000002.npz"
    for name in ("step_2", "step_00000002_old", "step_²", "step_00000003.bak"):
        (folder.probes / f"{name}.npz").write_bytes(first.read_bytes())
    files = folder.probe_files()
    assert [read_probe(path).step for path in files] == [2, 99_999_999, 100_000_000]
    files[1].write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="it is of step 2"):
        read_probe(files[1])


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "train", "step": 1, "seconds": 0.5, "loss": 3.0},
        {"kind": "evaluation", "step": 2, "cross_entropy": None},
        {"kind": "system", "step": 0, "seconds": 1.5, "cpu": 80.0, "why": "text"},
    ],
)
def test_a_line_of_metrics_is_written_as_it_was_read(line: dict[str, object]) -> None:
    read = MetricsLine.of(line)
    assert read is not None
    assert list(read.content().items()) == list(line.items())


@pytest.mark.parametrize("line", [{}, {"kind": "train"}, {"kind": "train", "step": None}, {"step": "3"}])
def test_a_line_of_no_step_is_none(line: dict[str, object]) -> None:
    assert MetricsLine.of(line) is None


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"state": "finished"}', Status("finished", 0, 0, None)),
        ('{"state": "running", "step": "3", "steps": 9}', Status("running", 0, 9, None)),
        ('{"step": 3}', Status("missing", 3, 0, None)),
    ],
)
def test_a_status_of_other_kinds_is_read_as_far_as_it_goes(tmp_path: Path, text: str, status: Status) -> None:
    (tmp_path / "status.json").write_text(text)
    assert RunFolder(tmp_path).read_status() == status


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("", Summary()),
        ('{"parameters": "many", "tokens": 7, "seconds": null, "learned": "no", "former": 1}', Summary(tokens=7)),
        ('{"learned": false, "causal": false, "versions": ["torch"]}', Summary(learned=False, causal=False)),
        ('{"versions": {"torch": "2.13"}, "commit": null}', Summary(versions={"torch": "2.13"})),
    ],
)
def test_a_summary_of_other_kinds_is_read_as_far_as_it_goes(tmp_path: Path, text: str, summary: Summary) -> None:
    (tmp_path / "summary.json").write_text(text)
    assert RunFolder(tmp_path).read_summary() == summary


@pytest.mark.parametrize(
    ("text", "domains", "dropped"),
    [
        ("", {}, {}),
        ('{"domains": ["a"], "dropped": null}', {}, {}),
        ('{"domains": {"a": 7, "b": {}}, "dropped": {"c": "gone"}}', {"b": DomainManifest()}, {"c": "gone"}),
        (
            '{"domains": {"a": {"licence": "MIT", "sources": [{"package": "p"}, 3], '
            '"splits": {"train": {"tokens": 5, "bytes": 9}, "tuning": {"bytes": 2}, "validation": null}}}}',
            {
                "a": DomainManifest(
                    "MIT", ({"package": "p"},), {"train": 5, "tuning": None, "validation": None}
                )
            },
            {},
        ),
        ('{"domains": {"a": {"licence": 1, "sources": "x", "splits": ["train"]}}}', {"a": DomainManifest()}, {}),
    ],
)  # fmt: skip
def test_a_manifest_of_other_kinds_is_read_as_far_as_it_goes(
    tmp_path: Path, text: str, domains: dict[str, DomainManifest], dropped: dict[str, str]
) -> None:
    (tmp_path / "manifest.json").write_text(text)
    found = RunFolder(tmp_path).read_manifest()
    assert (found.domains, found.dropped) == (domains, dropped)


def test_a_manifest_is_written_as_it_stands_and_tells_data_apart(tmp_path: Path) -> None:
    """Also what no reader asks for, in its order: two runs are on the same data if all of it is equal."""
    content = {"format": 3, "mix": {"name": "m"}, "domains": {"b": {}, "a": {"size": (1, 2)}}, "later": None}
    folder = RunFolder(tmp_path)
    assert not folder.is_on_other_data(Manifest(content))
    folder.write_manifest(Manifest(content))
    assert folder.manifest_file.read_text() == json.dumps(content, indent=1) + "\n"
    assert not folder.is_on_other_data(Manifest(content))
    assert folder.is_on_other_data(Manifest({**content, "later": 1}))
    assert folder.read_manifest().digest == Manifest(dict(reversed(content.items()))).digest != Manifest({}).digest


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    summary = Summary(parameters=5, seconds=1.5, causal=False, versions={"torch": "2.13"}, cut_passages={"law": 0.25})
    RunFolder(tmp_path).write_summary(summary)
    assert RunFolder(tmp_path).read_summary() == summary
    assert "commit" not in json.loads((tmp_path / "summary.json").read_text())
