"""The forms of a vector: float32 bytes, base64, JSON numbers, numpy arrays; cut and checked.

The only file that knows how numbers are laid out. Native vectors pass through it as bytes; floating
point is touched only to check what came in and to derive a narrower vector.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import orjson
import pybase64

from .base import Vector

Floats = npt.NDArray[np.float32]

_FLOAT32 = np.dtype("<f4")
_FLOAT16 = np.dtype("<f2")


class VectorError(ValueError):
    """The numbers are not a usable vector; the message says what is wrong with them."""


def from_wire(embedding: object) -> Vector:
    """Read an `embedding` as an upstream sent it, base64 or numbers. Raises VectorError."""
    if isinstance(embedding, str):
        return from_base64(embedding)
    if isinstance(embedding, list):
        return from_numbers(embedding)
    raise VectorError("is missing")


def from_base64(text: str) -> Vector:
    """Decode base64 of little-endian float32, OpenAI's `encoding_format: base64`.

    Raises VectorError if the text is not base64 or not a whole number of floats.
    """
    try:
        vector: bytes = pybase64.b64decode(text, validate=True)
    except ValueError as error:
        raise VectorError("not valid base64") from error
    if len(vector) % 4:
        raise VectorError(f"{len(vector)} bytes are no whole number of float32 values")
    return vector


def from_numbers(numbers: Sequence[object]) -> Vector:
    """Convert a JSON array of numbers to float32, rounding to nearest.

    Raises VectorError for anything but numbers. Overflow becomes an infinity, for `check` to find.
    """
    if not all(type(number) is float or type(number) is int for number in numbers):
        raise VectorError("holds something that is not a number")
    with np.errstate(over="ignore"):
        try:
            return np.array(numbers, dtype=np.float64).astype(_FLOAT32).tobytes()
        except OverflowError as error:
            raise VectorError("holds a number that is not finite") from error


LENGTH_TOLERANCE = 0.01
"""How far from 1 a length may be that is meant to be 1: some upstreams compute in 16 bits."""


def check(vector: Vector, dimensions: int, *, unit_norm: bool = False) -> None:
    """Raise VectorError unless the vector has that width, is finite, and is not all zeros.

    With `unit_norm`, its length must be 1 too, to within LENGTH_TOLERANCE.
    """
    if len(vector) != 4 * dimensions:
        raise VectorError(f"{len(vector) // 4} dimensions instead of {dimensions}")
    numbers = np.frombuffer(vector, dtype=_FLOAT32)
    # One pass: the sum of squares is zero, finite or not exactly when the vector is.
    # float64 keeps the squares of the largest and smallest float32 in range.
    square = float(np.dot(wide := numbers.astype(np.float64), wide))
    if not np.isfinite(square):
        raise VectorError("holds a number that is not finite")
    if square == 0.0:
        raise VectorError("all numbers are zero")
    if unit_norm and abs(square**0.5 - 1.0) > LENGTH_TOLERANCE:
        raise VectorError(f"length {square**0.5:.3g} where the model's vectors have length 1")


def is_finite(vector: Vector) -> bool:
    """Tell whether no number is NaN or an infinity."""
    return bool(np.isfinite(np.frombuffer(vector, dtype=_FLOAT32)).all())


def to_float16(vector: Vector) -> bytes | None:
    """Round each number to 16 bits; None where that leaves zeros only, or overflows."""
    with np.errstate(over="ignore"):
        half = np.frombuffer(vector, dtype=_FLOAT32).astype(_FLOAT16)
    return half.tobytes() if half.any() and np.isfinite(half).all() else None


def from_float16(half: bytes) -> Vector:
    """Return the vector of numbers of 16 bits."""
    return np.frombuffer(half, dtype=_FLOAT16).astype(_FLOAT32).tobytes()


def length(vector: Vector) -> float:
    """Return the Euclidean length of a vector, computed in float64."""
    return float(np.linalg.norm(np.frombuffer(vector, dtype=_FLOAT32).astype(np.float64)))


def cosine(one: Vector, other: Vector) -> float:
    """Return the cosine between two vectors of equal width, -1…1, computed in float64."""
    a, b = (np.frombuffer(v, dtype=_FLOAT32).astype(np.float64) for v in (one, other))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def stack(vectors: Sequence[Vector]) -> Floats:
    """Return n vectors of equal width as one array of float32, shape (n, dimensions)."""
    return np.frombuffer(b"".join(vectors), dtype=_FLOAT32).reshape(len(vectors), -1)


def rows(numbers: Floats) -> list[Vector]:
    """Return the rows of an array as vectors. Raises VectorError for what has no rows."""
    if numbers.ndim != 2:
        raise VectorError(f"{numbers.ndim} axes where there should be 2")
    return [row.tobytes() for row in numbers.astype(_FLOAT32)]


def cut(vectors: Sequence[Vector], dimensions: int) -> Floats:
    """Cut Matryoshka vectors to their first `dimensions` numbers and renormalise each to length 1.

    Works in float64 and rounds once, as OpenAI's own shortening does to within 1e-6. Returns shape
    (n, dimensions). Raises VectorError if a vector has nothing left; `check_heads` finds out first.
    """
    heads = stack(vectors)[:, :dimensions].astype(np.float64)
    lengths = np.linalg.norm(heads, axis=1, keepdims=True)
    if not lengths.all():
        raise VectorError(f"all of the first {dimensions} numbers are zero")
    narrow: Floats = (heads / lengths).astype(_FLOAT32)
    return narrow


def check_heads(vectors: Sequence[Vector], dimensions: int) -> None:
    """Raise VectorError unless every vector can be cut to `dimensions`: no head is all zeros."""
    for vector in vectors:
        if not np.frombuffer(vector, dtype=_FLOAT32, count=dimensions).any():
            raise VectorError(f"all of the first {dimensions} numbers are zero")


def derive(vectors: Sequence[Vector], dimensions: int) -> Sequence[Vector]:
    """Return the vectors at the asked-for width: as they are if native, else cut or padded.

    Padding appends zeros, and changes no other number.
    """
    if not vectors or len(vectors[0]) == 4 * dimensions:
        return vectors
    if len(vectors[0]) < 4 * dimensions:
        return [vector.ljust(4 * dimensions, b"\0") for vector in vectors]
    return [row.tobytes() for row in cut(vectors, dimensions)]


to_base64: Callable[[Vector], bytes] = pybase64.b64encode
"""Encodes for `encoding_format: base64`; no number is touched."""


def to_json(vector: Vector) -> bytes:
    """Render as a JSON array, each number in the shortest form that reads back to its float32."""
    return orjson.dumps(np.frombuffer(vector, dtype=_FLOAT32), option=orjson.OPT_SERIALIZE_NUMPY)
