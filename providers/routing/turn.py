"""One route's turn in a request: may it be asked, how often, and what its failures mean."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from providers.attempts import Attempt
from providers.base import (
    ClientKeyRefused,
    CredentialsRefused,
    Embedded,
    EmbeddingError,
    Full,
    InvalidAnswer,
    ProviderError,
    RateLimited,
    Unreadable,
    UpstreamFault,
    UpstreamTimeout,
)
from providers.scheduling.refusal import is_internal_error

from . import faults
from .breaker import Verdict
from .counts import Counts
from .health import Pass, Upstreams
from .journey import Journey
from .order import Latencies
from .route import Route

log = logging.getLogger("embedding_proxy.router")

ATTEMPTS_A_ROUTE = 2
"""The most attempts at one route while another is left, unless the route says how many."""
LONGEST_WAIT = 20.0
"""Seconds; an upstream that asks for more is left for the next route."""
SHORT_WAIT = 0.5
"""Seconds that a rate limit without a time is waited out where another route is left."""
PROBE_LIMIT = 10.0
"""Seconds that a probe may take of a request that another route could answer."""
HANG_SHARE = 0.5
"""The part of the time of a request, or of a route's share of it, that a provider must have had to
be held to have failed when that time is up. The rest may have been spent in queues of our own."""


class Shut(EmbeddingError):
    """The provider may not be asked now. Never leaves the router."""


class Turn:
    """Asks one route for one request. `later` is how many more routes could be asked after it."""

    def __init__(  # noqa: PLR0913 - what a router shares with its turns
        self,
        route: Route,
        journey: Journey,
        later: int,
        *,
        upstreams: Upstreams,
        latencies: Latencies,
        counts: Counts,
    ) -> None:
        self._route = route
        self._journey = journey
        self._later = later
        self._upstreams = upstreams
        self._budget = upstreams.budget_of(journey.context.credential)
        self._health = upstreams.of(route.name)
        self._lane = journey.lane(route)
        self._latencies = latencies
        self._counts = counts
        self._made = 0
        if route.retries is not None:
            most = 1 + route.retries
        else:
            most = ATTEMPTS_A_ROUTE if later else journey.left
        # Each later route keeps at least one attempt in reserve.
        self._most = max(1, min(most, journey.left - later))
        if journey.context.max_attempts is not None:
            self._most = min(self._most, journey.context.max_attempts)
        # Who came when the limit was known to be used up has had its wait.
        self._is_limited = self._health.is_limited(self._lane)
        first = journey.inputs[next(iter(journey.parts.missing), 0)]
        self._is_repeat = self._health.is_repeat(self._lane, first)
        self._failure: ProviderError | None = None
        self._has_failed_alone = False
        self._receipt: float | None = None
        self._scouting = False
        self._rested = False
        self._is_uncounted = False
        """Whether a failure of the attempt counts against nobody: the provider had too little of
        the time for its silence to mean anything, or it was counted when the time was up."""

    async def go_on(self) -> None:
        """Wait until the request, having failed elsewhere, may go on to this route.

        The rules are told in `budget`. Raises Shut, and TimeoutError at the request's deadline.
        """
        while self._health.ready(self._lane):
            if self._health.proved:
                return
            declined = self._health.declined(self._lane)
            if not (self._health.scouts or declined) or self._budget.affords():
                self._pay()
                self._scouting = True
                return
            if declined:
                raise Shut
            async with asyncio.timeout(self.time_left()):
                await self._health.news()
        raise Shut

    def hedge(self) -> bool:
        """Pay for an attempt beside another that is still under way, if that can be afforded."""
        affordable = self._health.ready(self._lane) and self._budget.affords()
        if affordable:
            self._pay()
        return affordable

    async def ask(self) -> Embedded:
        """Make one attempt at what is missing, and return the whole.

        Raises Shut when the provider may not be asked any more.
        """
        parts = self._journey.parts
        try:
            await self._attempt()
        except EmbeddingError:
            # What was asked for may have come from another route meanwhile.
            if parts.missing:
                raise
        return parts.whole()

    async def _attempt(self) -> None:
        journey, health = self._journey, self._health
        missing = list(journey.parts.missing)
        # A hedge may have taken the last attempt, or have answered.
        wanted = bool(missing) and journey.left > 0
        permit = health.enter(self._lane, rested=self._rested) if wanted else None
        if permit is None:
            self._refund()
            raise Shut
        call = None if journey.begun else self._budget.call()
        journey.left -= 1
        if self._made:
            self._counts.retries += 1
        else:
            journey.asked.append(self._route)
        self._made += 1
        self._counts.attempts += 1
        self._latencies.asked(self._route)
        free = self._receipt is None and call is None
        health.scouts += self._scouting
        begun = self._upstreams.clock()
        try:
            await self._embed(permit)
        except Full as error:
            self._note(error)
            if len(journey.parts.missing) < len(missing):
                # Some of several calls were made, and answered.
                health.abandoned(permit)
            else:
                self._take_back(permit, call)
            raise
        except ProviderError as error:
            self._note(error)
            if free and faults.rule(error).verdict is Verdict.BAD:
                self._budget.spend()
            health.failed(
                permit,
                error,
                self._lane,
                by_client=self._route.by_client,
                is_uncounted=self._is_about_input(error, permit) or self._is_uncounted,
            )
            raise
        except ClientKeyRefused as error:
            # Of the provider it says nothing; it is counted all the same.
            self._counts.failures[type(error).__name__] += 1
            health.failures[type(error).__name__] += 1
            health.abandoned(permit)
            raise
        except BaseException:
            health.abandoned(permit)
            raise
        finally:
            health.scouts -= self._scouting
        if self._scouting:
            self._refund()
        self._latencies.answered(self._route, self._upstreams.clock() - begun, len(missing))
        health.answered(permit, self._lane, [journey.inputs[index] for index in missing])

    def again(self, error: BaseException) -> bool:
        """Tell whether the same provider is to be asked again after an error; if so, pay for it."""
        if not isinstance(error, ProviderError) or isinstance(error, Full):
            return False
        self._receipt, self._scouting = None, False
        # Who was told a time, and waits for it, has done its part of the provider's rest.
        self._rested |= isinstance(error, RateLimited)
        wait = self._cooldown(error)
        again = (
            self._made < self._most
            and self._made <= faults.rule(error).again
            and not self._is_clients_to_repeat(error)
            and self._journey.is_needed
            and wait < self.time_left(self._max_wait(error))
            and self._health.ready(self._lane, rested=self._rested)
            and self._budget.affords()
        )
        if again:
            self._pay()
        return again

    def _is_clients_to_repeat(self, error: ProviderError) -> bool:
        """Tell whether another attempt is left to the client, which makes it by itself.

        Else each of its tries would be three of ours. After a rate limit that is so from the first
        try on of a client that says so; after another failure from the second on, also of one that
        only shows it. While a limit is known to be used up each request makes one attempt.
        """
        retries = self._journey.context.client_retries
        if isinstance(error, RateLimited):
            return self._is_limited or retries is not None
        is_passing = isinstance(error, UpstreamFault | Unreadable)
        return is_passing and (bool(retries) or self._is_repeat)

    def wait(self, jitter: float) -> float:
        """Return the seconds to wait before the next attempt: what was asked for, or the jitter."""
        if self._failure is None or not self._failure.retry_after:
            return min(self._cooldown(self._failure) + jitter, self.time_left(LONGEST_WAIT))
        return self._failure.retry_after

    def _max_wait(self, error: BaseException) -> float:
        """Return the seconds that another attempt at this provider is worth waiting for.

        Where another route is left, a wait that the provider did not ask for must be short.
        """
        is_asked = isinstance(error, ProviderError) and error.retry_after is not None
        return LONGEST_WAIT if is_asked or not self._later else SHORT_WAIT

    def _cooldown(self, error: BaseException | None) -> float:
        """Return the seconds for which the provider is to be left alone after a failure."""
        if isinstance(error, ProviderError) and error.retry_after:
            return error.retry_after
        return self._health.rest(self._lane) if isinstance(error, RateLimited) else 0.0

    def _is_about_input(self, error: ProviderError, permit: Pass) -> bool:
        """Tell whether one input may be to blame for a failure, and the provider is not for now.

        Of several inputs in the call, unless the call is a probe; or it is one that has failed
        before, which tells nothing new of the provider.
        """
        journey = self._journey
        inputs = [journey.inputs[index] for index in journey.parts.missing]
        if isinstance(error, InvalidAnswer) and error.indices:
            for item in inputs if error.index is not None else ():
                self._health.blame_input(self._lane, item)
            return not permit.probe
        if is_internal_error(error) and len(inputs) > 1 and not permit.probe:
            journey.unexplained.append((self._route.name, self._lane))
            return True
        if len(inputs) == 1 and faults.rule(error).verdict is Verdict.BAD:
            is_repeated = self._is_repeat or self._has_failed_alone
            self._has_failed_alone = is_internal_error(error)
            return is_repeated or self._health.is_blamed(self._lane, inputs[0])
        return False

    def time_left(self, most: float | None = None) -> float:
        """Return the seconds until the request's deadline, at most `most`."""
        deadline = self._journey.context.deadline
        left = float("inf") if deadline is None else deadline - self._upstreams.clock()
        return max(left if most is None else min(left, most), 0.0)

    async def _embed(self, permit: Pass) -> None:
        """Ask for what is missing, within the time that leaves the later routes theirs.

        A call that was sent goes on when that time is up, and what it brings is kept. Raises
        UpstreamTimeout; who queues for half of that time, and would be late, is told Full.
        """
        journey, limit = self._journey, None
        if self._later and journey.context.deadline is not None:
            limit = self.time_left() / (self._later + 1) or None
        if self._later and permit.probe:
            limit = min(limit or PROBE_LIMIT, PROBE_LIMIT)
        begin_by = None if limit is None else asyncio.get_running_loop().time() + limit / 2
        attempts: list[Attempt] = []
        self._is_uncounted = False

        async def work(attempt: Attempt) -> None:
            attempts.append(attempt)
            timer = self._at_deadline(partial(self._note_hang, permit, attempt))
            try:
                await journey.ask(self._route, begin_by, attempt)
            finally:
                if timer is not None:
                    timer.cancel()

        if not await self._upstreams.attempts.make(work, limit):
            whole = self._whole_time()
            if whole is not None and limit is not None:
                share = min(whole / (self._later + 1), PROBE_LIMIT)
                # Of a provider whose code tells nothing of its calls, all of the time was its own.
                told = [one for one in attempts if one.has_begun]
                self._is_uncounted = any(not self._has_hung(one, share) for one in told)
            raise UpstreamTimeout(self._route.name, f"no answer within {limit:.1f} s")

    def _at_deadline(self, note: Callable[[], None]) -> asyncio.TimerHandle | None:
        """Have something noted when the time of the request is up; None where it has no end."""
        context = self._journey.context
        if self._later or context.deadline is None or context.begun is None:
            return None
        return asyncio.get_running_loop().call_at(context.deadline, note)

    def _whole_time(self) -> float | None:
        """Return the seconds that the request has from its arrival on; None if not known."""
        context = self._journey.context
        if context.deadline is None or context.begun is None:
            return None
        return context.deadline - context.begun

    def _has_hung(self, attempt: Attempt, share: float) -> bool:
        """Tell whether a call has waited for the provider for most of a share of time."""
        since = attempt.waiting_since
        if since is None:
            return False
        return asyncio.get_running_loop().time() - since >= HANG_SHARE * share

    def _note_hang(self, permit: Pass, attempt: Attempt) -> None:
        """Count a failure of the provider whose call was not answered when the time was up.

        Only where the call had most of the time, and a client waited to the end: one that has left
        proves nothing. The call goes on; what it brings is kept, and counts as failed but once.
        """
        whole, context = self._whole_time(), self._journey.context
        if whole is None or not self._has_hung(attempt, whole):
            return
        if context.has_waiters is not None and not context.has_waiters():
            return
        self._is_uncounted = True
        log.warning("%s: no answer when the time of a request was up", self._route.name)
        self._health.hung(permit)

    def _take_back(self, permit: Pass, call: float | None) -> None:
        """Count an attempt no more that was not made."""
        self._health.unsent(permit)
        self._journey.left += 1
        self._made -= 1
        self._counts.attempts -= 1
        self._counts.retries -= self._made > 0
        if call is not None:
            self._budget.take_back(call)
        self._refund()

    def _note(self, error: ProviderError) -> None:
        self._failure = error
        self._journey.failed(error)
        self._counts.failures[type(error).__name__] += 1
        if isinstance(error, CredentialsRefused):
            log.error("%s: THE PROXY'S OWN KEY IS NOT ACCEPTED: %s", self._route.name, error)

    def give_up(self) -> None:
        """Say in the log why this route did not answer, and remember it."""
        journey = self._journey
        if journey.parts.missing:
            first = journey.inputs[next(iter(journey.parts.missing))]
            self._health.note_failed(self._lane, first)
        if self._failure is not None and not isinstance(self._failure, CredentialsRefused):
            log.warning("%s", self._failure)

    def _pay(self) -> None:
        self._receipt = self._budget.spend()

    def _refund(self) -> None:
        if self._receipt is not None:
            self._budget.refund(self._receipt)
            self._receipt = None
