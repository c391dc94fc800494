"""The field `index` of a request: which points are written to Qdrant, and with what beside.

::

    extra_body={"index": {"collection": "docs", "ids": [1, 2], "payload": [{"lang": "en"}, {}]}}
    extra_body={"index": {"ids": [1], "update": True, "group_id": "acme",
                          "sparse_vectors": [{"bm25": {"indices": [7], "values": [0.5]}}]}}
    extra_body={"index": False}
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from embedding_proxy.index.collection import LONGEST_NAME, not_in_names
from embedding_proxy.index.point import MAX_ID, PointId
from embedding_proxy.providers.errors import InvalidRequest

_KEYS = ("collection", "ids", "payload", "sparse_vectors", "group_id", "update")
_MAX_INDEX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """What a request says about its indexing."""

    is_enabled: bool = True
    collection: str | None = None
    """None = the collection that the configuration gives."""
    ids: Sequence[PointId] | None = None
    """One an input; None = each id follows from its input."""
    payload: Sequence[Mapping[str, object]] | None = None
    """One an input, kept beside the vector."""
    sparse_vectors: Sequence[Mapping[str, object]] | None = None
    """One an input: `indices` and `values` by the names of the vectors."""
    group_id: str | int | None = None
    """The tenant that the points belong to."""
    is_update: bool = False
    """Whether points that are there keep what the request does not name."""

    @property
    def names_content(self) -> bool:
        """Whether the content of a point, or its id, does not follow from its input alone."""
        return (
            self.ids is not None
            or self.payload is not None
            or self.sparse_vectors is not None
            or self.group_id is not None
        )


NO_INDEX_OPTIONS = IndexOptions()


def parse_index_options(value: object, inputs: int) -> IndexOptions:
    """Read the field of a request with so many inputs; None counts as absent.

    Raises InvalidRequest.

    >>> options = parse_index_options({"ids": [7]}, 1)
    >>> parse_index_options(False, 1).is_enabled, options.ids
    (False, (7,))
    """
    if value is None or value is True:
        return NO_INDEX_OPTIONS
    if value is False:
        return IndexOptions(is_enabled=False)
    if not isinstance(value, Mapping):
        raise _index_error("must be false, or an object with collection, ids, payload …", "")
    fields = {name: given for name, given in value.items() if given is not None}
    for name in fields:
        if name not in _KEYS:
            raise _index_error(f"has an unknown key; known are {', '.join(_KEYS)}", f".{name}")
    ids, payload, sparse = (fields.get(name) for name in ("ids", "payload", "sparse_vectors"))
    return IndexOptions(
        collection=_collection(fields.get("collection")),
        ids=None if ids is None else tuple(map(_id, _each(ids, "ids", inputs), range(inputs))),
        payload=None
        if payload is None
        else tuple(map(_object, _each(payload, "payload", inputs), range(inputs))),
        sparse_vectors=None
        if sparse is None
        else tuple(map(_sparse, _each(sparse, "sparse_vectors", inputs), range(inputs))),
        group_id=_group(fields.get("group_id")),
        is_update=_flag(fields.get("update", False)),
    )


def _collection(name: object) -> str | None:
    if name is None:
        return None
    where = ".collection"
    if not isinstance(name, str) or not name:
        raise _index_error("must be a non-empty string", where)
    if len(name) > LONGEST_NAME:
        raise _index_error(f"must be of at most {LONGEST_NAME} characters", where)
    if name in (".", "..") or not_in_names(name):
        raise _index_error("holds a character that Qdrant allows in no name", where)
    return name


def _each(value: object, name: str, inputs: int) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise _index_error("must be an array, one item for each input", f".{name}")
    if len(value) != inputs:
        raise _index_error(
            f"must have one item for each input: {inputs}, and not {len(value)}", f".{name}"
        )
    return value


def _id(value: object, index: int) -> PointId:
    # bool is an int to Python, not to JSON.
    if type(value) is int and 0 <= value <= MAX_ID:
        return value
    if isinstance(value, UUID):
        return value
    if isinstance(value, str):
        try:
            return UUID(value)
        except ValueError:
            pass
    raise _index_error("must be an unsigned integer of 64 bits or a UUID", f".ids[{index}]")


def _object(value: object, index: int) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise _index_error("must be an object", f".payload[{index}]")
    return value


def _sparse(one: object, place: int) -> Mapping[str, object]:
    where = f".sparse_vectors[{place}]"
    if not isinstance(one, Mapping) or not all(isinstance(name, str) and name for name in one):
        raise _index_error("must be an object with sparse vectors by their names", where)
    for name, sparse in one.items():
        found = sparse if isinstance(sparse, Mapping) else {}
        indices, values = found.get("indices"), found.get("values")
        if not (
            set(found) == {"indices", "values"}
            and isinstance(indices, list | tuple)
            and isinstance(values, list | tuple)
            and len(indices) == len(values) == len({*map(repr, indices)})
            and all(type(index) is int and 0 <= index <= _MAX_INDEX for index in indices)
            and all(type(value) in (int, float) and math.isfinite(value) for value in values)
        ):
            raise _index_error(
                "must have indices, distinct unsigned integers of 32 bits, and as many values",
                f"{where}.{name}",
            )
    return one


def _group(value: object) -> str | int | None:
    if value is None or (isinstance(value, str) and value) or type(value) is int:
        return value
    raise _index_error("must be a non-empty string or an integer", ".group_id")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise _index_error("must be true or false", ".update")


def _index_error(problem: str, where: str) -> InvalidRequest:
    return InvalidRequest(f"'$.index{where}' is invalid: it {problem}.", param="index")
