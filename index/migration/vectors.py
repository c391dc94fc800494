"""The vectors of points as Qdrant gives them: dense, multi and sparse, by their names.

A stored vector holds no more than its type can: a copy of it that is stored again may differ in the
last digits of that type, and by no more. So copies are compared within such a tolerance. A digest
tells whether one and the same collection gives other numbers than before; it is exact.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from qdrant_client.models import CollectionParams

Floats = NDArray[np.float32]

_TOLERANCES = {"float16": 2e-3, "uint8": 0.0, "turbo16": 2e-3, "turbo8": 2e-2, "turbo4": 0.2}
"""What a number may differ by when it is stored again, as a share of the largest of its vector."""
_FLOAT32 = 1e-5


@dataclass(frozen=True, slots=True)
class VectorType:
    """How a collection stores the vectors of one name."""

    datatype: str = "float32"
    is_cosine: bool = False
    """Whether a server scales them to length 1 when it stores them."""

    @property
    def tolerance(self) -> float:
        """The share of its largest number by which a vector and its copy may differ."""
        return _TOLERANCES.get(self.datatype, _FLOAT32)


def vector_types(params: "CollectionParams") -> dict[str, VectorType]:
    """Return how the vectors of a collection are stored, by their names; "" is the unnamed one."""
    found: Any = params.vectors
    dense = dict(found) if isinstance(found, Mapping) else {"": found} if found else {}
    types = {
        name: VectorType(_datatype(one.datatype), str(one.distance.value) == "Cosine")
        for name, one in dense.items()
    }
    for name, one in (params.sparse_vectors or {}).items():
        types[name] = VectorType(_datatype(one.index.datatype if one.index else None))
    return types


def _datatype(found: Any) -> str:  # noqa: ANN401 - an enum of the client, or None
    return "float32" if found is None else str(found.value)


def digest(vector: Any) -> str | None:  # noqa: ANN401 - in each form that Qdrant has
    """Return a digest of a vector in any form; None of no vector."""
    if vector is None:
        return None
    indices, numbers = _parts(vector)
    content = hashlib.blake2b(f"{numbers.shape}".encode(), digest_size=12)
    if indices is not None:
        content.update(indices.tobytes())
    content.update(numbers.tobytes())
    return content.hexdigest()


def is_copy(one: Any, other: Any, kind: VectorType) -> bool:  # noqa: ANN401 - as above
    """Tell whether two vectors of any form are equal, within what their type can hold."""
    if one is None or other is None:
        return one is other
    (indices, numbers), (others, theirs) = _parts(one), _parts(other)
    if numbers.shape != theirs.shape or (indices is None) != (others is None):
        return False
    if indices is not None and others is not None and not np.array_equal(indices, others):
        return False
    if kind.is_cosine and indices is None:
        numbers, theirs = _scaled(numbers), _scaled(theirs)
    largest = max(np.abs(numbers).max(initial=0.0), np.abs(theirs).max(initial=0.0))
    return np.allclose(numbers, theirs, rtol=0, atol=kind.tolerance * largest, equal_nan=True)


def numbers_in(vector: Any) -> int:  # noqa: ANN401 - as above
    """Return how many numbers the JSON of a vector has."""
    if isinstance(vector, Sequence):
        return sum(len(one) if isinstance(one, Sequence) else 1 for one in vector)
    return 2 * len(getattr(vector, "indices", ()))


def _parts(vector: Any) -> tuple[NDArray[np.int64] | None, Floats]:  # noqa: ANN401 - as above
    """Return the indices in order, None of a vector that is not sparse, and the numbers."""
    if isinstance(vector, bytes):
        return None, np.frombuffer(vector, "<f4")
    if not isinstance(vector, Sequence):
        indices = np.asarray(vector.indices, np.int64)
        order = np.argsort(indices)
        return indices[order], np.asarray(vector.values, np.float32)[order]
    return None, np.asarray(vector, np.float32)


def _scaled(numbers: Floats) -> Floats:
    lengths = np.linalg.norm(numbers, axis=-1, keepdims=True)
    return (numbers / np.where(lengths > 0, lengths, 1)).astype(np.float32)
