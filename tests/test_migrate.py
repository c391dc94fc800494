"""The owner's seven collections moved to another provider and another model, and back."""

import asyncio
import json
import re
import shlex
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from command import Done
from fault_server import vector_of
from migrate_kills import kill_and_resume
from old_system import (
    LARGE,
    MISTRAL,
    SIZES,
    OldSystem,
    payload_of,
    text_of,
)
from qdrant_client import QdrantClient, models
from qdrant_client.local.persistence import CollectionPersistence
from qdrant_server import REAL

OPENROUTER = f"openrouter/openai/{LARGE}"
MEMORIES = "hephaestus_agent_memories"
CONTEXT = "hephaestus_project_context"


@pytest.fixture
async def system(tmp_path, monkeypatch):
    """Give the old system, and have every provider's key set."""
    async with OldSystem(tmp_path) as system:
        for name in ("OPENAI", "OPENROUTER", "MISTRAL"):
            monkeypatch.setenv(f"{name}_API_KEY", "k")
        yield system


@pytest.fixture
def migrate(system, command):
    """Give a function that runs a step in this process, and says how it ended."""

    async def step(name, *arguments, qdrant=None) -> Done:
        where = ("--qdrant", qdrant or system.qdrant.url, "--config", str(system.config))
        return await asyncio.to_thread(command, "migrate", name, *arguments, *where)

    return step


async def _same_but_for_vectors(system, old, new, model, width):
    """Assert that a collection holds the old points, each with the vector of its text."""
    before, after = await system.qdrant.points(old), await system.qdrant.points(new)
    assert set(before) == set(after)
    for one, point in after.items():
        assert point["payload"] == before[one]["payload"]
        expected = vector_of(model, text_of(old, point["payload"]), width)
        assert np.allclose(point["vector"], expected, atol=1e-6)
    return len(after)


# The whole way, with all 2,000 points


async def test_the_same_model_from_another_provider_is_not_bought_again(system, migrate):
    """Of 2,000 points only the sample is bought; the rest is copied, verified, and switched to."""
    await system.fill()
    file = ("--file", str(system.mapping), "--to", OPENROUTER, "--from", LARGE)
    plans = (await migrate("plan", *file, "--json")).json
    assert {plan["regime"] for plan in plans} == {"reuse"}
    assert sum(plan["points"] for plan in plans) == 2000
    assert sum(plan["to_buy"] for plan in plans) == 10 * 7
    assert system.bought == []

    done = await migrate("run", *file, "--json")
    assert (done.code, done.err) == (0, "")
    sampled = len(system.openrouter.inputs)
    assert 7 * 8 <= sampled <= 7 * 10  # Equal texts in a sample are bought once.
    assert sum(state["counts"]["bought"] for state in done.json) == sampled
    points = 0
    for state in done.json:
        assert (state["regime"], state["counts"]["embedded"]) == ("reuse", 0)
        points += await _same_but_for_vectors(
            system, state["source"], state["target"], LARGE, system.width
        )
        info = await system.connection.ask(lambda c, n=state["target"]: c.get_collection(n))
        assert info.payload_schema["agent_id"].data_type == "keyword"
        assert info.config.metadata["embedding_proxy"]["space"] == f"openai/{LARGE}"
    assert points == 2000

    done = await migrate("cutover", *SIZES, "--json")
    assert (done.code, done.err) == (0, "")
    assert [state["verified"]["recalled"] for state in done.json] == [
        state["verified"]["sampled"] for state in done.json
    ]
    targets = {f"live_{state['source']}": state["target"] for state in done.json}
    assert await system.aliases() == targets
    assert len(system.bought) == sampled


async def test_another_model_is_bought_switched_to_and_left_again(system, migrate):
    """All 2,000 points get vectors of mistral-embed, equal texts bought once, and a way back."""
    await system.fill()
    file = ("--file", str(system.mapping), "--to", MISTRAL, "--from", LARGE)
    plans = (await migrate("plan", *file, "--json")).json
    assert {plan["regime"] for plan in plans} == {"reembed"}

    done = await migrate("run", *file, "--json")
    assert (done.code, done.err) == (0, "")
    texts = {text_of(n, payload_of(n, i)) for n, size in SIZES.items() for i in range(1, size + 1)}
    assert sorted(system.mistral.inputs) == sorted(texts)
    assert sum(plan["to_buy"] for plan in plans) == len(texts)
    for state in done.json:
        new = (state["source"], state["target"], MISTRAL, system.new_width)
        assert await _same_but_for_vectors(system, *new) == SIZES[state["source"]]
    targets = {f"live_{state['source']}": state["target"] for state in done.json}
    sources = {f"live_{name}": name for name in SIZES}

    done = await migrate("cutover", *SIZES)
    assert (done.code, done.err) == (0, "")
    assert await system.aliases() == targets
    assert (await migrate("rollback", *SIZES)).code == 0
    assert await system.aliases() == sources
    refused = await migrate("finalize", *SIZES, "--yes", "--yes")
    assert refused.code == 1
    assert "rolled back" in refused.err

    assert (await migrate("run", *file)).code == 0
    assert (await migrate("cutover", *SIZES)).code == 0
    assert await system.aliases() == targets
    assert len(system.bought) == len(texts)
    plans = (await migrate("plan", *file, "--regime", "reembed", "--json")).json
    assert (plans[0]["cached"], plans[0]["to_buy"]) == (plans[0]["distinct"], 0)

    assert (await migrate("finalize", *SIZES, "--yes")).code == 2  # The second question.
    assert set(SIZES) <= await system.collections()
    assert (await migrate("finalize", *SIZES, "--yes", "--yes")).code == 0
    assert await system.collections() == set(targets.values())
    assert {state["phase"] for state in (await migrate("status", *SIZES, "--json")).json} == {
        "finalized"
    }


def _blocks(language):
    """Return the blocks of a language in the page about migrations."""
    page = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


async def test_the_commands_of_the_page(system, migrate):
    """What docs/migration.md shows works as it stands there, on the collections that it names."""
    await system.fill(0.02, alias=False)
    params = models.VectorParams(size=system.width, distance=models.Distance.COSINE)
    await system.connection.ask(lambda client: client.create_collection("docs", params))
    (mapping,) = _blocks("yaml")
    system.mapping.write_text(mapping)
    lines = [line for block in _blocks("sh") for line in block.splitlines()]
    assert len(lines) == 9
    for line in lines:
        _, _, step, *arguments = shlex.split(line)
        given = [str(system.mapping) if one == "collections.yaml" else one for one in arguments]
        if "--qdrant" in given:
            del given[given.index("--qdrant") :]
        done = await migrate(step, *given, *(("--yes",) * 2 if step == "finalize" else ()))
        assert done.code == 0, (line, done)
    aliases = {f"{name}_live": name for name in SIZES} | {"docs_live": f"docs__{MISTRAL}-8"}
    assert await system.aliases() == aliases
    assert "docs" not in await system.collections()


async def test_killed_at_any_moment_and_resumed(tmp_path):
    """After kills at any moment the end is as without them, and nothing is bought twice."""
    assert (await kill_and_resume(tmp_path, kills=2, seed=5)).kills >= 2


# Points that are not as they should be

UUIDS = [f"00000000-0000-4000-8000-00000000000{i}" for i in range(3)]
VECTORS = {
    one: [float(number) for number in numbers]
    for one, numbers in {
        1: (1, 2, 3, 4),
        2: (2, 1, 3, 4),
        5: (3, 1, 2, 4),
        UUIDS[0]: (4, 1, 2, 3),
        UUIDS[1]: (1, 3, 2, 4),
        UUIDS[2]: (1, 4, 2, 3),
    }.items()
}
NONE = [0.0] * 4
ODD = [
    models.PointStruct(id=1, vector=VECTORS[1], payload={"content": "one"}),
    models.PointStruct(id=2, vector=VECTORS[2], payload={"content": "  "}),
    models.PointStruct(id=3, vector=NONE, payload={"content": "three"}),
    models.PointStruct(id=4, vector=NONE, payload={"note": "no text"}),
    models.PointStruct(id=5, vector=VECTORS[5], payload={"content": "a NaN"}),
    models.PointStruct(id=UUIDS[0], vector=VECTORS[UUIDS[0]], payload={"content": "six"}),
    models.PointStruct(id=UUIDS[1], vector=VECTORS[UUIDS[1]], payload=None),
    models.PointStruct(id=UUIDS[2], vector=VECTORS[UUIDS[2]], payload={"content": 7}),
]
WITH_TEXT = {1: "one", 3: "three", 5: "a NaN", UUIDS[0]: "six", UUIDS[2]: "7"}


@pytest.fixture(params=["server", "folder"])
async def odd(request, system, tmp_path):
    """Give a Qdrant with such points in `docs`, and a function that reads a collection there."""
    params = models.VectorParams(size=4, distance=models.Distance.DOT)
    if request.param == "server":
        if REAL:
            pytest.skip("a server takes a NaN by gRPC alone")
        await system.connection.ask(lambda client: client.create_collection("docs", params))
        await system.connection.ask(lambda client: client.upsert("docs", ODD))
        # As after a write by gRPC: JSON has no NaN, and the server says null.
        local = system.qdrant._engine._local.collections["docs"]
        local.vectors[""][local.ids[5]][1] = np.nan
        return system.qdrant.url, system.qdrant.points

    folder = tmp_path / "qdrant"
    with closing(QdrantClient(path=str(folder))) as client:
        client.create_collection("docs", params)
        client.upsert("docs", ODD)
    # The engine takes none either: this one is in its file.
    with closing(CollectionPersistence(str(folder / "collection" / "docs"))) as file:
        file.persist(ODD[4].model_copy(update={"vector": [1.0, float("nan"), 3.0, 4.0]}))

    async def read(collection):
        def points():
            with closing(QdrantClient(path=str(folder), force_disable_check_same_thread=True)) as c:
                return {
                    one.id: one.model_dump() for one in c.scroll(collection, with_vectors=True)[0]
                }

        return await asyncio.to_thread(points)

    return str(folder), read


def _letters(state):
    """Return why each point has a dead letter."""
    lines = Path(state["dead_letters"]).read_text(encoding="utf-8").splitlines()
    return {letter["id"]: letter["why"] for letter in map(json.loads, lines)}


async def test_odd_points_are_planned_for(odd, migrate):
    """The plan tells points without text, each sort of odd vector, and ids of both kinds."""
    place, _ = odd
    (plan,) = (await migrate("plan", "docs", "--to", MISTRAL, "--json", qdrant=place)).json
    assert (plan["points"], plan["numeric_ids"], plan["uuid_ids"]) == (8, 5, 3)
    assert plan["without_text"] == 3
    assert plan["odd_vectors"].pop("all numbers are zero") == 2
    (why,) = plan["odd_vectors"]
    assert why in {
        "holds a number that is not finite",
        "cannot be read: it holds what is no number",
    }
    assert plan["dead"] == 3
    assert set(plan["first_dead"]) == {2, 4, UUIDS[1]}


async def test_odd_points_are_never_rubbish_in_the_new_collection(odd, migrate, system):
    """What has a text gets its vector, whatever the old one was; the rest is a dead letter."""
    place, read = odd
    done = await migrate("run", "docs", "--to", MISTRAL, "--json", qdrant=place)
    assert done.code == 1
    (state,) = done.json
    assert (state["phase"], state["counts"]["dead"]) == ("copied", 3)
    new = await read(state["target"])
    assert set(new) == set(WITH_TEXT)
    for one, text in WITH_TEXT.items():
        expected = vector_of(MISTRAL, text, system.new_width)
        assert np.allclose(new[one]["vector"], expected, atol=1e-6)
    assert _letters(state) == dict.fromkeys([2, 4, UUIDS[1]], "no text: nothing at `content`")

    refused = await migrate("cutover", "docs", "--alias", "live", qdrant=place)
    assert refused.code == 1
    assert "3 of 8 points could not be carried" in refused.err
    done = await migrate("cutover", "docs", "--alias", "live", "--allow-missing", "3", qdrant=place)
    assert done.code == 0


async def test_copied_vectors_are_sound_or_bought(odd, migrate, system):
    """Where vectors are copied, an odd one is bought from its text; others need no text."""
    place, read = odd
    content = json.loads(system.config.read_text())
    content["models"]["old"] = {
        "space": "made/up",
        "dimensions": 4,
        "routes": [{"provider": "openai", "model": "old"}],
    }
    system.config.write_text(json.dumps(content))
    system.openai.widths["old"] = 4
    bought = {3: [4.0, 3.0, 2.0, 1.0], 5: [4.0, 2.0, 1.0, 3.0]}
    right = {WITH_TEXT[one]: (VECTORS | bought)[one] for one in WITH_TEXT}

    def answer(reply):
        for item, text in zip(reply["data"], system.openai.calls[-1].inputs, strict=True):
            item["embedding"] = right[text]

    system.openai.always = system.openai.altered(answer)
    options = ("--to", "old", "--from", "old", "--json")
    done = await migrate("run", "docs", *options, qdrant=place)
    (state,) = done.json
    counts = state["counts"]
    assert (done.code, state["regime"], counts["copied"], counts["embedded"]) == (1, "reuse", 5, 2)
    new = {one: point["vector"] for one, point in (await read(state["target"])).items()}
    assert new == VECTORS | bought
    assert _letters(state) == {4: "the vector: all numbers are zero; no text: nothing at `content`"}
