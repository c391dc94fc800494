"""Whether the Qdrant of a configuration can be used, found out before the first request."""

import asyncio
from dataclasses import asdict, dataclass

from embedding_proxy.index.failures import InUse, QdrantFailure
from embedding_proxy.proxy.embedding import indexing
from embedding_proxy.proxy.settings.schema import Settings

PATIENCE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class CollectionStatus:
    """What came of asking it."""

    place: str
    """Its address, or its folder."""
    ok: bool | None = None
    """Whether vectors may be written there; None if it was not asked."""
    collections: int | None = None
    error: str | None = None

    @property
    def line(self) -> str:
        """What is to be told, in one line."""
        if self.ok:
            return f"Qdrant: {self.place}: ok, {self.collections} collections"
        return f"Qdrant: {self.place}: {'FAILED' if self.ok is False else self.error}"

    @property
    def problem(self) -> str | None:
        """What is wrong, if something is."""
        return f"index.qdrant: {self.error}" if self.ok is False else None

    def as_json(self) -> dict[str, object]:
        """Return everything there is to say."""
        return asdict(self)


async def look(  # noqa: PLR0911 - one for each thing that may come of it
    settings: Settings, *, offline: bool
) -> CollectionStatus | None:
    """Open the Qdrant of a configuration, and see whose collections are there; None if it has none.

    Nothing is made there.
    """
    qdrant = settings.index.qdrant
    if qdrant is None:
        return None
    place = qdrant.url or str(qdrant.path)
    if offline:
        return CollectionStatus(place, error="not asked")
    if qdrant.path is not None and not qdrant.path.exists():
        return CollectionStatus(place, error="not there yet, the proxy makes it at its first start")
    try:
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            indexing.connection(qdrant) as opened,
        ):
            found = await opened.ask(lambda client: client.get_collections())
            against = await indexing.objections(settings, opened)
    except InUse as error:
        # Most likely by a proxy that runs; it has looked at its start.
        return CollectionStatus(place, error=str(error))
    except QdrantFailure as error:
        return CollectionStatus(place, ok=False, error=str(error))
    except TimeoutError:
        return CollectionStatus(place, ok=False, error=f"no answer within {PATIENCE_SECONDS:.0f} s")
    if against:
        return CollectionStatus(place, ok=False, error="; ".join(against))
    return CollectionStatus(place, ok=True, collections=len(found.collections))
