"""Which widths a model can answer with, by the policy that the operator named for it."""

from typing import Literal, TypeAlias

from embedding_proxy.providers.base import InvalidRequest, Space

from .strategies import find

Policy: TypeAlias = Literal["strict", "truncate", "pad"]
"""What may be done for a width that a model does not have.

`strict`: nothing but what the model is made for: a Matryoshka vector is cut and renormalised.
`truncate`: every vector is cut and renormalised, also where the model is not made for it.
`pad`: zeros are appended, which changes neither dot products nor cosines.
"""

BUILT_IN = ("strict", "truncate", "pad")
"""The policies; any other name is a strategy's, see `strategies`."""
WIDEST = 65_536
"""Dimensions that are asked for, at most."""


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
        within = 1 <= dimensions <= WIDEST
        return dimensions == native or (within and find(policy).can_give(native, dimensions))
    if dimensions < native:
        return dimensions >= 1 and (space.matryoshka or policy == "truncate")
    return dimensions == native or (policy == "pad" and dimensions <= WIDEST)


def chosen(space: Space, dimensions: int | None, policy: str, *, refused: bool = False) -> int:
    """Return the width to answer with; the native one if none is asked for.

    `refused` says that a strict model takes no `dimensions` at all, not even its own width. Raises
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
    least = 1 if can_give(space, 1, policy) else space.dimensions
    most = WIDEST if policy == "pad" else space.dimensions
    raise InvalidRequest(
        f"Invalid value for 'dimensions' = {dimensions}: must be at least {least} and at most"
        f" {most} for this model.",
        param="dimensions",
    )
