"""The field `index` of a request: what is to be indexed of it, and under which ids. Pure.

::

    extra_body={"index": {"collection": "docs", "ids": [1, 2], "payload": [{"lang": "en"}, {}]}}
    extra_body={"index": False}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from embedding_proxy.index.collection import LONGEST_NAME, not_in_names
from embedding_proxy.index.point import MOST_ID, PointId
from embedding_proxy.providers.base import InvalidRequest

_KEYS = ("collection", "ids", "payload")


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """What a request says about its indexing."""

    wanted: bool = True
    collection: str | None = None
    """None = the collection that the configuration gives."""
    ids: Sequence[PointId] | None = None
    """One an input; None = each id follows from its input."""
    payload: Sequence[Mapping[str, object]] | None = None
    """One an input, kept beside the vector."""


NO_INDEX_OPTIONS = IndexOptions()


def parse_index_options(value: object, inputs: int) -> IndexOptions:
    """Read the field of a request with so many inputs; None counts as absent.

    Raises InvalidRequest.

    >>> parse(False, 1).wanted, parse({"ids": [7]}, 1).ids
    (False, (7,))
    """
    if value is None or value is True:
        return NO_INDEX_OPTIONS
    if value is False:
        return IndexOptions(wanted=False)
    if not isinstance(value, Mapping):
        raise _invalid("must be false, or an object with collection, ids or payload", "")
    fields = {name: given for name, given in value.items() if given is not None}
    for name in fields:
        if name not in _KEYS:
            raise _invalid(f"has an unknown key; known are {', '.join(_KEYS)}", f".{name}")
    ids, payload = fields.get("ids"), fields.get("payload")
    return IndexOptions(
        collection=_collection(fields.get("collection")),
        ids=None if ids is None else tuple(map(_id, _each(ids, "ids", inputs), range(inputs))),
        payload=None
        if payload is None
        else tuple(map(_object, _each(payload, "payload", inputs), range(inputs))),
    )


def _collection(name: object) -> str | None:
    if name is None:
        return None
    where = ".collection"
    if not isinstance(name, str) or not name:
        raise _invalid("must be a non-empty string", where)
    if len(name) > LONGEST_NAME:
        raise _invalid(f"must be of at most {LONGEST_NAME} characters", where)
    if name in (".", "..") or not_in_names(name):
        raise _invalid("holds a character that Qdrant allows in no name", where)
    return name


def _each(value: object, name: str, inputs: int) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise _invalid("must be an array, one item for each input", f".{name}")
    if len(value) != inputs:
        raise _invalid(
            f"must have one item for each input: {inputs}, and not {len(value)}", f".{name}"
        )
    return value


def _id(one: object, place: int) -> PointId:
    # bool is an int to Python, not to JSON.
    if type(one) is int and 0 <= one <= MOST_ID:
        return one
    if isinstance(one, UUID):
        return one
    if isinstance(one, str):
        try:
            return UUID(one)
        except ValueError:
            pass
    raise _invalid("must be an unsigned integer of 64 bits or a UUID", f".ids[{place}]")


def _object(one: object, place: int) -> Mapping[str, object]:
    if not isinstance(one, Mapping):
        raise _invalid("must be an object", f".payload[{place}]")
    return one


def _invalid(problem: str, where: str) -> InvalidRequest:
    return InvalidRequest(f"'$.index{where}' is invalid: it {problem}.", param="index")
