"""Trees of YAML: scalars, includes, references, layers, origins, and writing them back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_testbed.launcher.config.yaml_text import to_yaml
from moe_testbed.launcher.config.yaml_tree import (
    ANY,
    Rules,
    load_file,
    lookup,
    merge,
    parse_overrides,
    split_dotted,
    to_plain,
)
from moe_testbed.launcher.errors import ConfigError

Write = Callable[[str, str], Path]
NO_RULES = Rules()
RULES = Rules(references=frozenset({("mix",)}), variants=((("router",), "name"), (("balance", ANY), "name")))


def plain(path: Path, rules: Rules = NO_RULES) -> Any:
    return to_plain(load_file(path, rules))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("3.0e-3", 3e-3),
        ("1_000", 1000),
        ("-7", -7),
        ("0.5", 0.5),
        (".inf", math.inf),
        ("true", True),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        # YAML 1.1 would make True, False, a date, the number 190 and the number 8 of these.
        ("yes", "yes"),
        ("off", "off"),
        ("2024-01-01", "2024-01-01"),
        ("3:10", "3:10"),
        ("010", "010"),
    ],
)
def test_scalars(write: Write, text: str, value: Any) -> None:
    found = plain(write("a.yaml", f"key: {text}"))["key"]
    assert found == value and type(found) is type(value)


def test_every_value_knows_its_line(write: Write) -> None:
    path = write("a.yaml", "# a comment\nmodel:\n  layers: 2\n\n  sizes:\n    - 1\n    - {deep: 3}\nseed: 1\n")
    tree = load_file(path, NO_RULES)
    lines = {
        ("model",): 2,
        ("model", "layers"): 3,
        ("model", "sizes"): 5,
        ("model", "sizes", 1, "deep"): 7,
        ("seed",): 8,
    }
    for keys, line in lines.items():
        node = lookup(tree, keys)
        assert node is not None and str(node.origin) == f"a.yaml:{line}", keys


def test_a_file_is_above_what_it_includes(write: Write) -> None:
    write("base/first.yaml", "a: {x: 1, y: 1, z: 1}\nb: [1, 2]")
    write("base/second.yaml", "a: {y: 2, z: 2}")
    path = write("top.yaml", "include: [base/first.yaml, base/second.yaml]\na: {z: 3}\nb: [9]")
    assert plain(path) == {"a": {"x": 1, "y": 2, "z": 3}, "b": [9]}


def test_an_include_may_stand_inside_a_mapping_and_is_relative_to_its_file(write: Write) -> None:
    write("models/common.yaml", "heads: 2")
    write("models/tiny.yaml", "include: common.yaml\nlayers: 2")
    path = write("experiments/a.yaml", "model:\n  include: ../models/tiny.yaml\n  layers: 3")
    assert plain(path) == {"model": {"heads": 2, "layers": 3}}
    node = lookup(load_file(path, NO_RULES), ("model", "heads"))
    assert node is not None and str(node.origin) == "models/common.yaml:1"


def test_a_file_that_includes_itself_is_an_error(write: Write) -> None:
    write("b.yaml", "include: a.yaml")
    with pytest.raises(ConfigError, match=r"b\.yaml:1: a\.yaml includes itself: a\.yaml -> b\.yaml -> a\.yaml"):
        load_file(write("a.yaml", "include: b.yaml"), NO_RULES)


def test_the_same_file_may_be_included_twice(write: Write) -> None:
    write("b.yaml", "x: 1")
    assert plain(write("a.yaml", "m: {include: b.yaml}\nn: {include: b.yaml}")) == {"m": {"x": 1}, "n": {"x": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"a\.yaml:3: the key 'a' stands here a second time \(first: a\.yaml:1\)"),
        ("a: [1, 2\nb: 3", r"a\.yaml:2: is not valid YAML: "),
        ("a: 1\n\tb: 2", r"a\.yaml:2: is not valid YAML: "),
        ("- a\n- b", r"a\.yaml:1: expected a mapping of keys to values, got \['a', 'b'\]"),
        ("1.5: a", r"a\.yaml:1: the key 1.5 is no text; write it in quotes"),
        ("a: !!python/name:os.system", r"a\.yaml:1: is not valid YAML: could not determine a constructor"),
        (
            "a:\n- !!int x",
            r"a\.yaml:2: is not valid YAML: 'x' with the tag !!int is no text, number, truth value or null",
        ),
        ("a: !!bool x", r"a\.yaml:1: is not valid YAML: 'x' with the tag !!bool"),
        ("a: !!timestamp x", r"a\.yaml:1: is not valid YAML: 'x' with the tag !!timestamp"),
        ("a: !!timestamp 2024-01-01", r"a\.yaml:1: is not valid YAML: '2024-01-01' with the tag !!timestamp"),
        ("a: !!binary YQ==", r"a\.yaml:1: is not valid YAML: 'YQ==' with the tag !!binary"),
        ("a: " + "9" * 5000, r"a\.yaml:1: is not valid YAML: '9{57}\.\.\.' with the tag !!int"),
        ("a: 1\nb: \0", r"a\.yaml:2: is not valid YAML: unacceptable character #x0000"),
        ("a: &one [*one]", r"a\.yaml:1: is not valid YAML: values are nested too deeply, or one contains itself"),
        ("include: ~nobody/a.yaml", r"a\.yaml:1: there is no file '~nobody/a\.yaml'"),
        ("include: " + "x" * 300, r"a\.yaml:1: there is no file 'x{300}'"),
        ("include: 3", r"a\.yaml:1: include takes the path of a YAML file or a list of them, got 3"),
        ("include: none.yaml", r"a\.yaml:1: there is no file 'none\.yaml', neither in \. nor embedded"),
        ("include: models/tny.yaml", r"Did you mean 'configs/models/tiny\.yaml'\?"),
    ],
)
def test_bad_yaml_is_told_with_its_line(write: Write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_file(write("a.yaml", text), NO_RULES)


def test_a_file_of_another_encoding_is_told(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    write("b.yaml", "")
    path.write_bytes(b"seed: 1\nname: \xe9t\xe9")
    with pytest.raises(ConfigError, match=r"a\.yaml:2: is not UTF-8 text \(byte 14\)"):
        load_file(path, NO_RULES)


def test_a_reference_is_relative_to_the_file_that_names_it_and_replaces_the_whole_mapping(write: Write) -> None:
    write("mixes/one.yaml", "domains: {a: 1, b: 2}")
    write("mixes/two.yaml", "domains: {c: 3}")
    write("base.yaml", "mix: mixes/one.yaml")
    path = write("more/top.yaml", "include: ../base.yaml\nmix: ../mixes/two.yaml")
    assert plain(path, RULES) == {"mix": {"domains": {"c": 3}}}
    above = write("more/above.yaml", "include: ../base.yaml\nmix: {domains: {b: 5}}")
    assert plain(above, RULES) == {"mix": {"domains": {"a": 1, "b": 5}}}


def test_another_router_drops_the_options_of_the_former_one(write: Write) -> None:
    low = load_file(write("a.yaml", "router: {name: top_k, normalise: true}"), RULES)

    def over(text: str) -> Any:
        return to_plain(merge(low, load_file(write("b.yaml", text), RULES), RULES))["router"]

    assert over("router: {name: hash, table: modulo}") == {"name": "hash", "table": "modulo"}
    assert over("router: {name: top_k}") == {"name": "top_k", "normalise": True}
    assert over("router: {normalise: false}") == {"name": "top_k", "normalise": False}


def test_another_balancer_under_a_label_drops_the_options_and_the_label_is_the_default_name(write: Write) -> None:
    low = load_file(write("a.yaml", "balance: {z_loss: {coefficient: 1}, even: {name: loss, scope: token}}"), RULES)
    high = load_file(write("b.yaml", "balance: {z_loss: {name: z_loss}, even: {name: bias}}"), RULES)
    assert to_plain(merge(low, high, RULES)) == {
        "balance": {"z_loss": {"coefficient": 1, "name": "z_loss"}, "even": {"name": "bias"}}
    }


def test_overrides_are_yaml_and_a_later_one_wins() -> None:
    texts = ["a.b=1", "a.c=[1, two]", "d=null", "e=x=y", "a.b=3e-4", "f={g: true}"]
    tree = parse_overrides(texts, NO_RULES)
    assert to_plain(tree) == {"a": {"b": 3e-4, "c": [1, "two"]}, "d": None, "e": "x=y", "f": {"g": True}}
    node = lookup(tree, ("a", "c", 1))
    assert node is not None and str(node.origin) == "command line"


@pytest.mark.parametrize("text", ["steps", "=1", "a..b=1", "a.=1", "a="])
def test_an_override_of_another_form_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"command line: expected KEY=VALUE, such as training\.steps=100, got"):
        parse_overrides([text], NO_RULES)


def test_an_override_that_is_no_yaml_is_told() -> None:
    with pytest.raises(ConfigError, match=r"command line: 'a=\[1' is not valid YAML"):
        parse_overrides(["a=[1"], NO_RULES)


def test_what_a_file_lacks_is_missing_there_whatever_the_command_line_adds(write: Write) -> None:
    tree = merge(
        load_file(write("a.yaml", "# a comment\nx: {y: 1}"), NO_RULES),
        parse_overrides(["x.z=1", "w={}"], NO_RULES),
        NO_RULES,
    )
    found = {".".join(path): str(node.origin) for path in [(), ("x",), ("w",)] if (node := lookup(tree, path))}
    assert found == {"": "a.yaml:2", "x": "a.yaml:2", "w": "command line"}


def test_dotted_keys_open_into_mappings(write: Write) -> None:
    tree = load_file(write("a.yaml", "x.y.z: 1\nx: {w: 2}\nx.y.v: 3"), NO_RULES)
    assert to_plain(split_dotted(tree, NO_RULES)) == {"x": {"y": {"z": 1, "v": 3}, "w": 2}}


def random_value(draw: random.Random, depth: int) -> Any:
    texts = [
        "plain",
        "",
        "1",
        "3e-4",
        "1e5",
        "yes",
        "null",
        "~",
        "a: b",
        "# no",
        "- x",
        "2024-01-01",
        "010",
        "1:30",
        "é\n\t",
        "\x85",
        "a\u2028b\u2029",
    ]
    kind = draw.choice(["scalar"] * 3 + ["list", "dict"]) if depth else "scalar"
    if kind == "list":
        return [random_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == "dict":
        return {key: random_value(draw, depth - 1) for key in draw.sample(texts, draw.randrange(4))}
    number = draw.choice([0, -3, 10**9, 0.1, 1e-30, -2.5e22, math.inf])
    return draw.choice([True, None, number, *draw.choices(texts, k=3)])


@pytest.mark.parametrize("seed", range(50))
def test_what_is_written_is_read_back_by_this_and_any_yaml_reader(write: Write, seed: int) -> None:
    draw = random.Random(seed)
    value = {f"key{i}": random_value(draw, 4) for i in range(5)}
    text = to_yaml(value)
    assert plain(write("a.yaml", text)) == value
    assert yaml.safe_load(text) == value


@pytest.mark.parametrize("text", ["\n", "a\nb", "\r", "\x85", "\u2028", "é\x85", "\xa0", "0\xa0"])
def test_a_text_with_line_ends_and_spaces_of_unicode_is_a_key_and_a_value(write: Write, text: str) -> None:
    value = {text: {text: text, "list": [text, 1, text]}}
    assert plain(write("a.yaml", to_yaml(value))) == value


def test_comments_do_not_change_what_is_read(write: Write) -> None:
    value = {"a": {"b": 1, "c": [{"d": "x # y"}, 2]}, "e": []}
    text = to_yaml(value, {("a", "b"): "here", ("a", "c", "0", "d"): "there", ("e",): "default"})
    assert [line.rpartition("# ")[2] for line in text.splitlines() if "# " in line][::2] == ["here", "default"]
    assert plain(write("a.yaml", text)) == value
