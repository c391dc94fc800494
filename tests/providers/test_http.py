"""What every HTTP provider sends, and how it counts what came back."""

import asyncio
import threading
from dataclasses import replace

import pytest
from clock import FOR_EVER, some_turns, until
from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import Context, Outcome, Space
from embedding_proxy.providers.charge import Charge
from embedding_proxy.providers.errors import (
    AuthenticationError,
    DeadlineExceeded,
    InvalidAnswer,
    InvalidRequest,
    LocalQueueFull,
    MalformedResponse,
    ProviderError,
    RateLimited,
    UpstreamError,
)
from embedding_proxy.providers.openai_compatible import HttpProvider
from embedding_proxy.providers.profile import Limits, Profile, Timeouts
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.routing.router import Router
from embedding_proxy.providers.scheduling.scheduler import Scheduler
from fault_server import status, succeeding, vector_of

CL100K = Space("openai/m", 1536, tokenizer="cl100k_base")
FOREIGN = Space("vendor/m", 1536)
NOBODY = Context()


async def ask(upstream, inputs, space=FOREIGN, context=NOBODY, **declared):
    """Ask a provider that declares this, in front of an upstream, once."""
    profile = Profile(base_url=upstream.url, accepts_tokens=True, forward_user=True, **declared)
    async with HttpProvider("acme", profile, api_key="made-up-key") as provider:
        return await provider.ask("m", space, inputs, context)


async def test_the_answer_is_the_upstreams(upstream):
    """Vectors come in the order of the inputs, all of them bought, and the provider is named."""
    inputs = ["b", "a", (1, 2)]
    got = await ask(upstream, inputs)
    right = [vector_of("m", item).tobytes() for item in ("b", "a", [1, 2])]
    assert list(got.vectors) == right
    assert got.providers == ("acme",)
    assert list(got.outcomes) == [Outcome.MISS] * 3


@pytest.mark.parametrize(
    ("inputs", "sent"),
    [
        (["a"], ["a"]),
        (["", " a ", "\x00é"], ["", " a ", "\x00é"]),
        ([(1, 2)], [[1, 2]]),
        ([(1, 2), (3,)], [[1, 2], [3]]),
        (["1", (1,)], ["1", [1]]),
    ],
)
async def test_inputs_are_sent_as_they_are(inputs, sent, upstream):
    """Model, inputs and the wire format are the whole payload: no width, no null, no trimming."""
    await ask(upstream, inputs)
    (call,) = upstream.calls
    assert call.path == "/v1/embeddings"
    assert call.payload == {"model": "m", "input": sent, "encoding_format": "float"}


@pytest.mark.parametrize("item", ["\ud800", (1 << 70,)])
async def test_an_input_that_is_no_json_is_refused_unsent(item, upstream):
    """Half a surrogate pair or an endless number is the request's fault and costs nothing."""
    with pytest.raises(InvalidRequest, match="cannot be sent on"):
        await ask(upstream, ["a", item])
    assert upstream.calls == []


@pytest.mark.parametrize("user", [None, "", "someone"])
async def test_the_user_is_passed_on_when_there_is_one(user, upstream):
    """`user` is sent as the client said it, and left out where it said nothing."""
    await ask(upstream, ["a"], context=Context(user=user))
    payload = upstream.calls[0].payload
    assert payload.get("user", None) == user
    assert ("user" in payload) is (user is not None)


async def test_parameters_of_the_space_are_sent_as_json(upstream):
    """Fields that decide the numbers reach the upstream with the values the client gave."""
    fields = {"input_type": "query", "task": None, "deep": {"b": [1, 2.5], "a": True}, "é": "é"}
    await ask(upstream, ["a"], FOREIGN.with_parameters(fields))
    payload = upstream.calls[0].payload
    assert payload == {"model": "m", "input": ["a"], "encoding_format": "float", **fields}


def _total(total):
    return lambda reply: reply.__setitem__("usage", {"prompt_tokens": total, "total_tokens": total})


def _none(reply):
    del reply["usage"]


# What cl100k makes of these: 2 + 1 + 5 tokens.
INPUTS = ["hello world", "hello", (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("space", "usage", "counts", "exact"),
    [
        (CL100K, _total(8), [2, 1, 5], True),
        (CL100K, _total(999), [2, 1, 5], True),
        (CL100K, _none, [2, 1, 5], True),
        (FOREIGN, _total(36), [11, 5, 20], False),
        (FOREIGN, _total(0), [2, 1, 5], False),
        (FOREIGN, _none, [2, 1, 5], False),
    ],
)
async def test_tokens_are_counted_where_the_tokenizer_is_known(
    space, usage, counts, exact, upstream
):
    """Else the upstream's total is shared out, or estimated if it gave none, and marked so."""
    upstream.script.append(upstream.altered(usage))
    got = await ask(upstream, INPUTS, space)
    assert (list(got.tokens), got.counted) == (counts, exact)


@pytest.mark.parametrize("space", [CL100K, FOREIGN], ids=["known tokenizer", "unknown"])
@pytest.mark.parametrize("repeats", [10, 100_000])
async def test_counting_much_does_not_hold_up_the_loop(repeats, space, upstream, monkeypatch):
    """Large inputs are counted in a thread, small ones at once, with the same result."""
    threads = []
    count = tokens.count

    def spy(*args):
        threads.append(threading.current_thread())
        return count(*args)

    monkeypatch.setattr(tokens, "count", spy)
    upstream.script.append(upstream.altered(_none))
    got = await ask(upstream, ["a" + " a" * (repeats - 1), (7,)], space)
    assert (list(got.tokens), got.counted) == ([repeats, 1], space is CL100K)
    assert (set(threads) == {threading.main_thread()}) is (repeats == 10)
    assert len(set(threads)) == 1


async def test_an_answer_may_be_as_long_as_floats_are(upstream):
    """The limit of a reply grows with what was asked for: two megabytes of numbers are fine."""
    inputs = [f"input {i}" for i in range(64)]
    got = await ask(upstream, inputs)
    assert list(got.vectors) == [vector_of("m", item).tobytes() for item in inputs]


@pytest.mark.parametrize("size", [2 << 20, 8 << 20])
async def test_an_answer_far_beyond_what_was_asked_is_refused(size, upstream):
    """One input of 1536 numbers is not worth two megabytes, even of good JSON."""
    upstream.script.append(upstream.altered(lambda reply: reply.update(padding="x" * size)))
    with pytest.raises(UpstreamError, match="larger than expected"):
        await ask(upstream, ["a"])


async def test_a_refusal_keeps_status_wait_and_message(upstream):
    """Headers are read whatever their case, so the wait an upstream asks for is not lost."""
    upstream.script.append(status(429, headers={"retry-after": "3"}))
    with pytest.raises(RateLimited) as caught:
        await ask(upstream, ["a"])
    assert (caught.value.provider, caught.value.retry_after) == ("acme", 3)
    assert caught.value.refusal.message == "made-up 429"


@pytest.mark.parametrize("code", [201, 202, 203, 206, 299])
async def test_any_status_of_success_with_a_good_body_is_an_answer(code, upstream):
    """Gateways answer 201 to a POST: the vectors are good, and are paid for."""
    upstream.script.append(succeeding(code))
    got = await ask(upstream, ["a"])
    assert list(got.vectors) == [vector_of("m", "a").tobytes()]
    assert got.charge == Charge(1)


@pytest.mark.parametrize("code", [200, 202, 204])
async def test_an_empty_body_is_no_answer(code, upstream):
    """A status of success without a body holds no vector, and the error says so."""
    upstream.script.append(status(code, b""))
    with pytest.raises(MalformedResponse, match=rf"the answer is empty \(status {code}\)"):
        await ask(upstream, ["a"])


async def test_an_error_under_another_status_of_success_is_that_error(upstream):
    """What holds for 200 holds for its siblings."""
    upstream.script.append(status(201, {"object": "error", "code": 429, "message": "slow"}))
    with pytest.raises(RateLimited):
        await ask(upstream, ["a"])


async def test_a_missing_index_is_told_once(upstream, caplog):
    """Vectors without an index are placed, and the log says so at the first of them alone."""

    def unnumbered(reply):
        for item in reply["data"]:
            del item["index"]

    upstream.always = upstream.altered(unnumbered)
    async with HttpProvider("acme", Profile(base_url=upstream.url)) as provider:
        for _ in range(3):
            got = await provider.ask("m", FOREIGN, ["a", "b"], NOBODY)
    assert list(got.vectors) == [vector_of("m", item).tobytes() for item in "ab"]
    assert [record.message for record in caplog.records] == [
        "acme: its answers leave out `index`; the missing ones are deduced, or follow the order"
    ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda reply: reply["data"].pop(),
        lambda reply: reply["data"].append(reply["data"][0]),
        lambda reply: reply["data"][1].update(index=0),
        lambda reply: [one.update(embedding=[0.0] * 1536) for one in reply["data"]],
        lambda reply: [one.update(embedding=[0.5] * 1024) for one in reply["data"]],
    ],
    ids=["too few", "too many", "index twice", "zeros", "width"],
)
async def test_an_answer_is_checked_against_the_question(spoil, upstream):
    """Count and width are those of this very call; an answer spoilt as a whole gives nothing."""
    upstream.script.append(upstream.altered(spoil))
    parts = Parts()
    with pytest.raises(InvalidAnswer) as caught:
        await ask(upstream, ["a", "b"], context=Context(on_part=parts))
    assert (caught.value.index, caught.value.indices) == (None, ())
    assert parts.told == []


class Parts:
    """Keeps what it is told of."""

    def __init__(self):
        self.told = []

    async def __call__(self, places, part):
        self.told.append((list(places), part))


@pytest.mark.parametrize(
    ("space", "usage", "tokens", "charge"),
    [
        (CL100K, _total(8), ([2, 5], True), Charge(8)),
        (FOREIGN, _total(36), ([11, 20], False), Charge(36)),
        (FOREIGN, _none, ([2, 5], False), Charge(8)),
        (FOREIGN, lambda reply: reply.update(usage={"cost": 1e-9}), ([2, 5], False), Charge(8, 1)),
    ],
    ids=["exact", "apportioned", "estimated", "cost alone"],
)
async def test_a_bad_vector_spoils_its_input_alone(space, usage, tokens, charge, upstream):
    """The others are handed on with their tokens; the error names the place and the whole price."""

    def spoil(reply):
        usage(reply)
        reply["data"][1]["embedding"] = [0.0] * 1536

    upstream.script.append(upstream.altered(spoil))
    parts = Parts()
    with pytest.raises(InvalidAnswer, match="acme: embedding 1: all numbers are zero") as caught:
        await ask(upstream, INPUTS, space, Context(on_part=parts))
    ((places, part),) = parts.told
    assert places == [0, 2]
    right = [vector_of("m", item).tobytes() for item in ("hello world", [1, 2, 3, 4, 5])]
    assert list(part.vectors) == right
    assert ((list(part.tokens), part.counted), part.charge) == (tokens, charge)
    assert (part.providers, list(part.outcomes)) == (("acme",), [Outcome.MISS] * 2)
    assert (caught.value.index, caught.value.indices) == (1, (1,))
    assert caught.value.charge == charge


@pytest.mark.parametrize("keeps", [True, False])
async def test_a_call_with_a_bad_vector_is_billed_once(keeps, upstream):
    """Before its good part is told, shared among all inputs, whether it names a price or not."""
    upstream.always = upstream.altered(
        lambda reply: (reply.pop("usage"), reply["data"][0].update(embedding=None))
    )
    events = []

    async def keep(places, part):
        assert part.charge is None
        events.append(("part", list(places)))

    def charge(bill):
        total = sum(bill.tokens), sum(bill.nanodollars)
        events.append((bill.provider, list(bill.places), *total))

    async with HttpProvider("acme", Profile(base_url=upstream.url)) as provider:
        scheduler = Scheduler(Router([Route(provider, "m", price=1.0, retries=0)]))
        context = Context(on_charge=charge, on_part=keep if keeps else None)
        with pytest.raises(InvalidAnswer):
            await scheduler.embed(CL100K, ["hello", "world"], context)
    assert events == [("acme", [0, 1], 2, 2000), ("part", [1])][: 2 if keeps else 1]


async def test_shuffled_answers_are_put_in_order(upstream):
    """An upstream may answer in any order as long as it numbers its answers."""
    upstream.script.append(upstream.altered(lambda reply: reply["data"].reverse()))
    inputs = ["a", "b", "c"]
    got = await ask(upstream, inputs)
    assert list(got.vectors) == [vector_of("m", item).tobytes() for item in inputs]


async def test_a_wait_inside_a_200_is_kept(upstream):
    """Headers count for an error inside a 200 as well."""
    body = {"error": {"code": 429, "message": "slow"}}
    upstream.script.append(status(200, body, {"Retry-After": "3"}))
    with pytest.raises(RateLimited) as caught:
        await ask(upstream, ["a"])
    assert caught.value.retry_after == 3


@pytest.mark.parametrize(
    ("declared", "fields"),
    [
        ({}, {"input_type": "query", "anything": 1}),
        ({"extra_fields": frozenset({"task"})}, {"task": "x"}),
    ],
)
async def test_fields_the_upstream_knows_are_sent(declared, fields, upstream):
    """Without a list every field is passed on, with one those on it."""
    await ask(upstream, ["a"], FOREIGN.with_parameters(fields), **declared)
    payload = upstream.calls[0].payload
    assert {name: payload[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ({"extra_fields": frozenset()}, "Unrecognized request argument supplied: width"),
        ({"extra_fields": frozenset({"task"})}, "Unrecognized request argument supplied: width"),
        ({"dimensions_field": "width"}, "asked for by `dimensions`, not by `width`"),
        (
            {"dimensions_field": "width", "extra_fields": frozenset({"width"})},
            "asked for by `dimensions`",
        ),
    ],
)
async def test_other_fields_are_refused_unsent(declared, problem, upstream):
    """A field that would be ignored, or is another's to say, is a 400 that names it."""
    space = FOREIGN.with_parameters({"width": 3})
    with pytest.raises(InvalidRequest, match=problem) as caught:
        await ask(upstream, ["a"], space, **declared)
    assert (caught.value.status, caught.value.param) == (400, "width")
    assert upstream.calls == []


def test_whether_a_space_can_be_asked_is_known_beforehand():
    """A router can find the route that knows a field without asking anybody."""
    profile = Profile(base_url="http://h", extra_fields=frozenset({"task"}))
    provider = HttpProvider("acme", profile)
    assert provider.objection(FOREIGN.with_parameters({"task": 1})) is None
    assert provider.objection(FOREIGN.with_parameters({"task": 1, "other": 1})).param == "other"


@pytest.mark.parametrize(
    ("sent", "field", "payload"),
    [
        (True, "output_dimension", {"output_dimension": 1536}),
        (True, None, {}),
        (False, "output_dimension", {}),
    ],
)
async def test_the_native_width_is_sent_only_where_it_must_be(sent, field, payload, upstream):
    """A model that says so, at an upstream that has a word for it, is asked for its width."""
    upstream.script.append(upstream.altered(lambda _: None))
    space = replace(FOREIGN, send_dimensions=sent)
    await ask(upstream, ["a"], space, dimensions_field=field)
    common = {"model": "m", "input": ["a"], "encoding_format": "float"}
    assert upstream.calls[0].payload == {**common, **payload}


async def test_the_user_is_dropped_where_it_is_not_known(upstream):
    """`user` changes no number, so an upstream that refuses it is asked without."""
    profile = Profile(base_url=upstream.url)
    async with HttpProvider("acme", profile) as provider:
        await provider.ask("m", FOREIGN, ["a"], Context(user="someone"))
    assert "user" not in upstream.calls[0].payload


async def test_without_a_key_none_is_sent(upstream):
    """A server of one's own is asked without a header for a key."""
    async with HttpProvider("acme", Profile(base_url=upstream.url)) as provider:
        await provider.ask("m", FOREIGN, ["a"], NOBODY)
    assert "Authorization" not in upstream.calls[0].headers


@pytest.mark.parametrize("code", [200, 401])
async def test_a_key_that_is_repeated_is_not_passed_on(code, upstream):
    """Some upstreams quote the key they refuse; neither log nor client sees it."""
    body = {"error": {"code": 401, "message": "no such key: made-up-key."}}
    upstream.script.append(status(code, body))
    with pytest.raises(AuthenticationError, match=r"no such key: \*\*\*\.") as caught:
        await ask(upstream, ["a"])
    assert "made-up-key" not in repr(caught.value.refusal)


@pytest.mark.parametrize("code", [200, 401, 500])
@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": 'made-up-key "embedding"', "code": "made-up-key"}, "embedding": 1},
        {"detail": [{"loc": ["made-up-key"], "msg": "embedding of made-up-key-"}]},
        b'"embedding" made-up-key',
        b"<html><title>made-up-key</title>embedding",
        b'\xef\xbb\xbf{"error": "made\\u002dup-key \\"embedding\\""}',
    ],
    ids=["object", "detail", "text", "html", "escaped"],
)
async def test_a_key_is_taken_out_of_every_error(body, code, upstream, caplog):
    """Also of a body that speaks of an embedding, of codes, of pages, and however it is escaped."""
    upstream.script.append(status(code, body))
    with pytest.raises(ProviderError) as caught:
        await ask(upstream, ["a"])
    said = f"{caught.value} {caught.value.refusal!r} {caplog.text}"
    assert "made-up" not in said
    assert "***" in said


@pytest.mark.parametrize("by", ["space", "profile"])
async def test_a_length_that_is_promised_is_checked(by, upstream):
    """Twice a vector is no vector of a model, or of an upstream, whose vectors have length 1."""

    def double(reply):
        item = reply["data"][0]
        item["embedding"] = [2 * number for number in item["embedding"]]

    upstream.always = upstream.altered(double)
    await ask(upstream, ["a"])
    space = replace(FOREIGN, unit_norm=by == "space")
    with pytest.raises(InvalidAnswer, match="length 2 where"):
        await ask(upstream, ["a"], space, unit_norm=by == "profile")


async def test_one_vector_for_all_texts_is_refused(upstream):
    """An upstream that answers every text alike is not believed, but may be asked for each."""

    def alike(reply):
        for item in reply["data"]:
            item["embedding"] = reply["data"][0]["embedding"]

    upstream.always = upstream.altered(alike)
    parts = Parts()
    with pytest.raises(InvalidAnswer, match="embeddings 0 and 1 are one") as caught:
        await ask(upstream, ["a", "b", "c"], context=Context(on_part=parts))
    assert (caught.value.index, caught.value.indices) == (None, (0, 1, 2))
    assert parts.told == []
    assert len((await ask(upstream, ["a"])).vectors) == 1


@pytest.mark.parametrize(
    ("told", "lines"),
    [
        ("m", 0),
        ("vendor/m", 0),
        ("M-v2", 0),
        ("other", 1),
        (None, 0),
        ("", 0),
        (7, 0),
    ],
)
async def test_another_model_in_the_reply_passes_with_one_line(told, lines, upstream, caplog):
    """A reply that names another model is good, counted each time, and logged once."""
    upstream.always = upstream.altered(lambda reply: reply.update(model=told))
    async with HttpProvider("acme", Profile(base_url=upstream.url)) as provider:
        for _ in range(3):
            await provider.ask("m", FOREIGN, ["a"], NOBODY)
    message = (
        "acme: answers as 'other' when asked for 'm'; `embedding-proxy check` compares the routes"
    )
    assert [r.message for r in caplog.records] == [message] * lines
    assert provider.other_models == ({"other": 3} if lines else {})


async def test_no_more_calls_at_once_than_the_limit(upstream):
    """Of five calls two are under way; the others wait, and each end lets one more go."""
    upstream.gate = asyncio.Event()
    profile = Profile(base_url=upstream.url, limits=Limits(concurrency=2))
    async with HttpProvider("acme", profile) as provider:
        tasks = [
            asyncio.create_task(provider.ask("m", FOREIGN, [str(i)], NOBODY)) for i in range(5)
        ]
        await until(lambda: len(upstream.calls) == 2)
        await some_turns()
        assert len(upstream.calls) == 2
        upstream.gate.set()
        await asyncio.gather(*tasks)
    assert len(upstream.calls) == 5


async def test_waiting_for_a_turn_counts(upstream, move):
    """A call whose time is up while it waits is not sent, and takes nobody's place."""
    upstream.gate = asyncio.Event()
    profile = Profile(base_url=upstream.url, limits=Limits(concurrency=1), timeouts=Timeouts(1e6))
    async with HttpProvider("acme", profile) as provider:
        first = asyncio.create_task(provider.ask("m", FOREIGN, ["a"], NOBODY))
        await until(lambda: upstream.calls)
        soon = Context(deadline=asyncio.get_running_loop().time() + 1000)
        waiting = asyncio.create_task(provider.ask("m", FOREIGN, ["b"], soon))
        await some_turns()
        await move(1001)
        with pytest.raises(DeadlineExceeded, match="waited its turn at acme"):
            await waiting
        upstream.gate.set()
        await first
        await provider.ask("m", FOREIGN, ["c"], NOBODY)
    assert upstream.inputs == ["a", "c"]


class Waits:
    """Records how long it was told to sleep, and does not."""

    def __init__(self):
        self.seconds = []

    async def __call__(self, seconds):
        self.seconds.append(seconds)


@pytest.mark.parametrize(("learn", "waits"), [(True, 1), (False, 0)])
async def test_limits_in_headers_are_kept_for_their_model(learn, waits, upstream):
    """What a reply tells of its model's limit delays the next call of that model, if wanted."""
    headers = {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "10m0s",
    }
    body = upstream.reply({"model": "m", "input": ["a"]})
    upstream.script.append(status(200, body, headers))
    sleep = Waits()
    profile = Profile(base_url=upstream.url, limits=Limits(from_headers=learn))
    async with HttpProvider("acme", profile, sleep=sleep) as provider:
        await provider.ask("m", FOREIGN, ["a"], NOBODY)
        await provider.ask("other", FOREIGN, ["a"], NOBODY)
        assert sleep.seconds == []
        await provider.ask("m", FOREIGN, ["a"], NOBODY)
    assert sleep.seconds == pytest.approx([60] * waits, abs=20)


async def test_declared_limits_hold_for_all_models(upstream):
    """A limit of calls a minute is the provider's, whichever model is asked."""
    sleep = Waits()
    profile = Profile(base_url=upstream.url, limits=Limits(requests_per_minute=2))
    async with HttpProvider("acme", profile, sleep=sleep) as provider:
        for model in ("m", "n", "o"):
            await provider.ask(model, FOREIGN, ["a"], NOBODY)
    assert sleep.seconds == pytest.approx([30], abs=10)


async def test_a_refusal_with_a_wait_holds_the_next_call_back(upstream):
    """After a 429 that says 5 seconds nobody asks that model before."""
    upstream.script.append(status(429, headers={"Retry-After": "5"}))
    sleep = Waits()
    async with HttpProvider("acme", Profile(base_url=upstream.url), sleep=sleep) as provider:
        with pytest.raises(RateLimited):
            await provider.ask("m", FOREIGN, ["a"], NOBODY)
        await provider.ask("m", FOREIGN, ["a"], NOBODY)
    assert sleep.seconds == pytest.approx([5], abs=4)


class Gates:
    """A wait that ends when the test says so."""

    def __init__(self):
        self.seconds = []
        self.open = asyncio.Event()

    async def __call__(self, seconds):
        self.seconds.append(seconds)
        await self.open.wait()


async def test_who_queues_for_the_limit_of_one_model_keeps_no_place_from_another(upstream):
    """Calls of a model whose limit is used up wait in its queue, and another model's pass."""
    spent = {f"x-ratelimit-{what}-requests": n for what, n in
             (("limit", "10"), ("remaining", "0"), ("reset", "1m0s"))}  # fmt: skip
    body = upstream.reply({"model": "m", "input": ["a"]})
    upstream.script.append(status(200, body, spent))
    sleep = Gates()
    profile = Profile(base_url=upstream.url, limits=Limits(concurrency=2))
    async with HttpProvider("acme", profile, sleep=sleep) as provider:
        await provider.ask("m", FOREIGN, ["a"], NOBODY)
        queue = [asyncio.create_task(provider.ask("m", FOREIGN, ["b"], NOBODY)) for _ in range(5)]
        await some_turns()
        assert len(sleep.seconds) == 1
        async with asyncio.timeout(FOR_EVER):
            await provider.ask("other", FOREIGN, ["c"], NOBODY)
        assert upstream.inputs == ["a", "c"]
        sleep.open.set()
        await asyncio.gather(*queue)


@pytest.mark.parametrize("wait", [5, 30])
async def test_a_refusal_with_a_wait_holds_back_who_waits_for_a_place(wait, upstream):
    """They wait as they were told, without keeping a place, or are told at once if it is long."""
    upstream.script.append(status(429, headers={"Retry-After": str(wait)}))
    upstream.gate = asyncio.Event()
    sleep = Gates()
    profile = Profile(base_url=upstream.url, limits=Limits(concurrency=1))
    async with HttpProvider("acme", profile, sleep=sleep) as provider:
        first = asyncio.create_task(provider.ask("m", FOREIGN, ["a"], NOBODY))
        await some_turns()
        others = [asyncio.create_task(provider.ask("m", FOREIGN, ["b"], NOBODY)) for _ in range(3)]
        await some_turns()
        upstream.gate.set()
        with pytest.raises(RateLimited) as refused:
            await first
        assert type(refused.value) is RateLimited
        async with asyncio.timeout(FOR_EVER):
            await provider.ask("other", FOREIGN, ["c"], NOBODY)
        sleep.open.set()
        ended = await asyncio.gather(*others, return_exceptions=True)
    if wait == 5:
        assert sleep.seconds == pytest.approx([5] * 3, abs=4)
        assert upstream.inputs == ["a", "c", "b", "b", "b"]
    else:
        assert [type(one) for one in ended] == [LocalQueueFull] * 3
        assert all(one.retry_after == pytest.approx(30, abs=10) for one in ended)
        assert upstream.inputs == ["a", "c"]


async def test_a_call_that_cannot_begin_in_time_is_told_so(upstream, move):
    """With all places taken past the time to begin, the queue is full; no call is made."""
    upstream.gate = asyncio.Event()
    profile = Profile(base_url=upstream.url, limits=Limits(concurrency=1), timeouts=Timeouts(1e6))
    now = asyncio.get_running_loop().time()
    context = Context(deadline=now + 6000, start_deadline=now + 1000)
    async with HttpProvider("acme", profile) as provider:
        first = asyncio.create_task(provider.ask("m", FOREIGN, ["a"], NOBODY))
        await until(lambda: upstream.calls)
        waiting = asyncio.create_task(provider.ask("m", FOREIGN, ["b"], context))
        await some_turns()
        await move(1001)
        with pytest.raises(LocalQueueFull, match="at a time") as caught:
            await waiting
        assert (caught.value.refusal.status, caught.value.retry_after) == (429, None)
        upstream.gate.set()
        await first
        await provider.ask("m", FOREIGN, ["c"], NOBODY)  # no place was lost
    assert upstream.inputs == ["a", "c"]


async def test_a_limit_that_lets_a_call_begin_too_late_refuses_it_at_once(upstream):
    """Half a minute's wait fits the request's time, and not that to begin."""
    now = asyncio.get_running_loop().time()
    context = Context(deadline=now + 1000, start_deadline=now + 20)
    profile = Profile(base_url=upstream.url, limits=Limits(requests_per_minute=2))
    async with HttpProvider("acme", profile) as provider:
        for item in "ab":
            await provider.ask("m", FOREIGN, [item], context)
        with pytest.raises(LocalQueueFull) as caught:
            await provider.ask("m", FOREIGN, ["c"], context)
    assert caught.value.retry_after == pytest.approx(30, abs=8)


async def test_who_has_gone_while_queueing_for_a_limit_is_not_sent(upstream):
    """The call is not made, and leaves its room within the limit to the next one."""
    with pytest.raises(LocalQueueFull):
        await ask(upstream, ["a"], context=Context(is_needed=lambda: False))
    assert not upstream.calls
