"""The dimensions of vectors: which ones a model can answer with, and how a vector is cut or padded.

The operator names a policy for each model: one of our own (`Policy`), or a strategy that an
installed package provides. `choose_dimensions` applies the policy to a request, `derive` cuts or
pads the vectors. The cache keeps native vectors: one record serves every request, whatever its
dimensions.

A package provides a strategy by an entry point of the group `embedding_proxy.widths`. Its name is
what a model's `dimension_policy` may say; it refers to an object as `Strategy` describes, or to a
class that makes one without arguments. It is loaded when a configuration names it.

The vectors of a strategy are an embedding space of their own, named after the strategy and its
version: they compare with one another, but neither with the model's own vectors nor with those of
another version.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from embedding_proxy.providers import plugins
from embedding_proxy.providers.base import Space, Vector
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.providers.vector import Floats, VectorError, stack

Policy: TypeAlias = Literal["strict", "truncate", "pad"]
"""The policy for a width that a model does not have.

`strict`: a Matryoshka vector is cut and renormalised; any other width is refused.
`truncate`: every vector is cut and renormalised, also where the model is not made for it.
`pad`: zeros are appended, which changes neither dot products nor cosines.
"""

BUILT_IN = ("strict", "truncate", "pad")
"""Our own policies; any other name is a strategy's."""
_FLOAT32 = np.dtype("<f4")
MAX_DIMENSIONS = 65_536
"""The largest width that a request may ask for."""


@runtime_checkable
class Strategy(Protocol):
    """A way to bring vectors to another width. It must give the same numbers each time."""

    version: str
    """Changes whenever the strategy gives other numbers than before."""

    def can_give(self, native: int, dimensions: int) -> bool:
        """Tell whether vectors of `native` numbers can be brought to `dimensions`."""
        ...

    def bring(self, vectors: Floats, dimensions: int) -> Floats:
        """Return n vectors, shape (n, native), in shape (n, dimensions). Called in a thread."""
        ...


class UnknownStrategy(LookupError):
    """There is no such strategy, or the package provides something else under its name."""


@lru_cache
def find(name: str) -> Strategy:
    """Return a strategy by its name. Raises UnknownStrategy, with a message for people."""
    absent = "expected strict, truncate or pad, or a strategy that an installed package brings"
    where, strategy = plugins.load(plugins.DIMENSIONS, name, UnknownStrategy, absent)
    if not isinstance(strategy, Strategy) or not str(strategy.version):
        raise UnknownStrategy(f"{where} has no version, can_give and bring")
    return strategy


def can_give(space: Space, dimensions: int, policy: str) -> bool:
    """Tell whether vectors of a space can be brought to a width.

    >>> plain, nested = Space("plain", 8), Space("nested", 8, matryoshka=True)
    >>> [can_give(plain, 4, policy) for policy in ("strict", "truncate", "pad")]
    [False, True, False]
    >>> [can_give(nested, 4, policy) for policy in ("strict", "truncate", "pad")]
    [True, True, True]
    >>> [can_give(nested, 9, policy) for policy in ("strict", "truncate", "pad")]
    [False, False, True]
    """
    native = space.dimensions
    if policy not in BUILT_IN:
        is_valid = 1 <= dimensions <= MAX_DIMENSIONS
        return dimensions == native or (is_valid and find(policy).can_give(native, dimensions))
    if dimensions < native:
        return dimensions >= 1 and (space.matryoshka or policy == "truncate")
    return dimensions == native or (policy == "pad" and dimensions <= MAX_DIMENSIONS)


def choose_dimensions(
    space: Space, dimensions: int | None, policy: str, *, refused: bool = False
) -> int:
    """Return the width of the answer; the native one if none is asked for.

    `refused`: a strict model takes no `dimensions` at all, not even its own width. Raises
    InvalidRequest, in OpenAI's words, for a width that cannot be given.
    """
    if dimensions is None:
        return space.dimensions
    refused = refused and policy == "strict"
    if not refused and can_give(space, dimensions, policy):
        return dimensions
    if refused or (policy == "strict" and not space.matryoshka):
        raise InvalidRequest(
            "This model does not support specifying dimensions.", param="dimensions"
        )
    if policy not in BUILT_IN:
        raise InvalidRequest(
            f"Invalid value for 'dimensions' = {dimensions}: {policy} does not give it.",
            param="dimensions",
        )
    min_dimensions = 1 if can_give(space, 1, policy) else space.dimensions
    max_dimensions = MAX_DIMENSIONS if policy == "pad" else space.dimensions
    raise InvalidRequest(
        f"Invalid value for 'dimensions' = {dimensions}: must be at least {min_dimensions} and at"
        f" most {max_dimensions} for this model.",
        param="dimensions",
    )


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
