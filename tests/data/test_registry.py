import pytest
from pydantic import BaseModel, ValidationError

from moe_testbed.data.config import MixConfig
from moe_testbed.data.readers import Reader, reader_kinds
from moe_testbed.data.registry import Registry
from moe_testbed.data.sources import PackageSource, source_kinds


def mix_with(source: object) -> MixConfig:
    return MixConfig.model_validate({"name": "m", "domains": {"a": {"sources": [source]}}})


def test_unknown_kind_names_the_nearest_and_all():
    with pytest.raises(
        ValidationError, match=r"Unknown source kind 'pakage'\. Did you mean 'package'\? Available: files"
    ):
        mix_with({"kind": "pakage"})


@pytest.mark.parametrize("kind", [{"a": 1}, ["files"], 3, None])
def test_a_kind_that_is_no_text_is_unknown(kind: object):
    with pytest.raises(ValidationError, match=r"Unknown source kind .* Available: files, hub, package"):
        mix_with({"kind": kind})
    with pytest.raises(ValidationError, match=r"Unknown reader .* Available: "):
        mix_with({"kind": "files", "glob": "*", "reader": {"kind": kind}})


def test_missing_kind_names_all():
    with pytest.raises(
        ValidationError, match=r"A source kind is missing: add `kind:`\. Available: files, hub, package"
    ):
        mix_with({"glob": "*.txt"})


def test_unknown_reader_names_the_nearest():
    with pytest.raises(ValidationError, match=r"Unknown reader 'json'.*'jsonl'"):
        mix_with({"kind": "files", "glob": "*", "reader": "json"})


def test_errors_inside_a_source_keep_their_place():
    with pytest.raises(ValidationError) as caught:
        mix_with({"kind": "files", "glob": "*", "reader": {"kind": "jsonl", "feild": "text"}})
    assert [error["loc"] for error in caught.value.errors()] == [("domains", "a", "sources", 0, "reader", "feild")]


def test_duplicate_kind_raises():
    registry: Registry[BaseModel] = Registry("thing")

    class First(BaseModel):
        pass

    registry.register("one")(First)
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        registry.register("one")(First)


@pytest.mark.parametrize("kind", reader_kinds.names())
def test_every_reader_knows_its_own_kind(kind: str):
    cls = reader_kinds.get(kind)
    assert issubclass(cls, Reader)
    assert cls.model_fields["kind"].default == kind


def test_round_trip_keeps_the_concrete_classes():
    pin = {"package": "p", "version": "1", "sha256": "0" * 64, "members": ["*.txt"], "reader": {"kind": "fasta"}}
    mix = mix_with({"kind": "package", **pin})
    again = MixConfig.model_validate_json(mix.model_dump_json())
    assert again == mix
    assert isinstance(again.domains["a"].sources[0], PackageSource)
    assert source_kinds.names() == ["files", "hub", "package"]
