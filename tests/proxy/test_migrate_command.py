"""`migrate` as it is typed: what it takes, what it refuses in one line, what it prints and asks."""

import asyncio
import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from aiohttp import web
from command import Done
from embedding_proxy.index.migration.state import MigrationState
from embedding_proxy.proxy.cli import migrate_process
from embedding_proxy.proxy.cli.migrate_options import find_model, settings_for, width_of
from embedding_proxy.proxy.cli.migrate_process import hold_lock
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Settings
from example_package import install
from fault_server import status, vector_of
from old_system import LARGE, MISTRAL, OldSystem, payload_of
from ports import own_port
from qdrant_client import models

CONTEXT = "hephaestus_project_context"


@pytest.fixture
async def system(tmp_path, monkeypatch):
    async with OldSystem(tmp_path) as system:
        for name in ("OPENAI", "OPENROUTER", "MISTRAL"):
            monkeypatch.setenv(f"{name}_API_KEY", "k")
        params = models.VectorParams(size=system.width, distance=models.Distance.COSINE)
        await system.connection.ask(lambda client: client.create_collection(CONTEXT, params))
        await system.put(CONTEXT, range(1, 6))
        yield system


@pytest.fixture
def migrate(system, monkeypatch, command):
    """Give a function that runs a step; `says` is typed on the terminal."""

    async def step(*arguments, qdrant=True, says="") -> Done:
        where = ["--config", str(system.config)]
        if qdrant:
            where += ["--qdrant", system.qdrant.url]
        monkeypatch.setattr(sys, "stdin", io.StringIO(says))
        return await asyncio.to_thread(command, "migrate", *arguments, *where)

    return step


def _change(system, **sections):
    content = json.loads(system.config.read_text())
    system.config.write_text(json.dumps(content | sections))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plan", CONTEXT), "--to: name the model"),
        (("plan", CONTEXT, "--to", "mistral-embet"), "did you mean mistral-embed?"),
        (("plan", CONTEXT, "--to", f"mistral/{LARGE}"), "--to: there is no model"),
        (("plan", CONTEXT, "--to", MISTRAL, "--from", "xyz"), "--from: there is no model 'xyz'"),
        (("plan", CONTEXT, "--to", MISTRAL, "--dimensions", "4"), "gives 8 and no other"),
        (("plan", CONTEXT, "--to", LARGE, "--dimensions", "17"), "gives 1 to 16"),
        (("plan", "--to", MISTRAL), "name the collections"),
        (("plan", "a", "b", "--to", MISTRAL, "--into", "c"), "--into is for one collection"),
        (("plan", CONTEXT, "--to", MISTRAL, "--template", "none"), "names no field"),
        (("plan", "a", "--to", MISTRAL, "--text-field", "x", "--template", "{x}"), "not both"),
        (("cutover", "a", "b", "--alias", "live"), "'{collection}_live'"),
    ],
)
async def test_wrong_usage(migrate, arguments, says):
    """A mistake on the command line is one line that says what to give, and exit code 2."""
    done = await migrate(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert says in done.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": {"text_fild": "x"}}', "a.text_fild: unknown key"),
        ('{"a": {"text_field": 3}}', "a.text_field: expected a string"),
        ('{"a": "content"}', "a: expected keys"),
        ('{"a": {"text_field": "x", "template": "{x}"}}', "not both"),
        ("{}", "name the collections"),
        ("[]", "expected keys"),
    ],
)
async def test_a_wrong_file(migrate, tmp_path, content, says):
    """A mistake in --file is told by file, collection and key."""
    path = tmp_path / "which.yaml"
    path.write_text(content)
    done = await migrate("plan", "--file", str(path), "--to", MISTRAL)
    assert done.code == 2
    assert says in done.err


async def test_no_place(migrate, system, tmp_path):
    """Without a Qdrant, or with a folder that is none, nothing is made."""
    done = await migrate("plan", CONTEXT, "--to", MISTRAL, qdrant=False)
    assert (done.code, "set index.qdrant" in done.err) == (2, True)
    done = await migrate("status", CONTEXT, "--qdrant", str(tmp_path), qdrant=False)
    assert (done.code, "no folder of Qdrant's embedded mode" in done.err) == (2, True)


async def test_the_place_is_that_of_the_configuration(migrate, system):
    """Without --qdrant it is index.qdrant's, and what is embedded is not indexed there."""
    _change(system, index={"qdrant": {"url": system.qdrant.url}})
    assert (await migrate("run", CONTEXT, "--to", MISTRAL, qdrant=False)).code == 0
    assert await system.collections() == {CONTEXT, f"{CONTEXT}__{MISTRAL}-8"}
    done = await migrate("status", CONTEXT)
    assert f"5 points in {CONTEXT}__{MISTRAL}-8" in done.out


async def test_what_is_not_there(migrate):
    """A collection that nobody knows is one line and exit code 1, for each step."""
    done = await migrate("run", "nothing", "--to", MISTRAL)
    assert (done.code, "no collection or alias `nothing`" in done.err) == (1, True)
    for step in ("status", "cutover", "rollback"):
        done = await migrate(step, CONTEXT)
        assert (done.code, "no migration of it is known here" in done.err) == (1, True)


async def test_without_names_all_migrations_are_listed(migrate, system, command):
    """Each with its Qdrant, which is not asked; one that cannot be read is told, and is code 1."""

    async def status(*options):
        arguments = ("migrate", "status", *options, "--config", str(system.config))
        return await asyncio.to_thread(command, *arguments)

    done = await status()
    assert (done.code, done.out, done.err) == (0, "no migration was begun here\n", "")
    assert (await status("--json")).json == []
    await migrate("run", CONTEXT, "--to", MISTRAL)
    other = MigrationState(system.folder / "cache" / "migrations", "http://elsewhere:6333", "docs")
    state = MigrationState(
        system.folder / "cache" / "migrations", system.qdrant.url, CONTEXT
    ).load()
    other.save(replace(state, place="http://elsewhere:6333", collection="docs"))
    await system.connection.close()
    done = await status()
    assert done.code == 0
    assert f"{CONTEXT}: copied; next: cutover" in done.out
    assert f"  in {system.qdrant.url}" in done.out
    assert "docs: copied; next: cutover" in done.out
    found = (await status("--json")).json
    assert {one["collection"] for one in found} == {CONTEXT, "docs"}
    for options, left in (
        (("--qdrant", system.qdrant.url), [CONTEXT]),
        (("--to", MISTRAL), ["docs", CONTEXT]),
        (("--to", LARGE), []),
    ):
        found = (await status("--json", *options)).json
        assert sorted(one["collection"] for one in found) == sorted(left)
    other.path.write_text("{}")
    done = await status()
    assert (done.code, f"{CONTEXT}: copied" in done.out) == (1, True)
    assert f"{other.path} is not what this version writes" in done.err


async def test_a_qdrant_that_is_not_there_is_named(migrate, system, command, monkeypatch):
    """A refused connection names the host and port that nobody listens on."""
    monkeypatch.setattr("embedding_proxy.index.collection_reader.MAX_TRIES", 1)
    port = own_port()
    plan = ("plan", CONTEXT, "--to", MISTRAL, "--config", str(system.config))
    done = await asyncio.to_thread(
        command, "migrate", *plan, "--qdrant", f"http://127.0.0.1:{port}"
    )
    assert done.code == 1
    assert f"connection refused by 127.0.0.1:{port}" in done.err


async def test_what_would_be_wrong_to_begin(migrate, system, monkeypatch):
    """A cache that keeps nothing, or a model without a key, is told before anything is made."""
    _change(system, cache={"directory": str(system.folder / "cache"), "mode": "refresh"})
    done = await migrate("run", CONTEXT, "--to", MISTRAL)
    assert (done.code, "cache.mode: refresh" in done.err) == (2, True)
    _change(system, cache={"directory": str(system.folder / "cache")})
    monkeypatch.delenv("MISTRAL_API_KEY")
    done = await migrate("run", CONTEXT, "--to", MISTRAL)
    assert (done.code, "set MISTRAL_API_KEY" in done.err) == (1, True)
    assert await system.collections() == {CONTEXT}
    assert (await migrate("plan", CONTEXT, "--to", MISTRAL)).code == 0


async def test_only_one_process_at_a_time(migrate, system, monkeypatch):
    """While somebody works on a migration, another one is told so."""
    monkeypatch.setattr(migrate_process, "NOTICED_S", 0)
    journal = MigrationState(system.folder / "cache" / "migrations", system.qdrant.url, CONTEXT)
    async with hold_lock(journal):
        done = await migrate("run", CONTEXT, "--to", MISTRAL)
    assert (done.code, "another process works on this migration" in done.err) == (1, True)
    assert (await migrate("run", CONTEXT, "--to", MISTRAL)).code == 0


async def test_a_provider_that_has_no_credit_ends_the_run(migrate, system):
    """What waiting does not help is one line, and the same command goes on later."""
    system.mistral.always = status(402)
    done = await migrate("run", CONTEXT, "--to", MISTRAL)
    assert (done.code, "run it again to go on" in done.err) == (1, True)
    system.mistral.always = None
    assert (await migrate("run", CONTEXT, "--to", MISTRAL)).code == 0


async def test_one_that_fails_keeps_no_other_back(migrate, system):
    """A collection that is refused is told at the end, and the others are done."""
    await system.connection.ask(
        lambda client: client.create_collection(
            "foreign", models.VectorParams(size=4, distance=models.Distance.COSINE)
        )
    )
    done = await migrate("run", "foreign", CONTEXT, "--to", LARGE, "--regime", "reuse")
    assert done.code == 1
    assert "foreign: --regime reuse" in done.err
    both = ("foreign", CONTEXT, "--to", MISTRAL)
    assert (await migrate("run", *both)).code == 0
    done = await migrate("cutover", "foreign", CONTEXT, "--alias", "{collection}_live")
    assert done.code == 0, done.err
    assert set(await system.aliases()) == {"foreign_live", f"{CONTEXT}_live"}
    done = await migrate("rollback", CONTEXT, "unknown")
    assert (done.code, f"{CONTEXT}: rolled back" in done.err) == (1, True)


async def test_the_proof_is_the_new_providers_own(migrate, system):
    """What another provider gave for the same texts, and is cached, proves nothing of this one."""
    both = (CONTEXT, "--from", LARGE)
    assert (await migrate("run", *both, "--to", LARGE, "--regime", "reembed")).code == 0
    assert len(system.openai.inputs) == 5

    async def another_model(_, payload):
        return web.json_response(system.openrouter.reply({**payload, "model": f"other/{MISTRAL}"}))

    system.openrouter.widths[f"other/{MISTRAL}"] = system.width
    system.openrouter.always = another_model
    there = ("--to", f"openrouter/openai/{LARGE}", "--restart")
    done = await migrate("run", *both, *there)
    assert (done.code, "5 of 5 sampled texts" in done.err) == (1, True)
    system.openrouter.always = None
    done = await migrate("run", *both, *there, "--json")
    assert (done.code, done.json[0]["proof"]) == (0, pytest.approx(1))


# What is printed and asked


async def test_a_package_may_make_the_texts(migrate, system, tmp_path, monkeypatch):
    """From the run to the cutover, which finds by the journal what made them."""
    module = install("acme_strategies", tmp_path / "site", monkeypatch)
    payloads = {1: {"title": "fire", "description": "x" * 600}, 2: {"title": "flood"}}
    params = models.VectorParams(size=2, distance=models.Distance.COSINE)
    points = [models.PointStruct(id=n, vector=[1, n], payload=p) for n, p in payloads.items()]
    await system.connection.ask(lambda client: client.create_collection("tickets", params))
    await system.connection.ask(lambda client: client.upsert("tickets", points))
    by = ("--text-by", "acme_ticket")
    done = await migrate("run", "tickets", "--to", MISTRAL, *by, "--text-field", "title")
    assert (done.code, "give a text field, a template or text-by, not" in done.err) == (2, True)
    done = await migrate("run", "tickets", "--to", MISTRAL, "--text-by", "nobody")
    assert (done.code, "tickets: no installed package brings" in done.err) == (2, True)
    assert (await migrate("run", "tickets", "--to", MISTRAL, *by)).code == 0
    done = await migrate("cutover", "tickets", "--alias", "live")
    assert (done.code, "cosine 1.00000 at least" in done.out) == (0, True)
    text = sys.modules.pop(module).Ticket().text
    found = await system.qdrant.points("live")
    assert found.keys() == payloads.keys()
    for one, payload in payloads.items():
        right = vector_of(MISTRAL, text(payload), system.new_width)
        assert np.allclose(found[one]["vector"], right, atol=1e-6)


async def test_what_people_read(migrate, system):
    """Plan, run and cutover say in words what they found, did, and what comes next."""
    done = await migrate("plan", CONTEXT, "--to", f"openrouter/openai/{LARGE}", "--from", LARGE)
    *lines, estimate = done.out.splitlines()
    assert lines == [
        f"{CONTEXT}: reuse (both are openai/{LARGE}, 16 numbers wide)",
        f"  {CONTEXT} (16) -> {CONTEXT}__{LARGE}-16 (16)",
        "  5 points (ids: 0 numbers, 5 UUIDs), 0 without text",
        f"  text from {{content}}; fields: {', '.join(sorted(payload_of(CONTEXT, 1)))}",
        "  0 to embed: 0 distinct texts, 0 tokens; 0 are in the cache",
        "  to buy: 5 texts, 40 tokens, $0.0000052",
    ]
    assert re.fullmatch(
        r"  about \d+ s, an estimate: 1 s to buy \(calls: 1\),"
        r" \d+ s for Qdrant by what reading took now",
        estimate,
    )
    done = await migrate("run", CONTEXT, "--to", MISTRAL)
    assert f"{CONTEXT}: copied; next: cutover" in done.out
    assert "5 points seen: 0 copied, 5 embedded, 5 bought" in done.out
    done = await migrate("cutover", CONTEXT, "--alias", "live", "--to", MISTRAL)
    assert "verified: 5 of 5 points, ids, payloads and carried vectors equal" in done.out
    assert "; 5 sampled, cosine 1.00000" in done.out
    assert "aliases: live" in done.out
    done = await migrate("rollback", CONTEXT, "--to", LARGE)
    assert (done.code, f"is migrated to {MISTRAL}, not {LARGE}" in done.err) == (1, True)


@pytest.mark.parametrize(("options", "says"), [((), "y\ny\n"), (("--yes",), "y\n")])
async def test_finalize_asks_twice(migrate, system, options, says, monkeypatch):
    """Two questions stand before the end of a collection; less than two answers change nothing.

    Without a terminal to ask on it is refused.
    """
    await migrate("run", CONTEXT, "--to", MISTRAL)
    await migrate("cutover", CONTEXT, "--alias", "live")
    done = await migrate("finalize", CONTEXT, *options, says=says)
    assert (done.code, CONTEXT in await system.collections()) == (2, True)
    assert "there is no terminal to ask on; say --yes --yes" in done.err
    monkeypatch.setattr("embedding_proxy.proxy.cli.output.has_terminal", lambda: True)
    for less in (says.removesuffix("y\n"), says.removesuffix("y\n") + "n\n"):
        done = await migrate("finalize", CONTEXT, *options, says=less)
        assert (done.code, CONTEXT in await system.collections()) == (1, True)
    if not options:
        assert f"Delete {CONTEXT} (5 points) for good?" in done.err
    done = await migrate("finalize", CONTEXT, *options, says=says)
    assert (done.code, CONTEXT in await system.collections()) == (0, False)


# What the configuration gives


def test_models_and_their_providers():
    """A name stands for a model; with a provider before it, that one alone serves it."""
    settings = Settings()
    assert find_model(settings, LARGE, "--to").provider is None
    assert find_model(settings, f"openai/{LARGE}", "--to").provider is None
    found = find_model(settings, f"openrouter/openai/{LARGE}", "--to")
    assert (found.provider, found.space.name) == ("openrouter", f"openai/{LARGE}")
    entry = settings_for(settings, found).models[found.name]
    assert [(route.provider, route.model) for route in entry.routes] == [
        ("openrouter", f"openai/{LARGE}")
    ]
    assert find_model(settings, "openrouter/mistralai/mistral-embed-2312", "--to").space.dimensions
    assert width_of(found, None) == 3072
    assert width_of(found, 256) == 256


def test_no_other_model_may_stand_in():
    """A fallback of another space is for clients who can see it; a collection cannot."""
    settings = Settings.model_validate(
        {
            "models": {
                LARGE: {"fallback": [{"model": "mistral-embed", "dimension_policy": "pad"}]},
                "unknown": {"space": "x/y", "routes": [{"provider": "openai", "model": "u"}]},
            }
        }
    )
    model = find_model(settings, LARGE, "--to")
    assert settings.models[LARGE].fallback
    changed = settings_for(settings, model)
    assert changed.models[LARGE].fallback == ()
    assert changed.server.drift_check_hours is None
    with pytest.raises(ConfigError, match=r"models\.unknown\.dimensions"):
        find_model(settings, "unknown", "--to")
