"""The forms of a vector: float32 bytes, base64, JSON numbers, numpy arrays; and their checks.

A vector from an upstream stays the bytes that it is: floating point is touched only to check it.
Where a vector gets other dimensions: `dimensions`.
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


def cosine(first: Vector, second: Vector) -> float:
    """Return the cosine between two vectors of equal width, -1…1, computed in float64."""
    a, b = (np.frombuffer(v, dtype=_FLOAT32).astype(np.float64) for v in (first, second))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def stack(vectors: Sequence[Vector]) -> Floats:
    """Return n vectors of equal width as one array of float32, shape (n, dimensions)."""
    return np.frombuffer(b"".join(vectors), dtype=_FLOAT32).reshape(len(vectors), -1)


def rows(numbers: Floats) -> list[Vector]:
    """Return the rows of an array as vectors. Raises VectorError for what has no rows."""
    if numbers.ndim != 2:
        raise VectorError(f"{numbers.ndim} axes where there should be 2")
    return [row.tobytes() for row in numbers.astype(_FLOAT32)]


to_base64: Callable[[Vector], bytes] = pybase64.b64encode
"""Encodes for `encoding_format: base64`; no number is touched."""


def to_json(vector: Vector) -> bytes:
    """Render as a JSON array, each number in the shortest form that reads back to its float32."""
    return orjson.dumps(np.frombuffer(vector, dtype=_FLOAT32), option=orjson.OPT_SERIALIZE_NUMPY)
