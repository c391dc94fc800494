"""What every HTTP provider sends, and how it counts what came back."""

import threading

import pytest
from fault_server import status, vector_of

from providers import tokens
from providers.base import (
    Context,
    InputRefused,
    InvalidAnswer,
    Outcome,
    RateLimited,
    Space,
    UpstreamFault,
)
from providers.http import HttpProvider
from providers.profile import Profile

CL100K = Space("openai/m", 1536, tokenizer="cl100k_base")
FOREIGN = Space("vendor/m", 1536)
NOBODY = Context()


async def ask(upstream, inputs, space=FOREIGN, context=NOBODY, **declared):
    """Ask a provider that declares this, in front of an upstream, once."""
    profile = Profile(base_url=upstream.url, accepts_tokens=True, sends_user=True, **declared)
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
    with pytest.raises(InputRefused, match="cannot be sent on"):
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
        (FOREIGN, _total(0), [0, 0, 0], False),
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
    assert (threads == [threading.main_thread()]) is (repeats == 10)
    assert len(threads) == 1


async def test_an_answer_may_be_as_long_as_floats_are(upstream):
    """The limit of a reply grows with what was asked for: two megabytes of numbers are fine."""
    inputs = [f"input {i}" for i in range(64)]
    got = await ask(upstream, inputs)
    assert list(got.vectors) == [vector_of("m", item).tobytes() for item in inputs]


@pytest.mark.parametrize("size", [2 << 20, 8 << 20])
async def test_an_answer_far_beyond_what_was_asked_is_refused(size, upstream):
    """One input of 1536 numbers is not worth two megabytes, even of good JSON."""
    upstream.script.append(upstream.altered(lambda reply: reply.update(padding="x" * size)))
    with pytest.raises(UpstreamFault, match="larger than expected"):
        await ask(upstream, ["a"])


async def test_a_refusal_keeps_status_wait_and_message(upstream):
    """Headers are read whatever their case, so the wait an upstream asks for is not lost."""
    upstream.script.append(status(429, headers={"retry-after": "3"}))
    with pytest.raises(RateLimited) as caught:
        await ask(upstream, ["a"])
    assert (caught.value.provider, caught.value.retry_after) == ("acme", 3)
    assert caught.value.refusal.message == "made-up 429"


@pytest.mark.parametrize("code", [201, 202, 206])
async def test_only_200_is_an_answer(code, upstream):
    """Vectors under another status of success are not taken."""
    upstream.script.append(status(code, upstream.reply({"model": "m", "input": ["a"]})))
    with pytest.raises(UpstreamFault):
        await ask(upstream, ["a"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda reply: reply["data"].pop(),
        lambda reply: reply["data"].append(reply["data"][0]),
        lambda reply: reply["data"][1].update(index=0),
        lambda reply: reply["data"][1].update(embedding=[0.0] * 1536),
        lambda reply: reply["data"][1].update(embedding=[0.5] * 1024),
    ],
    ids=["too few", "too many", "index twice", "zeros", "width"],
)
async def test_an_answer_is_checked_against_the_question(spoil, upstream):
    """Count and width are those of this very call; a spoilt answer gives nothing."""
    upstream.script.append(upstream.altered(spoil))
    with pytest.raises(InvalidAnswer):
        await ask(upstream, ["a", "b"])


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
