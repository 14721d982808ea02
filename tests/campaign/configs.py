"""Configs: every file that is there, changed at random. It is valid, or one line says where it is not."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from moe_testbed.launcher.cluster.config import load_cluster
from moe_testbed.launcher.cluster.hostfile import read_hosts
from moe_testbed.launcher.config.experiment import dump_config, load_experiment
from moe_testbed.launcher.config.mix import load_mix
from moe_testbed.launcher.config.suite import load_suite
from moe_testbed.launcher.errors import MENDABLE
from tests.campaign.trials import Part, Trial, without_one
from tests.processes.python import run_python

ROOT = Path(__file__).parents[2]
SECONDS = 10
BY_COMMAND = 200  # one of so many experiments goes through the real command too

VALUES = (
    "", "null", "~", "true", "no", "0", "-1", "1", "2", "3", "7", "0.5", "1e-3", "1e400", ".inf", "-.inf",
    ".nan", "1_0", "99999999999999999999", "9" * 5000, "1e99", "0x10", "1:30", "2024-13-45", "[]", "{}",
    "[1, 2]", "[[[]]]", "{a: 1}", "''", '" "', '"\\ud800"', '"\\0"', "'é'", "a.b", "../x.yaml",
    "~nobody/x.yaml", "/", ".", "!!binary x", "!!timestamp x", "!!int x", "!!float x",
    "!!python/name:os.system", "!x y", "&a [*a]", "*a", "&a 1", "|", ">", "top_k", "reference", "packed",
    "bfloat16", "files", "plain_text", "tiny.yaml", "x" * 300, "? a", "- a", "%", "@", "`", "{", "]", '"', "'",
    "a: b: c",
)  # fmt: skip
TEXTS = (
    "\0",
    "\t",
    "\r",
    "\x85",
    "\u2028",
    "\ufeff",
    "é",
    "\U0001f600",
    ":",
    "#",
    "-",
    " ",
    "\n",
    "{",
    "*a",
    "&a ",
    "<<: ",
)


class Configs(Part):
    """A trial is some of the files of configs/ with other texts, and overrides."""

    name = "configs"
    number = 10_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shutil.copytree(
            ROOT / "configs", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__")
        )
        for router in sorted((folder / "routers").glob("*.yaml")):
            text = f"include: [../experiments/tiny.yaml, ../routers/{router.name}]\n"
            (folder / "experiments" / f"with_{router.name}").write_text(text, encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".hostfile"))
        self.texts = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in files}
        self.lines = sorted({line for text in self.texts.values() for line in text.splitlines() if ":" in line})
        self.keys = sorted({line.split(":")[0].strip("- ") for line in self.lines})
        self.tried = 0

    def draw(self, generator: random.Random) -> Trial:
        name = generator.choice(sorted(self.texts))
        text = self.texts[name]
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            text = self._mutated(text, generator)
        overrides = [self._override(generator) for _ in range(generator.choice((0, 0, 0, 0, 1, 2)))]
        return {"file": name, "text": text, "overrides": overrides, "entry": self._entry(name, generator)}

    def smaller(self, trial: Trial) -> Iterator[Trial]:
        if trial["overrides"]:
            for fewer in without_one(trial["overrides"]) if len(trial["overrides"]) > 1 else ([],):
                yield {**trial, "overrides": fewer}
        for fewer in without_one(trial["text"].split("\n")):
            yield {**trial, "text": "\n".join(fewer)}

    def fault(self, trial: Trial) -> str | None:
        file = self.folder / trial["file"]
        before, folder = file.read_bytes(), Path.cwd()
        file.write_bytes(trial["text"].encode("utf-8", "surrogateescape"))
        os.chdir(self.folder)
        try:
            return self._fault(trial)
        finally:
            os.chdir(folder)
            file.write_bytes(before)

    def _fault(self, trial: Trial) -> str | None:
        entry, overrides = trial["entry"], trial["overrides"]
        try:
            with _limit():
                _load(entry)(entry, overrides)
                message = None
        except MENDABLE as error:
            message = str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error} at {_place(error)}"
        self.tried += 1
        if message is None:
            fault = self._again(entry, overrides)
        else:
            fault = (
                None
                if _says_where(message, bool(overrides))
                else f"the message does not say where, or not in one line: {message!r}"
            )
        if fault is None and entry.startswith("experiments") and self.tried % BY_COMMAND == 0:
            done = run_python("-m", "moe_testbed.launcher", "config", "show", entry, *overrides, folder=self.folder)
            lines = 0 if message is None else 1
            if done.returncode != (2 if lines else 0) or done.stderr.count("\n") != lines:
                fault = f"`config show` ends with status {done.returncode} and says {done.stderr!r}"
        return fault

    def _again(self, entry: str, overrides: list[str]) -> str | None:
        """A config that is written down is read back as the same."""
        if not entry.startswith("experiments"):
            return None
        config, file = load_experiment(entry, overrides), self.folder / "again.yaml"
        file.write_text(dump_config(config), encoding="utf-8")
        try:
            return None if load_experiment(file) == config else "a config that was written down is read as another"
        except MENDABLE as error:
            return f"a config that was written down is refused: {error}"
        finally:
            file.unlink()

    def _entry(self, name: str, generator: random.Random) -> str:
        """Returns the file that a command is given to meet the changed one."""
        folder, _, file = name.partition("/")
        if folder == "models":
            return f"experiments/{file}"
        if folder == "routers":
            return f"experiments/with_{file}"
        if name.endswith(".hostfile"):
            return "clusters/two_hosts.yaml"
        if folder == "mixes" and generator.random() < 0.3:
            return "experiments/tiny.yaml"
        return "experiments/tiny.yaml" if folder == "examples" else name

    def _override(self, generator: random.Random) -> str:
        keys = [generator.choice(self.keys) for _ in range(generator.choice((1, 2, 2, 3)))]
        parts = ["training", "model", "model.moe", "data", "routing.router", "routing.balance", "parallel", ""]
        key = ".".join([part for part in (generator.choice(parts), *keys) if part])
        return f"{key}={generator.choice(VALUES)}" if generator.random() < 0.9 else key

    def _mutated(self, text: str, generator: random.Random) -> str:
        lines = text.split("\n")
        number = generator.randrange(len(lines))
        line = lines[number]
        act = generator.choice(
            ("value", "value", "value", "key", "drop", "twice", "swap", "indent", "insert", "text", "cut", "byte")
        )
        if act == "value" and ":" in line:
            lines[number] = f"{line.split(':')[0]}: {generator.choice(VALUES)}"
        elif act == "key" and ":" in line:
            start = len(line) - len(line.lstrip("- "))
            key = generator.choice(
                (generator.choice(self.keys), generator.choice(VALUES), line[start:].split(":")[0] + "x")
            )
            lines[number] = f"{line[:start]}{key}:{line.split(':', 1)[1]}"
        elif act == "drop":
            del lines[number]
        elif act == "twice":
            lines.insert(number, line)
        elif act == "swap":
            other = generator.randrange(len(lines))
            lines[number], lines[other] = lines[other], line
        elif act == "indent":
            lines[number] = generator.choice((f"  {line}", f" {line}", line.removeprefix("  "), f"\t{line}"))
        elif act == "insert":
            lines.insert(number, generator.choice(self.lines))
        elif act == "text":
            at = generator.randint(0, len(line))
            lines[number] = line[:at] + generator.choice(TEXTS) + line[at:]
        elif act == "cut":
            return text[: generator.randint(0, len(text))]
        elif act == "byte":
            content = bytearray(text.encode("utf-8", "surrogateescape"))
            if content:
                content[generator.randrange(len(content))] = generator.randrange(256)
            return content.decode("utf-8", "surrogateescape")
        return "\n".join(lines)


def _load(entry: str) -> Callable[[str, list[str]], Any]:
    kinds = {"suites": load_suite, "mixes": load_mix, "clusters": _load_cluster}
    return kinds.get(entry.split("/")[0], load_experiment)


def _load_cluster(path: str, overrides: list[str]) -> None:
    read_hosts(load_cluster(path, overrides))


def _says_where(message: str, overridden: bool) -> bool:
    """Whether a message is one line that begins with a file and a line of it, or with the command line."""
    if "\n" in message.strip("\n"):
        return False
    text = re.sub(r"^(domain|run) '[^']*' of the (mix|suite) '[^']*': ", "", message)
    if overridden and text.startswith("command line"):
        return True
    if re.match(r".*\.hostfile names \d+ hosts, but nodes of cluster", text):
        return True  # what a file lacks as a whole has no line
    found = re.match(r"(?:hostfile )?(.+?)(?::|, line )(\d+): ", text)
    if found is None or not Path(found[1]).is_file():
        return False
    return 1 <= int(found[2]) <= len(Path(found[1]).read_bytes().splitlines()) + 1


class _limit:
    """Ends what takes longer than `SECONDS`."""

    def __enter__(self) -> None:
        def end(number: int, frame: FrameType | None) -> None:
            raise TimeoutError(f"no end after {SECONDS} s")

        signal.signal(signal.SIGALRM, end)
        signal.alarm(SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)


def _place(error: BaseException) -> str:
    """Returns the innermost line of ours."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT / "tests") not in frame.filename]
    ours = [frame for frame in frames if frame.filename.startswith(str(ROOT)) and ".venv" not in frame.filename]
    return f"{Path(ours[-1].filename).name} {ours[-1].name}" if ours else "no place of ours"
