"""A route: a provider, and the name by which it knows a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from providers import tokens
from providers.base import (
    Bill,
    Charge,
    Context,
    Credential,
    Embedded,
    Input,
    InputRefused,
    ProviderError,
    Space,
    nanodollars,
)
from providers.batching.within import ask_within_limits, limits_of
from providers.limits import Limits

from .lane import Lane, scoped


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
    retries: int | None = None
    """How often it is asked again within a request, at most; None = as the router thinks best."""

    @property
    def name(self) -> str:
        """The name of the provider."""
        return self.provider.name

    @property
    def by_client(self) -> bool:
        """Whether the provider is asked with each client's own key."""
        return bool(getattr(self.provider, "by_client", False))

    @property
    def limits(self) -> Limits:
        """What the provider takes of this model in one call, as declared or learned."""
        learned = getattr(self.provider, "limits_of", None)
        return learned(self.model) if learned else limits_of(self.provider)

    def takes(self, credential: Credential | None) -> bool:
        """Tell whether the provider may be asked by who has this key, or has none of its own."""
        if credential is not None and not credential.alone:
            return True
        return self.by_client is (credential is not None)

    def lane(self, credential: Credential | None, space: Space | None = None) -> Lane:
        """Return the name under which the provider's limits hold: a model's, or a key's for it.

        Its scope is the model, and what clients of this space add to their requests.
        """
        scope = self.model if space is None else scoped(self.model, space)
        if credential is None or not self.by_client:
            return Lane(scope)
        return Lane(f"{scope} ({credential.name})", scope)

    def objection(self, space: Space) -> InputRefused | None:
        """Return why the provider cannot serve this space: a field that it does not take."""
        objects = getattr(self.provider, "objection", None)
        found: InputRefused | None = objects(space) if objects else None
        return found

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Ask the provider once, or in several calls where it takes no more in one."""
        return await ask_within_limits(self._ask, self.limits, space, inputs, context)

    def learn_single(self) -> None:
        """Have each input of this model go alone from now on, if the provider can be told so."""
        learn = getattr(self.provider, "learn_single", None)
        if learn is not None:
            learn(self.model)

    async def embed_alone(
        self, space: Space, inputs: Sequence[Input], context: Context
    ) -> Embedded:
        """Ask the provider for each input in a call of its own."""
        limits = replace(self.limits, inputs=1)
        return await ask_within_limits(self._ask, limits, space, inputs, context)

    async def _ask(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Make one attempt, and tell what it was charged, whatever comes of its answer.

        The charge is told once, and before a part of the answer is: who keeps the part knows then
        who was paid for it, and nothing is kept unpaid if the call is cancelled meanwhile.
        """
        is_billed = False

        async def on_part(places: Sequence[int], part: Embedded) -> None:
            nonlocal is_billed
            if part.charge is not None and not is_billed:
                is_billed = True
                self._bill(part.charge, tokens.apportion(part.charge.tokens or 0, inputs), context)
            if context.on_part is not None:
                await context.on_part(places, replace(part, charge=None))

        try:
            embedded = await self.provider.ask(
                self.model, space, inputs, replace(context, on_part=on_part)
            )
        except ProviderError as error:
            if error.charge is not None and not is_billed:
                # Nobody counted the tokens of an answer that is no good.
                sizes = tokens.apportion(error.charge.tokens or 0, inputs)
                self._bill(error.charge, sizes, context)
            raise
        self._bill(embedded.charge, embedded.tokens, context)
        return embedded

    def _bill(self, charge: Charge | None, sizes: Sequence[int], context: Context) -> None:
        """Tell what a call was charged: what the upstream says, else what we count and know."""
        if context.on_charge is None:
            return
        total, cost = charge or Charge()
        total = sum(sizes) if total is None else total
        told = cost is not None
        if cost is None:
            price = context.account.price if self.price is None else self.price
            cost = nanodollars(total, price)
        context.on_charge(
            Bill(
                self.name,
                range(len(sizes)),
                tokens.share(total, sizes),
                tokens.share(cost, sizes),
                told,
            )
        )
