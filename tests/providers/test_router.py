"""Which route is asked, how often, and how long is waited in between; nothing here really waits."""

import asyncio
import contextlib
from dataclasses import replace
from itertools import pairwise

import pytest
from embedding_proxy.providers.base import Context, Embedded, Space
from embedding_proxy.providers.errors import (
    AuthenticationError,
    DeadlineExceeded,
    InvalidAnswer,
    InvalidRequest,
    ModelNotFound,
    NoRoute,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    Refusal,
    TransientError,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.providers.routing.policy import MAX_ATTEMPTS, MAX_WAIT_S
from embedding_proxy.providers.routing.router import Route, Router
from embedding_proxy.providers.scheduling.scheduler import Scheduler
from embedding_proxy.providers.upstream.retry_after import FIRST_COOLDOWN
from hypothesis import given, settings
from hypothesis import strategies as st

SPACE = Space("vendor/model", 2)
NOBODY = Context()


def failing(kind: type[ProviderError], wait: float | None = None) -> ProviderError:
    """Return a failure of a provider, with the wait it asks for."""
    return kind("acme", "made up", Refusal(500, "made up", retry_after=wait))


def limited(wait: float | None) -> ProviderError:
    """Return a 429 with that Retry-After."""
    return failing(RateLimited, wait)


class Player:
    """A provider that plays its script, one item for each attempt; then it answers."""

    def __init__(self, name, stage, script=(), *, always=None, accepts_tokens=True):
        self.name = name
        self.accepts_tokens = accepts_tokens
        self._stage = stage
        self._script = list(script)
        self._always = always

    async def ask(self, model, space, inputs, context):
        self._stage.asked.append(self.name)
        self._stage.arguments.append((model, space, inputs, context))
        outcome = self._script.pop(0) if self._script else self._always
        if outcome is not None:
            raise outcome
        return Embedded([b"8 bytes!"], [1], counted=True, providers=(self.name,))


class Stage:
    """A router over players named a, b, c …; `asked` and `waits` tell what happened."""

    def __init__(self, *scripts, **options):
        self.asked = []
        self.arguments = []
        self.waits = []
        names = "abcdefgh"
        self.players = [
            script if isinstance(script, Player) else Player(name, self, script)
            for name, script in zip(names, scripts, strict=False)
        ]
        self.router = Router(
            [Route(player, f"{player.name}-model") for player in self.players],
            **{"sleep": self._wait, "upstreams": HealthRegistry(self._clock), **options},
        )

    def _clock(self):
        return asyncio.get_running_loop().time() + sum(self.waits)

    async def _wait(self, seconds):
        self.waits.append(seconds)

    async def embed(self, inputs=("text",), context=NOBODY):
        """Embed, and return who answered."""
        answer = await Scheduler(self.router).embed(SPACE, inputs, context)
        return answer.providers[0]

    @property
    def story(self) -> str:
        """Who was asked, in order."""
        return "".join(self.asked)


def in_seconds(seconds: float) -> Context:
    """Return a context whose deadline is so far away."""
    return Context(deadline=asyncio.get_running_loop().time() + seconds)


FAULT = failing(UpstreamError)
NO_CREDIT = failing(QuotaExceeded)
TIMEOUT = failing(UpstreamTimeout)


@pytest.mark.parametrize(
    ("scripts", "story"),
    [
        ([[]], "a"),
        ([[], []], "a"),
        ([[FAULT]], "aa"),
        ([[FAULT, FAULT]], "aaa"),
        ([[FAULT], []], "aa"),
        ([[FAULT, FAULT], []], "aab"),
        ([[NO_CREDIT], []], "ab"),
        ([[NO_CREDIT], [FAULT]], "abb"),
        ([[TIMEOUT], []], "ab"),
        ([[TIMEOUT], [FAULT]], "abb"),
        ([[FAULT, TIMEOUT], []], "aab"),
        ([[FAULT, NO_CREDIT], []], "aab"),
        ([[FAULT], [], []], "ab"),
        ([[NO_CREDIT], [FAULT], []], "abc"),
        ([[NO_CREDIT], [TIMEOUT], []], "abc"),
        ([[FAULT], [FAULT], [], []], "abc"),
    ],
)
async def test_the_first_route_that_can_answers(scripts, story):
    """Routes are asked in order; only what may pass is tried again; the last asked answers."""
    stage = Stage(*scripts)
    assert await stage.embed() == story[-1]
    assert stage.story == story


@pytest.mark.parametrize(
    ("routes", "story"), [(1, "aaa"), (2, "aab"), (3, "abc"), (4, "abc"), (5, "abc")]
)
async def test_three_attempts_are_all_there_are(routes, story):
    """However many routes there are, attempts are three, and each route has one if it can be."""
    errors = [UpstreamError(name, "made up", Refusal(500, "made up")) for name in "abcde"[:routes]]
    stage = Stage()
    players = [Player(name, stage, always=e) for name, e in zip("abcde", errors, strict=False)]
    stage.router.routes = tuple(Route(player, "m") for player in players)
    with pytest.raises(UpstreamError) as caught:
        await stage.embed()
    assert stage.story == story
    assert caught.value.provider == story[-1]
    assert len(stage.waits) == len(story) - len(set(story))


@pytest.mark.parametrize(
    ("retries", "story"),
    [
        ([None], "aaa"),
        ([0], "a"),
        ([1], "aa"),
        ([4], "aaaaa"),
        ([0, None], "abb"),
        ([None, 0], "aab"),
        ([0, 0], "ab"),
        ([4, None], "aaaaab"),
        ([1, 2], "aabbb"),
        ([0, None, None, 0], "abcd"),
    ],
)
async def test_a_provider_is_asked_again_as_often_as_is_said(retries, story):
    """A provider's own number counts for it, and leaves the other routes their attempts."""
    stage = Stage()
    players = [Player(name, stage, always=FAULT) for name in "abcd"[: len(retries)]]
    stage.router.routes = tuple(
        Route(player, "m", retries=often) for player, often in zip(players, retries, strict=True)
    )
    with pytest.raises(UpstreamError):
        await stage.embed()
    assert stage.story == story


async def test_no_number_of_retries_beats_the_budget():
    """Requests that fail again and again make no more calls than all together may."""
    stage = Stage(upstreams=HealthRegistry(lambda: 1000.0))
    for name in "abcd":
        # A breaker would end it before: each request meets another provider.
        stage.router.routes = (Route(Player(name, stage, always=limited(None)), "m", retries=100),)
        with pytest.raises(RateLimited):
            await stage.embed()
    assert len(stage.asked) == 4 + 10


@pytest.mark.parametrize("kind", [RateLimited, UpstreamError, Unreachable, InvalidAnswer])
async def test_what_may_pass_is_tried_again_after_a_short_wait(kind):
    """Without a word from the upstream the wait is drawn at random, and is short."""
    stage = Stage([failing(kind)])
    assert await stage.embed() == "a"
    (wait,) = stage.waits
    assert 0 <= wait <= 0.5


async def test_waits_are_spread():
    """Callers that fail together do not come back together, and none waits long."""
    waits = []
    for _ in range(10):
        stage = Stage([failing(RateLimited)])
        await stage.embed()
        waits += stage.waits
    assert len(set(waits)) == 10
    assert max(waits) <= 0.5


@pytest.mark.parametrize(
    "kind", [AuthenticationError, QuotaExceeded, ModelNotFound, UpstreamTimeout, ProviderError]
)
async def test_what_will_not_pass_goes_to_the_next_route_at_once(kind):
    """A key, a bill, a model, and the time an attempt has used up do not mend by waiting."""
    stage = Stage([failing(kind, wait=1.0)], [])
    assert await stage.embed() == "b"
    assert (stage.story, stage.waits) == ("ab", [])


@pytest.mark.parametrize(
    "kind", [AuthenticationError, QuotaExceeded, ModelNotFound, UpstreamTimeout, ProviderError]
)
async def test_what_will_not_pass_is_not_tried_again_on_the_last_route(kind):
    """Where there is no other route, the failure itself is the answer, at once."""
    error = failing(kind, wait=1.0)
    stage = Stage([error])
    with pytest.raises(kind) as caught:
        await stage.embed()
    assert caught.value is error
    assert (stage.story, stage.waits) == ("a", [])


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("wrong"),
        InvalidRequest("too large", status=413),
        DeadlineExceeded("over"),
        NoRoute("not installed"),
        ValueError("a mistake of ours"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("before", [[], [FAULT]])
async def test_what_no_other_route_could_mend_ends_the_matter(before, error):
    """A refused input, a deadline, a cancelled caller and a bug of ours are handed up as is."""
    stage = Stage([*before, error], [])
    with pytest.raises(type(error)) as caught:
        await stage.embed()
    assert caught.value.args == error.args
    assert stage.story == "a" * (1 + len(before))


@pytest.mark.parametrize("wait", [0.25, 7.0, MAX_WAIT_S - 0.01])
async def test_the_wait_an_upstream_asks_for_is_kept(wait):
    """Retry-After is waited for to the letter, neither shortened nor drawn at random."""
    stage = Stage([limited(wait), limited(wait)])
    assert await stage.embed() == "a"
    assert stage.waits == [wait, wait]


async def test_each_failure_is_waited_for_as_it_asks():
    """A later failure's wait replaces an earlier one's."""
    stage = Stage([limited(5.0), limited(None)])
    await stage.embed()
    assert stage.waits[0] == 5.0
    assert stage.waits[1] <= 2 * FIRST_COOLDOWN + 0.5


@pytest.mark.parametrize("wait", [MAX_WAIT_S, 3600.0])
async def test_too_long_a_wait_goes_to_the_next_route_at_once(wait):
    """No client waits for an upstream's hour when another upstream is there."""
    stage = Stage([limited(wait)], [])
    assert await stage.embed() == "b"
    assert (stage.story, stage.waits) == ("ab", [])


async def test_too_long_a_wait_is_the_clients_when_no_route_is_left():
    """The failure comes up with its Retry-After, for the client to keep."""
    stage = Stage([limited(3600.0)])
    with pytest.raises(RateLimited) as caught:
        await stage.embed()
    assert caught.value.retry_after == 3600
    assert (stage.story, stage.waits) == ("a", [])


@pytest.mark.parametrize(("wait", "story"), [(2.0, "aa"), (6.0, "ab")])
async def test_a_wait_must_fit_the_deadline(wait, story):
    """A wait that would outlast the request is not begun."""
    stage = Stage([limited(wait)], [])
    assert await stage.embed(context=in_seconds(5)) == story[-1]
    assert stage.story == story
    assert stage.waits == [wait] * (len(story) - len(set(story)))


async def test_little_time_is_enough_for_a_short_wait():
    """Half a second before the deadline, a failure that asks for no wait is still tried again."""
    stage = Stage([limited(None)], [])
    assert await stage.embed(context=in_seconds(0.5)) == "a"
    assert stage.story == "aa"


async def test_nothing_is_tried_after_the_deadline():
    """With no time left there is no second attempt, and the client is told that."""
    stage = Stage([limited(None)])
    with pytest.raises(DeadlineExceeded):
        await stage.embed(context=in_seconds(-1))
    assert len(stage.story) <= 1


async def test_each_route_is_asked_for_its_own_name_of_the_model():
    """Space, inputs, user and time go through untouched; the model's name is the route's."""
    stage = Stage([NO_CREDIT], [])
    context = replace(in_seconds(5), user="alice", namespace="hers")
    await stage.embed(["one", "two"], context)
    assert [arguments[:3] for arguments in stage.arguments] == [
        ("a-model", SPACE, ["one", "two"]),
        ("b-model", SPACE, ["one", "two"]),
    ]
    for *_, sent in stage.arguments:
        assert (sent.deadline, sent.user) == (context.deadline, context.user)
        assert sent.finishes_calls


@pytest.mark.parametrize(
    ("inputs", "takes", "story"),
    [
        (["text"], [False, True], "a"),
        ([(1, 2)], [False, True], "b"),
        ([(1, 2)], [True, False], "a"),
        (["text", (1, 2)], [False, True], "b"),
        (["text", (1, 2)], [False, False, True], "c"),
    ],
)
async def test_token_arrays_go_only_where_they_are_taken(inputs, takes, story):
    """One token array among the inputs is enough to pass over a provider of texts."""
    stage = Stage()
    players = [Player(n, stage, accepts_tokens=t) for n, t in zip("abc", takes, strict=False)]
    stage.router.routes = tuple(Route(player, "m") for player in players)
    assert await stage.embed(inputs) == story
    assert stage.story == story


async def test_routes_that_are_passed_over_keep_no_attempt_in_reserve():
    """The only route that takes token arrays has all three attempts."""
    stage = Stage()
    players = [
        Player("a", stage, accepts_tokens=False),
        Player("b", stage, always=FAULT),
        Player("c", stage, accepts_tokens=False),
    ]
    stage.router.routes = tuple(Route(player, "m") for player in players)
    with pytest.raises(UpstreamError):
        await stage.embed([(1, 2)])
    assert stage.story == "bbb"


async def test_token_arrays_that_nobody_takes_are_the_clients_mistake():
    """With providers of texts alone, a token array is a 400 about `input`."""
    stage = Stage()
    stage.router.routes = (Route(Player("a", stage, accepts_tokens=False), "m"),)
    with pytest.raises(InvalidRequest, match="token arrays") as caught:
        await stage.embed(["text", (1, 2)])
    assert (caught.value.status, caught.value.param, stage.story) == (400, "input", "")


@pytest.mark.parametrize("inputs", [["text"], [(1, 2)]])
async def test_without_a_route_the_remedy_is_said(inputs):
    """The error is the text that was given for this case."""
    stage = Stage(unavailable="set OPENAI_API_KEY")
    with pytest.raises(NoRoute, match=r"^set OPENAI_API_KEY$"):
        await stage.embed(inputs)


async def test_a_rate_limit_that_is_known_is_met_once_by_each_request():
    """The first request tries again; those that come after it try once, when the rest is over."""
    stage = Stage()
    stage.router.routes = (Route(Player("a", stage, always=limited(None)), "m"),)
    for _ in range(4):
        with pytest.raises(RateLimited):
            await stage.embed()
    assert stage.story == "aaa" + "aaa"


async def test_a_failed_route_is_logged(caplog):
    """The operator reads which provider failed and why, once for each route that was given up."""
    stage = Stage([FAULT, NO_CREDIT], [])
    await stage.embed()
    messages = [(r.levelname, r.getMessage()) for r in caplog.records if "router" in r.name]
    assert messages == [("WARNING", "acme: made up")]


async def test_the_router_waits_on_the_loop_by_default():
    """Without an injected wait it is asyncio's own, which holds up nobody."""
    stage = Stage()
    router = Router([Route(Player("a", stage, [limited(0.0)]), "m")])
    got = await Scheduler(router).embed(SPACE, ["text"], NOBODY)
    assert got.providers == ("a",)


FAILURES = st.sampled_from(
    [
        *(failing(k) for k in (RateLimited, UpstreamError, Unreachable, InvalidAnswer)),
        *(failing(k) for k in (AuthenticationError, QuotaExceeded, ModelNotFound, UpstreamTimeout)),
        limited(3600.0),
        limited(1.0),
        InvalidRequest("wrong"),
        None,
    ]
)


@given(st.lists(st.lists(FAILURES, max_size=4), min_size=1, max_size=5))
@settings(deadline=None)
async def test_the_laws_of_trying(scripts):
    """Never more than three attempts, never back to an earlier route, no waiting for the settled.

    What comes up is what the last attempt gave, unless only an earlier one may pass, and a route is
    asked again only after a wait.
    """
    stage = Stage(*scripts)
    played = [(name, o) for name, s in zip("abcde", scripts, strict=False) for o in [*s, None]]
    try:
        ended = await stage.embed()
    except (ProviderError, InvalidRequest) as error:
        ended = error
    story = stage.story
    assert 1 <= len(story) <= MAX_ATTEMPTS
    assert list(story) == sorted(story)
    assert set(story) == set("abcde"[: len(set(story))])
    outcomes = []
    for name in story:
        turn = sum(1 for other, _ in outcomes if other == name)
        outcomes.append((name, [o for other, o in played if other == name][turn]))
    assert len(stage.waits) == len(story) - len(set(story))
    said = [outcome for _, outcome in outcomes]
    passing = [outcome for outcome in said if isinstance(outcome, TransientError)]
    if said[-1] is None:
        assert ended == story[-1]
    elif isinstance(said[-1], InvalidRequest):
        assert ended.args == said[-1].args
    else:
        told = (passing or said)[-1]
        assert (type(ended), ended.args) == (type(told), told.args)
    for (name, outcome), (after, _) in pairwise(outcomes):
        assert isinstance(outcome, ProviderError)
        if after == name:
            assert isinstance(outcome, TransientError)
            assert not isinstance(outcome, UpstreamTimeout)
            assert outcome.retry_after != 3600


async def test_no_wait_outlasts_the_request():
    """A wait drawn at random ends before the deadline too."""
    stage = Stage(*[[limited(None)] * 3])
    with contextlib.suppress(RateLimited, DeadlineExceeded):
        await stage.embed(context=in_seconds(0.001))
    assert all(wait <= 0.001 for wait in stage.waits)


async def test_no_call_is_made_after_a_cooldown_that_nobody_waited_for():
    """A request that comes in a cooldown waits; if its client goes meanwhile, it is not sent."""
    stage = Stage([limited(30.0)])
    with pytest.raises(RateLimited):
        await stage.embed()
    stage.waits.append(15.0)
    abandoned = asyncio.get_running_loop().create_future()

    async def leave(seconds):
        abandoned.set_result(None)
        await stage._wait(seconds)

    stage.router.sleep = leave
    with pytest.raises(DeadlineExceeded):
        await stage.embed(context=Context(abandoned=abandoned))
    assert stage.story == "a"
