"""Collections of Qdrant: what they are called, how they are made, and whose vectors they hold.

A collection holds the vectors of one space at one width. Which, it says itself: in its metadata,
under `embedding_proxy`, which servers since 1.16 and the embedded mode keep with it, from the call
that makes it on. So whoever copies, restores or renames a collection copies that too, and no other
process has to be asked. A server before 1.16 drops metadata in silence; what it holds is then as if
somebody else had made it, and is taken only with `adopt`.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from uuid import uuid4

from embedding_proxy.providers.base import current_label

from .client import Connection, no_metadata
from .collection_reader import CollectionReader
from .errors import Denied, Exists, Missing, OtherSpace
from .point import CollectionState

if TYPE_CHECKING:
    from qdrant_client.models import CollectionInfo

log = logging.getLogger("embedding_proxy.index")

KEY = "embedding_proxy"
"""The key of the provenance in a collection's metadata."""
VERSION = 1
"""The version of the layout of provenance and payloads."""
LONGEST_NAME = 200
"""Characters of a collection's name; a server allows 255."""

AnyConnection: TypeAlias = Connection | CollectionReader
"""A connection, or a reader, which also waits for passing failures to end."""
Quantization: TypeAlias = Literal["scalar", "binary"]
FieldType: TypeAlias = Literal[
    "keyword", "integer", "float", "bool", "geo", "datetime", "text", "uuid", "tenant"
]
"""The types of payload indexes; a tenant is a keyword by which the points lie together."""
SparseModifier: TypeAlias = Literal["none", "idf"]

# What Qdrant refuses in a name, and what would be another folder or a path of the URL.
_NOT_IN_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\s]')


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which vectors a collection holds. Vectors of two spaces or dimensions never mix."""

    space: str
    """The label of the space: the canonical model and the parameters that change the numbers."""
    dimensions: int
    text: str | None = None
    """How the input is made from a payload: a template as `{title} {tags}`; None = as it came."""
    version: int = VERSION
    origin: str | None = None
    """The collection that this one replaces, after one migration or several."""

    def __post_init__(self) -> None:
        """Replace a label of an earlier version by the present label of the space."""
        object.__setattr__(self, "space", current_label(self.space))

    def as_metadata(self) -> dict[str, object]:
        """Return the metadata of a new collection, with a new id."""
        fields = {key: value for key, value in asdict(self).items() if key != "origin" or value}
        return {KEY: {**fields, "id": uuid4().hex}}

    def is_comparable(self, other: "Provenance") -> bool:
        """Tell whether vectors of both can be in one collection."""
        return (self.space, self.dimensions) == (other.space, other.dimensions)

    def __str__(self) -> str:
        return f"{self.space} at {self.dimensions}"


@dataclass(frozen=True, slots=True)
class CollectionOptions:
    """How new collections are made."""

    on_disk: bool = False
    """Whether the vectors are on disk, and only those in use are in memory."""
    quantization: Quantization | None = None
    payload_indexes: Mapping[str, FieldType] = field(default_factory=dict)
    """The indexed fields of the payload, and their types."""
    adopt: bool = False
    """Whether a collection of the right width without provenance is used as ours."""
    vector_name: str = ""
    """The name of our vector among those of a point; "" is the unnamed one."""
    sparse_vectors: Mapping[str, SparseModifier] = field(default_factory=dict)
    """Sparse vectors beside it."""
    shard_number: int | None = None
    replication_factor: int | None = None
    hnsw_config: Mapping[str, object] = field(default_factory=dict)
    optimizers_config: Mapping[str, object] = field(default_factory=dict)


def name_of(model: str, dimensions: int, *, parameters: str = "", prefix: str = "") -> str:
    """Return the name of a space's collection: `{prefix}{model}-{dimensions}`.

    Characters that no name may have become underscores. `parameters` are those of the space. A
    space with parameters has a separate collection, whose name ends in a digest of them.

    >>> name_of("text-embedding-3-small", 256, prefix="my_")
    'my_text-embedding-3-small-256'
    >>> name_of("openai/text-embedding-3-small", 256, parameters="task=1")
    'openai_text-embedding-3-small-256-67758369'
    """
    tail = f"-{dimensions}"
    if parameters:
        tail += f"-{hashlib.blake2b(parameters.encode(), digest_size=4).hexdigest()}"
    head = _NOT_IN_NAMES.sub("_", prefix + model)
    return head[: LONGEST_NAME - len(tail)] + tail


def not_in_names(text: str) -> str:
    """Return the first character that Qdrant allows in no name; empty if there is none."""
    match = _NOT_IN_NAMES.search(text)
    return match[0] if match else ""


class CollectionNames:
    """The names `{prefix}{model}-{dimensions}`, and the collections that they mean now.

    A migration replaces one of these collections by another one, to which aliases then point. From
    then on, vectors of the new collection's space go there.
    """

    def __init__(self, models: Iterable[str] = (), prefix: str = "") -> None:
        names = "|".join(re.escape(name_of(model, 0, prefix=prefix)[:-2]) for model in models)
        self._own = re.compile(f"(?:{names})-[1-9][0-9]*(?:-[0-9a-f]{{8}})?" if names else r"(?!)")
        self._aliases: dict[str, str] | None = None
        self._successors: list[tuple[str, Provenance]] = []

    def is_own(self, name: str) -> bool:
        """Tell whether a name has this form."""
        return self._own.fullmatch(name) is not None

    async def locate(self, qdrant: AnyConnection, name: str, provenance: Provenance) -> str:
        """Return the collection for vectors of a provenance. Raises QdrantFailure.

        A name of another form means itself. A name that has become an alias of a migrated
        collection with vectors of another space means the separate collection `{name}-2`.
        """
        if not self.is_own(name):
            return name
        aliases = await self._look(qdrant)
        for real, actual in self._successors:
            if actual.is_comparable(provenance):
                return real
        is_taken = aliases.get(name) in {real for real, _ in self._successors}
        return f"{name}-2" if is_taken else name

    async def is_replaced(self, qdrant: Connection, name: str) -> bool:
        """Tell whether a name is an alias of a migrated collection."""
        aliases = await self._look(qdrant)
        return aliases.get(name) in {real for real, _ in self._successors}

    async def _look(self, qdrant: AnyConnection) -> dict[str, str]:
        """Return the aliases, and update the collections that replace one of ours."""
        try:
            aliases = await collection_aliases(qdrant)
        except Denied:
            aliases = {}  # a key with rights to some collections alone
        if aliases != self._aliases:
            # An alias goes with its collection, so nothing else has to be looked at again.
            self._successors = []
            for real in sorted({*aliases.values()}):
                contents = None
                with contextlib.suppress(Denied):
                    contents = await look(qdrant, real)
                provenance = None if contents is None else contents[1]
                origin = origin_of(real, provenance)
                if provenance is not None and origin != real and self.is_own(origin):
                    self._successors.append((real, provenance))
            self._aliases = aliases
        return aliases


async def ensure(
    qdrant: Connection, name: str, provenance: Provenance, options: CollectionOptions | None = None
) -> CollectionState:
    """Make the collection unless it exists, and check that it holds vectors of this provenance.

    Returns its state. `name` may be an alias. Raises QdrantFailure; OtherSpace if the collection
    holds vectors of another space or width, or does not say which.
    """
    options = options or CollectionOptions()
    info = await _info(qdrant, name)
    is_new = info is None and await _make(qdrant, name, provenance, options)
    if info is None:
        info = await _info(qdrant, name)
    if info is None:
        raise Missing(f"the collection {name} was deleted just now")
    if is_new:
        await index_payload(qdrant, name, options.payload_indexes)
        return CollectionState(identity_of(info), 0, is_new)
    contents = (width_of(info, options.vector_name), provenance_of(info))
    claim = conflict(
        name, contents, provenance, adopt=options.adopt, vector_name=options.vector_name
    )
    if claim is not None:
        raise OtherSpace(claim)
    if provenance_of(info) is None:
        await qdrant.ask(
            lambda client: client.update_collection(name, metadata=provenance.as_metadata())
        )
    lacking = {
        field_name: kind
        for field_name, kind in options.payload_indexes.items()
        if field_name not in info.payload_schema
    }
    try:
        await index_payload(qdrant, name, lacking)
    except Denied as error:
        # A search works without an index, so points must not wait for it.
        _tell_once(f"the payload of {name} is not indexed: {error}")
    return CollectionState(identity_of(info), info.points_count or 0)


@lru_cache(maxsize=256)
def _tell_once(words: str) -> None:
    log.warning("%s", words)


Look: TypeAlias = tuple[int, Provenance | None]
"""A collection's width, 0 if it has no such single vector; and its provenance, if it has one."""


async def look(qdrant: AnyConnection, name: str, vector_name: str = "") -> Look | None:
    """Return the width and provenance of a collection; None if there is none of that name.

    Raises QdrantFailure.
    """
    info = await _info(qdrant, name)
    return None if info is None else (width_of(info, vector_name), provenance_of(info))


async def state_of(qdrant: AnyConnection, name: str) -> CollectionState | None:
    """Return the state of a collection; None if there is none of that name.

    Raises QdrantFailure.
    """
    info = await _info(qdrant, name)
    return None if info is None else CollectionState(identity_of(info), info.points_count or 0)


def conflict(  # noqa: PLR0911 - one for each reason
    name: str, contents: Look, expected: Provenance, *, adopt: bool = False, vector_name: str = ""
) -> str | None:
    """Return why vectors may not go into a collection; None if they may."""
    width, actual = contents
    if not width:
        if vector_name:
            return f"the collection {name} has no vector named {vector_name} (one for each point)"
        return (
            f"the collection {name} has named vectors or multivectors, and not one unnamed one; if"
            " one of them is for these, name it in index.qdrant.vector_name"
        )
    if width != expected.dimensions:
        return (
            f"the collection {name} holds vectors of {width} dimensions, and not of"
            f" {expected.dimensions}; name another collection"
        )
    if actual is None:
        if adopt:
            return None
        return (
            f"the collection {name} does not say whose vectors it holds; if they are of"
            f" {expected.space}, set index.qdrant.adopt_unlabeled: true, else name another"
            " collection"
        )
    if not actual.is_comparable(expected):
        return (
            f"the collection {name} holds vectors of {actual}, and not of {expected}: they do not"
            " compare; name another collection"
        )
    return None


def width_of(info: "CollectionInfo", vector_name: str = "") -> int:
    """Return the width of the vector of a name; 0 if there is none, or it is a multivector."""
    params: Any = info.config.params.vectors
    vectors = params if isinstance(params, Mapping) else {"": params}
    vector = vectors.get(vector_name)
    return 0 if vector is None or vector.multivector_config else int(vector.size)


def provenance_of(info: "CollectionInfo") -> Provenance | None:
    """Return the provenance in a collection's metadata; None if it has none."""
    metadata = (info.config.metadata or {}).get(KEY)
    if not isinstance(metadata, Mapping):
        return None
    space, dimensions, text = (metadata.get(key) for key in ("space", "dimensions", "text"))
    version, origin = metadata.get("version"), metadata.get("origin")
    if not isinstance(space, str) or not isinstance(dimensions, int):
        return None
    return Provenance(
        space,
        dimensions,
        text if isinstance(text, str) else None,
        version if isinstance(version, int) else VERSION,
        origin if isinstance(origin, str) else None,
    )


def identity_of(info: "CollectionInfo") -> str:
    """Return the id that differs in a later collection of the same name; "" if there is none."""
    metadata = (info.config.metadata or {}).get(KEY)
    identity = metadata.get("id") if isinstance(metadata, Mapping) else None
    return identity if isinstance(identity, str) else ""


def origin_of(name: str, provenance: Provenance | None) -> str:
    """Return the collection that this one replaces by migrations; itself without any.

    Earlier versions have the origin in the name, `{origin}__{model}-{dimensions}`.
    """
    if provenance is not None and provenance.origin is not None:
        return provenance.origin
    return name.partition("__")[0] or name


async def index_payload(qdrant: Connection, name: str, fields: Mapping[str, FieldType]) -> None:
    """Index fields of the payload; the embedded mode has no such indexes. Raises QdrantFailure."""
    if qdrant.embedded:
        return
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    keyword = models.KeywordIndexType.KEYWORD
    for field_name, kind in fields.items():
        schema: Any = kind
        if kind == "tenant":
            schema = models.KeywordIndexParams(type=keyword, is_tenant=True)
        await qdrant.ask(
            lambda client, field_name=field_name, schema=schema: client.create_payload_index(  # type: ignore[misc]
                name, field_name, schema, wait=True
            )
        )


async def collection_aliases(qdrant: AnyConnection) -> dict[str, str]:
    """Return the collection of each alias. Raises QdrantFailure."""
    response = await qdrant.ask(lambda client: client.get_aliases())
    return {alias.alias_name: alias.collection_name for alias in response.aliases}


async def present_ids(qdrant: AnyConnection, name: str, ids: Sequence[int | str]) -> set[int | str]:
    """Return the ids that a collection has; none if it does not exist. Raises QdrantFailure."""
    if not ids:
        return set()
    try:
        records = await qdrant.ask(
            lambda client: client.retrieve(name, list(ids), with_payload=False, with_vectors=False)
        )
    except Missing:
        return set()
    return {record.id if isinstance(record.id, int) else str(record.id) for record in records}


async def _info(qdrant: AnyConnection, name: str) -> "CollectionInfo | None":
    try:
        return await qdrant.ask(
            lambda client: client.get_collection(name),
            doing=f"reading the configuration of {name}",
        )
    except Missing:
        return None


async def _make(
    qdrant: Connection, name: str, provenance: Provenance, options: CollectionOptions
) -> bool:
    """Make a collection; return False if another process was first."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    quantization: Any = None
    if options.quantization == "scalar":
        scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
        quantization = models.ScalarQuantization(scalar=scalar)
    elif options.quantization == "binary":
        binary = models.BinaryQuantizationConfig(always_ram=True)
        quantization = models.BinaryQuantization(binary=binary)
    vectors: Any = models.VectorParams(
        size=provenance.dimensions, distance=models.Distance.COSINE, on_disk=options.on_disk or None
    )
    if options.vector_name:
        vectors = {options.vector_name: vectors}
    sparse = {
        name_of_sparse: models.SparseVectorParams(modifier=models.Modifier(kind))
        for name_of_sparse, kind in options.sparse_vectors.items()
    }
    hnsw: Any = dict(options.hnsw_config)
    optimizers: Any = dict(options.optimizers_config)
    try:
        await qdrant.ask(
            lambda client: client.create_collection(
                name,
                vectors_config=vectors,
                sparse_vectors_config=sparse or None,
                shard_number=options.shard_number,
                replication_factor=options.replication_factor,
                hnsw_config=models.HnswConfigDiff(**hnsw) if hnsw else None,
                optimizers_config=models.OptimizersConfigDiff(**optimizers) if optimizers else None,
                quantization_config=quantization,
                metadata=provenance.as_metadata(),
            )
        )
    except Exists:
        return False
    return True


async def conflicts(
    qdrant: Connection,
    spaces: Mapping[str, str],
    options: CollectionOptions,
    *,
    collection: str | None = None,
    prefix: str = "",
) -> list[str]:
    """Return why vectors cannot be written; an empty list if they can. Raises QdrantFailure.

    `spaces` are the labels of the models' spaces by the models' names. With a `collection` all
    vectors go there, and it must belong to one of them; else each model has collections of its own,
    one a width. What is not there will be made.
    """
    lack = None if options.adopt else await no_metadata(qdrant)
    if lack is not None:
        return [lack]
    response = await qdrant.ask(lambda client: client.get_collections())
    try:
        aliases = await collection_aliases(qdrant)
    except Denied:
        aliases = {}
    names = {description.name for description in response.collections} | aliases.keys()
    if collection is not None:
        if collection not in names:
            return []
        return await _conflicts(qdrant, collection, spaces, options)
    problems: list[str] = []
    own = CollectionNames(spaces, prefix)
    for model, space in spaces.items():
        head = name_of(model, 0, prefix=prefix)[:-1]
        for name in sorted(names):
            width = re.fullmatch(re.escape(head) + r"([1-9][0-9]*)", name)
            contents = await look(qdrant, name, options.vector_name) if width else None
            if width and contents:
                expected = Provenance(space, int(width[1]))
                problem = conflict(
                    name, contents, expected, adopt=options.adopt, vector_name=options.vector_name
                )
                if problem and not await own.is_replaced(qdrant, name):
                    problems.append(problem)
    return problems


async def _conflicts(
    qdrant: Connection, name: str, spaces: Mapping[str, str], options: CollectionOptions
) -> list[str]:
    """Return why no vector of any of the spaces can be written, if none can."""
    contents = await look(qdrant, name, options.vector_name)
    if contents is None:
        return []
    width, actual = contents
    if actual is None or not width:
        expected = Provenance("the models of this configuration", width)
        problem = conflict(
            name, contents, expected, adopt=options.adopt, vector_name=options.vector_name
        )
        return [problem] if problem else []
    if actual.space.partition("?")[0] in spaces.values():
        return []
    problem = (
        f"the collection {name} holds vectors of {actual}, and no model of the configuration is of"
        " that space: they do not compare; name another collection"
    )
    return [problem]
