"""One call: a batch of pending inputs at one route, until each has a vector or goes on.

The call is a task of its own: who waits for its inputs may go, and its answer is kept. What fails
goes where the policy says: back to the queue, for the same route or another one, or to its end.
"""

import asyncio
import logging
from collections.abc import Sequence

from embedding_proxy.providers.attempts import EXTRA_SHARE, Attempt
from embedding_proxy.providers.errors import (
    AuthenticationError,
    ClientKeyRefused,
    DeadlineExceeded,
    EmbeddingError,
    InvalidAnswer,
    LocalQueueFull,
    ProviderError,
    RateLimited,
    UpstreamTimeout,
)
from embedding_proxy.providers.routing import policy
from embedding_proxy.providers.routing.circuit_breaker import MAX_FAILURES, Verdict
from embedding_proxy.providers.routing.health import CallPermit, Slots
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.routing.router import View

from .call import Call
from .pending import (
    FailedAttempt,
    PendingInput,
    QueueKey,
    Queues,
    max_deadline,
    min_retries,
    requests_of,
)
from .refusal import is_internal_error
from .search import fail_inputs, final_error, give_up

log = logging.getLogger("embedding_proxy.router")

PROBE_LIMIT_S = 10.0
"""Seconds that a probe may take of inputs that another route could answer."""
HANG_SHARE = 0.5
"""The part of the time of a request, or of a route's share of it, that a provider must have had to
be held to have failed when that time is up. The rest may have been spent in queues of our own."""


class Batch:
    """One call of one route for some pending inputs. It gives back its permit and its slot."""

    def __init__(  # noqa: PLR0913, PLR0917 - who is asked for what, and what it takes
        self,
        queues: Queues,
        key: QueueKey,
        view: View,
        route: Route,
        inputs: list[PendingInput],
        permit: CallPermit,
        slots: Slots,
    ) -> None:
        self._queues = queues
        self._key = key
        self._view = view
        self._route = route
        self._inputs = inputs
        self._permit = permit
        self._slots = slots
        self._router = view.router
        self._limit_key, self._health = view.limits(route)
        self._budget = view.router.upstreams.budget_of(view.credential)
        self._requests = requests_of(inputs)
        self._call = Call(self._router, key, route, inputs, self._requests, slots)
        self._deadline = self._call.deadline
        self._attempt = self._call.attempt
        self._task: asyncio.Task[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._limit: float | None = None
        """Seconds for which it is waited for, where another route is left."""
        self._is_over = False
        """Whether its inputs are others' matter by now."""
        self._later = 0
        """How many more routes could be asked after it."""
        self._is_extended = False
        """Whether a reply that has begun was given more time."""
        self._has_hung = False
        """Whether it was counted as failed when the time was up."""
        self._is_retry = self._is_failover = False
        self._was_made = True
        """Whether it is an attempt: False where the queue of the provider had no room."""
        first = [failure for failure in inputs[0].failures if failure.route == route]
        # Who came when the limit was known to be used up has had its wait.
        self._was_limited = (
            first[0].was_limited if first else self._health.is_limited(self._limit_key)
        )

    def start(self) -> None:
        """Make the call."""
        route, first = self._route, self._inputs[0]
        self._is_retry = route in first.story
        self._is_failover = (
            not self._is_retry and bool(first.story or first.passed) and not first.batches
        )
        self._router.latencies.note_attempt(route)
        for pending in self._inputs:
            pending.story += (route,)
            pending.batches += (self,)
        for request, request_inputs in self._requests.items():
            request.begin_call(request_inputs)
        self._start_timers()
        self._task = self._router.upstreams.attempts.start(self._run(), self._attempt)

    async def _run(self) -> None:
        begun = self._router.upstreams.clock()
        start_deadline = None
        if self._limit is not None:
            # Where another route is left, half of the time is enough to wait for a rate limit.
            start_deadline = asyncio.get_running_loop().time() + self._limit / 2
        try:
            indices, answer = await self._call.make(start_deadline)
        except asyncio.CancelledError:
            if not self._is_over:
                self._health.cancelled(self._permit)
                stop = DeadlineExceeded("the proxy is stopping")
                fail_inputs(self._inputs, stop, self._key.search)
                self._end()
            self._slots.release()
            raise
        except Exception as error:  # noqa: BLE001 - raised where someone waits
            try:
                if self._is_over:
                    raise
                self._stop_timers()
                self._fail(error)
            finally:
                self._slots.release()
        else:
            self._slots.release()
            if not self._is_over:
                self._stop_timers()
                self._note_success(self._router.upstreams.clock() - begun)
            try:
                await self._call.deliver(indices, answer)
                self._end_others(self._inputs)
            except Exception as error:  # noqa: BLE001 - a defect; it is raised where someone waits
                fail_inputs(self._inputs, error, self._key.search)
            finally:
                if not self._is_over:
                    self._end()

    def _note_success(self, seconds: float) -> None:
        inputs, health = self._inputs, self._health
        self._router.latencies.note_answer(self._route, seconds, len(inputs))
        self._budget.give_back()
        health.succeeded(self._permit, self._limit_key)
        if (first := inputs[0]).failures:
            *_, (failed, error, *_) = first.failures
            log.info(
                "%s: answered for model %s in attempt %d, after %s at %s",
                *(self._route.name, self._route.model, len(first.story), error.reason, failed.name),
            )
        if len(inputs) == 1:
            health.answered_alone(self._limit_key, inputs[0].input)
        for failure in inputs[0].failures:
            # Another attempt has answered: it was none of the inputs.
            if failure.is_unexplained:
                self._view.health(failure.route).blame(self._view.key(failure.route))
        if self._key.search is not None:
            self._key.search.note(inputs, [], None, is_answered=True)

    def _fail(self, error: Exception, *, is_counted: bool = True) -> None:
        """Decide what becomes of the inputs that have had no vector; the call is over for them."""
        missing = [pending for pending in self._inputs if pending.is_missing]
        if isinstance(error, LocalQueueFull) and len(missing) == len(self._inputs):
            self._take_back(error)
        elif isinstance(error, ProviderError):
            self._note_failure(error, missing, is_counted=is_counted)
        else:
            if isinstance(error, ClientKeyRefused):
                # Of the provider it says nothing; it is counted all the same.
                self._router.counts.failures[error.reason] += 1
                self._health.failures[error.reason] += 1
            self._health.cancelled(self._permit)
            for pending in self._inputs:
                pending.forget_attempt(self._route)
        self._end(keeps_requests=True)
        try:
            if missing or self._key.search is not None:
                self._send_on(error, missing)
        except Exception as defect:
            fail_inputs(missing, defect, self._key.search)
            raise
        finally:
            self._end_others(missing)
            for request in self._requests:
                request.end_call()

    def _send_on(self, error: Exception, missing: list[PendingInput]) -> None:
        """Send inputs where the policy says, after a failure."""
        if not isinstance(error, EmbeddingError):
            fail_inputs(missing, error, self._key.search)
            return
        if not missing:
            if self._key.search is not None:
                self._key.search.note(self._inputs, [], None, is_answered=True)
            return
        if isinstance(error, ProviderError):
            missing = self._try_on(error, missing)
        if missing:
            self._give_up(error, missing)

    def _try_on(self, error: ProviderError, missing: list[PendingInput]) -> list[PendingInput]:
        """Queue inputs for another attempt, if the policy says so; return those it gives up."""
        free = [pending for pending in missing if not pending.is_pursued]
        if isinstance(error, LocalQueueFull):
            # A hedge that had no room goes on to the next route.
            missing = [pending for pending in missing if not pending.is_queued]
        else:
            missing = free
        if not missing:
            return []
        search, half = self._key.search, self._key.half
        step = policy.next_step(error, self._attempt_state(error, missing))
        if search is not None and not isinstance(step, policy.GiveUp):
            # The rest of the half comes back to the search later.
            search.note([pending for pending in self._inputs if pending not in missing], [], None)
        if isinstance(step, policy.Retry):
            self._queues.add_later(step.after_s, self._key, missing, self._route)
            return []
        self._health.note_failed(self._limit_key, missing[0].input)
        if not isinstance(error, AuthenticationError | LocalQueueFull):
            log.warning("%s", error)
        if isinstance(step, policy.NextRoute):
            self._queues.add_again(self._key, missing, search=search, half=half)
            return []
        return free

    def _give_up(self, error: EmbeddingError, missing: list[PendingInput]) -> None:
        """End the way of inputs that no attempt is left for."""
        culprit = None if error.index is None else self._inputs[error.index]
        if (
            culprit is None
            and self._key.is_alone
            and len(self._inputs) == 1
            and isinstance(error, InvalidAnswer)
        ):
            # Its vector was bad among good ones, and is bad alone.
            culprit = self._inputs[0]
        key = self._key._replace(route=self._route)
        if self._key.search is not None:
            failure = final_error(self._view, missing, error)
            self._key.search.note(self._inputs, missing, failure, culprit=culprit)
        else:
            give_up(self._queues, key, self._view, missing, error, culprit)

    def _attempt_state(
        self, error: ProviderError, missing: Sequence[PendingInput]
    ) -> policy.AttemptState:
        """Return where the inputs stand that have had no vector."""
        story, passed = missing[0].story, missing[0].passed
        search = self._key.search
        is_last = search is not None and search.is_internal
        max_attempts = policy.max_attempts(route.retries for route in self._key.routes)
        cooldown_s = self._health.rest(self._limit_key)
        deadline = max_deadline(requests_of(missing))
        now = self._router.upstreams.clock()
        seconds_left = float("inf") if deadline is None else deadline - now
        rested = isinstance(error, RateLimited)
        return policy.AttemptState(
            here=story.count(self._route),
            left=0 if is_last else max_attempts - len(story),
            alternatives=len(self._view.ready((*story, *passed))),
            retries=self._route.retries,
            cooldown_s=cooldown_s,
            time_left_s=max(seconds_left, 0.0),
            has_budget=self._budget.can_retry,
            is_needed=self._call.is_needed(),
            is_ready=self._view.is_ready(self._route, rested=rested),
            is_limited=self._was_limited,
            client_retries=min_retries(requests_of(missing)),
            is_repeat=self._health.is_repeat(self._limit_key, missing[0].input),
        )

    def _note_failure(
        self, error: ProviderError, missing: Sequence[PendingInput], *, is_counted: bool
    ) -> None:
        """Count a failed attempt, and write it into the history of its inputs."""
        self._router.counts.failures[error.reason] += 1
        if isinstance(error, AuthenticationError):
            log.error("%s: THE PROXY'S OWN KEY IS NOT ACCEPTED: %s", self._route.name, error)
        if isinstance(error, LocalQueueFull):
            # Of several calls some were made, and answered.
            self._health.cancelled(self._permit)
            is_unexplained = False
        else:
            is_unexplained = (
                is_internal_error(error) and len(missing) > 1 and not self._permit.is_probe
            )
            is_counted = (
                is_counted
                and not self._has_hung
                and not is_unexplained
                and not self._is_about_input(error, missing)
            )
            self._health.failed(
                self._permit,
                error,
                self._limit_key,
                by_client=self._route.by_client,
                is_counted=is_counted,
            )
            rule = policy.rule(error)
            is_failure = rule.verdict is Verdict.FAILURE and (is_counted or is_unexplained)
            if is_failure or rule.retries:
                self._budget.take()
            is_counted = is_counted and rule.verdict is Verdict.FAILURE
        failure = FailedAttempt(self._route, error, self._was_limited, is_unexplained, is_counted)
        for pending in missing:
            pending.failures += (failure,)
            pending.is_alone = pending.is_alone or bool(error.indices)

    def _is_about_input(self, error: ProviderError, missing: Sequence[PendingInput]) -> bool:
        """Tell whether one input may be to blame, and the provider is not for now.

        An input that fails alone counts for fewer failures than open a breaker, and for none where
        it has failed in another request before.
        """
        if isinstance(error, InvalidAnswer) and error.indices:
            for pending in missing if error.index is not None else ():
                self._health.blame_input(self._limit_key, pending.input)
            return not self._permit.is_probe
        if len(missing) != 1:
            return False
        (pending,) = missing
        counted = sum(failure.is_counted for failure in pending.failures)
        return (
            counted >= MAX_FAILURES - 1
            or self._health.is_repeat(self._limit_key, pending.input)
            or self._health.is_blamed(self._limit_key, pending.input)
        )

    def _take_back(self, error: LocalQueueFull) -> None:
        """Take the attempt out of the history of its inputs: it was not made."""
        self._was_made = False
        self._health.cancelled(self._permit)
        self._router.counts.failures[error.reason] += 1
        for pending in self._inputs:
            pending.forget_attempt(self._route)
            pending.passed += (self._route,)
            pending.failures += (FailedAttempt(self._route, error),)

    # The end of the wait for it.

    def _end(self, *, keeps_requests: bool = False) -> None:
        """Note that the call is over for its inputs, and count it: what is counted stays so."""
        self._is_over = True
        if self._was_made:
            counts = self._router.counts
            counts.attempts += 1
            counts.retries += self._is_retry
            counts.failovers += self._is_failover
            self._health.attempts += 1
        self._stop_timers()
        for pending in self._inputs:
            pending.batches = tuple(batch for batch in pending.batches if batch is not self)
        for request in () if keeps_requests else self._requests:
            request.end_call()

    def _end_others(self, inputs: Sequence[PendingInput]) -> None:
        """End what is under way beside this call for the same inputs, if nobody needs it."""
        for pending in inputs:
            for batch in pending.batches:
                if batch is not self:
                    batch.end_unneeded()

    def end_unneeded(self) -> None:
        """End the wait for the call if none of its inputs needs it; if it was sent, it goes on."""
        if not self._is_over and not self._call.is_needed():
            self._health.cancelled(self._permit)
            self._end()
            if self._key.search is not None:
                is_answered = not any(pending.is_missing for pending in self._inputs)
                self._key.search.note(self._inputs, [], None, is_answered=is_answered)
            if self._task is not None:
                self._router.upstreams.attempts.abandon(self._task)

    def _start_timers(self) -> None:
        """Limit the time that the call is waited for, where another route is left."""
        loop, upstreams = asyncio.get_running_loop(), self._router.upstreams
        first = self._inputs[0]
        if len(self._key.routes) > 1:
            self._later = len(self._view.ready((*first.story, *first.passed)))
        if self._later and self._deadline is not None:
            self._limit = max(self._deadline - upstreams.clock(), 0.0) / (self._later + 1)
        if self._later and self._permit.is_probe:
            self._limit = min(self._limit or PROBE_LIMIT_S, PROBE_LIMIT_S)
        if self._limit is not None:
            self._timers.append(loop.call_later(self._limit, self._time_out))
        elif self._deadline is not None:
            self._timers.append(loop.call_at(self._deadline, self._note_hang))
        may_hedge = self._key.search is None and len(first.batches) == 1
        if self._later and self._router.hedge_after_s is not None and may_hedge:
            upstreams.attempts.start(self._hedge(self._router.hedge_after_s), Attempt())

    def _stop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    async def _hedge(self, after_s: float) -> None:
        """Send the same inputs to the next route as well, when the time for it has come."""
        await self._router.sleep(after_s)
        missing = [
            pending for pending in self._inputs if pending.is_wanted and not pending.is_queued
        ]
        if self._is_over or not missing or not self._budget.can_retry:
            return
        if self._view.ready((*missing[0].story, *missing[0].passed)):
            self._budget.take()
            self._router.counts.hedges += 1
            self._queues.add_again(self._key, missing)

    def _time_out(self) -> None:
        """End the wait for the call: the rest of the time is for the later routes.

        A call that was sent goes on, and what it brings is kept. One whose reply has begun is
        waited for a while longer.
        """
        limit = self._limit or 0.0
        if self._attempt.has_reply and not self._is_extended:
            self._is_extended = True
            extra = asyncio.get_running_loop().call_later(EXTRA_SHARE * limit, self._time_out)
            self._timers.append(extra)
            return
        whole = self._whole_s
        share = PROBE_LIMIT_S if whole is None else min(whole / (self._later + 1), PROBE_LIMIT_S)
        # Of a provider whose code tells nothing of its calls, all of the time was its own.
        is_counted = whole is None or not self._attempt.has_begun or self._has_waited(share)
        error = UpstreamTimeout(self._route.name, f"no answer within {limit:.1f} s")
        self._fail(error, is_counted=is_counted)
        if self._task is not None:
            self._router.upstreams.attempts.abandon(self._task)

    @property
    def _whole_s(self) -> float | None:
        """The seconds that the most patient request has from its arrival on; None if not known."""
        if self._deadline is None:
            return None
        last = max(self._requests, key=lambda request: request.context.deadline or 0.0).context
        return None if last.begun is None else self._deadline - last.begun

    def _has_waited(self, share: float) -> bool:
        """Tell whether the call has waited for the provider for most of a share of time."""
        since = self._attempt.waiting_since
        return since is not None and (
            asyncio.get_running_loop().time() - since >= HANG_SHARE * share
        )

    def _note_hang(self) -> None:
        """Count a failure of the provider whose call was not answered when the time was up.

        Only where the call had most of the time, and a client waited to the end: one that has left
        proves nothing. The call goes on; what it brings is kept, and counts as failed but once.
        """
        whole = self._whole_s
        if whole is None or not self._has_waited(whole):
            return
        if any(request.has_client for request in self._requests):
            self._has_hung = True
            log.warning("%s: no answer when the time of a request was up", self._route.name)
            self._health.hung(self._permit)
