"""A route: a provider, and the name by which it knows a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .base import Context, Embedded, Input, InputRefused, Space
from .within import ask_within_limits


class Provider(Protocol):
    """What a route needs of a provider: its name, and one attempt."""

    name: str

    @property
    def accepts_tokens(self) -> bool:
        """Whether token arrays may be sent as they are."""
        ...

    async def ask(
        self, model: str, space: Space, inputs: Sequence[Input], context: Context
    ) -> Embedded:
        """Make one attempt at the upstream's `model`. Raises EmbeddingError."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """A provider and the name by which it knows the model; an Embedder of a single attempt."""

    provider: Provider
    model: str
    price: float | None = None
    """USD per million tokens, where it is known."""

    @property
    def name(self) -> str:
        """The name of the provider."""
        return self.provider.name

    def objection(self, space: Space) -> InputRefused | None:
        """Return why the provider cannot serve this space: a field that it does not take."""
        objects = getattr(self.provider, "objection", None)
        found: InputRefused | None = objects(space) if objects else None
        return found

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Ask the provider once, or in several calls where it takes no more in one."""
        return await ask_within_limits(self.provider, self.model, space, inputs, context)
