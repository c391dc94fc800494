"""Strategies that a package brings: another width in a space of its own, and texts of payloads."""

import asyncio
import base64
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from embedding_proxy.index.client import Connection
from embedding_proxy.index.errors import Missing
from embedding_proxy.index.migration.text_template import Rule, TemplateError
from embedding_proxy.providers import dimensions as strategies
from embedding_proxy.providers import plugins
from embedding_proxy.proxy.config.schema import Settings
from example_package import install
from fault_server import vector_of
from pydantic import ValidationError
from qdrant_server import QdrantServer

ADA = "text-embedding-ada-002"
SMALL = "text-embedding-3-small"
PROJECTED = {ADA: {"dimension_policy": "acme_projection"}}


@pytest.fixture(autouse=True)
def acme(tmp_path, monkeypatch):
    """Install the example package, and give its module."""
    name = install("acme_strategies", tmp_path / "site", monkeypatch)
    strategies.find.cache_clear()
    yield __import__(name)
    strategies.find.cache_clear()
    sys.modules.pop(name, None)


async def _ask(proxy, texts, **fields):
    body = {"model": ADA, "input": texts, "encoding_format": "base64", **fields}
    response = await proxy.post(body)
    answer = await response.json()
    if response.status != 200:
        return response, answer["error"]
    rows = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer["data"]]
    return response, np.stack(rows)


# Widths


@pytest.mark.parametrize("length", [1, 2000])
async def test_another_width_is_another_space_bought_once(start_proxy, upstream, acme, length):
    """The model's own vector is bought and cached, what is made of it named after the strategy.

    So it is with short requests and with long ones, which come again by another way.
    """
    texts = ["a" * length, "b" * length]
    proxy = await start_proxy(openai=upstream, models=PROJECTED)
    whole, native = await _ask(proxy, texts)
    right = np.stack([vector_of(ADA, text) for text in texts])
    assert np.array_equal(native, right)
    for _ in range(3):
        reply, narrow = await _ask(proxy, texts, dimensions=64)
        assert np.array_equal(narrow, acme.Projection().bring(right, 64))
        assert reply.headers["x-cache"] == "hit"
        assert reply.headers["x-embedding-space"] == f"openai/{ADA}~acme_projection-1"
    assert whole.headers["x-embedding-space"] == f"openai/{ADA}"
    assert upstream.inputs == texts
    assert all("dimensions" not in call.payload for call in upstream.calls)


@pytest.mark.parametrize("dimensions", [1, 15, 1537])
async def test_a_width_that_it_does_not_give_is_a_400(start_proxy, upstream, dimensions):
    """Before anything is bought; the model's own width needs no strategy."""
    proxy = await start_proxy(openai=upstream, models=PROJECTED)
    response, error = await _ask(proxy, ["a"], dimensions=dimensions)
    assert (response.status, error["param"]) == (400, "dimensions")
    assert "acme_projection does not give it" in error["message"]
    assert not upstream.calls
    assert (await _ask(proxy, ["a"], dimensions=1536))[0].status == 200


async def test_its_vectors_go_to_a_collection_of_their_own(start_proxy, upstream, acme):
    """Also beside cut ones of the same width; a new version does not meet those of the old."""
    async with QdrantServer() as server:
        index = {"qdrant": {"url": server.url}}
        proxy = await start_proxy(openai=upstream, models=PROJECTED, index=index)
        service = proxy.service
        await _ask(proxy, ["a"], dimensions=64)
        async with asyncio.timeout(60):
            while (await service.indexing.indexer.snapshot())["backlog_points"]:  # noqa: ASYNC110 - it is on disk
                await asyncio.sleep(0.01)
        async with Connection(url=server.url) as qdrant:
            found = await qdrant.ask(lambda client: client.get_collections())
        (name,) = (one.name for one in found.collections)
        assert name.startswith(f"{ADA}-64-")
        ((_, point),) = (await server.points(name)).items()
        assert point["payload"]["space"] == f"openai/{ADA}~acme_projection-1"
        (found,) = await service.query("a", ADA, dimensions=64, stored={})
        assert found.score == pytest.approx(1, abs=1e-5)
        acme.Projection.version = "2"
        strategies.find.cache_clear()
        with pytest.raises(Missing):
            await service.query("a", ADA, dimensions=64)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda vectors, dimensions: vectors[:, : dimensions - 1],
        lambda vectors, dimensions: vectors[:1, :dimensions],
        lambda vectors, dimensions: vectors[:, :dimensions] * np.nan,
        lambda vectors, dimensions: vectors[:, :dimensions] * 0,
        lambda vectors, dimensions: vectors[0, :dimensions],
        lambda vectors, dimensions: 1 / 0,
    ],
)
async def test_a_strategy_that_fails_gives_no_wrong_vector(start_proxy, upstream, acme, wrong):
    """Whatever it returns is checked as an upstream's answer is; the request fails in one line."""
    acme.Projection.bring = lambda _self, vectors, dimensions: wrong(vectors, dimensions)
    proxy = await start_proxy(openai=upstream, models=PROJECTED)
    response, error = await _ask(proxy, ["a", "b"], dimensions=64)
    assert response.status == 502
    assert "width acme_projection" in error["message"]
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize(
    ("brought", "says"),
    [
        (None, "expected strict, truncate or pad, or a strategy"),
        (SimpleNamespace(version="1"), "has no version, can_give and bring"),
        (lambda: None, "has no version, can_give and bring"),
    ],
)
def test_what_is_no_strategy_is_a_configuration_error(brought, says, acme, monkeypatch):
    """The name is refused at the start, with what was expected."""
    name = "unheard_of"
    if brought is not None:
        name = "acme_projection"
        monkeypatch.setattr(acme, "Projection", brought)
    with pytest.raises(ValidationError, match=says):
        Settings.model_validate({"models": {ADA: {"dimension_policy": name}}})


# Texts


def test_a_package_makes_texts_that_no_template_could():
    """Its texts, its refusals, and blanks that are none; the source tells of its version."""
    rule = Rule.from_name("acme_ticket")
    assert rule.text({"title": "on fire", "description": "x" * 600}) == f"ON FIRE\n\n{'x' * 500}"
    assert rule.text({"title": " ", "description": "\n"}) is None
    assert rule.text(None) is None
    assert rule.source == "acme_ticket 1"
    assert Rule.read("acme_ticket 1") == Rule.read("acme_ticket 1")
    assert Rule.read("{title}") == Rule.template("{title}")


def test_another_version_does_not_go_on(acme):
    """Half a collection of other texts would be none."""
    acme.Ticket.version = "2"
    with pytest.raises(TemplateError, match=r"made by acme_ticket 1, and acme_ticket 2 is"):
        Rule.read("acme_ticket 1")


@pytest.mark.parametrize(
    ("ticket", "says"),
    [
        (lambda _self, payload: payload["none"], "fails at a payload: KeyError: 'none'"),
        (lambda _self, _payload: 7, "gives no text, but a int"),
    ],
)
def test_what_makes_texts_and_fails_is_one_line(acme, ticket, says):
    """It is told, and no point is carried with another text."""
    acme.Ticket.text = ticket
    with pytest.raises(TemplateError, match=says):
        Rule.from_name("acme_ticket").text({"title": "a"})


def test_what_makes_no_texts_is_refused(acme, monkeypatch):
    """A name that nobody brings, something that has no text, and what cannot be made."""
    with pytest.raises(TemplateError, match="called `nobody`"):
        Rule.from_name("nobody")
    for brought, says in ((object(), "has no version and text"), (int, "has no version and text")):
        monkeypatch.setattr(acme, "Ticket", brought)
        with pytest.raises(TemplateError, match=says):
            Rule.from_name("acme_ticket")
    monkeypatch.delattr(acme, "Ticket")
    with pytest.raises(TemplateError, match="cannot be loaded"):
        Rule.from_name("acme_ticket")
    assert plugins.TEXTS == "embedding_proxy.texts"
