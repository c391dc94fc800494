"""Models of which only the name is known: where they are asked for, and how wide they are."""

import asyncio
import sys
import threading
from pathlib import Path

import numpy as np
import orjson
import pytest
from embedding_proxy.providers.errors import InvalidAnswer
from embedding_proxy.proxy.service import learned_dimensions
from embedding_proxy.proxy.service.learned_dimensions import LearnedDimensions
from embedding_proxy.proxy.service.model_registry import Registry
from fault_server import status, tokens_of, vector_of

from tests.test_deadline import until

NEW = "text-embedding-9"
ROUTES = [{"provider": "openai", "model": "own"}]


async def _embed(proxy, inputs, model=NEW, **fields):
    reply = await proxy.post({"model": model, "input": inputs, **fields})
    body = await reply.json()
    return reply, [np.array(item["embedding"], np.float32) for item in body.get("data", [])]


async def test_bought_once_whoever_asks_first(upstream, start_proxy):
    """The first request tells the width; every input is bought once, in the order it was given."""
    upstream.widths = {NEW: 40}
    proxy = await start_proxy(openai=upstream)
    texts = ["a", "b", "a", "c", "b"]
    reply, got = await _embed(proxy, texts)
    assert reply.headers["x-embedding-space"] == f"openai/{NEW}"
    assert (reply.headers["x-cache"], reply.headers["x-cache-misses"]) == ("miss", "3")
    for vector, text in zip(got, texts, strict=True):
        assert np.array_equal(vector, vector_of(NEW, text, 40))
    assert sorted(upstream.inputs) == ["a", "b", "c"]
    again, _ = await _embed(proxy, texts)
    assert again.headers["x-cache"] == "hit"
    assert await again.text() == await reply.text()


async def test_many_at_once_buy_each_input_once(upstream, start_proxy):
    """Those who ask before the width is known join each other like anybody else."""
    upstream.widths = {NEW: 40}
    proxy = await start_proxy(openai=upstream)
    some = [["a"], ["b", "a"], ["a", "c"], ["c", "b"]] * 5
    for (_, got), texts in zip(
        await asyncio.gather(*(_embed(proxy, texts) for texts in some)), some, strict=True
    ):
        for vector, text in zip(got, texts, strict=True):
            assert np.array_equal(vector, vector_of(NEW, text, 40))
    assert sorted(upstream.inputs) == ["a", "b", "c"]


async def test_the_width_is_pinned(upstream, start_proxy):
    """Another width later is an error, also after a restart; what is kept is still served."""
    upstream.widths = {NEW: 40}
    proxy = await start_proxy(openai=upstream)
    await _embed(proxy, "a")
    upstream.widths = {NEW: 41}
    for _ in range(2):
        reply, _ = await _embed(proxy, "b")
        assert reply.status == 502
        assert "41 dimensions instead of 40" in await reply.text()
        reply, (got,) = await _embed(proxy, "a")
        assert (reply.headers["x-cache"], got.shape) == ("hit", (40,))
        await start_proxy.stop()
        proxy = await start_proxy(openai=upstream)


async def test_two_workers_learn_one_width(upstream, start_proxy):
    """What one process has learned holds for the other, though it asked before."""
    upstream.widths = {NEW: 40}
    one, other = await start_proxy(openai=upstream), await start_proxy(openai=upstream)
    await _embed(one, "a")
    upstream.widths = {NEW: 41}
    reply, _ = await _embed(other, "b")
    assert reply.status == 502
    reply, _ = await _embed(other, "a")
    assert reply.headers["x-cache"] == "hit"


@pytest.mark.skipif(sys.platform != "linux", reason="such leases are Linux's own")
@pytest.mark.parametrize("fields", [{}, {"task": "x"}], ids=["plain", "parameters"])
async def test_two_workers_buy_the_first_input_once(fields, upstream, start_proxy):
    """The one waits for the other, and learns the width from what that has bought."""
    upstream.widths = {NEW: 40}
    workers = [await start_proxy(openai=upstream) for _ in range(2)]
    asked = [asyncio.create_task(_embed(worker, "a", **fields)) for worker in workers * 3]
    for reply, (got,) in [await task for task in asked]:
        assert (reply.status, got.shape) == (200, (40,))
    assert upstream.inputs == ["a"]


async def test_a_width_that_is_asked_for_is_the_upstreams_to_give(upstream, start_proxy):
    """Nobody knows whether such a model may be cut, so it is asked, and its answer checked."""
    upstream.widths = {NEW: 40}
    proxy = await start_proxy(openai=upstream)
    reply, _ = await _embed(proxy, "a", dimensions=20)
    assert reply.status == 502, "the width was dropped in silence"
    assert upstream.calls[-1].payload["dimensions"] == 20
    upstream.widths = {NEW: 20}
    for verdict in ("miss", "hit"):
        reply, (got,) = await _embed(proxy, "a", dimensions=20)
        assert (reply.headers["x-cache"], got.shape) == (verdict, (20,))
        assert reply.headers["x-embedding-space"] == f"openai/{NEW}@20"
    upstream.widths = {NEW: 40}
    reply, (got,) = await _embed(proxy, "a")
    assert (reply.headers["x-cache"], got.shape) == ("miss", (40,))


@pytest.mark.parametrize("dimensions", [65537, 1 << 40])
async def test_no_width_beyond_all_bounds(dimensions, upstream, start_proxy):
    """A width that no model has is refused before anybody is asked."""
    proxy = await start_proxy(openai=upstream)
    reply, _ = await _embed(proxy, "a", dimensions=dimensions)
    assert (reply.status, len(upstream.calls)) == (400, 0)


@pytest.mark.parametrize(
    ("name", "first"),
    [(NEW, NEW), (f"openai/{NEW}", NEW), ("vendor/model", None), ("vendor/group/model", None)],
)
async def test_who_is_asked_for_a_name(name, first, upstream, second, start_proxy):
    """A plain name is OpenAI's, and OpenRouter's with the vendor before it; others OpenRouter's."""
    upstream.always = status(500)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    reply, _ = await _embed(proxy, "a", name)
    assert (reply.status, (await reply.json())["model"]) == (200, name)
    assert {call.payload["model"] for call in upstream.calls} == ({first} if first else set())
    other = name if "/" in name else f"openai/{name}"
    assert [call.payload["model"] for call in second.calls] == [other]


async def test_a_model_that_nobody_has(upstream, start_proxy):
    """The provider's own 404 is told, nothing is learned, and nothing listed."""
    upstream.always = status(404)
    proxy = await start_proxy(openai=upstream)
    reply, _ = await _embed(proxy, "a", "misspelt")
    assert reply.status == 404
    assert "misspelt" not in proxy.service.models


@pytest.mark.parametrize(
    ("name", "server"),
    [("vendor/model", {}), ("x" * 300, {}), (NEW, {"unknown_models": "reject"})],
)
async def test_a_name_that_leads_nowhere(name, server, upstream, start_proxy):
    """Without a provider for such names, or with `unknown_models: reject`, it is OpenAI's 404."""
    proxy = await start_proxy(openai=upstream, server=server)
    reply, _ = await _embed(proxy, "a", name)
    assert (reply.status, len(upstream.calls)) == (404, 0)
    assert (await reply.json())["error"]["code"] == "model_not_found"


async def test_a_configured_model_without_a_width(upstream, start_proxy):
    """`dimensions` may be left out; once learned, the model is like any other."""
    upstream.widths = {"own": 40}
    models = {"mine": {"space": "mine/own", "matryoshka": True, "routes": ROUTES}}
    proxy = await start_proxy(openai=upstream, models=models)
    reply, (got,) = await _embed(proxy, "a", "mine", dimensions=10)
    head = vector_of("own", "a", 40)[:10].astype(np.float64)
    assert np.allclose(got, head / np.linalg.norm(head), atol=1e-7)
    reply, (got,) = await _embed(proxy, "a", "mine")
    assert (reply.headers["x-cache"], got.shape) == ("hit", (40,))
    reply, _ = await _embed(proxy, "a", "mine", dimensions=41)
    assert reply.status == 400
    assert len(upstream.inputs) == 1


async def test_a_failure_teaches_nothing(upstream, start_proxy):
    """An answer that fails a check, or none, leaves the width open; the next one tells it."""
    proxy = await start_proxy(openai=upstream)
    upstream.always = upstream.altered(lambda reply: reply["data"][0].update(embedding=[0.0] * 7))
    reply, _ = await _embed(proxy, "a")
    assert reply.status == 502
    upstream.always, upstream.widths = None, {NEW: 40}
    reply, (got,) = await _embed(proxy, "a")
    assert (reply.status, got.shape) == (200, (40,))


@pytest.mark.parametrize("spoilt", [b"", b"[]", b'{"a": "b"}', b"{"])
async def test_a_spoilt_file_is_learned_anew(spoilt, upstream, start_proxy, caplog):
    """Without what was pinned, the first answer tells again, and what was kept is found again."""
    upstream.widths = {NEW: 40}
    proxy = await start_proxy(openai=upstream)
    await _embed(proxy, "a")
    await start_proxy.stop()
    (file,) = proxy.service.settings.cache.directory.rglob("widths.json")
    file.write_bytes(spoilt)
    proxy = await start_proxy(openai=upstream)
    await _embed(proxy, "b")
    reply, _ = await _embed(proxy, "a")
    assert reply.headers["x-cache"] == "hit"
    told = [one.message for one in caplog.records if one.name == "embedding_proxy.learned"]
    (line,) = [message for message in told if "is damaged or cannot be read" in message]
    assert str(file) in line


@pytest.mark.parametrize("answers", [True, False])
async def test_what_is_charged_before_the_width_is_known(answers, upstream, start_proxy):
    """The bill has it under the width that it turned out to be, or under none if nothing came."""
    upstream.widths = {NEW: 40}
    if not answers:
        upstream.always = upstream.altered(lambda reply: reply["data"].clear())
    proxy = await start_proxy(openai=upstream)
    await _embed(proxy, ["one", "two words"])
    counted = proxy.service.counted
    assert {heading.partition.dimensions for heading in counted} == ({40} if answers else {0})
    charged = sum(usage.tokens_billed for usage in counted.values())
    assert charged == sum(tokens_of(item) for item in upstream.inputs) > 0


async def test_a_refused_input_has_the_clients_own_place(upstream, start_proxy):
    """The error of the first request of all names the place in it, like that of any other."""
    body = {"error": {"message": "too long", "type": "t", "param": "input", "code": None}}

    async def act(request, payload):
        if "bad" in payload["input"]:
            return await status(400, body)(request, payload)
        return await upstream.altered(lambda _: None)(request, payload)

    upstream.always = act
    proxy = await start_proxy(openai=upstream)
    reply, _ = await _embed(proxy, ["a", "b", "a", "bad", "c"])
    error = (await reply.json())["error"]
    assert (reply.status, error["message"]) == (400, "too long (input 3)")


async def test_several_workers_pin_at_the_same_time(tmp_path):
    """None of their widths is lost, and of one space the first counts for all."""
    file = tmp_path / "widths.json"
    workers = [LearnedDimensions(file) for _ in range(8)]
    await asyncio.gather(*(pins.pin(f"space {i}", i + 1) for i, pins in enumerate(workers)))
    widths = {f"space {i}": i + 1 for i in range(8)}
    assert orjson.loads(file.read_bytes()) == widths
    for pins in workers:
        await pins.refresh()
    assert [pins.get("space 5") for pins in workers] == [6] * 8
    ends = await asyncio.gather(
        *(pins.pin("new", 10 + i) for i, pins in enumerate(workers)), return_exceptions=True
    )
    assert ends.count(None) == 1
    assert sum(isinstance(end, InvalidAnswer) for end in ends) == 7
    assert len({pins.get("new") for pins in workers}) == 1
    assert sorted(one.name for one in tmp_path.iterdir()) == ["widths.json", "widths.lock"]


async def test_the_pinned_widths_are_bounded(upstream, start_proxy, monkeypatch, caplog):
    """Clients name models: beyond the bound each process learns a width anew, from one input."""
    monkeypatch.setattr(learned_dimensions, "MAX_WIDTHS", 2)
    for _ in range(2):
        proxy = await start_proxy(openai=upstream)
        for i in range(4):
            upstream.widths[f"text-embedding-{i}9"] = 40 + i
            _, (got,) = await _embed(proxy, "a", f"text-embedding-{i}9")
            assert got.shape == (40 + i,)
        assert len(proxy.service._registry._learned._known) <= 2
        (file,) = proxy.service.settings.cache.directory.rglob("widths.json")
        assert len(orjson.loads(file.read_bytes())) == 2
        await start_proxy.stop()
    assert caplog.text.count("further ones are not kept") == 2
    assert len(upstream.inputs) == 4 + 2, "the first two are hits after the restart"


async def test_two_who_ask_at_the_same_moment_buy_one_input_first(upstream, start_proxy):
    """While the width is not known one input is on the wire, and nothing is bought twice."""
    upstream.widths, upstream.gate = {NEW: 40}, asyncio.Event()
    proxy = await start_proxy(openai=upstream)
    some = [["a", "b"], ["b", "c"], ["c", "a"]] * 3
    asking = [asyncio.create_task(_embed(proxy, texts)) for texts in some]
    await until(lambda: upstream.calls)
    for _ in range(200):
        await asyncio.sleep(0)
    assert len(upstream.inputs) == 1
    upstream.gate.set()
    for task, texts in zip(asking, some, strict=True):
        _, got = await task
        for vector, text in zip(got, texts, strict=True):
            assert np.array_equal(vector, vector_of(NEW, text, 40))
    assert sorted(upstream.inputs) == ["a", "b", "c"]


async def test_who_waits_for_a_refused_first_input_asks_with_its_own(upstream, start_proxy):
    """What one client's first input is refused for is none of another's business."""
    upstream.widths = {NEW: 40}
    gate = asyncio.Event()

    async def act(request, payload):
        if "bad" in payload["input"]:
            await gate.wait()
            return await status(400)(request, payload)
        return await upstream.altered(lambda _: None)(request, payload)

    upstream.always = act
    proxy = await start_proxy(openai=upstream)
    bad = asyncio.create_task(_embed(proxy, ["bad", "a"]))
    await until(lambda: upstream.calls)
    good = asyncio.create_task(_embed(proxy, ["a"]))
    for _ in range(200):
        await asyncio.sleep(0)
    gate.set()
    (refused, _), (reply, (got,)) = await bad, await good
    assert (refused.status, reply.status) == (400, 200)
    assert np.array_equal(got, vector_of(NEW, "a", 40))
    assert upstream.inputs == ["bad", "a"]


async def test_what_a_client_left_behind_tells_the_width(upstream, start_proxy):
    """The call was sent: its answer is kept, billed, and pins the width, though nobody waits."""
    upstream.widths, upstream.gate = {NEW: 40}, asyncio.Event()
    proxy = await start_proxy(openai=upstream)
    embedding = asyncio.create_task(proxy.service.embed(["a", "b"], NEW))
    await until(lambda: upstream.calls)
    embedding.cancel()
    await asyncio.wait([embedding])
    upstream.gate.set()
    await until(lambda: proxy.service.counted)
    reply, (got,) = await _embed(proxy, "a")
    assert (reply.headers["x-cache-misses"], got.shape) == ("0", (40,))
    assert upstream.inputs == ["a"]
    ((heading, usage),) = [one for one in proxy.service.counted.items() if one[1].misses]
    assert heading.partition.dimensions == 40
    assert (usage.misses, usage.tokens_billed) == (1, tokens_of("a"))


async def test_a_model_that_is_asked_for_at_a_width_is_kept(upstream, start_proxy, monkeypatch):
    """Its routes are made once; and no request waits for a file in the event loop."""
    made, read = [], []
    make, stat = Registry._make, Path.stat

    def noted(registry, name, entry):
        made.append(name)
        return make(registry, name, entry)

    def looked(path, **options):
        if path.name == "widths.json":
            read.append(threading.current_thread())
        return stat(path, **options)

    upstream.widths = {NEW: 20}
    proxy = await start_proxy(openai=upstream)
    monkeypatch.setattr(Registry, "_make", noted)
    monkeypatch.setattr(Path, "stat", looked)
    for text in ("a", "b", "a"):
        reply, _ = await _embed(proxy, text, dimensions=20)
        assert reply.status == 200
    await _embed(proxy, "a", "text-embedding-11")
    assert made == [NEW, "text-embedding-11"]
    assert read
    assert threading.main_thread() not in read
    assert NEW not in proxy.service.models


@pytest.mark.parametrize("turns", range(40))
async def test_who_comes_when_the_first_has_left_is_answered(turns, upstream, start_proxy):
    """Whenever the first client goes away: the next one waits for its call, or makes one."""
    upstream.widths = {NEW: 40}
    proxy = await start_proxy(openai=upstream)
    first = asyncio.create_task(proxy.service.embed(["a"], NEW))
    for _ in range(turns):
        await asyncio.sleep(0)
    first.cancel()
    result = await proxy.service.embed(["a", "b"], NEW)
    assert np.array_equal(result.vectors[0], vector_of(NEW, "a", 40))
    assert sorted(upstream.inputs) == ["a", "b"]
