"""The owner's seven collections moved to another provider and another model, and back."""

import asyncio
import json
import signal
import sys
from contextlib import closing

import numpy as np
import pytest
from fault_server import vector_of
from migrate_kills import kill_and_resume
from old_system import (
    LARGE,
    MISTRAL,
    SIZES,
    TICKETS,
    Done,
    OldSystem,
    id_of,
    payload_of,
    text_of,
)
from qdrant_client import QdrantClient, models
from qdrant_client.local.persistence import CollectionPersistence

from proxy import cli

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
def migrate(system, monkeypatch, capsys):
    """Give a function that runs a step in this process, and says how it ended."""

    async def step(name, *arguments, qdrant=None) -> Done:
        where = ("--qdrant", qdrant or system.qdrant.url, "--config", str(system.config))
        monkeypatch.setattr(sys, "argv", ["embedding-proxy", "migrate", name, *arguments, *where])

        def in_thread() -> int:
            with pytest.raises(SystemExit) as caught:
                cli.main()
            return caught.value.code or 0

        done = Done(await asyncio.to_thread(in_thread), *capsys.readouterr())
        assert "Traceback" not in done.out + done.err
        return done

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

    assert (await migrate("finalize", *SIZES, "--yes")).code == 1  # The second question.
    assert set(SIZES) <= await system.collections()
    assert (await migrate("finalize", *SIZES, "--yes", "--yes")).code == 0
    assert await system.collections() == set(targets.values())
    assert {state["phase"] for state in (await migrate("status", *SIZES, "--json")).json} == {
        "finalized"
    }


async def test_killed_at_any_moment_and_resumed(tmp_path):
    """After kills amid copying and comparing, the end is as without, and nothing is bought twice."""
    story = await kill_and_resume(tmp_path, kills=3, seed=5)
    assert story.kills == 3
    assert story.twice <= story.in_doubt
