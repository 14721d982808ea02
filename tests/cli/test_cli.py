"""The command line: its help, its exit status, one line for what a user can mend."""

from __future__ import annotations

import errno
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.data.errors import DataError
from moe_testbed.launcher.cli.main import main
from moe_testbed.launcher.config.experiment import load_experiment, run_name
from moe_testbed.launcher.errors import CheckpointError, ConfigError, guarded

Write = Callable[[str, str], Path]
COMMANDS = [
    "",
    "train",
    "compare",
    "report",
    "plan",
    "launch",
    "slurm",
    "slurm submit",
    "slurm status",
    "slurm cancel",
    "sync",
    "analyze",
    "export",
    "data",
    "data build",
    "data show",
    "data check",
    "router",
    "router check",
    "config",
    "config show",
]
HEAVY = ["torch", "deepspeed", "datasets", "mlflow", "matplotlib", "sklearn", "scipy", "numpy", "pydantic", "yaml"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {' '.join(['moe-testbed', *command.split()])}")
    assert "examples:" in text or command in ("data", "router", "config", "slurm")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from moe_testbed.launcher.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_testbed.launcher", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: moe-testbed")


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["compare", "a.yaml", "--jobs", "0"], ["report"]])
def test_wrong_arguments_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_config_show(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(experiment), "seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_a_wrong_config_is_one_line_and_status_2(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(experiment), "sead=7"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("moe-testbed: command line: unknown key 'sead'. Did you mean 'seed'?")


def test_overrides_may_stand_behind_options(experiment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moe_testbed.launcher.train import train as training

    calls = []
    monkeypatch.setattr(training, "train", lambda config, run_dir, trust: calls.append((config, run_dir, trust)))
    assert main(["train", str(experiment), "seed=7", "--run-dir", "here", "training.steps=9", "--trust"]) == 0
    assert main(["train", str(experiment), "seed=7"]) == 0
    (first, first_dir, first_trust), (second, second_dir, second_trust) = calls
    assert first_trust and not second_trust
    assert (first.seed, first.training.steps, first_dir) == (7, 9, Path("here"))
    assert (second.training.steps, second_dir) == (4, Path("runs/small-seed7"))


def test_trainings_under_other_overrides_get_other_folders(experiment: Path) -> None:
    def name(*overrides: str) -> str:
        return run_name(load_experiment(experiment, overrides), overrides)

    assert name("seed=7", "name=big") == "big-seed7"
    assert name("training.steps=9").startswith("small-seed1-training-steps-9-")
    assert name("training.steps=9", "seed=2", "data.cache_dir=a/b") == name(
        "data.cache_dir=a/b", "training.steps=9", "seed=2"
    )
    many = [f"model.rope_theta={1000 + number}.0" for number in range(20)]
    names = {name("data.cache_dir=somewhere/rather/far/away/from/here", text) for text in many}
    assert len(names) == 20 and max(map(len, names)) <= len("small-seed1-") + 40 + 7


def test_the_examples_of_the_help_work(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_testbed.launcher.analyze import analyze
    from moe_testbed.launcher.cli import data as data_commands
    from moe_testbed.launcher.cli import router_check
    from moe_testbed.launcher.cluster.launch import launch
    from moe_testbed.launcher.cluster.plan import text
    from moe_testbed.launcher.cluster.slurm import cancel, status, submit
    from moe_testbed.launcher.export import export as exporting
    from moe_testbed.launcher.report import write as report
    from moe_testbed.launcher.suites import compare
    from moe_testbed.launcher.tracking import sync
    from moe_testbed.launcher.train import train as training

    done = []
    for module, name in (
        (training, "train"),
        (compare, "compare"),
        (report, "print_report"),
        (report, "print_comparison"),
        (analyze, "analyze"),
        (text, "print_plan"),
        (launch, "launch"),
        (submit, "submit"),
        (status, "print_status"),
        (cancel, "cancel"),
        (sync, "sync"),
        (exporting, "export"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: done.append(name) or 0)
    for name in ("build", "show", "check"):
        monkeypatch.setattr(data_commands, name, lambda *_, name=name: done.append(name))
    monkeypatch.setattr(router_check, "check_routers", lambda *_: done.append("check_routers") or 0)
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        lines = capsys.readouterr().out.partition("examples:")[2].splitlines()
        for example in filter(None, lines):
            arguments = shlex.split(example.split("   train")[0], comments=True)
            assert arguments.pop(0) == "moe-testbed"
            assert main(arguments) == 0, example
    reports = {"print_report", "print_comparison"}
    clusters = {"print_plan", "launch", "submit", "print_status", "cancel", "sync"}
    assert (
        set(done)
        == {"train", "compare", "analyze", "export", "build", "show", "check", "check_routers"} | reports | clusters
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("a: b"), 2, "moe-testbed: a: b"),
        (DataError("two\nlines"), 2, "moe-testbed: two lines"),
        (CheckpointError("cut in half"), 2, "moe-testbed: cut in half"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"),
            2,
            "moe-testbed: No space left on device (runs/a/metrics.jsonl): free some space, then repeat the command; "
            "what is finished is kept",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            2,
            "moe-testbed: Permission denied (runs): make it writable or choose another folder, "
            "then repeat the command; what is finished is kept",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "runs/a"),
            2,
            "moe-testbed: Not a directory (runs/a): correct this path, "
            "then repeat the command; what is finished is kept",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "moe-testbed: No space left on device: free some space, then repeat the command; what is finished is kept",
        ),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues where it stopped"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert guarded(fail) == status
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError("of a library"), OSError(errno.EBADF, "Bad file")])
def test_a_defect_of_the_program_keeps_its_traceback(error: Exception) -> None:
    def fail() -> int:
        raise error

    with pytest.raises(type(error)):
        guarded(fail)


def test_a_report_needs_no_torch(write: Write) -> None:
    write("runs/s/suite.yaml", "name: s\nruns: {a: {}}\n")
    script = (
        "import sys\nfrom moe_testbed.launcher.cli.main import main\n"
        "status = main(['report', 'runs/s'])\nprint(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


def test_data_commands_take_a_mix_and_need_no_torch(write: Write) -> None:
    write("mix.yaml", "name: m\ndomains: {a: {sources: [{kind: files, glob: 'nothing/*.txt'}]}}\nvocab: 3\n")
    script = (
        "import sys\nfrom moe_testbed.launcher.cli.main import main\n"
        "status = main(['data', 'build', 'mix.yaml'])\nprint(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 False"
    assert "mix.yaml:3: unknown key 'vocab'. Did you mean 'vocab_size'?" in done.stderr
