"""What answers the batches of the scheduler: the router of a model, as it is seen from here."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol

from providers.base import Credential, Embedder, Input, ProviderError, Space
from providers.limits import Limits


class NextRoute(NamedTuple):
    """The route that a batch would be sent to now."""

    limits: Limits
    """What it takes in one call, as declared or learned."""
    slots: asyncio.Semaphore
    """One for each call that its provider takes at a time."""
    has_alternative: bool
    """Whether another route could be asked instead."""
    call_s: float | None
    """Seconds that a call has taken lately; None = not known."""
    is_blamed: Callable[[Input], bool] | None = None
    """Tells of an input whether calls are known to fail because of it; None = of none they are."""


class Dispatcher(Embedder, Protocol):
    """What answers a batch: the router over the routes of a model."""

    def next_route(self, credential: Credential | None, space: Space | None = None) -> NextRoute:
        """Return the route that a batch would be sent to now."""
        ...

    def may_search(self, credential: Credential | None) -> bool:
        """Tell whether two more calls may find out if one input is to blame; if so, count them."""
        ...

    def blame_provider(self, error: ProviderError) -> None:
        """Count a failure against the providers that it is of: no single input is to blame."""
        ...

    def blame_input(
        self,
        error: ProviderError,
        item: Input,
        credential: Credential | None,
        space: Space | None = None,
    ) -> None:
        """Note that an input, and not the provider, is to blame for a failure."""
        ...
