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
"""Where in a collection's metadata its provenance is."""
VERSION = 1
"""Of the layout of provenance and payloads."""
LONGEST_NAME = 200
"""Characters of a collection's name; a server allows 255."""

AnyConnection: TypeAlias = Connection | CollectionReader
"""What can be asked: the second waits for what passes by itself."""
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
    """Whose vectors a collection holds. Two that differ in space or dimensions never mix."""

    space: str
    """The label of the space: the canonical model and the parameters that change the numbers."""
    dimensions: int
    text: str | None = None
    """How the input is made from a payload: a template as `{title} {tags}`; None = as it came."""
    version: int = VERSION
    origin: str | None = None
    """The collection whose place this one takes since a migration, or a chain of them."""

    def __post_init__(self) -> None:
        """Take a label that an earlier version wrote for the one of the same space today."""
        object.__setattr__(self, "space", current_label(self.space))

    def as_metadata(self) -> dict[str, object]:
        """Return it as the metadata of a new collection, with an id of its own."""
        told = {key: value for key, value in asdict(self).items() if key != "origin" or value}
        return {KEY: {**told, "id": uuid4().hex}}

    def is_comparable(self, other: "Provenance") -> bool:
        """Tell whether vectors of both may stand in one collection."""
        return (self.space, self.dimensions) == (other.space, other.dimensions)

    def __str__(self) -> str:
        return f"{self.space} at {self.dimensions}"


@dataclass(frozen=True, slots=True)
class CollectionOptions:
    """How new collections are made."""

    on_disk: bool = False
    """Whether the vectors stay on disk, and memory holds what is in use."""
    quantization: Quantization | None = None
    payload_indexes: Mapping[str, FieldType] = field(default_factory=dict)
    """Fields of the payload that are filtered by, and their types."""
    adopt: bool = False
    """Whether a collection of the right width that says nothing of its space is taken for ours."""
    vector_name: str = ""
    """The name of our vector among those of a point; "" is the unnamed one."""
    sparse_vectors: Mapping[str, SparseModifier] = field(default_factory=dict)
    """Sparse vectors beside it."""
    shard_number: int | None = None
    replication_factor: int | None = None
    hnsw_config: Mapping[str, object] = field(default_factory=dict)
    optimizers_config: Mapping[str, object] = field(default_factory=dict)


def name_of(model: str, dimensions: int, *, parameters: str = "", prefix: str = "") -> str:
    """Return what the collection of a space is called: `{prefix}{model}-{dimensions}`.

    What may stand in no name becomes an underscore. `parameters` are those of the space, if any:
    with them it is another space, and has a collection of its own, named by their digest too.

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
    """Return the first character that Qdrant allows in no name; an empty string if all are fine."""
    found = _NOT_IN_NAMES.search(text)
    return found[0] if found else ""


class CollectionNames:
    """The names `{prefix}{model}-{dimensions}`, and the collections that they stand for now.

    A migration puts another collection in the place of one of these, and lets aliases point to it.
    From then on it is the one for the vectors that it holds.
    """

    def __init__(self, models: Iterable[str] = (), prefix: str = "") -> None:
        names = "|".join(re.escape(name_of(model, 0, prefix=prefix)[:-2]) for model in models)
        self._own = re.compile(f"(?:{names})-[1-9][0-9]*(?:-[0-9a-f]{{8}})?" if names else r"(?!)")
        self._aliases: dict[str, str] | None = None
        self._successors: list[tuple[str, Provenance]] = []

    def is_own(self, name: str) -> bool:
        """Tell whether a name is one of these."""
        return self._own.fullmatch(name) is not None

    async def locate(self, qdrant: AnyConnection, name: str, wanted: Provenance) -> str:
        """Return the collection that these vectors are to be in, for `name`. Raises QdrantFailure.

        Any other name stands for itself. A name that has become an alias of a migrated collection
        with vectors of another space stands for a collection of its own, `{name}-2`.
        """
        if not self.is_own(name):
            return name
        aliases = await self._look(qdrant)
        for real, found in self._successors:
            if found.is_comparable(wanted):
                return real
        is_taken = aliases.get(name) in {real for real, _ in self._successors}
        return f"{name}-2" if is_taken else name

    async def is_replaced(self, qdrant: Connection, name: str) -> bool:
        """Tell whether one of these names is an alias of a migrated collection."""
        aliases = await self._look(qdrant)
        return aliases.get(name) in {real for real, _ in self._successors}

    async def _look(self, qdrant: AnyConnection) -> dict[str, str]:
        """Return the aliases; learn which collections took the place of one of ours."""
        try:
            aliases = await collection_aliases(qdrant)
        except Denied:
            aliases = {}  # a key with rights to some collections alone
        if aliases != self._aliases:
            # An alias goes with its collection, so nothing else has to be looked at again.
            self._successors = []
            for real in sorted({*aliases.values()}):
                seen = None
                with contextlib.suppress(Denied):
                    seen = await look(qdrant, real)
                found = None if seen is None else seen[1]
                origin = origin_of(real, found)
                if found is not None and origin != real and self.is_own(origin):
                    self._successors.append((real, found))
            self._aliases = aliases
        return aliases


async def ensure(
    qdrant: Connection, name: str, wanted: Provenance, options: CollectionOptions | None = None
) -> CollectionState:
    """Make the collection unless it is there, and see that it is one of these vectors.

    Returns what it is. `name` may be an alias. Raises QdrantFailure; OtherSpace if the collection
    holds vectors of another space or width, or does not say which.
    """
    options = options or CollectionOptions()
    info = await _info(qdrant, name)
    is_new = info is None and await _make(qdrant, name, wanted, options)
    if info is None:
        info = await _info(qdrant, name)
    if info is None:
        raise Missing(f"the collection {name} was deleted just now")
    if is_new:
        await index_payload(qdrant, name, options.payload_indexes)
        return CollectionState(identity_of(info), 0, is_new)
    seen = (width_of(info, options.vector_name), provenance_of(info))
    claim = conflict(name, seen, wanted, adopt=options.adopt, vector_name=options.vector_name)
    if claim is not None:
        raise OtherSpace(claim)
    if provenance_of(info) is None:
        await qdrant.ask(
            lambda client: client.update_collection(name, metadata=wanted.as_metadata())
        )
    lacking = {
        one: kind for one, kind in options.payload_indexes.items() if one not in info.payload_schema
    }
    try:
        await index_payload(qdrant, name, lacking)
    except Denied as error:
        # Searches do without an index; points must not wait for it.
        _tell_once(f"the payload of {name} is not indexed: {error}")
    return CollectionState(identity_of(info), info.points_count or 0)


@lru_cache(maxsize=256)
def _tell_once(words: str) -> None:
    log.warning("%s", words)


Look: TypeAlias = tuple[int, Provenance | None]
"""A collection's width, 0 where it has no such single vector; and whose vectors it holds."""


async def look(qdrant: AnyConnection, name: str, vector_name: str = "") -> Look | None:
    """Return what a collection says of itself; None if there is none of that name.

    Raises QdrantFailure.
    """
    info = await _info(qdrant, name)
    return None if info is None else (width_of(info, vector_name), provenance_of(info))


async def state_of(qdrant: AnyConnection, name: str) -> CollectionState | None:
    """Return what a collection is now; None if there is none of that name. Raises QdrantFailure."""
    info = await _info(qdrant, name)
    return None if info is None else CollectionState(identity_of(info), info.points_count or 0)


def conflict(  # noqa: PLR0911 - one for each reason
    name: str, seen: Look, wanted: Provenance, *, adopt: bool = False, vector_name: str = ""
) -> str | None:
    """Say why the vectors may not go into a collection; None if they may."""
    width, found = seen
    if not width:
        if vector_name:
            return f"the collection {name} has no vector named {vector_name} (one for each point)"
        return (
            f"the collection {name} has named vectors or multivectors, and not one unnamed one; if"
            " one of them is for these, name it in index.qdrant.vector_name"
        )
    if width != wanted.dimensions:
        return (
            f"the collection {name} holds vectors of {width} dimensions, and not of"
            f" {wanted.dimensions}; name another collection"
        )
    if found is None:
        if adopt:
            return None
        return (
            f"the collection {name} does not say whose vectors it holds; if they are of"
            f" {wanted.space}, set index.qdrant.adopt_unlabeled: true, else name another collection"
        )
    if not found.is_comparable(wanted):
        return (
            f"the collection {name} holds vectors of {found}, and not of {wanted}: they do not"
            " compare; name another collection"
        )
    return None


def width_of(info: "CollectionInfo", vector_name: str = "") -> int:
    """Return how wide the vectors of a name are; 0 if there is none, or many for each point."""
    found: Any = info.config.params.vectors
    vectors = found if isinstance(found, Mapping) else {"": found}
    one = vectors.get(vector_name)
    return 0 if one is None or one.multivector_config else int(one.size)


def provenance_of(info: "CollectionInfo") -> Provenance | None:
    """Return whose vectors a collection says to hold; None if it does not say."""
    said = (info.config.metadata or {}).get(KEY)
    if not isinstance(said, Mapping):
        return None
    space, dimensions, text = (said.get(one) for one in ("space", "dimensions", "text"))
    version, origin = said.get("version"), said.get("origin")
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
    """Return what tells a collection from one that is made anew under its name; "" if nothing."""
    said = (info.config.metadata or {}).get(KEY)
    found = said.get("id") if isinstance(said, Mapping) else None
    return found if isinstance(found, str) else ""


def origin_of(name: str, found: Provenance | None) -> str:
    """Return the collection whose place a collection took by migrations; itself without any.

    What earlier versions migrated has that in its own name, `{origin}__{model}-{dimensions}`.
    """
    if found is not None and found.origin is not None:
        return found.origin
    return name.partition("__")[0] or name


async def index_payload(qdrant: Connection, name: str, fields: Mapping[str, FieldType]) -> None:
    """Index fields of the payload; the embedded mode has no such indexes. Raises QdrantFailure."""
    if qdrant.embedded:
        return
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    keyword = models.KeywordIndexType.KEYWORD
    for one, kind in fields.items():
        schema: Any = kind
        if kind == "tenant":
            schema = models.KeywordIndexParams(type=keyword, is_tenant=True)
        await qdrant.ask(
            lambda client, one=one, schema=schema: client.create_payload_index(  # type: ignore[misc]
                name, one, schema, wait=True
            )
        )


async def collection_aliases(qdrant: AnyConnection) -> dict[str, str]:
    """Return the collections that aliases lead to, by the aliases. Raises QdrantFailure."""
    found = await qdrant.ask(lambda client: client.get_aliases())
    return {one.alias_name: one.collection_name for one in found.aliases}


async def present_ids(qdrant: AnyConnection, name: str, ids: Sequence[int | str]) -> set[int | str]:
    """Return those ids that a collection has; none if it is not there. Raises QdrantFailure."""
    if not ids:
        return set()
    try:
        found = await qdrant.ask(
            lambda client: client.retrieve(name, list(ids), with_payload=False, with_vectors=False)
        )
    except Missing:
        return set()
    return {one.id if isinstance(one.id, int) else str(one.id) for one in found}


async def _info(qdrant: AnyConnection, name: str) -> "CollectionInfo | None":
    try:
        return await qdrant.ask(
            lambda client: client.get_collection(name),
            doing=f"reading the configuration of {name}",
        )
    except Missing:
        return None


async def _make(
    qdrant: Connection, name: str, wanted: Provenance, options: CollectionOptions
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
        size=wanted.dimensions, distance=models.Distance.COSINE, on_disk=options.on_disk or None
    )
    if options.vector_name:
        vectors = {options.vector_name: vectors}
    sparse = {
        one: models.SparseVectorParams(modifier=models.Modifier(kind))
        for one, kind in options.sparse_vectors.items()
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
                metadata=wanted.as_metadata(),
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
    """Say what stands against writing; an empty list if nothing does. Raises QdrantFailure.

    `spaces` are the labels of the models' spaces by the models' names. With a `collection` all
    vectors go there, and it must belong to one of them; else each model has collections of its own,
    one a width. What is not there will be made.
    """
    lack = None if options.adopt else await no_metadata(qdrant)
    if lack is not None:
        return [lack]
    found = await qdrant.ask(lambda client: client.get_collections())
    try:
        aliases = await collection_aliases(qdrant)
    except Denied:
        aliases = {}
    names = {one.name for one in found.collections} | aliases.keys()
    if collection is not None:
        if collection not in names:
            return []
        return await _conflicts(qdrant, collection, spaces, options)
    against: list[str] = []
    own = CollectionNames(spaces, prefix)
    for model, space in spaces.items():
        head = name_of(model, 0, prefix=prefix)[:-1]
        for name in sorted(names):
            width = re.fullmatch(re.escape(head) + r"([1-9][0-9]*)", name)
            seen = await look(qdrant, name, options.vector_name) if width else None
            if width and seen:
                wanted = Provenance(space, int(width[1]))
                said = conflict(
                    name, seen, wanted, adopt=options.adopt, vector_name=options.vector_name
                )
                if said and not await own.is_replaced(qdrant, name):
                    against.append(said)
    return against


async def _conflicts(
    qdrant: Connection, name: str, spaces: Mapping[str, str], options: CollectionOptions
) -> list[str]:
    """Say what stands against every one of the spaces, if nothing may be written at all."""
    seen = await look(qdrant, name, options.vector_name)
    if seen is None:
        return []
    width, found = seen
    if found is None or not width:
        wanted = Provenance("the models of this configuration", width)
        said = conflict(name, seen, wanted, adopt=options.adopt, vector_name=options.vector_name)
        return [said] if said else []
    if found.space.partition("?")[0] in spaces.values():
        return []
    said = (
        f"the collection {name} holds vectors of {found}, and no model of the configuration is of"
        " that space: they do not compare; name another collection"
    )
    return [said]
