"""Migrations of points with dense, sparse and multi vectors, by the commands."""

import asyncio
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from command import Done
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import Provenance
from fault_server import vector_of
from old_system import LARGE, MISTRAL, OldSystem
from qdrant_client import models
from qdrant_server import answer

ROUTED = f"openrouter/openai/{LARGE}"
DOT = models.Distance.DOT
OTHERS = {
    "image": models.VectorParams(size=3, distance=models.Distance.COSINE),
    "tokens": models.VectorParams(
        size=2,
        distance=models.Distance.COSINE,
        multivector_config=models.MultiVectorConfig(
            comparator=models.MultiVectorComparator.MAX_SIM
        ),
    ),
}


@pytest.fixture
async def system(tmp_path, monkeypatch):
    async with OldSystem(tmp_path) as system:
        for name in ("OPENAI", "OPENROUTER", "MISTRAL"):
            monkeypatch.setenv(f"{name}_API_KEY", "k")
        text = models.VectorParams(size=system.width, distance=models.Distance.COSINE)
        await system.connection.ask(
            lambda client: client.create_collection(
                "docs",
                {"text": text, **OTHERS},
                sparse_vectors_config={"words": models.SparseVectorParams()},
            )
        )
        yield system


@pytest.fixture
def migrate(system, command):
    async def step(name, *arguments) -> Done:
        where = ("--qdrant", system.qdrant.url, "--config", str(system.config))
        return await asyncio.to_thread(command, "migrate", name, *arguments, *where)

    return step


def _sparse(*indices):
    return models.SparseVector(indices=sorted(indices), values=[i / 8 for i in sorted(indices)])


def _vectors(number, text):
    """Return all vectors of a point, as its writer gives them."""
    return {
        "text": vector_of(LARGE, text, 16).tolist(),
        "image": [3.0, 4.0, float(number)],
        "tokens": [[1.0, float(number)], [2.0, 1.0]],
        "words": _sparse(number, number + 7),
    }


@dataclass
class Writer:
    """Writes to a collection as a client does, and remembers what must be found there."""

    connection: Connection
    name: str
    expected: dict[int, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """Text and vectors of each point."""
    fresh: Iterator[int] = field(default_factory=lambda: itertools.count(100))
    """Numbers that no point and no vector has had."""

    async def put(self, number: int, text: str, vectors: Any = None) -> None:
        """Write a whole point; its other vectors stay as they are, or are new."""
        known = self.expected.get(number)
        others = _vectors(number, text) if known is None else known[1]
        found = {**others, "text": vector_of(LARGE, text, 16).tolist(), **(vectors or {})}
        self.expected[number] = text, {name: one for name, one in found.items() if one is not None}
        await self._upsert(number, {"content": text}, self.expected[number][1])

    async def _upsert(self, number: int, payload: Any, vectors: Any) -> None:
        point = models.PointStruct(id=number, payload=payload, vector=vectors)
        await self.connection.ask(lambda client: client.upsert(self.name, [point]))

    async def change(self, number: int, name: str, vector: Any) -> None:
        """Write one vector of a point, or take it away."""
        self.expected[number][1].pop(name, None)
        if vector is None:
            await self.connection.ask(
                lambda client: client.delete_vectors(self.name, [name], [number])
            )
            return
        self.expected[number][1][name] = vector
        one = models.PointVectors(id=number, vector={name: vector})
        await self.connection.ask(lambda client: client.update_vectors(self.name, [one]))

    async def drop(self, number: int) -> None:
        """Delete a point."""
        del self.expected[number]
        await self.connection.ask(lambda client: client.delete(self.name, [number]))

    async def change_something(self, chance: random.Random) -> None:
        """Do one of the things above to a point that is found."""
        number = chance.choice(sorted(self.expected))
        if not await self.connection.ask(lambda client: client.retrieve(self.name, [number])):
            return  # Added while the aliases switched: a client does not find it yet.
        fresh = next(self.fresh)
        match chance.randrange(6):
            case 0:
                await self.put(number, f"text {fresh}")
            case 1:
                await self.change(number, "words", _sparse(fresh))
            case 2:
                await self.change(number, "tokens", [[1.0, float(fresh)]] * 2)
            case 3:
                await self.change(number, chance.choice(["words", "tokens", "image"]), None)
            case 4:
                await self.drop(number)
            case 5:
                await self.put(fresh, f"text {number}")


def _numbers(vector):
    """Return the numbers of a vector, as a cosine collection stores them."""
    if isinstance(vector, models.SparseVector):
        vector = vector.model_dump()
    if isinstance(vector, dict):
        pairs = zip(vector["indices"], vector["values"], strict=True)
        return np.array(sorted(pairs), np.float32)
    numbers = np.asarray(vector, np.float32)
    return numbers / np.linalg.norm(numbers, axis=-1, keepdims=True)


def _differences(found, expected, text_vector):
    """Return what is not in a collection as it was written."""
    different = [("point", one) for one in set(found) ^ set(expected)]
    for one in set(found) & set(expected):
        text, vectors = expected[one]
        if found[one]["payload"] != {"content": text}:
            different.append(("payload", one))
        wanted = {**vectors, "text": text_vector(text)}
        there = found[one]["vector"]
        for name in {*wanted, *there}:
            pair = [_numbers(some[name]) for some in (wanted, there) if name in some]
            is_same = len(pair) == 2 and pair[0].shape == pair[1].shape
            if not (is_same and np.allclose(*pair, atol=1e-5)):
                different.append((name, one))
    return different


@pytest.mark.parametrize("model", [MISTRAL, ROUTED])
async def test_what_changes_between_run_and_cutover_follows(migrate, system, model):
    """Of vectors that are changed or removed, and of no other part of their points."""
    writer = Writer(system.connection, "docs")
    for number in range(1, 11):
        await writer.put(number, f"text {number}")
    options = ("--vector", "text", "--to", model, "--from", LARGE)
    done = await migrate("run", "docs", *options, "--json")
    assert (done.code, done.err) == (0, "")
    (state,) = done.json
    await writer.change(1, "words", _sparse(99))
    await writer.change(2, "words", None)
    await writer.change(3, "tokens", [[5.0, 1.0]])
    await writer.change(4, "tokens", None)
    await writer.change(5, "image", [1.0, 0.0, 0.5])
    await writer.change(6, "image", None)
    done = await migrate("cutover", "docs", "--alias", "live")
    assert (done.code, done.err) == (0, "")
    found = await system.qdrant.points("live")
    name, width = (LARGE, 16) if model == ROUTED else (MISTRAL, 8)
    differences = _differences(found, writer.expected, lambda text: vector_of(name, text, width))
    assert differences == []
    assert state["target"] != "docs"


@pytest.mark.parametrize("failing", [0.0, 0.03])
@pytest.mark.parametrize("seed", range(4))
async def test_no_difference_under_a_writer_of_all_three(migrate, system, seed, failing):
    """A client changes dense, sparse and multi vectors before every read of the migration.

    Where requests fail now and then, each step is given again until it is through.
    """
    chance = random.Random(seed)
    async with Connection(url=system.qdrant.url) as own:
        writer = Writer(own, "docs")
        for number in range(1, 41):
            await writer.put(number, f"text {number}")
        await system.alias("live", "docs")
        writer.name = "live"
        writing = False

        async def meanwhile(request: web.Request) -> web.StreamResponse | None:
            nonlocal writing
            if writing:
                return None
            if chance.random() < failing:
                return await answer(400, "not now")(request)
            # Between a read and the write that follows it nobody can do anything about it.
            if request.method in ("PUT", "DELETE") or request.path.endswith("delete"):
                return None
            writing = True
            await writer.change_something(chance)
            writing = False
            return None

        async def step(*arguments: str) -> Done:
            for _ in range(50):
                done = await migrate(*arguments, "--json")
                if done.code == 0:
                    return done
                assert failing
            raise AssertionError(done.err)

        system.qdrant.always = meanwhile
        options = ("--vector", "text", "--to", ROUTED, "--from", LARGE, "--page", "16")
        await step("run", "docs", *options)
        done = await step("cutover", "docs")
        system.qdrant.always = None
    assert (await system.aliases())["live"] == done.json[0]["target"]
    found = await system.qdrant.points("live")
    assert _differences(found, writer.expected, lambda text: vector_of(LARGE, text, 16)) == []


async def test_points_without_text_or_vector_are_carried(migrate, system):
    """What has only an image stays so; what has a text and no vector gets one; plan says both."""
    writer = Writer(system.connection, "docs")
    for number in range(1, 4):
        await writer.put(number, f"text {number}")
    await writer.put(4, "text 4", {"text": None})
    image = {"image": [3.0, 4.0, 5.0]}
    await writer._upsert(5, {"file": "a.png"}, image)
    await writer._upsert(6, {"file": "b.png"}, {})
    options = ("--vector", "text", "--to", MISTRAL, "--from", LARGE)
    (plan,) = (await migrate("plan", "docs", *options, "--json")).json
    assert (plan["without_vector"], plan["others_only"], plan["dead"]) == (3, 2, 0)
    done = await migrate("plan", "docs", *options)
    assert (
        "  3 without an old vector: 1 get one from their text, 2 have no text and stay without"
        in done.out
    )
    done = await migrate("run", "docs", *options, "--json")
    assert (done.code, done.err) == (0, "")
    (state,) = done.json
    assert (state["counts"]["embedded"], state["counts"]["without_vector"]) == (4, 2)
    assert (await migrate("cutover", "docs", "--alias", "live")).code == 0
    found = await system.qdrant.points("live")
    assert set(found) == set(range(1, 7))
    assert set(found[4]["vector"]) == {"text", "image", "tokens", "words"}
    assert found[4]["vector"]["text"] == pytest.approx(vector_of(MISTRAL, "text 4", 8), abs=1e-6)
    assert (found[5]["payload"], set(found[5]["vector"])) == ({"file": "a.png"}, {"image"})
    assert found[6]["vector"] == {}


async def test_a_point_without_any_vector_is_carried_from_a_plain_collection(migrate, system):
    """Its payload is all there is; beside it, a point whose text is gone is a dead letter."""
    await _own(system, "plain", lambda number: {"content": f"text {number}"}, 3)
    bare = models.PointStruct(id=8, payload={"note": "a folder"}, vector={})
    textless = models.PointStruct(id=9, payload={"note": "x"}, vector=system.old_vector("x"))
    await system.connection.ask(lambda client: client.upsert("plain", [bare, textless]))
    done = await migrate("run", "plain", "--to", MISTRAL, "--json")
    (state,) = done.json
    counts = state["counts"]
    assert (done.code, counts["dead"], counts["without_vector"]) == (1, 1, 1)
    found = await system.qdrant.points(state["target"])
    assert set(found) == {1, 2, 3, 8}
    assert found[8]["payload"] == {"note": "a folder"}
    done = await migrate("cutover", "plain", "--alias", "live", "--allow-missing", "1", "--json")
    assert (done.code, done.json[0]["verified"]["differing"]) == (0, 0)


# Where the texts are


async def _own(system, name, payload, count=20, **metadata):
    """Make a collection of unnamed vectors whose payloads come from a function of the number."""
    params = models.VectorParams(size=system.width, distance=models.Distance.COSINE)
    await system.connection.ask(
        lambda client: client.create_collection(name, params, metadata=metadata)
    )
    points = [
        models.PointStruct(
            id=number, payload=payload(number), vector=system.old_vector(f"text {number}")
        )
        for number in range(1, count + 1)
    ]
    await system.connection.ask(lambda client: client.upsert(name, points))


async def test_a_collection_of_our_own_is_read_by_its_own_field(migrate, system):
    """What the proxy has indexed needs no option: its text is in `text`."""
    told = Provenance(f"openai/{LARGE}", system.width).as_metadata()
    await _own(system, "own", lambda number: {"text": f"text {number}"}, **told)
    done = await migrate("run", "own", "--to", MISTRAL, "--json")
    assert (done.code, done.err) == (0, "")
    (state,) = done.json
    assert (state["counts"]["embedded"], state["counts"]["dead"]) == (20, 0)
    assert state["rule"] == "{text}"
    # The new collection says itself where its texts are.
    assert (await migrate("cutover", "own", "--alias", "live")).code == 0
    done = await migrate("plan", "live", "--to", LARGE, "--json")
    assert (done.code, done.json[0]["rule"]) == (0, "{text}")


async def test_a_field_that_no_point_has_is_refused_with_those_there(migrate, system):
    """`plan` and `run` say which fields there are, and which reading fits."""
    await _own(system, "foreign", lambda number: {"page_content": f"text {number}", "n": number})
    for step in ("plan", "run"):
        done = await migrate(step, "foreign", "--to", MISTRAL)
        assert done.code == 1
        assert "has a text at {content}; the fields there: n, page_content" in done.err
        assert "--text-by langchain" in done.err
    done = await migrate("run", "foreign", "--to", MISTRAL, "--text-by", "langchain", "--json")
    assert (done.code, done.json[0]["counts"]["embedded"]) == (0, 20)
    assert (await migrate("cutover", "foreign", "--alias", "live")).code == 0


async def test_one_text_among_many_points_is_found(migrate, system):
    """A field that few points have is no wrong one, however far away the first of them is."""
    await _own(system, "rare", lambda n: {"content": "the only one"} if n == 300 else {"n": n}, 300)
    (plan,) = (await migrate("plan", "rare", "--to", MISTRAL, "--json")).json
    assert (plan["points"], plan["to_embed"], plan["dead"]) == (300, 1, 299)
    assert plan["fields"] == ["content", "n"]


def _node(number):
    node = {
        "id_": str(number),
        "text": f"text {number}",
        "metadata": {"file": "a.md", "secret": "no"},
        "excluded_embed_metadata_keys": ["secret"],
        "metadata_template": "{key}: {value}",
        "metadata_seperator": "\n",
        "text_template": "{metadata_str}\n\n{content}",
    }
    return {"_node_content": json.dumps(node), "_node_type": "TextNode", "file": "a.md"}


@pytest.mark.parametrize(
    ("reading", "payload", "text"),
    [
        ("llamaindex", _node, "file: a.md\n\ntext 7"),
        ("langchain", lambda number: {"page_content": f"text {number}", "metadata": {}}, "text 7"),
        ("mem0", lambda number: {"data": f"text {number}", "user_id": "u"}, "text 7"),
        ("embedding-proxy", lambda number: {"text": f"text {number}"}, "text 7"),
    ],
)
async def test_ready_readings(migrate, system, reading, payload, text):
    """The text is what the tool that wrote the payload has embedded."""
    await _own(system, "foreign", payload)
    done = await migrate("run", "foreign", "--to", MISTRAL, "--text-by", reading, "--json")
    assert (done.code, done.err) == (0, "")
    found = await system.qdrant.points(done.json[0]["target"])
    assert found[7]["vector"] == pytest.approx(vector_of(MISTRAL, text, 8), abs=1e-6)


# What must not be lost


async def test_nothing_is_switched_to_an_empty_collection(migrate, system):
    """However many may be missing: a verification that looked at nothing does not pass."""
    await _own(system, "plain", lambda number: {"content": f"text {number}"})
    await system.alias("live", "plain")
    assert (await migrate("run", "plain", "--to", MISTRAL)).code == 0
    ids = list(range(1, 21))
    await system.connection.ask(lambda c: c.overwrite_payload("plain", {"note": "x"}, ids))
    done = await migrate("cutover", "plain", "--allow-missing", "19")
    assert done.code == 1
    assert "20 of 20 points could not be carried" in done.err
    done = await migrate("cutover", "plain", "--allow-missing", "100%")
    assert done.code == 1
    assert "nothing of plain could be looked at" in done.err
    assert (await system.aliases())["live"] == "plain"


async def test_a_share_of_the_points_may_be_missing(migrate, system):
    """As many as are named, as a number or a share; finalize has to be told the number, too."""
    await _own(system, "plain", lambda number: {"content": f"text {number}" if number > 2 else ""})
    assert (await migrate("run", "plain", "--to", MISTRAL)).code == 1
    wrong = await migrate("cutover", "plain", "--allow-missing", "many")
    assert (wrong.code, "neither a number nor a share" in wrong.err) == (2, True)
    done = await migrate("cutover", "plain", "--alias", "live", "--allow-missing", "9%")
    assert done.code == 1
    assert "2 of 20 points could not be carried" in done.err
    done = await migrate("cutover", "plain", "--alias", "live", "--allow-missing", "10%")
    assert done.code == 0
    done = await migrate("finalize", "plain", "--yes", "--yes")
    assert done.code == 1
    assert "has 18 points, and plain has 20" in done.err
    assert "plain" in await system.collections()
    done = await migrate("finalize", "plain", "--yes", "--yes", "--allow-missing", "2")
    assert done.code == 0
    assert "plain" not in await system.collections()


async def test_a_snapshot_is_made_before_the_old_collection_is_deleted(migrate, system):
    """`finalize --snapshot` says what it is called; it stays when the collection is gone."""
    await _own(system, "plain", lambda number: {"content": f"text {number}"})
    assert (await migrate("run", "plain", "--to", MISTRAL)).code == 0
    assert (await migrate("cutover", "plain", "--alias", "live")).code == 0
    done = await migrate("finalize", "plain", "--yes", "--yes", "--snapshot")
    assert done.code == 0
    assert "the server keeps plain as the snapshot plain-" in done.out
    assert "plain" not in await system.collections()
