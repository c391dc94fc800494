"""What becomes of inputs when their call has failed for good: they are divided, searched, or fail.

A call may fail because of one input, and nothing says which. It is found by halving: the inputs
around it are answered, and only its own request fails.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from embedding_proxy.providers.errors import (
    EmbeddingError,
    InvalidAnswer,
    InvalidRequest,
    PermissionDenied,
    ProviderError,
    RateLimited,
    ScopedQuotaExceeded,
)
from embedding_proxy.providers.routing import policy
from embedding_proxy.providers.routing.router import View

from .pending import Bisection, FailedAttempt, PendingInput, QueueKey, Queues, requests_of
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
MIN_COOLDOWN_TOLD_S = 1.0
"""A shorter cooldown after a rate limit that named no time is not told to clients."""

_groups = itertools.count(1)
"""Names groups of inputs that go in calls of their own."""


def fail_inputs(
    inputs: Sequence[PendingInput], error: Exception, search: Bisection | None = None
) -> None:
    """Fail the requests of some inputs; the search that they are a half of waits for them no more.

    Else it, and with it its request, would never end.
    """
    for request in requests_of(inputs):
        request.fail(error)
    if search is not None and inputs:
        search.note(inputs, [], None)


def give_up(  # noqa: PLR0913, PLR0917 - whose, where, and why
    queues: Queues,
    key: QueueKey,
    view: View,
    inputs: Sequence[PendingInput],
    error: EmbeddingError | None = None,
    culprit: PendingInput | None = None,
) -> None:
    """End the way of inputs that no attempt is left for: divide them, search them, or fail them.

    `error` is that of the last attempt, or None where none was made; `culprit` is the input that it
    names. `key.route` is the route that failed. None is sent again that another route is asked for
    as well: that decides. Without those it is another call, which may be taken.
    """
    free = [pending for pending in inputs if not pending.is_pursued]
    failure = final_error(view, inputs, error)
    may_search = view.router.upstreams.budget_of(view.credential).can_retry
    if is_about_size(failure) and len(inputs) > 1:
        divide(queues, key, free, failure)
    elif culprit is not None:
        fail(view, inputs, failure, culprit)
        send_rest(queues, key, free)
    elif (
        isinstance(failure, PermissionDenied | ScopedQuotaExceeded)
        and len(requests_of(inputs)) > 1
        and may_search
    ):
        view.router.upstreams.budget_of(view.credential).take()
        send_halves_by_request(queues, key, free)
    elif (
        len(inputs) > 1
        and is_about_some_input(failure)
        and is_worth_a_search(inputs, failure)
        and (may_search or not is_internal_error(failure))
    ):
        if len(free) < len(inputs):
            queues.add_again(key, free)
        else:
            Search(queues, key, view, inputs, failure).begin()
    else:
        fail(view, inputs, failure)


def final_error(
    view: View, inputs: Sequence[PendingInput], error: EmbeddingError | None
) -> EmbeddingError:
    """Return the failure that says most, with the cooldown that is left."""
    if error is not None and not isinstance(error, ProviderError):
        return error
    failure = policy.select_error(failed.error for failed in inputs[0].failures)
    if failure is None:
        return error or view.unavailable()
    if failure is not error and failure.index is not None:
        # It names a place in another call.
        failure = failure.with_index(None)
    refusal = failure.refusal
    if isinstance(failure, RateLimited) and refusal is not None and not refusal.retry_after:
        for route in view.routes:
            cooldown_s = (
                view.health(route).rest(view.key(route)) if route.name == failure.provider else 0.0
            )
            if cooldown_s > MIN_COOLDOWN_TOLD_S:
                failure.refusal = replace(refusal, retry_after=cooldown_s)
    return failure


def divide(
    queues: Queues, key: QueueKey, inputs: Sequence[PendingInput], error: InvalidRequest
) -> None:
    """Queue the inputs of a call that was too large, to be sent in smaller ones."""
    # The route may have learned no limit from it: sure is only that this was too much.
    max_batch = named_batch_limit(error, len(inputs)) or max(1, len(inputs) // 2)
    for pending in inputs:
        pending.max_batch = max_batch
    queues.add_again(key, inputs)


def fail(
    view: View,
    inputs: Sequence[PendingInput],
    error: EmbeddingError,
    culprit: PendingInput | None = None,
    *,
    is_proven: bool | None = None,
) -> None:
    """Fail the request of the input that is to blame, or all requests.

    `is_proven`: whether a search has shown that other inputs are taken; None = none was made.
    """
    is_named = culprit is not None
    if culprit is None and len(inputs) == 1:
        is_refused = isinstance(error, InvalidRequest) and not is_about_a_field(error)
        is_only = is_proven is None or inputs[0].request.count == 1
        is_bad = isinstance(error, InvalidAnswer) or is_internal_error(error)
        if is_proven or (is_refused and is_only) or (is_bad and is_proven is None):
            culprit = inputs[0]
    if culprit is None:
        fail_inputs(inputs, error)
        if is_proven is None and len(inputs) > 1:
            blame_providers(view, inputs[0].failures)
        return
    culprit.request.fail(error.with_index(culprit.index))
    if isinstance(error, ProviderError) and (is_proven or is_named):
        for route in view.routes:
            if route.name == error.provider:
                view.health(route).blame_input(view.key(route), culprit.input)


def blame_providers(view: View, failures: Iterable[FailedAttempt]) -> None:
    """Count failures against the providers, for which no single input is to blame."""
    for failure in failures:
        if failure.is_unexplained:
            view.health(failure.route).blame(view.key(failure.route))


def send_rest(queues: Queues, key: QueueKey, inputs: Sequence[PendingInput]) -> None:
    """Go on with the requests that have not failed, when an input of another one was bad."""
    remainder = [pending for pending in inputs if pending.is_wanted]
    for pending in remainder:
        pending.searches += 1
    if not remainder:
        return
    if remainder[0].searches <= MAX_SEARCHES:
        _send_fresh(queues, key, remainder)
        return
    for request_inputs in requests_of(remainder).values():
        _send_fresh(queues, key, request_inputs, next(_groups))


def send_halves_by_request(queues: Queues, key: QueueKey, inputs: Sequence[PendingInput]) -> None:
    """Send the requests of a batch in two calls: what one is denied, another may be given."""
    groups = list(requests_of(pending for pending in inputs if pending.is_wanted).values())
    middle = len(groups) // 2
    for part in (groups[:middle], groups[middle:]):
        if part:
            _send_fresh(
                queues, key, [pending for group in part for pending in group], next(_groups)
            )


def _send_fresh(
    queues: Queues, key: QueueKey, inputs: Sequence[PendingInput], half: int = 0
) -> None:
    """Queue inputs as if nothing had been tried; those of a half go by themselves."""
    for pending in inputs:
        pending.story, pending.passed, pending.failures = (), (), ()
    queues.add_again(key, inputs, half=half)


def is_about_some_input(error: EmbeddingError) -> bool:
    """Tell whether one of the inputs may be to blame, and it is not said which."""
    return is_about_an_input(error) or is_internal_error(error)


def is_worth_a_search(inputs: Sequence[PendingInput], error: EmbeddingError) -> bool:
    """Tell whether it is of use to anybody to find out which input is to blame.

    For a refusal one bad input of a request is enough. Inputs around one that an upstream fails
    with are kept, also those of a request that has failed, as long as somebody waits.
    """
    if is_internal_error(error):
        return any(pending.request.is_waited_for for pending in inputs)
    return any(pending.is_wanted for pending in inputs)


class Search:
    """The halving of a batch until one input is left, which is to blame.

    Its halves are queued like any other inputs, and are told to it when they come back. While both
    fail, only the first is looked into; the other is held back until its end.
    """

    def __init__(
        self,
        queues: Queues,
        key: QueueKey,
        view: View,
        inputs: Sequence[PendingInput],
        error: EmbeddingError,
    ) -> None:
        self._queues = queues
        self._key = key._replace(search=None, half=0)
        self._view = view
        self._inputs = inputs
        self._error = error
        self.is_internal = is_internal_error(error)
        """Whether the upstream fails with an internal error, and does not say that it refuses."""
        requests = list(requests_of(inputs))
        self._requests = requests
        self._request = requests[0] if len(requests) == 1 else None
        self._has_proof = False
        self._is_hopeless = False
        """Whether going on would cost calls for nothing: no single input is to blame."""
        self._unproven = 0
        """Times in a row, from the first on, that both halves failed."""
        self._unexplained: list[FailedAttempt] = []
        self._held: list[Sequence[PendingInput]] = []
        """Parts that failed, and are not looked into."""
        self._open: set[PendingInput] = set()
        self._failed: list[tuple[Sequence[PendingInput], EmbeddingError]] = []
        self._has_answer = False

    @property
    def _is_proven(self) -> bool:
        """Whether other inputs are taken: only then is it this one that is refused."""
        return self._has_proof or (self._request is not None and self._request.has_answers)

    def begin(self) -> None:
        """Begin; where another search for the same request is under way, when that has ended."""
        for request in self._requests:
            # Until the search ends, none of them does.
            request.begin_call()
        if self._request is None:
            self._halve(self._inputs, self._error)
            return
        self._request.searching.append(self)
        if len(self._request.searching) == 1:
            self.proceed()

    def proceed(self) -> None:
        """Go on, as the only search for its request."""
        if self._request is not None and self._request.has_refusal:
            # One bad input of a request is enough.
            self._finish()
        else:
            self._halve(self._inputs, self._error)

    def wants(self, pending: PendingInput) -> bool:
        """Tell whether an input is worth a call, though its request may have failed."""
        return self.is_internal and pending.is_missing and pending.request.is_waited_for

    def note(
        self,
        inputs: Sequence[PendingInput],
        missing: Sequence[PendingInput],
        error: EmbeddingError | None,
        *,
        culprit: PendingInput | None = None,
        is_answered: bool = False,
    ) -> None:
        """Note what came of inputs of a half; when both halves are back, look into the next."""
        self._open.difference_update(inputs)
        self._has_answer = self._has_answer or is_answered
        if missing and error is not None:
            self._take_unexplained(missing)
            if culprit is None and is_about_some_input(error):
                self._failed.append((missing, error))
            elif is_about_size(error) and len(missing) > 1:
                divide(self._queues, self._key, missing, error)
            else:
                fail(self._view, missing, error, culprit)
                if self._request is None:
                    # An input that is named fails its own request; the others have no answer yet.
                    self._held.append(missing)
        if not self._open:
            self._end_round()

    def _take_unexplained(self, inputs: Sequence[PendingInput]) -> None:
        """Take over the failures that are explained by the end of the search."""
        self._unexplained += [failure for failure in inputs[0].failures if failure.is_unexplained]
        for pending in inputs:
            pending.failures = tuple(f._replace(is_unexplained=False) for f in pending.failures)

    def _halve(self, inputs: Sequence[PendingInput], error: EmbeddingError) -> None:
        """Make a call for each half, if that is worth it; else this is where the search ends."""
        self._take_unexplained(inputs)
        # Else all may fail alike, as in an outage; who began has looked at the budget.
        must_ask = self.is_internal and not self._is_proven and bool(self._unproven)
        budget = self._view.router.upstreams.budget_of(self._view.credential)
        if (
            len(inputs) == 1
            or self._is_hopeless
            or not is_worth_a_search(inputs, error)
            or (must_ask and not budget.can_retry)
        ):
            self._end(inputs, error)
            return
        middle = len(inputs) // 2
        halves = [
            half for half in (inputs[:middle], inputs[middle:]) if is_worth_a_search(half, error)
        ]
        self._open = {pending for half in halves for pending in half}
        self._failed, self._has_answer = [], False
        for number, half in enumerate(halves):
            self._send(half, number)

    def _send(self, half: Sequence[PendingInput], number: int) -> None:
        self._queues.add_again(self._key, half, self._key.route, search=self, half=number)

    def _end_round(self) -> None:
        """Both halves are back: look into the first that failed."""
        failed = self._failed
        self._has_proof = self._has_proof or self._has_answer
        if not self._is_proven:
            self._unproven += 1
            is_alike = len({str(error) for _, error in failed}) == 1
            has_own_fields = bool(self._key.space.parameters)
            self._is_hopeless = (
                self._unproven >= MAX_UNPROVEN if self.is_internal else is_alike and has_own_fields
            )
        if not failed:
            # They were only too much together, or fail for another reason now.
            self._finish()
            return
        (inputs, error), *other_halves = failed
        self._held += [half for half, _ in other_halves]
        self._halve(inputs, error)

    def _end(self, inputs: Sequence[PendingInput], error: EmbeddingError) -> None:
        fail(self._view, inputs, error, is_proven=self._is_proven)
        if not self._is_proven:
            blame_providers(self._view, self._unexplained)
        self._finish()

    def _finish(self) -> None:
        """Go on with what was held back, and with the next search for the same request."""
        request = self._request
        if request is None:
            send_rest(self._queues, self._key, [pending for half in self._held for pending in half])
        elif self.is_internal:
            # Its request has failed, but the good inputs around further bad ones are kept as well.
            request.searches += 1
            for half in self._held:
                if request.is_waited_for and request.searches < MAX_SEARCHES:
                    search = Search(self._queues, self._key, self._view, half, self._error)
                    search._has_proof = self._is_proven
                    search.begin()
        else:
            for half in self._held:
                send_rest(self._queues, self._key, half)
        if request is not None:
            request.searching.remove(self)
            if request.searching:
                request.searching[0].proceed()
        for member in self._requests:
            member.end_call()
