"""The name under which what is known of a provider holds for one model, or for one key."""

from typing import Self

from providers.base import Space


class Lane(str):  # noqa: SLOT000 - it has one field of its own
    """The name under which rate limits hold: a model's, or that of a client's key for the model.

    `scope` is what a circuit breaker is of: the model, with the fields that clients of one
    embedding space add to their requests. Failures for one scope say nothing of another, so no
    client's choice of a model or a field can have the provider shut for others. Keys share a scope.
    """

    scope: str

    def __new__(cls, name: str, scope: str = "") -> Self:
        """Return a lane; without a scope, that is its name."""
        lane = super().__new__(cls, name)
        lane.scope = scope or name
        return lane


def scoped(model: str, space: Space) -> str:
    """Return the scope of calls of a model: with what clients of this space ask for besides.

    >>> scoped("m", Space("m", 8)), scoped("m", Space("m", 8, dimensions_sent=True))
    ('m', 'm@8')
    """
    width = f"@{space.dimensions}" if space.dimensions_sent else ""
    fields = f"?{space.label.partition('?')[2]}" if space.parameters else ""
    return f"{model}{width}{fields}"


def scope_of(lane: str) -> str:
    """Return what the breaker of a lane is of; a plain name is that of a model."""
    return lane.scope if isinstance(lane, Lane) else lane
