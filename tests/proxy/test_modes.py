"""`cache.mode` and `Cache-Control` through the whole proxy, as the official client sees them."""

import asyncio
import os
import re
import sys
from pathlib import Path

import numpy as np
import openai
import pytest
from aiohttp import web
from embedding_proxy.cache.tiers import Lookup
from embedding_proxy.providers.base import Outcome
from fault_server import status, vector_of

SMALL = "text-embedding-3-small"
PAGE = (Path(__file__).parents[2] / "docs" / "caching.md").read_text(encoding="utf-8")
COUNTS = ("x-cache", "x-cache-hits", "x-cache-joined", "x-cache-misses")
HIT, MISS, DUPLICATE = Outcome.HIT, Outcome.MISS, Outcome.DUPLICATE


async def _ask(proxy, *inputs, control=None):
    """Ask with the official client; return what the headers say, once the vectors are right."""
    raw = await proxy.client.embeddings.with_raw_response.create(
        model=SMALL,
        input=list(inputs),
        extra_headers={"Cache-Control": control} if control else {},
    )
    for one, item in zip(raw.parse().data, inputs, strict=True):
        assert np.array_equal(np.float32(one.embedding), vector_of(SMALL, item))
    return tuple(raw.headers[name] for name in COUNTS), raw.headers["x-tokens-billed"]


async def _billed(proxy):
    """Return the sums of the proxy's store: misses, and tokens billed."""
    store = proxy.service._storage.tiers._store
    await store._writer.flush()
    rows = store._disk.file.sql("SELECT sum(misses), sum(tokens_billed) FROM Usage")
    return next(iter(rows))


@pytest.mark.parametrize("stock", [["a"], []], ids=["some known", "none known"])
async def test_frozen_names_what_is_missing_and_asks_nobody(stock, upstream, start_proxy):
    """A miss is a 404 in OpenAI's shape that says which input; the client does not try again."""
    if stock:
        proxy = await start_proxy(openai=upstream)
        await _ask(proxy, *stock)
        await start_proxy.stop()
    calls = len(upstream.calls)
    proxy = await start_proxy(openai=upstream, cache={"mode": "frozen"})
    asked = []
    answer = proxy.service.answer

    async def counted(*arguments):
        asked.append(arguments)
        return await answer(*arguments)

    proxy.service.answer = counted
    client = proxy.client.with_options(max_retries=5)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.embeddings.create(model=SMALL, input=["a", "b", "a", "c"])
    first, missing = (1, "2 of 4 inputs are") if stock else (0, "4 of 4 inputs are")
    body = caught.value.body
    assert body == {
        "message": f"{missing} not in the cache (the first is input {first}), and nothing is"
        " bought: cache.mode is frozen; ask once in the mode normal to have them cached.",
        "type": "invalid_request_error",
        "param": "input",
        "code": "not_cached",
    }
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(asked) == 1
    assert len(upstream.calls) == calls


@pytest.mark.parametrize("control", ["no-cache", "no-store", "max-age=0", "max-age=9"])
async def test_no_header_thaws_a_frozen_proxy(control, upstream, start_proxy):
    """Whatever a client asks for, what would have to be bought is an error."""
    proxy = await start_proxy(openai=upstream, cache={"mode": "frozen"})
    with pytest.raises(openai.NotFoundError) as caught:
        await _ask(proxy, "a", control=control)
    assert caught.value.code == "not_cached"
    assert not upstream.calls


async def test_frozen_needs_no_key_and_lists_every_model(upstream, start_proxy, monkeypatch):
    """Without keys, even with one that is none, hits are served; any known model may be cached."""
    await _ask(await start_proxy(openai=upstream), "a", "b")
    await start_proxy.stop()
    monkeypatch.setenv("OPENAI_API_KEY", "no\nkey")
    proxy = await start_proxy(cache={"mode": "frozen"})
    assert await _ask(proxy, "b", "a") == (("hit", "2", "0", "0"), "0")
    listed = {model.id for model in (await proxy.client.models.list()).data}
    assert listed == proxy.service.models.keys()
    assert (await proxy.client.models.retrieve("baai/bge-m3")).id == "baai/bge-m3"


async def test_frozen_serves_a_model_known_by_name_alone(upstream, start_proxy):
    """What was bought of it is served; of one never asked for, every input is missing."""
    proxy = await start_proxy(openai=upstream)
    for name, fields in (("new-model", {}), ("sized", {"dimensions": 1536})):
        await proxy.client.embeddings.create(model=name, input=["a"], **fields)
    calls = len(upstream.calls)
    await start_proxy.stop()
    proxy = await start_proxy(cache={"mode": "frozen"})
    for name, fields in (("new-model", {}), ("sized", {"dimensions": 1536})):
        reply = await proxy.client.embeddings.create(model=name, input=["a"], **fields)
        assert np.array_equal(np.float32(reply.data[0].embedding), vector_of(name, "a"))
    with pytest.raises(openai.NotFoundError, match="3 of 3 inputs are not in the cache") as caught:
        await proxy.client.embeddings.create(model="newer-model", input=["a", "b", "a"])
    assert caught.value.code == "not_cached"
    assert len(upstream.calls) == calls


@pytest.mark.parametrize(("mode", "control"), [("frozen", ""), ("normal", "only-if-cached")])
async def test_no_other_model_stands_in_for_what_is_not_bought(
    mode, control, upstream, start_proxy
):
    """What is missing of the model that was asked for is an error, though another has it."""
    large = {"fallback": {"model": SMALL, "dimension_policy": "pad"}}
    models = {"models": {"text-embedding-3-large": large}}
    await _ask(await start_proxy(openai=upstream, **models), "a")
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, cache={"mode": mode}, **models)
    with pytest.raises(openai.APIStatusError) as caught:
        await proxy.client.embeddings.create(
            model="text-embedding-3-large", input=["a"], extra_headers={"Cache-Control": control}
        )
    assert caught.value.code == "not_cached"
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("mode", ["normal", "refresh", "frozen", "off"])
async def test_canaries_are_asked_only_where_there_is_something_to_compare(mode, start_proxy):
    """A frozen proxy may not ask, and one that keeps nothing has nothing to hold against."""
    proxy = await start_proxy(cache={"mode": mode})
    assert (proxy.service.drift_check is not None) == (mode in ("normal", "refresh"))


async def test_refresh_buys_anew_and_replaces(upstream, start_proxy):
    """Every distinct input of every request is a miss; afterwards its new vector is known."""
    await _ask(await start_proxy(openai=upstream), "a a")
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, cache={"mode": "refresh"})
    for _ in range(2):
        assert await _ask(proxy, "a a", "b", "a a") == (("miss", "0", "0", "2"), "3")
    assert await _ask(proxy, "b", control="only-if-cached") == (("hit", "1", "0", "0"), "0")
    upstream.always = status(400)
    with pytest.raises(openai.BadRequestError):
        await _ask(proxy, "b")
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream)
    assert await _ask(proxy, "a a", "b") == (("hit", "2", "0", "0"), "0")
    assert upstream.inputs == ["a a", *["a a", "b"] * 2, "b"]


async def test_off_neither_reads_nor_keeps(upstream, start_proxy):
    """Each request buys each distinct input once, and nothing of it is there after a restart."""
    await _ask(await start_proxy(openai=upstream), "a")
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, cache={"mode": "off"})
    for _ in range(2):
        assert await _ask(proxy, "a", "b b", "a") == (("miss", "0", "0", "2"), "3")
    with pytest.raises(openai.InternalServerError, match="504"):
        await _ask(proxy, "a", control="only-if-cached")
    assert await _billed(proxy) == (5, 7)
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream)
    assert await _ask(proxy, "a", "b b") == (("partial", "1", "0", "1"), "2")


async def test_no_cache_refreshes_one_request(upstream, start_proxy):
    """It is a miss that is billed; without the header the input is a hit again."""
    proxy = await start_proxy(openai=upstream)
    await _ask(proxy, "a")
    for control in ("no-cache", "max-age=0", "x, No-Cache"):
        assert await _ask(proxy, "a", control=control) == (("miss", "0", "0", "1"), "1")
    assert await _ask(proxy, "a", control="max-age=3600") == (("hit", "1", "0", "0"), "0")
    assert await _ask(proxy, "a") == (("hit", "1", "0", "0"), "0")
    assert upstream.inputs == ["a"] * 4


async def test_a_refresh_that_fails_leaves_the_old_vector(upstream, start_proxy):
    """While the upstream is down `no-cache` is an error, and the entry is served as before."""
    proxy = await start_proxy(openai=upstream)
    await _ask(proxy, "a")
    upstream.always = status(500)
    with pytest.raises(openai.InternalServerError):
        await _ask(proxy, "a", control="no-cache")
    assert await _ask(proxy, "a") == (("hit", "1", "0", "0"), "0")


async def test_no_store_leaves_nothing_but_the_bill(upstream, start_proxy):
    """What is bought so is bought again by the next; what is known is served; all is summed."""
    proxy = await start_proxy(openai=upstream)
    await _ask(proxy, "known")
    for _ in range(2):
        answer = await _ask(proxy, "known", "b b", control="no-store")
        assert answer == (("partial", "1", "0", "1"), "2")
    assert await _billed(proxy) == (3, 5)
    assert await _ask(proxy, "b b") == (("miss", "0", "0", "1"), "2")


async def test_only_if_cached_is_a_504_that_is_not_tried_again(upstream, start_proxy):
    """It names the first missing input, waits for no purchase under way, and buys nothing."""
    proxy = await start_proxy(openai=upstream)
    await _ask(proxy, "a")
    came, go = asyncio.Event(), asyncio.Event()

    async def held(_, payload):
        came.set()
        await go.wait()
        return web.json_response(upstream.reply(payload))

    upstream.script.append(held)
    buying = asyncio.create_task(_ask(proxy, "b"))
    await came.wait()
    response = await proxy.post(
        {"model": SMALL, "input": ["a", "b"]}, **{"Cache-Control": "only-if-cached"}
    )
    go.set()
    assert response.status == 504
    assert response.headers["x-should-retry"] == "false"
    error = (await response.json())["error"]
    assert (error["code"], error["param"]) == ("not_cached", "input")
    assert "1 of 2 inputs is not in the cache (input 1)" in error["message"]
    assert (await buying)[0][0] == "miss"
    assert await _ask(proxy, "a", "b", control="only-if-cached") == (("hit", "2", "0", "0"), "0")
    assert upstream.inputs == ["a", "b"]


async def test_several_headers_count_as_one(upstream, start_proxy):
    """Directives in two lines of the same name hold together."""
    proxy = await start_proxy(openai=upstream)
    lines = [("Cache-Control", "x"), ("Cache-Control", "only-if-cached")]
    body = {"model": SMALL, "input": "a"}
    async with proxy.http.post(f"{proxy.url}/embeddings", json=body, headers=lines) as response:
        assert response.status == 504
    assert not upstream.calls


async def test_in_python_the_words_are_a_parameter(upstream, start_proxy):
    """`EmbeddingService.embed` takes what the header would say, and answers alike."""
    service = (await start_proxy(openai=upstream)).service
    await service.embed(["a"], model=SMALL)
    for control, how in (("", HIT), ("no-cache", MISS), ("no-store", HIT)):
        result = await service.embed(["a", "a"], model=SMALL, cache_control=control)
        assert result.outcomes == [how, DUPLICATE]


# The page.


def _on_the_page(mark):
    return re.findall(rf"^```{mark}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


async def test_the_example_on_the_page_runs_a_suite_offline(upstream, tmp_path):
    """Recorded, exported, imported elsewhere and frozen: the page's file and commands, in order."""
    (text,) = _on_the_page("yaml")
    providers = f'providers: {{openai: {{base_url: "{upstream.url}"}}}}'
    recording, replaying = (tmp_path / name for name in ("here", "there"))
    for folder in (recording, replaying):
        folder.mkdir()
        (folder / "embeddings.yaml").write_text(f"{text}{providers}\n")
        (folder / "ask.py").write_text(SUITE)
        (folder / "Makefile").write_text(f"my-tests:\n\t{sys.executable} ask.py\n")
    program = tmp_path / "embedding-proxy"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m embedding_proxy "$@"\n')
    program.chmod(0o755)
    record, replay = _on_the_page("sh")[-2:]
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    with_key = {**environment, "OPENAI_API_KEY": "k"}
    assert await _shell(record, recording, with_key) == 0
    assert upstream.inputs == ["a", "b"]
    (recording / "embeddings.emba").rename(replaying / "embeddings.emba")
    await upstream.stop()
    assert await _shell(replay, replaying, environment) == 0


SUITE = """
import openai

with openai.OpenAI() as client:
    reply = client.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
assert len(reply.data) == 2
"""


async def _shell(commands: str, folder: Path, environment: dict[str, str]) -> int:
    """Run lines of a shell, which end at the first that fails; return the exit code."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-e", "-c", commands),
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.DEVNULL,
    )
    return await process.wait()


async def test_the_error_on_the_page_is_the_one_that_comes(start_proxy):
    """What the page shows of a miss is, word for word, what the proxy answers."""
    proxy = await start_proxy(cache={"mode": "frozen"})
    proxy.service.models[SMALL].embedder._tiers.lookup = _all_but_the_last
    with pytest.raises(openai.NotFoundError) as caught:
        await proxy.client.embeddings.create(model=SMALL, input=["a", "b", "c"])
    (shown,) = _on_the_page("text")
    assert " ".join(shown.split()) == caught.value.body["message"]


async def _all_but_the_last(keys, *_):
    return Lookup(keys, [None] * len(keys), [len(keys) - 1])
