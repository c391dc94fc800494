"""Which widths a model can answer with, by the policy that the operator named for it."""

from typing import Literal, TypeAlias

from providers.base import Space

Policy: TypeAlias = Literal["strict", "truncate", "pad"]
"""What may be done for a width that a model does not have.

`strict`: nothing but what the model is made for: a Matryoshka vector is cut and renormalised.
`truncate`: every vector is cut and renormalised, also where the model is not made for it.
`pad`: zeros are appended, which changes neither dot products nor cosines.
"""

WIDEST = 65_536
"""Dimensions that are asked for, at most."""


def can_give(space: Space, dimensions: int, policy: Policy) -> bool:
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
    if dimensions < native:
        return dimensions >= 1 and (space.matryoshka or policy == "truncate")
    return dimensions == native or (policy == "pad" and dimensions <= WIDEST)
