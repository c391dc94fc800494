"""Points as a migration writes them: with the new vector, and all others as they came.

Collections and aliases as a migration finds, makes, switches and deletes them.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedding_proxy.index.collection import KEY, LONGEST_NAME, Provenance, name_of, provenance_of
from embedding_proxy.index.collection import aliases as collection_aliases
from embedding_proxy.index.collection_reader import CollectionReader, Point, PointId
from embedding_proxy.index.errors import Exists, Missing, OtherSpace, Rejected
from embedding_proxy.providers import vector

if TYPE_CHECKING:
    from qdrant_client.models import PointStruct

WRITE_BYTES = 4_000_000
"""About how much goes in one write; a server takes 32 MiB, and gateways before it less."""
_BYTES_A_NUMBER = 12
"""Of a float32 in JSON."""


class Points(CollectionReader):
    """Reads and writes the points of collections whose migrated vector has this name."""

    async def write(
        self, collection: str, points: Sequence[Point], *, only_new: bool = False
    ) -> None:
        """Write points; they are there when this returns. `only_new` leaves alone what is there.

        A server before 1.17 does not know `only_new`; so a caller asks before which are there.
        """
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        # Older versions of the package have no such thing; then the asking before must do.
        modes = getattr(models, "UpdateMode", None)
        options = {"update_mode": modes.INSERT_ONLY} if only_new and modes else {}
        for some in _in_writes(points):
            structs = [self._struct(point) for point in some]
            await self.ask(
                lambda client, structs=structs: client.upsert(  # type: ignore[misc]
                    collection, structs, wait=True, **options
                ),
                [point.payload for point in some],
            )

    async def delete(self, collection: str, ids: Sequence[PointId]) -> None:
        """Delete points; they are gone when this returns."""
        if ids:
            await self.ask(lambda client: client.delete(collection, list(ids), wait=True))

    def _struct(self, point: Point) -> "PointStruct":
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        assert point.vector is not None  # noqa: S101 - nothing is written without
        (numbers,) = vector.stack([point.vector]).tolist()
        every: Any = numbers
        if self.vector_name or point.others:
            every = {**(point.others or {}), self.vector_name: numbers}
        return models.PointStruct(id=point.id, payload=dict(point.payload), vector=every)


def _in_writes(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Part points so that each write has about WRITE_BYTES at most, and one point at least."""
    some: list[Point] = []
    size = 0
    for point in points:
        own = len(point.vector or b"") // 4 * _BYTES_A_NUMBER
        own += len(json.dumps(point.payload, default=str)) + sum(
            _BYTES_A_NUMBER * len(one) for one in (point.others or {}).values() if type(one) is list
        )
        if some and size + own > WRITE_BYTES:
            yield some
            some, size = [], 0
        some.append(point)
        size += own
    if some:
        yield some


if TYPE_CHECKING:
    from qdrant_client.models import CollectionInfo


@dataclass(frozen=True, slots=True)
class Old:
    """A collection that is to be migrated."""

    name: str
    """Its own, where it was named by an alias."""
    vector: str
    """The name of the vector that is migrated; "" is the unnamed one."""
    width: int
    distance: str
    """Cosine, Dot, Euclid or Manhattan."""
    provenance: Provenance | None
    points: int
    others: bool
    """Whether its points may have further vectors."""


async def real_name(points: Points, name: str) -> str:
    """Return a collection's own name, given that or an alias. Raises Missing."""
    real = (await collection_aliases(points)).get(name)
    if real is not None:
        return real
    if await exists(points, name):
        return name
    raise Missing(f"there is no collection or alias `{name}` in {points.qdrant}")


async def exists(points: Points, name: str) -> bool:
    """Return whether there is a collection, or an alias of one, of this name."""
    return await points.ask(lambda client: client.collection_exists(name))


async def look(points: Points, name: str, vector: str | None = None) -> Old:
    """Return what a collection is; `vector` names one of its vectors, where it has several.

    Raises Missing, and Rejected for one that cannot be migrated.
    """
    real = await real_name(points, name)
    info = await _info(points, real)
    params = info.config.params
    if params.sharding_method is not None and str(params.sharding_method.value) == "custom":
        raise Rejected(f"{real} is sharded by keys of its own, which is not supported")
    found: Any = params.vectors
    there = dict(found) if isinstance(found, Mapping) else {"": found} if found else {}
    chosen = vector if vector is not None else next(iter(there)) if len(there) == 1 else None
    if chosen is None or chosen not in there:
        names = ", ".join(one or "the unnamed one" for one in there) or "none"
        raise Rejected(f"pick one of the vectors of {real} with --vector: {names}")
    one = there[chosen]
    if one.multivector_config:
        raise Rejected(f"{real} has a multivector, many for each point, which cannot be migrated")
    count = await points.count(real)
    distance = str(one.distance.value)
    others = len(there) > 1 or bool(params.sparse_vectors)
    return Old(real, chosen, int(one.size), distance, provenance_of(info), count, others)


def target_name(source: str, model: str, dimensions: int) -> str:
    """Return what the new collection is called, beside the old.

    >>> target_name("docs", "mistral/mistral-embed", 1024)
    'docs__mistral_mistral-embed-1024'
    >>> target_name("docs__mistral_mistral-embed-1024", "m", 8)
    'docs__m-8'
    >>> target_name("docs__m-8", "m", 8), target_name("docs__m-8-2", "m", 8)
    ('docs__m-8-2', 'docs__m-8')
    """
    stem = re.sub(r"(?<=.)__.*", "", source, flags=re.DOTALL)
    tail = name_of(model, dimensions, prefix="__")
    name = stem[: LONGEST_NAME - len(tail)] + tail
    return name if name != source else f"{name}-2"


async def make_beside(points: Points, old: Old, name: str, wanted: Provenance) -> None:
    """Make the new collection like the old but for the width, indexes of its payload first.

    One that is there is taken if it says itself that it is of these vectors, or is being made by
    this migration (an interrupted one). Raises OtherSpace, QdrantFailure.
    """
    info = await _info(points, old.name)
    config = _config_like(info, old, wanted)
    if not await exists(points, name):
        with contextlib.suppress(Exists):  # an attempt before, whose answer was lost
            await points.ask(lambda client: client.create_collection(name, **config))
    made = await _info(points, name)
    found = provenance_of(made)
    if found is not None and (found.space, found.dimensions) != (wanted.space, wanted.dimensions):
        raise OtherSpace(f"{name} holds vectors of {found}, and not of {wanted}; see --into")
    if _width(made, old.vector) != wanted.dimensions:
        raise OtherSpace(f"{name} has other vectors than {wanted}; see --into")
    for field, schema in info.payload_schema.items():
        if field not in made.payload_schema:
            kind: Any = schema.params or schema.data_type
            await points.ask(
                lambda client, field=field, kind=kind: client.create_payload_index(  # type: ignore[misc]
                    name, field, kind, wait=True
                )
            )


async def owner(points: Points, name: str) -> tuple[Provenance | None, int] | None:
    """Return what a collection says of itself, and its points; None if there is none."""
    if not await exists(points, name):
        return None
    return provenance_of(await _info(points, name)), await points.count(name)


async def aliases_of(points: Points, name: str) -> list[str]:
    """Return the aliases of a collection, sorted."""
    found = await collection_aliases(points)
    return sorted(alias for alias, real in found.items() if real == name)


async def switch(points: Points, to: str, aliases: Sequence[str]) -> None:
    """Let all these aliases, new ones too, point to a collection: at one moment."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    there = await collection_aliases(points)
    operations: list[Any] = []
    for alias in aliases:
        if alias in there:
            gone = models.DeleteAlias(alias_name=alias)
            operations.append(models.DeleteAliasOperation(delete_alias=gone))
        new = models.CreateAlias(collection_name=to, alias_name=alias)
        operations.append(models.CreateAliasOperation(create_alias=new))
    if operations:
        await points.ask(lambda client: client.update_collection_aliases(operations))


async def delete(points: Points, name: str) -> None:
    """Delete a collection; one that is not there is no error."""
    if await exists(points, name):
        await points.ask(lambda client: client.delete_collection(name))


async def _info(points: Points, name: str) -> "CollectionInfo":
    return await points.ask(lambda client: client.get_collection(name))


def _width(info: "CollectionInfo", vector: str) -> int:
    found: Any = info.config.params.vectors
    one = found.get(vector) if isinstance(found, Mapping) else None if vector else found
    return int(one.size) if one else 0


def _config_like(info: "CollectionInfo", old: Old, wanted: Provenance) -> dict[str, Any]:
    """Return how to make a collection like one that is there, but for the width of a vector."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    config, params = info.config, info.config.params
    found: Any = params.vectors

    def widened(name: str, one: Any) -> Any:  # noqa: ANN401 - VectorParams
        size = wanted.dimensions if name == old.vector else one.size
        return one.model_copy(update={"size": size})

    if isinstance(found, Mapping):
        vectors: Any = {name: widened(name, one) for name, one in found.items()}
    else:
        vectors = widened("", found)
    hnsw = models.HnswConfigDiff(**_told(config.hnsw_config, models.HnswConfigDiff))
    optimizers = models.OptimizersConfigDiff(
        **_told(config.optimizer_config, models.OptimizersConfigDiff)
    )
    old_metadata = {k: v for k, v in (config.metadata or {}).items() if k != KEY}
    made = {
        "vectors_config": vectors,
        "sparse_vectors_config": params.sparse_vectors,
        "shard_number": params.shard_number,
        "replication_factor": params.replication_factor,
        "write_consistency_factor": params.write_consistency_factor,
        "on_disk_payload": params.on_disk_payload,
        "hnsw_config": hnsw,
        "optimizers_config": optimizers,
        "quantization_config": config.quantization_config,
        "metadata": {**old_metadata, **wanted.as_metadata()},
    }
    return {key: value for key, value in made.items() if value is not None}


def _told(config: Any, taken: Any) -> dict[str, Any]:  # noqa: ANN401 - pydantic models, or None
    """Return what a configuration says, of what may be said when a collection is made."""
    told = {} if config is None else config.model_dump(exclude_none=True)
    return {key: value for key, value in told.items() if key in taken.model_fields}
