"""A task that several requests wait for, and whose failure may be its leader's alone.

For one thread: the event loop's.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from embedding_proxy.providers.base import Context
from embedding_proxy.providers.errors import (
    ClientKeyRefused,
    DeadlineExceeded,
    EmbeddingError,
    InvalidRequest,
    NoProviderAvailable,
    PermissionDenied,
    ProviderError,
    ScopedQuotaExceeded,
    UpstreamTimeout,
)

from .errors import BudgetExceeded

K = TypeVar("K")
T = TypeVar("T")

# Timers may go off early by as much, in seconds: uvloop's count whole milliseconds.
_TICK = 0.01


class SharedTask(Generic[K, T]):
    """A task that buys some keys, and that several requests wait for.

    The last to leave cancels it, unless a call was begun. `context` is the leader's: by its
    deadline, or its client's key, the task may fail for the leader alone.
    """

    def __init__(
        self,
        keys: Sequence[K],
        work: Callable[["SharedTask[K, T]"], Coroutine[Any, Any, T]],
        context: Context,
    ) -> None:
        self.keys = keys
        self.context = context
        self.failed_key: K | None = None
        """Of the one input that its failure is about."""
        self.begun: set[K] = set()
        """Those for which a call was begun: these are finished, though nobody may wait any more."""
        self.waiters = 0
        self.abandonment: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once nobody waits any more: only what was begun may still be waited for."""
        self.task = asyncio.create_task(work(self))

    def begin(self, indices: Sequence[int]) -> None:
        """Note that a call for the keys at these indices is about to be sent."""
        self.begun.update(self.keys[index] for index in indices)

    def leave(self) -> None:
        """Note that one who waited no longer does; the last one out ends what was not begun."""
        self.waiters -= 1
        if not self.waiters and not self.task.done():
            if not self.abandonment.done():
                self.abandonment.set_result(None)
            if not self.begun:
                self.task.cancel()

    def is_leader_specific(
        self, error: EmbeddingError, wanted: Collection[K], context: Context
    ) -> bool:
        """Tell whether it failed for a reason that need not hold for one who waited for it.

        What was refused may be another's input that was bought along; or the leader's time was up;
        or its own key is refused, or has used up its limits. `context` is that of who waited.
        """
        if self._is_of_client(error, context):
            return True
        if self.failed_key is not None:
            return self.failed_key not in wanted
        if isinstance(error, InvalidRequest | PermissionDenied | ScopedQuotaExceeded):
            # A budget is about no input.
            return not (isinstance(error, BudgetExceeded) or set(self.keys) <= set(wanted))
        if self.abandonment.done():
            # It was joined after everybody had gone, and was not asked for again when it failed.
            return True
        if isinstance(error, DeadlineExceeded | UpstreamTimeout):
            now, deadline = asyncio.get_running_loop().time(), self.context.deadline
            return deadline is not None and deadline <= now + _TICK
        return False

    def _is_of_client(self, error: EmbeddingError, context: Context) -> bool:
        """Tell whether it failed for what is the leader's client's own: its budget, or its key."""
        if isinstance(error, BudgetExceeded):
            return self.context.account.client != context.account.client
        is_other_key = self.context.credential != context.credential
        failures = NoProviderAvailable | ClientKeyRefused | ProviderError
        return is_other_key and isinstance(error, failures)
