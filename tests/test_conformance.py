"""The mistakes that gave wrong vectors elsewhere: each row holds here, and each mistake is caught.

A row is a check, which a right proxy passes, and a mistake, which makes the same check fail. The
mistakes are those of other caches and proxies; they are made on purpose, one at a time.
"""

import base64
import dataclasses
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import Proxy, StartProxy
from embedding_proxy.cache import embedder, key
from embedding_proxy.cache.key import Keyring, Keys
from embedding_proxy.providers import tokens, vector
from embedding_proxy.providers.base import Outcome
from embedding_proxy.providers.openai_compatible import HttpProvider
from embedding_proxy.providers.upstream import response as answer
from embedding_proxy.proxy.http import openai_format
from embedding_proxy.proxy.http.auth import Authenticator
from embedding_proxy.proxy.service.request import Client, EmbeddingRequest
from fault_server import FaultServer, vector_of

MODEL = "text-embedding-3-small"


class Bench(NamedTuple):
    """What a check works with."""

    start: StartProxy
    upstream: FaultServer
    second: FaultServer
    patch: pytest.MonkeyPatch


async def _ask(proxy: Proxy, value: object, **fields: Any) -> list[np.ndarray]:
    """Return the vectors of a reply, and see that it is a whole reply in input order."""
    body = {"model": MODEL, "input": value, "encoding_format": "base64", **fields}
    response = await proxy.post(body)
    assert response.status == 200, await response.text()
    data = (await response.json())["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    embeddings = [item["embedding"] for item in data]
    if body["encoding_format"] == "float":
        return [np.array(numbers, dtype="<f4") for numbers in embeddings]
    return [np.frombuffer(base64.b64decode(text), dtype="<f4") for text in embeddings]


def _same(got: np.ndarray, right: np.ndarray) -> bool:
    return got.tobytes() == right.tobytes()


def _right(value: object, **parameters: Any) -> np.ndarray:
    """Return the vector the upstream gives for an input, a token array taken as its text."""
    item = tokens.as_text(tuple(value)) if isinstance(value, list) else value
    return vector_of(MODEL, item, 1536, parameters)


async def _all_right(proxy: Proxy, values: list[object]) -> None:
    """Ask for each value alone, twice over, and see that each gets its own vector."""
    for value in values * 2:
        (got,) = await _ask(proxy, value)
        assert _same(got, _right(value)), value


# --- the parts of a key ---------------------------------------------------------------------------


async def parts_are_delimited(bench: Bench) -> None:
    models = {
        name: {
            "space": f"x/{name}",
            "dimensions": 8,
            "routes": [{"provider": "openai", "model": name}],
        }
        for name in ("a", "ab")
    }
    bench.upstream.widths = {"a": 8, "ab": 8}
    proxy = await bench.start(openai=bench.upstream, models=models)
    for model, text in (("a", "bc"), ("ab", "c")):
        (got,) = await _ask(proxy, text, model=model)
        assert _same(got, vector_of(model, text, 8))
    await _all_right(proxy, ["hello", "hellodimensions: 256"])


def parts_are_joined(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(key, "part", lambda _tag, data: data)


async def kinds_are_distinct(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream)
    await _all_right(proxy, ["123", [123], "[1, 2]", [1, 2], "1,2", "[123]"])
    vectors = await _ask(proxy, [[1, 2], [123], [100257]])
    rights = map(_right, ([1, 2], [123], [100257]))
    assert all(map(_same, vectors, rights))


def tokens_are_spelled_out(patch: pytest.MonkeyPatch) -> None:
    def spelled(item: Any) -> bytes:
        text = item if isinstance(item, str) else ",".join(map(str, item))
        return key.part(b"s", text.encode())

    patch.setattr(key, "input_part", spelled)


async def bytes_are_taken_as_they_are(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream)
    await _all_right(
        proxy, ["US", "us", " us", "us ", "us\n", "caf\u00e9", "cafe\u0301", "\u212b", "\u00c5"]
    )


def case_is_folded(patch: pytest.MonkeyPatch) -> None:
    as_it_is = key.input_part
    patch.setattr(key, "input_part", lambda i: as_it_is(i.lower() if isinstance(i, str) else i))


def space_is_trimmed(patch: pytest.MonkeyPatch) -> None:
    as_it_is = key.input_part
    patch.setattr(key, "input_part", lambda i: as_it_is(i.strip() if isinstance(i, str) else i))


async def parameters_are_in_the_space(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream)
    variants = [{}, {"input_type": "query"}, {"input_type": "document"}, {"task": "query"}]
    for fields in variants * 2:
        (got,) = await _ask(proxy, "text", **fields)
        assert _same(got, _right("text", **fields)), fields
    assert len(bench.upstream.calls) == len(variants)


def parameters_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        embedder, "keyring", lambda space, n: Keyring(dataclasses.replace(space, parameters=()), n)
    )


async def what_does_not_matter_is_left_out(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream)
    for value, encoding, user in itertools.product(
        ("text", ["text"]), ("base64", "float"), (None, "alice", "bob")
    ):
        (got,) = await _ask(proxy, value, encoding_format=encoding, user=user)
        assert _same(got, _right("text"))
    await proxy.post(b'{"input": "text", "user": "eve", "model": "%b"}' % MODEL.encode())
    await proxy.post(b'{"model": "openai/%b", "input": "text"}' % MODEL.encode())
    assert len(bench.upstream.calls) == 1


def all_fields_are_in_the_key(patch: pytest.MonkeyPatch) -> None:
    parse = openai_format.parse

    def parse_all(*given: Any) -> EmbeddingRequest:
        asked = parse(*given)
        return dataclasses.replace(asked, parameters={**asked.parameters, "user": asked.user})

    patch.setattr(openai_format, "parse", parse_all)


async def addresses_may_collide(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream)
    made = Keyring.keys_at_once
    assert len(made(Keyring(proxy.service.models[MODEL].space), ["x"]).addresses[0]) == 16

    def collide(self: Keyring, items: Any) -> Any:
        keys = made(self, items)
        return Keys([bytes(16)] * len(keys), keys.digests)

    bench.patch.setattr(Keyring, "keys_at_once", collide)
    await _all_right(proxy, ["one", "two"])


def digest_is_not_compared(patch: pytest.MonkeyPatch) -> None:
    made = Keyring.keys_at_once

    def without(self: Keyring, items: Any) -> Any:
        keys = made(self, items)
        return Keys(keys.addresses, [bytes(16)] * len(keys))

    patch.setattr(Keyring, "keys_at_once", without)


# --- the answer -----------------------------------------------------------------------------------


async def width_is_what_was_asked(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream)
    for width in (256, None, 1536, 1, 512, 256):
        fields = {} if width is None else {"dimensions": width}
        (got,) = await _ask(proxy, "text", **fields)
        assert len(got) == (width or 1536)
        assert np.abs(np.linalg.norm(got.astype(float)) - 1) < 1e-6
    assert len(bench.upstream.calls) == 1


def width_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(openai_format, "derive", lambda vectors, _: vectors)


def cut_is_not_renormalised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(openai_format, "derive", lambda vectors, d: [v[: 4 * d] for v in vectors])


async def order_is_kept(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream)
    texts = ["pear", "apple", "zebra", "fig", "a pear", "Apple"]
    got = await _ask(proxy, texts)
    assert all(map(_same, got, map(_right, texts)))
    got = await _ask(proxy, texts[::-1])
    assert all(map(_same, got, map(_right, texts[::-1])))


def inputs_are_sorted(patch: pytest.MonkeyPatch) -> None:
    made = HttpProvider._payload
    patch.setattr(
        HttpProvider,
        "_payload",
        lambda self, m, s, inputs, c: made(self, m, s, sorted(inputs), c),
    )


async def partial_hits_fall_into_place(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream)
    await _ask(proxy, ["b", "d"])
    texts = ["a", "b", "c", "b", "d", "e", "a"]
    response = await proxy.post({"model": MODEL, "input": texts})
    assert response.headers["x-cache"] == "partial"
    assert (response.headers["x-cache-hits"], response.headers["x-cache-misses"]) == ("2", "3")
    partial = [np.array(one["embedding"], "<f4") for one in (await response.json())["data"]]
    for got in (partial, await _ask(proxy, texts)):
        assert all(map(_same, got, map(_right, texts)))
    assert len(got) == len(texts)


def hits_come_first(patch: pytest.MonkeyPatch) -> None:
    expand = embedder._expand

    async def hits_first(entries: Any, outcomes: Any, positions: Any) -> Any:
        order = sorted(range(len(entries)), key=lambda i: outcomes[i] is not Outcome.HIT)
        entries, outcomes = [entries[i] for i in order], [outcomes[i] for i in order]
        return await expand(entries, outcomes, positions)

    patch.setattr(embedder, "_expand", hits_first)


async def upstreams_order_proves_nothing(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream)
    texts = ["a", "b", "c"]
    bench.upstream.script.append(bench.upstream.altered(lambda reply: reply["data"].reverse()))
    for _ in range(2):
        got = await _ask(proxy, texts)
        assert all(map(_same, got, map(_right, texts)))
    await _all_right(proxy, list(texts))


def upstreams_order_is_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answer, "_order_by_index", lambda _provider, reply, _count: (reply["data"], True))


async def routes_share_a_space(bench: Bench) -> None:
    bench.second.widths = {f"openai/{MODEL}": 1024}
    proxy = await bench.start(openai=bench.upstream, openrouter=bench.second)
    await _ask(proxy, "known")
    await bench.upstream.stop()
    response = await proxy.post({"model": MODEL, "input": ["known", "unknown"]})
    assert response.status == 502
    assert "1024 dimensions instead of 1536" in await response.text()
    await bench.upstream.start()
    got = await _ask(proxy, ["known", "unknown"])
    assert all(map(_same, got, map(_right, ["known", "unknown"])))


def widths_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vector, "check", lambda *_, **_kwargs: None)


# --- the bill and the door ------------------------------------------------------------------------


async def duplicates_are_bought_once(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream)
    texts = ["a", "b", "a", "a", "b"]
    got = await _ask(proxy, texts)
    assert all(map(_same, got, map(_right, texts)))
    assert bench.upstream.inputs == ["a", "b"]


def duplicates_are_not_seen(patch: pytest.MonkeyPatch) -> None:
    made = Keyring.keys_at_once
    count = itertools.count()

    def always_new(self: Keyring, items: Any) -> Any:
        addresses = made(self, items).addresses
        return Keys(addresses, [next(count).to_bytes(16, "big") for _ in addresses])

    patch.setattr(Keyring, "keys_at_once", always_new)


async def access_comes_first(bench: Bench) -> None:
    proxy = await bench.start(openai=bench.upstream, server={"keys": ["right"]})
    body = {"model": MODEL, "input": "text"}
    assert (await proxy.post(body, Authorization="Bearer right")).status == 200
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
        assert (await proxy.post(body, **header)).status == 401
    assert (await proxy.post(body, Authorization="Bearer right")).headers["x-cache"] == "hit"


def access_is_not_asked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Authenticator, "admit", lambda *_: Client())


Check = Callable[[Bench], Awaitable[None]]
Mistake = Callable[[pytest.MonkeyPatch], None]

ROWS: list[tuple[Check, Mistake]] = [
    (parts_are_delimited, parts_are_joined),
    (kinds_are_distinct, tokens_are_spelled_out),
    (bytes_are_taken_as_they_are, case_is_folded),
    (bytes_are_taken_as_they_are, space_is_trimmed),
    (parameters_are_in_the_space, parameters_are_forgotten),
    (what_does_not_matter_is_left_out, all_fields_are_in_the_key),
    (addresses_may_collide, digest_is_not_compared),
    (width_is_what_was_asked, width_is_ignored),
    (width_is_what_was_asked, cut_is_not_renormalised),
    (order_is_kept, inputs_are_sorted),
    (partial_hits_fall_into_place, hits_come_first),
    (upstreams_order_proves_nothing, upstreams_order_is_believed),
    (routes_share_a_space, widths_are_not_checked),
    (duplicates_are_bought_once, duplicates_are_not_seen),
    (access_comes_first, access_is_not_asked),
]


@pytest.fixture
def bench(start_proxy, upstream, second):
    key._kept_keyring.cache_clear()
    made = Keyring.keys_at_once
    # One for mistakes and checks alike: two would not undo in the reverse order of what was done.
    with pytest.MonkeyPatch.context() as patch:
        yield Bench(start_proxy, upstream, second, patch)
    assert Keyring.keys_at_once is made, "a mistake would go on in the tests to come"
    key._kept_keyring.cache_clear()


@pytest.mark.parametrize("check", dict(ROWS), ids=lambda check: check.__name__)
async def test_row_holds(check, bench):
    """Every row of the conformance list holds."""
    await check(bench)


@pytest.mark.parametrize(("check", "mistake"), ROWS, ids=[mistake.__name__ for _, mistake in ROWS])
async def test_mistake_is_caught(check, mistake, bench):
    """The check of a row fails when its mistake is made on purpose."""
    mistake(bench.patch)
    with pytest.raises(AssertionError):
        await check(bench)
