"""The section `index`: the Qdrant that vectors are written to, and how its collections are made."""

from collections.abc import Iterator
from typing import Annotated, Literal

from embedding_proxy.index.collection import (
    LONGEST_NAME,
    FieldType,
    SparseModifier,
    not_in_names,
)
from pydantic import Field, ValidationInfo, field_validator, model_validator

from .errors import KeyPath, Problem, refuse
from .fields import CertificateFile, FilePath, HttpUrl, Name, Number, Section, VariableName, Whole

MAX_BATCH_MIB = 4.5
"""The longest time of one request to Qdrant."""


class Hnsw(Section):
    """The graph of new collections, in Qdrant's own words."""

    m: Annotated[Whole, Field(ge=0)] | None = None
    ef_construct: Annotated[Whole, Field(ge=4)] | None = None
    full_scan_threshold: Annotated[Whole, Field(ge=0)] | None = None
    max_indexing_threads: Annotated[Whole, Field(ge=0)] | None = None
    on_disk: bool | None = None
    payload_m: Annotated[Whole, Field(ge=0)] | None = None


class Optimizers(Section):
    """The optimizers of new collections, in Qdrant's own words."""

    deleted_threshold: Annotated[Number, Field(ge=0, le=1)] | None = None
    vacuum_min_vector_number: Annotated[Whole, Field(ge=100)] | None = None
    default_segment_number: Annotated[Whole, Field(ge=0)] | None = None
    max_segment_size: Annotated[Whole, Field(ge=0)] | None = None
    memmap_threshold: Annotated[Whole, Field(ge=0)] | None = None
    indexing_threshold: Annotated[Whole, Field(ge=0)] | None = None
    flush_interval_sec: Annotated[Whole, Field(ge=1)] | None = None
    max_optimization_threads: Annotated[Whole, Field(ge=0)] | None = None


class Qdrant(Section):
    """The Qdrant that vectors are indexed in, and how."""

    url: HttpUrl | None = None
    path: FilePath | None = None
    api_key_env: VariableName | None = None
    ca_file: CertificateFile | None = None
    prefer_grpc: bool = False
    grpc_port: Annotated[Whole, Field(ge=1, le=65535)] = 6334
    timeout_s: Annotated[Number, Field(ge=1, le=3600)] = 60
    collection: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)] | None = None
    prefix: Annotated[str, Field(max_length=100)] = ""
    vector_name: Annotated[str, Field(max_length=LONGEST_NAME)] = ""
    store_text: bool = True
    adopt_unlabeled: bool = False
    on_disk: bool = False
    quantization: Literal["scalar", "binary"] | None = None
    payload_indexes: dict[Name, FieldType] = Field(default_factory=dict)
    sparse_vectors: dict[Name, SparseModifier] = Field(default_factory=dict)
    shard_number: Annotated[Whole, Field(ge=1)] | None = None
    replication_factor: Annotated[Whole, Field(ge=1)] | None = None
    hnsw_config: Hnsw | None = None
    optimizers_config: Optimizers | None = None
    batch_mib: Annotated[Number, Field(gt=0, le=MAX_BATCH_MIB)] = 1
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
        """Refuse a name that Qdrant refuses."""
        bad = not_in_names(value or "")
        if bad:
            raise ValueError(f"a collection's name cannot hold {bad!r}")
        return value

    @field_validator("payload_indexes", "sparse_vectors", mode="before")
    @classmethod
    def _names_alone(cls, value: object, info: ValidationInfo) -> object:
        """Accept a list of names instead of a mapping: keyword fields, plain sparse vectors."""
        if not isinstance(value, list | tuple):
            return value
        if not all(isinstance(name, str) for name in value):
            raise ValueError("expected a list of names, or names with types below it")
        return dict.fromkeys(value, "keyword" if info.field_name == "payload_indexes" else "none")

    @field_validator("url")
    @classmethod
    def _not_the_dashboard(cls, value: str | None) -> str | None:
        if value is not None and "/dashboard" in value:
            raise ValueError(
                "is the address of Qdrant's dashboard; write that of its API, without /dashboard"
            )
        return value

    @model_validator(mode="after")
    def _one_place(self) -> "Qdrant":
        refuse(self._misfits())
        return self

    def _misfits(self) -> Iterator[Problem]:
        """Yield the problems of keys that exclude each other."""
        needs: tuple[KeyPath, ...] = (("url",), ("path",))
        if (self.url is None) == (self.path is None):
            yield Problem(
                (), "set either url, of a server, or path, of a folder of this machine", needs=needs
            )
        elif self.path is not None and self.api_key_env is not None:
            yield Problem(
                ("api_key_env",), "is for a server; a folder has no key: remove it", needs=needs
            )
        for key in ("ca_file", "prefer_grpc"):
            if self.path is not None and getattr(self, key):
                yield Problem(
                    (key,), "is for a server, and not for a folder: remove it", needs=needs
                )
        if self.ca_file is not None and not str(self.url).lower().startswith("https:"):
            yield Problem(
                ("ca_file",), "is for a url that begins with https: remove it", needs=(("url",),)
            )
        if self.vector_name in self.sparse_vectors and self.vector_name:
            yield Problem(
                ("sparse_vectors",),
                f"{self.vector_name} is the name of the dense vector; choose another name",
                needs=(("vector_name",),),
            )


class Index(Section):
    """The vector store that the proxy writes to."""

    qdrant: Qdrant | None = None
