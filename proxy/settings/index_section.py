"""The section `index` of a configuration: the vector store behind the proxy."""

from collections.abc import Iterator
from typing import Annotated, Literal

from embedding_proxy.index.collection import LONGEST_NAME, FieldType, not_in_names
from pydantic import Field, field_validator, model_validator

from .problem import KeyPath, Problem, refuse
from .section import FilePath, HttpUrl, Name, Number, Section, VariableName

MOST_MIB = 4.5
"""Of one request to Qdrant."""


class Qdrant(Section):
    """Where vectors are indexed, and how."""

    url: HttpUrl | None = None
    path: FilePath | None = None
    api_key_env: VariableName | None = None
    timeout_s: Annotated[Number, Field(ge=1, le=3600)] = 60
    collection: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)] | None = None
    prefix: Annotated[str, Field(max_length=100)] = ""
    store_text: bool = True
    adopt: bool = False
    on_disk: bool = False
    quantization: Literal["scalar", "binary"] | None = None
    payload_indexes: dict[Name, FieldType] = Field(default_factory=dict)
    batch_mib: Annotated[Number, Field(gt=0, le=MOST_MIB)] = 1
    outbox_gib: Annotated[Number, Field(gt=0, le=1e6)] = 10

    @field_validator("path", mode="before")
    @classmethod
    def _a_folder_of_its_own(cls, value: object) -> object:
        if isinstance(value, str) and not value.strip(" ."):
            raise ValueError("expected a folder for Qdrant's files")
        return value

    @field_validator("collection", "prefix")
    @classmethod
    def _a_name(cls, value: str | None) -> str | None:
        """Refuse what Qdrant would refuse in a name."""
        bad = not_in_names(value or "")
        if bad:
            raise ValueError(f"a collection's name cannot hold {bad!r}")
        return value

    @field_validator("payload_indexes", mode="before")
    @classmethod
    def _keywords(cls, value: object) -> object:
        """Take a list of fields for keywords, which is what is mostly filtered by."""
        if not isinstance(value, list | tuple):
            return value
        if not all(isinstance(name, str) for name in value):
            raise ValueError("expected a list of names, or names with types below it")
        return dict.fromkeys(value, "keyword")

    @model_validator(mode="after")
    def _one_place(self) -> "Qdrant":
        refuse(self._misfits())
        return self

    def _misfits(self) -> Iterator[Problem]:
        """Yield what does not go together."""
        needs: tuple[KeyPath, ...] = (("url",), ("path",))
        if (self.url is None) == (self.path is None):
            yield Problem(
                (), "set either url, of a server, or path, of a folder of this machine", needs=needs
            )
        elif self.path is not None and self.api_key_env is not None:
            yield Problem(
                ("api_key_env",), "is for a server; a folder has no key: remove it", needs=needs
            )


class Index(Section):
    """The vector store behind the proxy."""

    qdrant: Qdrant | None = None
