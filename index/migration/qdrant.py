"""What a migration does with whole collections: looks, makes, switches aliases, deletes."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedding_proxy.index.collection import (
    KEY,
    LONGEST_NAME,
    Provenance,
    collection_aliases,
    name_of,
    provenance_of,
)
from embedding_proxy.index.errors import Exists, Missing, OtherSpace, Rejected

from .points import Points, VectorType, vector_types

if TYPE_CHECKING:
    from qdrant_client.models import CollectionInfo

SNAPSHOT_POLL_S = 2.0
MAX_SNAPSHOT_POLLS = 1800
"""The number of polls for a complete snapshot: one hour."""


@dataclass(frozen=True, slots=True)
class SourceCollection:
    """The old collection of a migration."""

    name: str
    """Its own name, never an alias."""
    vector: str
    """The name of the vector that is migrated; "" is the unnamed one."""
    width: int
    distance: str
    """Cosine, Dot, Euclid or Manhattan."""
    provenance: Provenance | None
    points: int
    kind: VectorType
    """How the vector that is migrated is stored."""
    others: Mapping[str, VectorType]
    """Further vectors that its points may have, and how they are stored."""


async def real_name(points: Points, name: str) -> str:
    """Return the own name of a collection from that name or an alias. Raises Missing."""
    real = (await collection_aliases(points)).get(name)
    if real is not None:
        return real
    if await exists(points, name):
        return name
    raise Missing(f"there is no collection or alias `{name}` in {points.qdrant}")


async def exists(points: Points, name: str) -> bool:
    """Tell whether a collection or an alias has this name."""
    return await points.ask(lambda client: client.collection_exists(name))


async def look(points: Points, name: str, vector: str | None = None) -> SourceCollection:
    """Return the description of a collection; `vector` picks one of several vectors.

    Raises Missing, and Rejected for one that cannot be migrated.
    """
    real = await real_name(points, name)
    info = await _info(points, real)
    params = info.config.params
    if params.sharding_method is not None and str(params.sharding_method.value) == "custom":
        raise Rejected(f"{real} is sharded by keys of its own, which is not supported")
    config: Any = params.vectors
    vectors = dict(config) if isinstance(config, Mapping) else {"": config} if config else {}
    single = [
        name
        for name, vector_params in vectors.items()
        if not vector_params.multivector_config or len(vectors) == 1
    ]
    chosen = vector if vector is not None else single[0] if len(single) == 1 else None
    if chosen is None or chosen not in vectors:
        names = ", ".join(vector_name or "the unnamed one" for vector_name in vectors) or "none"
        raise Rejected(f"pick one of the vectors of {real} with --vector: {names}")
    vector_params = vectors[chosen]
    if vector_params.multivector_config:
        raise Rejected(f"{real} has a multivector, many for each point, which cannot be migrated")
    types = vector_types(params)
    kind = types.pop(chosen)
    if kind.datatype == "uint8":
        raise Rejected(
            f"{real} stores its vectors as uint8, whole numbers from 0 to 255: no model gives such"
            " vectors; make a collection of float32 or float16 first"
        )
    count = await points.count(real)
    distance = str(vector_params.distance.value)
    return SourceCollection(
        real, chosen, int(vector_params.size), distance, provenance_of(info), count, kind, types
    )


def target_name(source: str, model: str, dimensions: int) -> str:
    """Return the name of the new collection.

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


async def make_target(
    points: Points, old: SourceCollection, name: str, provenance: Provenance
) -> None:
    """Make the new collection: the configuration and payload indexes of the old one, another width.

    An existing collection is used if its metadata has this provenance, or if an interrupted run of
    this migration made it. Raises OtherSpace, QdrantFailure.
    """
    info = await _info(points, old.name)
    config = _config_like(info, old, provenance)
    if not await exists(points, name):
        with contextlib.suppress(Exists):  # an attempt before, whose answer was lost
            await points.ask(lambda client: client.create_collection(name, **config))
    target = await _info(points, name)
    actual = provenance_of(target)
    if actual is not None and (actual.space, actual.dimensions) != (
        provenance.space,
        provenance.dimensions,
    ):
        raise OtherSpace(f"{name} holds vectors of {actual}, and not of {provenance}; see --into")
    if _width(target, old.vector) != provenance.dimensions:
        raise OtherSpace(f"{name} has other vectors than {provenance}; see --into")
    await _set_reading(points, name, info, target)
    for field, schema in info.payload_schema.items():
        if field not in target.payload_schema:
            kind: Any = schema.params or schema.data_type
            await points.ask(
                lambda client, field=field, kind=kind: client.create_payload_index(  # type: ignore[misc]
                    name, field, kind, wait=True
                )
            )


async def owner(points: Points, name: str) -> tuple[Provenance | None, int] | None:
    """Return the provenance and the number of points of a collection; None if there is none."""
    if not await exists(points, name):
        return None
    return provenance_of(await _info(points, name)), await points.count(name)


async def aliases_of(points: Points, name: str) -> list[str]:
    """Return the aliases of a collection, sorted."""
    aliases = await collection_aliases(points)
    return sorted(alias for alias, real in aliases.items() if real == name)


async def switch(points: Points, to: str, aliases: Sequence[str]) -> None:
    """Point all these aliases, also new ones, to a collection in one atomic step."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    aliases_now = await collection_aliases(points)
    operations: list[Any] = []
    for alias in aliases:
        if alias in aliases_now:
            deletion = models.DeleteAlias(alias_name=alias)
            operations.append(models.DeleteAliasOperation(delete_alias=deletion))
        new = models.CreateAlias(collection_name=to, alias_name=alias)
        operations.append(models.CreateAliasOperation(create_alias=new))
    if operations:
        await points.ask(lambda client: client.update_collection_aliases(operations))


async def make_snapshot(points: Points, name: str) -> str:
    """Make a snapshot of a collection on the server. It stays when the collection is deleted.

    Returns its name once it is complete. Raises Rejected for a folder, which has none.
    """
    if points.qdrant.embedded:
        raise Rejected("a folder has no snapshots: copy the folder itself instead")

    async def names() -> set[str]:
        return {
            snapshot.name
            for snapshot in await points.ask(lambda client: client.list_snapshots(name))
        }

    before = await names()
    # The call takes longer than a call may where there is much: so its end is asked for.
    await points.ask(lambda client: client.create_snapshot(name, wait=False))
    for _ in range(MAX_SNAPSHOT_POLLS):
        if new_names := await names() - before:
            return max(new_names)
        await points.pause(SNAPSHOT_POLL_S)
    raise Rejected(f"Qdrant has not made a snapshot of {name} in time; nothing is deleted")


async def delete(points: Points, name: str) -> None:
    """Delete a collection if it exists."""
    if await exists(points, name):
        await points.ask(lambda client: client.delete_collection(name))


async def _info(points: Points, name: str) -> "CollectionInfo":
    return await points.ask(lambda client: client.get_collection(name))


def _width(info: "CollectionInfo", vector: str) -> int:
    config: Any = info.config.params.vectors
    vector_params = (
        config.get(vector) if isinstance(config, Mapping) else None if vector else config
    )
    return int(vector_params.size) if vector_params else 0


async def _set_reading(
    points: Points, name: str, info: "CollectionInfo", target: "CollectionInfo"
) -> None:
    """Set the parts of a configuration that a new collection cannot get when it is made."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    fields = ("read_fan_out_factor", "read_fan_out_delay_ms")
    source_params, target_params = info.config.params, target.config.params
    changes = {
        field: value
        for field in fields
        if (value := getattr(source_params, field, None)) != getattr(target_params, field, None)
    }
    if changes:
        diff = models.CollectionParamsDiff(**changes)
        await points.ask(lambda client: client.update_collection(name, collection_params=diff))


def _config_like(
    info: "CollectionInfo", old: SourceCollection, provenance: Provenance
) -> dict[str, Any]:
    """Return the configuration of an existing collection with another width of one vector."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    config, params = info.config, info.config.params
    source_vectors: Any = params.vectors

    def widen(name: str, vector_params: Any) -> Any:  # noqa: ANN401 - VectorParams
        size = provenance.dimensions if name == old.vector else vector_params.size
        return vector_params.model_copy(update={"size": size})

    if isinstance(source_vectors, Mapping):
        vectors: Any = {
            name: widen(name, vector_params) for name, vector_params in source_vectors.items()
        }
    else:
        vectors = widen("", source_vectors)
    old_metadata = {k: v for k, v in (config.metadata or {}).items() if k != KEY}
    options = {
        "vectors_config": vectors,
        "hnsw_config": _fields_of(config.hnsw_config, models.HnswConfigDiff),
        "optimizers_config": _fields_of(config.optimizer_config, models.OptimizersConfigDiff),
        "wal_config": _fields_of(config.wal_config, models.WalConfigDiff),
        "quantization_config": config.quantization_config,
        "sparse_vectors_config": params.sparse_vectors,
        "metadata": {**old_metadata, **provenance.as_metadata()},
    }
    strict = getattr(config, "strict_mode_config", None)
    if strict is not None:
        options["strict_mode_config"] = _fields_of(strict, models.StrictModeConfig)
    # Older versions of the client do not know some of these.
    options |= {name: getattr(params, name, None) for name in _PARAMS}
    return {key: value for key, value in options.items() if value is not None}


_PARAMS = (
    "shard_number",
    "replication_factor",
    "write_consistency_factor",
    "on_disk_payload",
    "payload",
    "id_tracker",
)


def _fields_of(config: Any, model: Any) -> Any:  # noqa: ANN401 - pydantic models, or None
    """Return a configuration as another model with the same fields; None without one."""
    if config is None:
        return None
    values = config.model_dump(exclude_none=True)
    return model(**{key: value for key, value in values.items() if key in model.model_fields})
