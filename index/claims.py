"""Whether collections that are there already belong to the spaces that would be written to them."""

import re
from collections.abc import Mapping

from .collection import Making, Provenance, aliases, look, name_of, objection
from .connection import Connection
from .version import no_metadata


async def objections(
    qdrant: Connection,
    spaces: Mapping[str, str],
    making: Making,
    *,
    collection: str | None = None,
    prefix: str = "",
) -> list[str]:
    """Say what stands against writing; an empty list if nothing does. Raises QdrantFailure.

    `spaces` are the labels of the models' spaces by the models' names. With a `collection` all
    vectors go there, and it must belong to one of them; else each model has collections of its own,
    one a width. What is not there will be made.
    """
    lack = None if making.adopt else await no_metadata(qdrant)
    if lack is not None:
        return [lack]
    found = await qdrant.ask(lambda client: client.get_collections())
    names = {one.name for one in found.collections} | (await aliases(qdrant)).keys()
    if collection is not None:
        if collection not in names:
            return []
        return await _objections_to_all(qdrant, collection, spaces, making)
    against: list[str] = []
    for model, space in spaces.items():
        head = name_of(model, 0, prefix=prefix)[:-1]
        for name in sorted(names):
            width = re.fullmatch(re.escape(head) + r"([1-9][0-9]*)", name)
            seen = await look(qdrant, name) if width else None
            if width and seen:
                wanted = Provenance(space, int(width[1]))
                said = objection(name, seen, wanted, adopt=making.adopt)
                against += [said] if said else []
    return against


async def _objections_to_all(
    qdrant: Connection, name: str, spaces: Mapping[str, str], making: Making
) -> list[str]:
    """Say what stands against every one of the spaces, if nothing may be written at all."""
    seen = await look(qdrant, name)
    if seen is None:
        return []
    width, found = seen
    if found is None:
        wanted = Provenance("the models of this configuration", width)
        said = objection(name, seen, wanted, adopt=making.adopt)
        return [said] if said else []
    if found.space.partition("?")[0] in spaces.values():
        return []
    said = (
        f"the collection {name} holds vectors of {found}, and no model of the configuration is of"
        " that space: they do not compare; name another collection"
    )
    return [said]
