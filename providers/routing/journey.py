"""A request on its way over the routes: what its attempts share, whichever routes they go to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from providers.attempts import Attempt
from providers.base import (
    Bill,
    Context,
    Embedded,
    EmbeddingError,
    Full,
    Input,
    InputRefused,
    InvalidAnswer,
    PassingFailure,
    ProviderError,
    Space,
)
from providers.batching.calls import Parts, assembled, rows_of
from providers.batching.twins import exact_tokenizer, find_duplicate_vectors

from .lane import Lane
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
    is_alone: bool = False
    """Whether inputs go in calls of their own: an answer to several of them was bad in parts."""
    is_fused: bool = False
    """Whether one vector came for several inputs that differ."""
    unexplained: list[tuple[str, Lane]] = field(default_factory=list)
    """Providers and lanes, once for each call of several inputs that failed in a way of which one
    input may be the cause: it is not counted against them until that is known."""

    def __post_init__(self) -> None:
        """Begin with all of it missing."""
        self.parts = Parts(len(self.inputs))
        self.left = self.most

    @property
    def begun(self) -> bool:
        """Whether an attempt was made, or is being made."""
        return self.left < self.most

    def lane(self, route: Route) -> Lane:
        """Return the lane of a route that this request is in."""
        return route.lane(self.context.credential, self.space)

    @property
    def is_needed(self) -> bool:
        """Whether one more attempt would be of use to anybody."""
        return self.context.is_needed is None or self.context.is_needed()

    async def ask(self, route: Route, begin_by: float | None, attempt: Attempt) -> None:
        """Ask a route for all that is missing, and keep what comes, also when it fails then.

        What comes is told to `context.on_part` as well: nobody may wait for it any more.

        Raises EmbeddingError; the index of a refused input is its place in the whole request. Full
        where another attempt has answered all of it before this one begins.
        """
        missing = list(self.parts.missing)
        if not missing:
            raise Full(route.name, "all of it was answered meanwhile")

        async def keep(places: Sequence[int], part: Embedded) -> None:
            new, part = self.parts.take([missing[place] for place in places], part)
            if new and self.context.on_part is not None:
                await self.context.on_part(new, part)

        def charged(bill: Bill) -> None:
            self.on_bill(route, bill)
            if self.context.on_charge is not None:
                self.context.on_charge(bill.at(missing))

        context = replace(
            self.context, begin_by=begin_by, on_part=keep, on_charge=charged, attempt=attempt
        )
        try:
            inputs = [self.inputs[place] for place in missing]
            if self.is_alone and len(missing) > 1:
                embedded = await self._ask_each(route, inputs, context)
            else:
                embedded = await route.embed(self.space, inputs, context)
        except EmbeddingError as error:
            index = error.index
            if index is None and self.is_alone and len(missing) == 1:
                # Its vector was bad among good ones, and is bad alone.
                index = 0
            if index is None or not isinstance(error, InputRefused | InvalidAnswer):
                raise
            raise error.at(missing[index]) from error
        await keep(range(len(missing)), embedded)

    async def _ask_each(self, route: Route, inputs: Sequence[Input], context: Context) -> Embedded:
        """Ask for each input in a call of its own, and keep no vector that several of them get.

        One vector for inputs that differ may be a call's fault; alone it is the upstream's. Raises
        EmbeddingError.
        """
        parts: dict[int, Embedded] = {}

        async def collect(places: Sequence[int], part: Embedded) -> None:
            parts.update({place: rows_of(part, [row]) for row, place in enumerate(places)})

        failure: EmbeddingError | None = None
        try:
            answer = await route.embed_alone(self.space, inputs, replace(context, on_part=collect))
        except EmbeddingError as error:
            failure = error
        else:
            parts = {place: rows_of(answer, [place]) for place in range(len(inputs))}
        vectors = {place: part.vectors[0] for place, part in parts.items()}
        groups = find_duplicate_vectors(inputs, vectors, exact_tokenizer(self.space))
        shared = sorted({place for group in groups for place in group})
        good = [place for place in parts if place not in shared]
        if good and context.on_part is not None:
            await context.on_part(good, assembled([([place], parts[place]) for place in good]))
        if shared:
            self.is_alone = False
            problem = "one vector for inputs that differ, also when each is asked for alone"
            failure = InvalidAnswer(route.name, problem)
            failure.index = shared[0] if len(shared) < len(inputs) else None
        if failure is not None:
            raise failure
        if self.is_fused:
            route.learn_single()
        return assembled([([place], parts[place]) for place in good])

    def failed(self, error: ProviderError) -> None:
        """Keep the failure that says most: the last one that may pass, else the last one."""
        self.is_alone = self.is_alone or bool(error.indices)
        self.is_fused = self.is_fused or (error.index is None and bool(error.indices))
        if isinstance(error, PassingFailure) or not isinstance(self.failure, PassingFailure):
            self.failure = error
