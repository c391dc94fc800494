"""Which version a Qdrant server is, and what it would drop in silence of what it is asked for."""

import re

from .connection import Connection
from .failures import Rejected

METADATA = (1, 16)
"""From which on a collection keeps its metadata: whose vectors it holds."""
INSERT_ONLY = (1, 17)
"""From which on a write can leave alone what is there."""


async def version(qdrant: Connection) -> tuple[int, int] | None:
    """Return a server's version; None for a folder, and for what does not say.

    What stands before a server and answers only for its collections says nothing. Raises
    QdrantFailure.
    """
    if qdrant.embedded:
        return None
    try:
        told = await qdrant.ask(lambda client: client.info())
    except Rejected:
        return None
    found = re.match(r"v?(\d+)\.(\d+)", told.version)
    return (int(found[1]), int(found[2])) if found else None


async def no_metadata(qdrant: Connection) -> str | None:
    """Say that a server keeps no metadata of collections; None if it does. Raises QdrantFailure."""
    found = await version(qdrant)
    if found is None or found >= METADATA:
        return None
    return (
        f"Qdrant at {qdrant} is {_dotted(found)}, which does not keep whose vectors a collection"
        f" holds: use {_dotted(METADATA)} or later, or set index.qdrant.adopt: true and see to it"
        " yourself that no two models share a collection"
    )


async def no_insert_only(qdrant: Connection) -> str | None:
    """Say that a server cannot leave alone what is there; None if it can. Raises QdrantFailure."""
    found = await version(qdrant)
    if found is None or found >= INSERT_ONLY:
        return None
    return (
        f"Qdrant at {qdrant} is {_dotted(found)}: before {_dotted(INSERT_ONLY)} a point that a"
        " client writes to the new collection while the same one is carried may be overwritten"
    )


def _dotted(found: tuple[int, int]) -> str:
    return f"{found[0]}.{found[1]}"
