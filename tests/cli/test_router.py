"""`moe-testbed router check`: every property finds the router that violates it, and no built-in one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_testbed.launcher.cli.main import main
from moe_testbed.routing.check.check import PROPERTIES, Finding, check_router
from moe_testbed.routing.router import ROUTERS, Router
from tests.cli.broken_routers import (
    BROKEN,
    Counting,
    Draws,
    NeedsPrimes,
    OneTooFar,
    Plain,
    SaysLearned,
    SaysNotCausal,
    SaysNotLearned,
    SeesOtherSequences,
    SeesTheFuture,
)

Write = Callable[[str, str], Path]
REPOSITORY = Path(__file__).parents[2]


def findings_of(cls: type[Router]) -> dict[str, Finding]:
    return {finding.property: finding for finding in check_router(cls, cls.Config(name="tried"))}


def violations(findings: dict[str, Finding]) -> list[str]:
    return [name for name, finding in findings.items() if not finding.ok]


@pytest.mark.parametrize(("cls", "property", "words"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_violation_is_found_and_told(cls: type[Router], property: str, words: str) -> None:
    findings = findings_of(cls)
    assert not findings[property].ok
    assert words in findings[property].text


def test_every_property_has_a_router_that_violates_it() -> None:
    assert {property for _, property, _ in BROKEN} == {"builds", *PROPERTIES}


@pytest.mark.parametrize("cls", [Plain, Counting])
def test_what_the_broken_ones_start_from_violates_nothing(cls: type[Router]) -> None:
    findings = findings_of(cls)
    assert violations(findings) == []
    assert list(findings) == ["builds", *PROPERTIES]


@pytest.mark.parametrize("name", ROUTERS.names())
def test_built_in_routers_violate_nothing(name: str) -> None:
    cls = ROUTERS.get(name)
    assert violations({finding.property: finding for finding in check_router(cls, cls.Config(name=name))}) == []


def test_a_router_without_a_decision_is_not_tried_further() -> None:
    assert list(findings_of(OneTooFar)) == ["builds", "config", "decision"]
    assert list(findings_of(NeedsPrimes)) == ["builds"]


@pytest.mark.parametrize("source", [SeesTheFuture, SeesOtherSequences])
def test_a_router_that_says_that_it_is_not_causal_may_be_so(source: type[Router]) -> None:
    findings = findings_of(type("Open", (source,), {"Config": SaysNotCausal}))
    assert violations(findings) == []
    if source is SeesTheFuture:
        assert findings["causality"].text.startswith("not causal, as it says: the experts of a token depend on later")
    else:
        assert findings["micro-batches"].text.startswith("routes depend on the other sequences, as a router")


def test_a_router_that_is_causal_may_say_that_it_is_not() -> None:
    findings = findings_of(type("Careful", (Plain,), {"Config": SaysNotCausal}))
    assert violations(findings) == []
    assert findings["causality"].text == "says that it is not causal, though no dependence on later tokens was found"


def test_a_router_without_parameters_must_say_that_it_does_not_learn() -> None:
    findings = findings_of(type("Honest", (Draws,), {"Config": SaysNotLearned}))
    assert violations(findings) == []
    assert findings["gradients"].text == "none, as it says: it does not learn"
    assert violations(findings_of(type("Boastful", (Draws,), {"Config": SaysLearned}))) == ["gradients"]


def test_torchs_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    findings_of(Plain)
    assert torch.equal(torch.rand(3), expected)


GOOD = """
    from moe_testbed.routing.routers.top_k import TopK

    class Mine(TopK):
        pass
"""
BAD = """
    from moe_testbed.routing.routers.top_k import TopK

    class Mine(TopK):
        def select(self, scores, context):
            return super().select(scores, context)[:, :1]
"""


def test_the_command_prints_a_line_per_property(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("good.py", GOOD)
    assert main(["router", "check", "good.py:Mine", "top_k", "normalise=false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "good.py:Mine"
    assert [line.split("  ")[1] for line in lines[1 : len(PROPERTIES) + 2]] == ["ok"] * (len(PROPERTIES) + 1)
    assert lines[-1] == "2 of 2 routers do all that they say"


def test_a_violation_is_status_1(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("bad.py", BAD)
    assert main(["router", "check", "bad.py:Mine", "top_k"]) == 1
    output = capsys.readouterr().out
    assert "  VIOLATED  decision  in training: router 'bad.py:Mine' in MoE layer 1 at step 0 returned 1 exp" in output
    assert output.endswith("1 of 2 routers do all that they say\nviolated by bad.py:Mine: decision\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "takes the names of routers and their options, or --all; give one of the two"),
        (["--all", "top_k"], "takes the names of routers and their options, or --all; give one of the two"),
        (["normalise=false"], "got options (normalise=false) but no name of a router; add one"),
        (["topk"], "Unknown router 'topk'. Did you mean 'top_k'?"),
        (["top_k", "normalize=true"], "unknown key 'router.normalize'. Did you mean 'normalise'?"),
        (["nowhere.py:Mine"], "there is no file"),
    ],
)
def test_wrong_names_and_options_are_one_line(
    arguments: list[str], words: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["router", "check", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert words in output.err


def test_all_names_those_that_are_not_causal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moe_testbed.launcher.cli import router_check

    monkeypatch.setattr(router_check, "check_router", lambda *_: [Finding("builds", True, "")])
    assert main(["router", "check", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ROUTERS.names()
    assert f"{len(names)} of {len(names)} routers do all that they say" in lines
    not_causal = [name for name in names if not ROUTERS.get(name).Config(name=name).causal]
    assert lines[-1] == f"not causal, as they say: {', '.join(not_causal)}" or not not_causal


@pytest.mark.parametrize(
    "module", ["configs/examples/nearest_vector.py", "moe_testbed.configs.examples.nearest_vector"]
)
def test_the_example_violates_nothing(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["router", "check", f"{module}:NearestVector", "sharpness=4.0"]) == 0, capsys.readouterr().out


def test_the_example_is_short() -> None:
    assert len((REPOSITORY / "configs/examples/nearest_vector.py").read_text().splitlines()) <= 30


@pytest.mark.parametrize("command", ["router", "router check"])
def test_the_commands_have_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: moe-testbed {command}")


def test_the_examples_of_the_help_are_real(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_testbed.launcher.cli import router_check

    monkeypatch.setattr(router_check, "check_router", lambda *_: [Finding("builds", True, "")])
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit):
        main(["router", "check", "--help"])
    examples = capsys.readouterr().out.partition("examples:")[2].split("moe-testbed")[1:]
    assert len(examples) == 3
    for example in examples:
        assert main(example.split()) == 0, example
