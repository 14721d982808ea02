"""The content of a mix file: domains, where their text comes from, and how it is cleaned, split and tokenised."""

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from moe_testbed.data.sources import Source, source_kinds


class DomainConfig(BaseModel, extra="forbid", frozen=True):
    """Says what one domain of the mix is."""

    weight: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="share of the training sequences, relative"
    )
    family: str | None = Field(
        default=None, description="natural_language, code, science, ...: groups domains in reports"
    )
    licence: str = Field(default="unknown", description="licence of the text, for the manifest")
    labelled: bool = Field(default=True, description="false: its tokens carry no domain label (-1)")
    optional: bool = Field(
        default=False, description="true: the mix goes on without it if it cannot be had; else the build stops"
    )
    sources: tuple[SerializeAsAny[Annotated[Source, BeforeValidator(source_kinds.parse)]], ...]

    @field_validator("sources")
    @classmethod
    def _at_least_one(cls, value: tuple[Source, ...]) -> tuple[Source, ...]:
        # Field(min_length=1) would add an error of its own to every error inside a source.
        if not value:
            raise ValueError("a domain needs at least one source")
        return value


class MixConfig(BaseModel, extra="forbid", frozen=True):
    """Says what a mix of domains is. Sizes are bytes of UTF-8."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    domains: dict[str, DomainConfig] = Field(min_length=1)
    vocab_size: int = Field(
        default=2048, ge=512, le=1_000_000, description="pieces of the tokenizer, 256 of them bytes"
    )
    tokenizer_bytes_per_domain: int = Field(
        default=500_000, ge=1_000, description="training text that the tokenizer is fitted to"
    )
    tokenizer_character_share: float = Field(
        default=0.4, gt=0, lt=1, description="share of the pieces open to single characters; rarer ones become bytes"
    )
    max_bytes_per_domain: int = Field(default=10_000_000, ge=1_000, description="text kept after de-duplication")
    max_document_share: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="share of max_bytes_per_domain that one document may take; of a longer one the beginning is kept, "
        "up to the end of a paragraph",
    )
    max_bad_records: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="share of a domain's records (lines, rows, files) that may be unreadable; these are passed over, "
        "and with more of them the domain fails",
    )
    validation_fraction: float = Field(default=0.05, gt=0, lt=1, description="share of the bytes that is reported on")
    tuning_fraction: float = Field(default=0.025, gt=0, lt=1, description="share of the bytes for choosing settings")
    minimum_document_characters: int = Field(default=100, ge=1, description="shorter documents are dropped")
    minimum_paragraph_characters: int = Field(
        default=32, ge=1, description="shorter paragraphs ('else:', '---') may recur; longer ones occur once in the mix"
    )
    evaluation_only: bool = Field(
        default=False,
        description="true: a labelled set to look at checkpoints with, too small to train on; read whole, duplicates "
        "and all",
    )
    strict: bool = Field(default=False, description="true: no domain is optional, whatever it says itself")

    @model_validator(mode="after")
    def _check(self) -> "MixConfig":
        held_out = self.validation_fraction + self.tuning_fraction
        if held_out >= 1:
            raise ValueError(
                f"validation_fraction + tuning_fraction = {held_out:g} leaves nothing to train on: "
                "make them less than 1 together"
            )
        if math.fsum(domain.weight for domain in self.domains.values()) == 0:
            raise ValueError("every domain has weight 0: give at least one a positive weight")
        return self

    @property
    def max_document_bytes(self) -> int:
        """Bytes of UTF-8 that one document may have; enough for one that is not too short, however small the cap."""
        return max(int(self.max_bytes_per_domain * self.max_document_share), 4 * self.minimum_document_characters)

    def domain_weights(self) -> dict[str, float]:
        """Returns the weights by domain, as the sampler takes them."""
        return {name: domain.weight for name, domain in self.domains.items()}
