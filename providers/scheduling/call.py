"""One call at a provider for some pending inputs: what goes along, what comes back, what it costs.

Knows nothing of retries and of a provider's health: see `batch`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from embedding_proxy.providers.attempts import Attempt
from embedding_proxy.providers.base import Context, Embedded
from embedding_proxy.providers.charge import Bill
from embedding_proxy.providers.errors import InvalidAnswer, LocalQueueFull, ProviderError
from embedding_proxy.providers.routing.health import Slots
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.routing.router import Router
from embedding_proxy.providers.upstream.duplicate_vectors import (
    exact_tokenizer,
    find_duplicate_vectors,
)

from .assembly import assemble, rows_of
from .pending import (
    FailedAttempt,
    PendingInput,
    PendingRequest,
    QueueKey,
    max_deadline,
    rank,
    requests_of,
)


class Call:
    """A call of one route."""

    def __init__(  # noqa: PLR0913, PLR0917 - who is asked for what
        self,
        router: Router,
        key: QueueKey,
        route: Route,
        inputs: Sequence[PendingInput],
        requests: Mapping[PendingRequest, Sequence[PendingInput]],
        slots: Slots,
    ) -> None:
        self._router = router
        self._key = key
        self._route = route
        self._inputs = inputs
        self._requests = requests
        self._slots = slots
        """Those of the provider, of which it has one."""
        self._first = next(iter(requests)).context
        self.deadline = max_deadline(requests)
        """That of the most patient request."""
        self.attempt = Attempt()
        self._is_billed = False

    def _wants(self, pending: PendingInput) -> bool:
        search = self._key.search
        return pending.is_wanted or (search is not None and search.wants(pending))

    def is_needed(self) -> bool:
        """Tell whether its answer is still of use to anybody."""
        return any(map(self._wants, self._inputs))

    def _context(self, start_deadline: float | None) -> Context:
        """Return what goes along with the call."""
        context = self._first
        return Context(
            deadline=self.deadline,
            user=context.user,
            neutral=context.neutral,
            namespace=context.namespace,
            credential=context.credential,
            account=context.account,
            on_part=self.deliver,
            counts={
                pending.input: pending.count
                for pending in self._inputs
                if pending.count is not None and type(pending.input) is str
            },
            start_deadline=start_deadline,
            is_needed=self.is_needed,
            finishes_calls=True,
            attempt=self.attempt,
        )

    async def make(self, start_deadline: float | None) -> tuple[Sequence[int], Embedded]:
        """Return the answer to the inputs at some indices: all that are still missing.

        What comes before a failure is delivered.

        The provider must have begun by `start_deadline`, a point on the event loop's clock, or it
        raises LocalQueueFull. Raises EmbeddingError.
        """
        if not self.is_needed():
            raise LocalQueueFull(self._route.name, "nobody waits for the answer any more")
        context = self._context(start_deadline)
        if self._key.is_alone and len(self._inputs) > 1:
            return await self._ask_each(replace(context, on_part=None))
        return range(len(self._inputs)), await self._ask(self._inputs, context)

    async def _ask(self, inputs: Sequence[PendingInput], context: Context) -> Embedded:
        """Make one call at the provider, and tell what it was charged, whatever comes of it."""
        items = [pending.input for pending in inputs]
        account = inputs[0].request.context.account
        try:
            answer = await self._route.provider.ask(
                self._route.model, self._key.space, items, context
            )
        except ProviderError as error:
            if error.charge is not None and (len(inputs) == 1 or not self._is_billed):
                self._charge(self._route.bill_failed(error.charge, items, account), inputs)
            raise
        self._charge(self._route.bill(answer.charge, answer.tokens, account), inputs)
        return answer

    async def _ask_each(self, context: Context) -> tuple[Sequence[int], Embedded]:
        """Ask for each input in a call of its own, and keep no vector that several of them get.

        One that nobody needs any more when its turn comes is left out.

        One vector for inputs that differ may be a call's fault; alone it is the upstream's. Raises
        EmbeddingError.
        """
        inputs = self._inputs
        further = self._slots.acquire_free(len(inputs) - 1, self._route.limits.concurrency)
        places = asyncio.Semaphore(1 + further)

        async def ask(pending: PendingInput) -> Embedded | None:
            async with places:
                return await self._ask([pending], context) if self._wants(pending) else None

        try:
            results = await asyncio.gather(*map(ask, inputs), return_exceptions=True)
        finally:
            for _ in range(further):
                self._slots.release()
        parts = {i: part for i, part in enumerate(results) if isinstance(part, Embedded)}
        vectors = {i: part.vectors[0] for i, part in parts.items()}
        items, tokenizer = [pending.input for pending in inputs], exact_tokenizer(self._key.space)
        groups = find_duplicate_vectors(items, vectors, tokenizer)
        shared = sorted({i for group in groups for i in group})
        failed = {error: i for i, error in enumerate(results) if isinstance(error, BaseException)}
        good = [i for i in parts if i not in shared]
        whole = assemble([([row], parts[i]) for row, i in enumerate(good)])
        if shared or failed:
            await self.deliver(good, whole)
        if shared:
            for pending in inputs:
                pending.is_alone = False
            problem = "one vector for inputs that differ, also when each is asked for alone"
            error = InvalidAnswer(self._route.name, problem)
            error.index = shared[0] if len(shared) < len(inputs) else None
            raise error
        if failed:
            worst = min(failed, key=rank)
            if isinstance(worst, InvalidAnswer):
                worst.index = failed[worst]
            raise worst
        if any(map(_is_fused, inputs[0].failures)):
            self._route.learn_single()
        return good, whole

    async def deliver(self, indices: Sequence[int], part: Embedded) -> None:
        """Hand a part of the answer to the requests whose inputs these are."""
        if part.charge is not None and not self._is_billed:
            account = self._first.account
            items = [pending.input for pending in self._inputs]
            self._charge(self._route.bill_failed(part.charge, items, account), self._inputs)
        if not indices:
            return
        if part.charge is not None and len(indices) < len(self._inputs):
            part = replace(part, charge=None)
        inputs = [self._inputs[index] for index in indices]
        if len(self._requests) == 1:
            await inputs[0].request.take([pending.index for pending in inputs], part)
        else:
            for request, request_inputs in requests_of(inputs).items():
                rows = [row for row, pending in enumerate(inputs) if pending.request is request]
                await request.take(
                    [pending.index for pending in request_inputs], rows_of(part, rows)
                )

    def _charge(self, bill: Bill, inputs: Sequence[PendingInput]) -> None:
        """Tell each request what was charged for its inputs."""
        self._is_billed = True
        self._router.prices.note_charge(self._route, bill)
        whole = bill.at([pending.index for pending in inputs])
        if len(self._requests) == 1:
            inputs[0].request.charge(whole)
            return
        for request in self._requests:
            rows = [row for row, pending in enumerate(inputs) if pending.request is request]
            if rows:
                request.charge(whole.rows(rows))


def _is_fused(failure: FailedAttempt) -> bool:
    """Tell whether one vector came for all inputs of a call, which differ."""
    return failure.error.index is None and bool(failure.error.indices)
