"""What a configuration may say of one model: its space, its routes, what may stand in for it."""

from typing import Annotated, Literal

from embedding_proxy.providers import model_catalog
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.dimensions import (
    BUILT_IN,
    Policy,
    UnknownStrategy,
    can_give,
    find,
)
from embedding_proxy.providers.model_catalog import ModelEntry
from pydantic import Field, ValidationError, field_validator, model_validator

from .errors import Problem, refuse, suggestion
from .fields import Name, Number, Section, Whole


class RouteConfig(Section):
    """A provider of a model, and its name for the model."""

    provider: Name
    model: Name
    price: Annotated[Number, Field(ge=0)] | None = None


class Fallback(Section):
    """A model of another space that answers when no route of the first one does."""

    model: Name
    dimension_policy: Policy = "strict"

    def objection(self, first: "ModelConfig", stand_in: "ModelConfig") -> str | None:
        """Return why a model cannot be a fallback; None if it can."""
        if stand_in.space == first.space:
            return "has the same space; add its routes to `routes` instead"
        if first.dimensions is None or stand_in.dimensions is None:
            return "say the `dimensions` of both models, so that it is known whether they fit"
        if not can_give(stand_in.as_space(), first.dimensions, self.dimension_policy):
            policy = "pad" if stand_in.dimensions < first.dimensions else "truncate"
            return (
                f"gives {stand_in.dimensions} numbers where {first.dimensions} are asked for;"
                f" say `dimension_policy: {policy}`"
                " if that is what you want"
            )
        return None


class ModelConfig(Section):
    """One embedding model."""

    space: Annotated[str, Field(min_length=1, max_length=200)]
    dimensions: Annotated[Whole, Field(ge=1, le=65536)] | None = None
    matryoshka: bool = False
    reject_dimensions: bool = False
    send_dimensions: bool = False
    tokenizer: Literal["cl100k_base", "o200k_base"] | None = None
    max_input_tokens: Annotated[Whole, Field(ge=1)] | None = None
    truncate: Literal["end"] | None = None
    unit_norm: bool = False
    price: Annotated[Number, Field(ge=0)] = 0
    routing_strategy: Literal["listed", "cheapest", "fastest"] = "listed"
    hedge_after_s: Annotated[Number, Field(gt=0)] | None = None
    dimension_policy: Name = "strict"
    routes: Annotated[tuple[RouteConfig, ...], Field(min_length=1)]
    fallback: tuple[Fallback, ...] = ()

    @field_validator("fallback", mode="before")
    @classmethod
    def _several_or_one(cls, value: object) -> object:
        """Accept one value for a list of one, a name for a whole entry, and null for none."""
        if value is None:
            return ()
        several = value if isinstance(value, list | tuple) else [value]
        return [{"model": entry} if isinstance(entry, str) else entry for entry in several]

    @field_validator("dimension_policy")
    @classmethod
    def _check_policy(cls, value: str) -> str:
        if value not in BUILT_IN:
            try:
                find(value)
            except UnknownStrategy as error:
                raise ValueError(f"{error}{suggestion(value, BUILT_IN)}") from error
        return value

    @model_validator(mode="after")
    def _cut_by_tokens_of_its_own(self) -> "ModelConfig":
        refuse(
            Problem(
                ("truncate",),
                f"needs the model's `{key}`; give it, or leave `truncate` out: then what is too"
                " long is refused",
                needs=((key,),),
            )
            for key in ("tokenizer", "max_input_tokens")
            if self.truncate is not None and getattr(self, key) is None
        )
        return self

    @property
    def truncate_to(self) -> int | None:
        """Tokens to which an input is cut first; None = it is not cut."""
        return self.max_input_tokens if self.truncate else None

    def as_space(self) -> Space:
        """Return the embedding space of this model."""
        return Space(
            self.space,
            self.dimensions or 0,
            self.matryoshka,
            self.tokenizer,
            unit_norm=self.unit_norm,
            send_dimensions=self.send_dimensions,
        )


def from_catalogue(entry: ModelEntry) -> dict[str, object]:
    """Return the catalog entry of a model, in the form of a configuration."""
    return {
        "space": entry.space,
        "dimensions": entry.dimensions or None,
        "matryoshka": entry.matryoshka,
        "reject_dimensions": entry.reject_dimensions,
        "send_dimensions": entry.send_dimensions,
        "tokenizer": entry.tokenizer,
        "max_input_tokens": entry.max_input_tokens,
        "unit_norm": entry.unit_norm,
        "price": entry.price,
        "routes": [{"provider": provider, "model": model} for provider, model in entry.routes],
    }


def unlisted_model(name: str) -> ModelConfig | None:
    """Return the entry of a model that is not configured; None if the name is no model's."""
    try:
        return ModelConfig.model_validate(from_catalogue(model_catalog.by_name(name)))
    except ValidationError:
        return None
