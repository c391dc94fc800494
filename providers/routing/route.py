"""A route: a provider, and the name by which it knows a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import Context, Embedded, Input, Space
from embedding_proxy.providers.charge import Account, Bill, Charge, nanodollars
from embedding_proxy.providers.client_credential import Credential
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.providers.profile import Limits, limits_of


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


class LimitKey(str):  # noqa: SLOT000 - it has one field of its own
    """The name under which rate limits hold: a model's, or that of a client's key for the model.

    `scope` is what a circuit breaker is of: the model, with the fields that clients of one
    embedding space add to their requests. Failures for one scope say nothing of another, so no
    client's choice of a model or a field can have the provider shut for others. Keys share a scope.
    """

    scope: str

    def __new__(cls, name: str, scope: str = "") -> Self:
        """Return a key; without a scope, that is its name."""
        key = super().__new__(cls, name)
        key.scope = scope or name
        return key


def request_scope(model: str, space: Space) -> str:
    """Return the scope of calls of a model: with what clients of this space ask for besides.

    >>> request_scope("m", Space("m", 8)), request_scope("m", Space("m", 8, send_dimensions=True))
    ('m', 'm@8')
    """
    width = f"@{space.dimensions}" if space.send_dimensions else ""
    fields = f"?{space.label.partition('?')[2]}" if space.parameters else ""
    return f"{model}{width}{fields}"


def scope_of(key: str) -> str:
    """Return what the breaker of a key is of; a plain name is that of a model."""
    return key.scope if isinstance(key, LimitKey) else key


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A provider and the name by which it knows the model. Two are never equal."""

    provider: Provider
    model: str
    price: float | None = None
    """USD per million tokens, where it is known."""
    retries: int | None = None
    """How often it is asked again within a request, at most; None = as the policy says."""

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
        if credential is not None and not credential.is_exclusive:
            return True
        return self.by_client is (credential is not None)

    def limit_key(self, credential: Credential | None, space: Space | None = None) -> LimitKey:
        """Return the name under which the provider's limits hold: a model's, or a key's for it.

        Its scope is the model, and what clients of this space add to their requests.
        """
        scope = self.model if space is None else request_scope(self.model, space)
        if credential is None or not self.by_client:
            return LimitKey(scope)
        return LimitKey(f"{scope} ({credential.name})", scope)

    def objection(self, space: Space) -> InvalidRequest | None:
        """Return why the provider cannot serve this space: a field that it does not take."""
        objects = getattr(self.provider, "objection", None)
        problem: InvalidRequest | None = objects(space) if objects else None
        return problem

    def learn_single(self) -> None:
        """Have each input of this model go alone from now on, if the provider can be told so."""
        learn = getattr(self.provider, "learn_single", None)
        if learn is not None:
            learn(self.model)

    def bill_failed(self, charge: Charge, inputs: Sequence[Input], account: Account) -> Bill:
        """Return the bill of an answer that is no good: nobody has counted its tokens."""
        return self.bill(charge, tokens.apportion(charge.tokens or 0, inputs), account)

    def bill(self, charge: Charge | None, sizes: Sequence[int], account: Account) -> Bill:
        """Return what a call was charged: what the upstream says, else what we count and know.

        `sizes` are the tokens of its inputs.
        """
        total, cost = charge or Charge()
        total = sum(sizes) if total is None else total
        is_told = cost is not None
        if cost is None:
            cost = nanodollars(total, account.price if self.price is None else self.price)
        return Bill(
            self.name,
            range(len(sizes)),
            tokens.share(total, sizes),
            tokens.share(cost, sizes),
            is_told,
        )
