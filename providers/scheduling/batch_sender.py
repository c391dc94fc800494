"""Answers one batch: by one call, or by more where its failure is not that of the whole.

The inputs of a call that was too large go back to the queue. An input that is to blame for a
failure is found by halving: the inputs around it are answered, and only its own request fails.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from providers.base import (
    Credential,
    DeadlineExceeded,
    EmbeddingError,
    InputRefused,
    InvalidAnswer,
    PermissionDenied,
    ProviderError,
    ScopedQuotaExceeded,
    Space,
)

from .dispatcher import Dispatcher
from .pending import PendingInput, PendingRequest, call_context
from .refusal import (
    is_about_a_field,
    is_about_an_input,
    is_about_size,
    is_internal_error,
    named_batch_limit,
)

MAX_SEARCHES = 3
"""Bad inputs that are left out of a shared call one by one; then each request goes alone."""
MAX_UNPROVEN = 2
"""Times that both halves may fail with an internal error, before it is the provider's."""


class BatchSender:
    """Sends batches of one space, with one key, to the routes of a model.

    `queue` takes back inputs that are to be sent again, in smaller calls.
    """

    def __init__(
        self,
        router: Dispatcher,
        space: Space,
        credential: Credential | None,
        queue: Callable[[Sequence[PendingInput]], None],
    ) -> None:
        self._router = router
        self._space = space
        self._credential = credential
        self._queue = queue

    async def send(self, batch: list[PendingInput]) -> None:
        """Answer a batch, or fail its requests; what is left of it may be queued again."""
        requests = _by_request(batch)
        for request, own in requests.items():
            request.begin_call(own)
        try:
            await self._answer(batch)
        except asyncio.CancelledError:
            for request in requests:
                request.fail(DeadlineExceeded("the proxy is stopping"))
            raise
        except Exception as error:  # noqa: BLE001 - a defect; it is raised where someone waits
            for request in requests:
                request.fail(error)
        finally:
            for request in requests:
                request.end_call()

    async def _answer(
        self, batch: list[PendingInput], searches: int = 0, max_attempts: int | None = None
    ) -> None:
        """Make a call for a batch, and more calls where its failure is not that of the whole."""
        failure = await self._call(batch, max_attempts)
        batch = [one for one in batch if one.is_missing]
        if failure is None or not batch:
            return
        error = failure.error
        if is_about_size(error) and len(batch) > 1:
            self._queue_again(batch, error)
        elif failure.culprit is not None:
            self._fail(batch, failure)
            await self._answer_rest(batch, searches)
        elif (
            isinstance(error, PermissionDenied | ScopedQuotaExceeded)
            and len(_requests(batch)) > 1
            and self._may_search()
        ):
            await self._answer_halves(batch, searches)
        elif (
            len(batch) > 1
            and failure.is_about_some_input
            and failure.is_worth_a_search(batch)
            and (not is_internal_error(error) or self._may_search())
        ):
            await self._search(batch, failure, searches)
        else:
            self._fail(batch, failure)

    async def _answer_halves(self, batch: Sequence[PendingInput], searches: int) -> None:
        """Send the requests of a batch in two calls: what one is denied, another may be given."""
        own = list(_by_request([one for one in batch if one.is_wanted]).values())
        middle = len(own) // 2
        halves = [list(itertools.chain(*half)) for half in (own[:middle], own[middle:])]
        await asyncio.gather(*(self._answer(half, searches) for half in halves if half))

    async def _answer_rest(self, batch: Sequence[PendingInput], searches: int) -> None:
        """Go on with the requests that have not failed, when an input of another one was bad."""
        batch = [one for one in batch if one.is_wanted]
        if batch and searches < MAX_SEARCHES:
            await self._answer(batch, searches + 1)
        elif batch:
            alone = _by_request(batch).values()
            await asyncio.gather(*(self._answer(own, searches) for own in alone))

    async def _call(
        self, batch: Sequence[PendingInput], max_attempts: int | None = None
    ) -> "_Failure | None":
        """Make one call; hand out what it brings, and return what it fails with."""
        context = call_context(batch, max_attempts=max_attempts)
        try:
            inputs = [one.input for one in batch]
            answer = await self._router.embed(self._space, inputs, context)
        except Exception as error:  # noqa: BLE001 - raised where someone waits
            index = error.index if isinstance(error, EmbeddingError) else None
            return _Failure(error, None if index is None else batch[index])
        if context.on_part is not None and any(one.is_missing for one in batch):
            await context.on_part(range(len(batch)), answer)
        return None

    def _queue_again(self, batch: Sequence[PendingInput], error: InputRefused) -> None:
        """Queue the inputs of a call that was too large, to be sent in smaller ones."""
        # The route may have learned no limit from it: sure is only that this was too much.
        max_batch = named_batch_limit(error, len(batch)) or len(batch) // 2
        for one in batch:
            one.max_batch = max_batch
        self._queue(batch)

    def _may_search(self) -> bool:
        return self._router.may_search(self._credential)

    async def _search(
        self, batch: Sequence[PendingInput], failure: "_Failure", searches: int
    ) -> None:
        """Find the input for which a call fails; those around it are answered."""
        requests = _requests(batch)
        # Its calls that fail for the same reason are not all searched: one bad input is enough.
        lock = requests[0].search_lock if len(requests) == 1 else contextlib.nullcontext()
        async with lock:
            if len(requests) == 1 and requests[0].has_refusal:
                return
            held = await self._bisect(batch, failure)
        if len(requests) > 1:
            await self._answer_rest([one for half in held for one in half], searches)
            return
        if not is_internal_error(failure.error):
            for half in held:
                await self._answer_rest(half, 0)
            return
        # Its request has failed, but the good inputs around further bad ones are kept as well.
        request = requests[0]
        request.searches += 1
        for half in held:
            if request.is_waited_for and request.searches < MAX_SEARCHES:
                await self._answer([one for one in half if one.is_missing], max_attempts=1)

    async def _bisect(
        self, batch: Sequence[PendingInput], failure: "_Failure"
    ) -> list[Sequence[PendingInput]]:
        """Halve a batch until one input is left, and fail the request of that.

        Returns what failed on the way, and was not looked into; requests in it may go on.
        """
        requests = _requests(batch)
        search = _Search(
            is_internal=is_internal_error(failure.error),
            has_own_fields=bool(self._space.parameters),
            # Only where other inputs are taken is it this one that is refused.
            is_proven=len(requests) == 1 and requests[0].has_answers,
            failures=[failure],
        )
        while len(batch) > 1 and failure.is_about_some_input and not search.is_hopeless:
            if not failure.is_worth_a_search(batch) or (search.must_pay and not self._may_search()):
                break
            failed = await self._send_halves(batch, search)
            if not failed:
                # They were only too much together, or fail for another reason now.
                return search.held
            (batch, failure), *others = failed
            search.held += [half for half, _ in others]
        self._fail(batch, failure, is_proven=search.is_proven)
        for each in () if search.is_proven else search.failures:
            if isinstance(each.error, ProviderError):
                self._router.blame_provider(each.error)
        return search.held

    async def _send_halves(
        self, batch: Sequence[PendingInput], search: "_Search"
    ) -> list[tuple[Sequence[PendingInput], "_Failure"]]:
        """Make a call for each half of a batch; return what is left of those that may go on."""
        middle = len(batch) // 2
        halves = [
            half
            for half in (batch[:middle], batch[middle:])
            if search.failures[-1].is_worth_a_search(half)
        ]
        max_attempts = 1 if search.is_internal else None
        results = await asyncio.gather(*(self._call(half, max_attempts) for half in halves))
        failed: list[tuple[Sequence[PendingInput], _Failure]] = []
        for half, result in zip(halves, results, strict=True):
            left = [one for one in half if one.is_missing]
            if result is None or not left:
                continue
            if result.is_about_some_input:
                failed.append((left, result))
            elif is_about_size(result.error) and len(left) > 1:
                self._queue_again(left, result.error)
            else:
                self._fail(left, result)
                # An input that is named fails its own request; the others have had no answer yet.
                search.held.append(left)
        search.note([result for _, result in failed], has_answer=None in results)
        return failed

    def _fail(
        self, batch: Sequence[PendingInput], failure: "_Failure", *, is_proven: bool | None = None
    ) -> None:
        """Fail the request of the input that is to blame, or all requests of a batch.

        `is_proven`: whether a search has shown that other inputs are taken; None = none was made.
        """
        error, culprit = failure
        if culprit is None and len(batch) == 1:
            is_refused = isinstance(error, InputRefused) and not is_about_a_field(error)
            is_only = is_proven is None or batch[0].request.count == 1
            is_bad = isinstance(error, InvalidAnswer) or is_internal_error(error)
            is_found = is_proven or (is_refused and is_only) or (is_bad and is_proven is None)
            if is_found and isinstance(error, EmbeddingError):
                culprit = batch[0]
        if culprit is None:
            for request in _requests(batch):
                request.fail(error)
            if is_proven is None and len(batch) > 1 and isinstance(error, ProviderError):
                self._router.blame_provider(error)
        elif isinstance(error, EmbeddingError):
            culprit.request.fail(error.at(culprit.index))
            if isinstance(error, ProviderError) and (is_proven or failure.culprit is not None):
                self._router.blame_input(error, culprit.input, self._credential, self._space)


class _Failure(NamedTuple):
    """What a call failed with."""

    error: Exception
    culprit: PendingInput | None
    """The one input that is to blame, where the error names one."""

    @property
    def is_about_some_input(self) -> bool:
        """Whether one of its inputs may be to blame, and it is not said which."""
        if self.culprit is not None:
            return False
        return is_about_an_input(self.error) or is_internal_error(self.error)

    def is_worth_a_search(self, batch: Sequence[PendingInput]) -> bool:
        """Tell whether it is of use to anybody to find out which input is to blame.

        For a refusal one bad input of a request is enough. Inputs around one that an upstream
        fails with are kept, also those of a request that has failed, as long as somebody waits.
        """
        if is_internal_error(self.error):
            return any(one.request.is_waited_for for one in batch)
        return any(one.is_wanted for one in batch)


@dataclass(slots=True)
class _Search:
    """What is known on the way down to the one input that is to blame."""

    is_internal: bool
    """Whether the upstream fails with an internal error, and does not say that it refuses."""
    has_own_fields: bool
    """Whether the client sent fields of its own along, which may be what is refused."""
    is_proven: bool
    failures: list[_Failure]
    held: list[Sequence[PendingInput]] = field(default_factory=list)
    """Parts that failed, and are not looked into."""
    unproven: int = 0
    """Times in a row, from the first on, that both halves failed."""
    is_hopeless: bool = False
    """Whether going on would cost calls for nothing: no single input is to blame."""

    @property
    def must_pay(self) -> bool:
        """Whether two more calls count as retries: all may fail alike, as in an outage.

        The first two were paid for by who began the search.
        """
        return self.is_internal and not self.is_proven and len(self.failures) > 1

    def note(self, failures: Sequence[_Failure], *, has_answer: bool) -> None:
        """Take note of what two halves have failed with, and whether one was answered."""
        self.failures += failures
        self.is_proven = self.is_proven or has_answer
        if self.is_proven:
            return
        self.unproven += 1
        is_alike = len({str(failure.error) for failure in failures}) == 1
        self.is_hopeless = (
            self.unproven >= MAX_UNPROVEN if self.is_internal else is_alike and self.has_own_fields
        )


def _requests(inputs: Sequence[PendingInput]) -> list[PendingRequest]:
    return list(dict.fromkeys(one.request for one in inputs))


def _by_request(inputs: Sequence[PendingInput]) -> dict[PendingRequest, list[PendingInput]]:
    own: dict[PendingRequest, list[PendingInput]] = {}
    for one in inputs:
        own.setdefault(one.request, []).append(one)
    return own
