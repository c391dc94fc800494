"""A request on its way over the routes: what its attempts share, whichever routes they go to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from providers.base import (
    Bill,
    Context,
    Embedded,
    Input,
    InputRefused,
    PassingFailure,
    ProviderError,
    Space,
)
from providers.batching.calls import Parts

from .route import Route

ATTEMPTS = 3
"""The attempts for one request, all routes together, unless the routes say more."""


def attempts(routes: Sequence[Route]) -> int:
    """Return the most attempts for a request that may go to these routes.

    Who says of a provider how often it is asked again has that many, and one for each other route.
    """
    said = [0 if route.retries is None else route.retries for route in routes]
    told = any(route.retries is not None for route in routes)
    return max(ATTEMPTS, sum(said) + len(said)) if told else ATTEMPTS


@dataclass(slots=True)
class Journey:
    """A request, and what has come of it so far."""

    space: Space
    inputs: Sequence[Input]
    context: Context
    parts: Parts = field(init=False)
    """What the routes have answered, several of them maybe: it is not asked for again."""
    on_bill: Callable[[Route, Bill], None]
    """Is told what each call was charged, and by whom."""
    most: int = ATTEMPTS
    """Attempts that may be made."""
    left: int = field(init=False)
    """Attempts that may still be made."""
    asked: list[Route] = field(default_factory=list)
    """Routes that had their turn, in order, whether or not a call was made."""
    hedged: bool = False
    """Whether a second route is or was asked beside the first."""
    failure: ProviderError | None = None
    """What to tell the client when no route answers."""

    def __post_init__(self) -> None:
        """Begin with all of it missing."""
        self.parts = Parts(len(self.inputs))
        self.left = self.most

    @property
    def begun(self) -> bool:
        """Whether an attempt was made, or is being made."""
        return self.left < self.most

    async def ask(self, route: Route, begin_by: float | None) -> None:
        """Ask a route for all that is missing, and keep what comes, also when it fails then.

        Raises EmbeddingError; the index of a refused input is its place in the whole request.
        """
        missing = list(self.parts.missing)

        async def keep(places: Sequence[int], part: Embedded) -> None:
            new, part = self.parts.take([missing[place] for place in places], part)
            if new and self.context.on_part is not None:
                await self.context.on_part(new, part)

        def charged(bill: Bill) -> None:
            self.on_bill(route, bill)
            if self.context.on_charge is not None:
                self.context.on_charge(bill.at(missing))

        context = replace(self.context, begin_by=begin_by, on_part=keep, on_charge=charged)
        try:
            inputs = [self.inputs[place] for place in missing]
            embedded = await route.embed(self.space, inputs, context)
        except InputRefused as error:
            if error.index is None:
                raise
            raise error.at(missing[error.index]) from error
        self.parts.take(missing, embedded)

    def failed(self, error: ProviderError) -> None:
        """Keep the failure that says most: the last one that may pass, else the last one."""
        if isinstance(error, PassingFailure) or not isinstance(self.failure, PassingFailure):
            self.failure = error
