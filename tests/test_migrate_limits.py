"""Migrations and imports where a server takes less than is asked for, or fails, by the commands."""

import asyncio
import itertools
import json

import numpy as np
import pytest
from aiohttp import web
from command import Done
from embedding_proxy.index import collection_reader
from embedding_proxy.index.migration import points as migration_points
from embedding_proxy.index.migration.state import states_in
from fault_server import vector_of
from old_system import LARGE, MISTRAL, OldSystem
from qdrant_client import models
from qdrant_server import answer

COUNT = 150
OPTIONS = ("--to", MISTRAL, "--from", LARGE)


@pytest.fixture
async def system(tmp_path, monkeypatch):
    async with OldSystem(tmp_path) as system:
        for name in ("OPENAI", "OPENROUTER", "MISTRAL"):
            monkeypatch.setenv(f"{name}_API_KEY", "k")
        yield system


@pytest.fixture
def run(system, command):
    """Give a function that runs a command of `migrate` or `cache`."""

    async def run(*arguments) -> Done:
        where = ["--config", str(system.config)]
        if arguments[0] == "migrate":
            where += ["--qdrant", system.qdrant.url]
        return await asyncio.to_thread(command, *arguments, *where)

    return run


async def _fill(system, count=COUNT, **options):
    """Make `docs`, with an alias; the text is in `content`."""
    params = models.VectorParams(size=system.width, distance=models.Distance.COSINE)
    await system.connection.ask(lambda client: client.create_collection("docs", params, **options))
    points = [
        models.PointStruct(
            id=number,
            payload={"content": f"text {number}"},
            vector=system.old_vector(f"text {number}"),
        )
        for number in range(1, count + 1)
    ]
    for start in range(0, count, 50):
        some = points[start : start + 50]
        await system.connection.ask(lambda client, some=some: client.upsert("docs", some))
    await system.alias("live", "docs")


async def _is_right(system, count=COUNT, name="live"):
    found = await system.qdrant.points(name)
    assert sorted(found) == list(range(1, count + 1))
    for point in found.values():
        expected = vector_of(MISTRAL, point["payload"]["content"], system.new_width)
        assert np.allclose(point["vector"], expected, atol=1e-6)


def _at_most(reads=None, writes=None, status=400):
    """Refuse larger requests as strict mode does."""

    async def act(request: web.Request) -> web.StreamResponse | None:
        if request.path.rpartition("/")[2] not in {"points", "scroll", "query"}:
            return None
        body = json.loads(await request.read())
        is_write = request.method == "PUT"
        asked = len(body.get("points") or body.get("ids") or ()) or body.get("limit") or 0
        most, name = (writes, "upsert limit") if is_write else (reads, "limit")
        if most is None or asked <= most:
            return None
        words = f'Limit exceeded {asked} > {most} for "{name}". Help: Reduce the "{name}" parameter'
        return await answer(status, f"Bad request: {words} to or below {most}.")(request)

    return act


# Limits


@pytest.mark.parametrize("status", [400, 403])
async def test_smaller_pages_where_a_query_has_a_limit(run, system, status, caplog):
    """Strict mode's max_query_limit stops no step, from the plan to the end."""
    await _fill(system)
    system.qdrant.always = _at_most(reads=7, status=status)
    assert (await run("migrate", "plan", "docs", *OPTIONS)).code == 0
    done = await run("migrate", "run", "docs", *OPTIONS)
    assert done.code == 0
    assert caplog.text.count("trying 7 points at a time") == 2  # plan and run
    assert (await run("migrate", "cutover", "docs")).code == 0
    done = await run("migrate", "rollback", "docs")
    assert (done.code, (await system.aliases())["live"]) == (0, "docs")
    assert (await run("migrate", "run", "docs", *OPTIONS)).code == 0
    assert (await run("migrate", "cutover", "docs")).code == 0
    assert (await run("migrate", "finalize", "docs", "--yes", "--yes")).code == 0
    await _is_right(system)


async def test_smaller_writes_where_a_batch_has_a_limit(run, system, caplog):
    """What the server says it takes is kept to from then on."""
    await _fill(system)
    system.qdrant.always = _at_most(writes=20)
    done = await run("migrate", "run", "docs", *OPTIONS, "--json")
    assert done.code == 0
    (state,) = done.json
    written = [len(body["points"]) for body in system.qdrant.bodies[3:]]
    assert max(written) == 20
    await _is_right(system, name=state["target"])
    # Asked for once, and never again.
    assert caplog.text.count("trying batches of 20") == 1


async def test_a_batch_above_the_rate_limit_is_halved(run, system, caplog):
    """The same batch is not sent again and again where it says "please try to split"."""
    await _fill(system)

    async def act(request):
        if request.method != "PUT" or not request.path.endswith("/points"):
            return None
        if len(json.loads(await request.read())["points"]) <= 16:
            return None
        words = (
            "Rate limiting exceeded: Write rate limit exceeded, request larger than rate limiter"
            " capacity, please try to split your request"
        )
        return await answer(429, words)(request)

    system.qdrant.always = act
    done = await run("migrate", "run", "docs", *OPTIONS, "--json")
    assert done.code == 0
    await _is_right(system, name=done.json[0]["target"])
    assert caplog.text.count("split your request") == 3  # 128, 64, 32


@pytest.mark.parametrize("how", ["cut", "413"])
async def test_a_write_that_is_too_large_is_halved(run, system, how):
    """A gateway says so, or cuts the connection."""
    await _fill(system)

    async def act(request):
        if request.method != "PUT" or (request.content_length or 0) < 5000:
            return None
        if how == "cut":
            request.transport.abort()
            return web.Response()
        return web.Response(status=413, text="<html>413 Request Entity Too Large</html>")

    system.qdrant.always = act
    done = await run("migrate", "run", "docs", *OPTIONS, "--json")
    assert done.code == 0
    await _is_right(system, name=done.json[0]["target"])


def test_the_size_of_a_write_counts_every_number():
    """130 points of 200 × 128 numbers are many writes, each far below 32 MiB."""
    tokens = [[1 / 3] * 128] * 200
    words = models.SparseVector(indices=list(range(1000)), values=[1 / 3] * 1000)
    points = [
        collection_reader.Point(number, {}, None, {"tokens": tokens, "words": words})
        for number in range(130)
    ]
    writes = list(migration_points._in_writes(points))
    assert sum(map(len, writes)) == 130
    assert max(len(json.dumps(tokens)) * len(some) for some in writes) < 16 << 20


async def test_ten_writes_in_each_pass_end_a_run(run, system):
    """A pass that finds little is the last: what is left is carried under the switch."""
    await _fill(system)
    written = 0

    async def act(request):
        nonlocal written
        if request.path == "/collections/docs/points/count" and request.method == "POST":
            # The beginning of each pass over the old collection.
            written += 1
            point = models.PointStruct(
                id=written, payload={"content": f"text {written}"}, vector=[float(written)] * 16
            )
            changed = [
                point.model_copy(update={"id": one, "payload": {"content": f"new {written} {one}"}})
                for one in range(1, 11)
            ]
            await system.connection.ask(lambda client: client.upsert("docs", changed))

    system.qdrant.always = act
    done = await run("migrate", "run", "docs", *OPTIONS, "--page", "16", "--passes", "2")
    assert (done.code, done.err) == (0, "")
    done = await run("migrate", "cutover", "docs", "--json")
    assert done.code == 0
    system.qdrant.always = None
    old, new = await system.qdrant.points("docs"), await system.qdrant.points("live")
    late = done.json[0]["verified"]["late"]
    assert (late["left"], late["quiet"]) == (0, False)
    # The last pass began with a write as well, which it has carried.
    assert {one: point["payload"] for one, point in old.items()} == {
        one: point["payload"] for one, point in new.items()
    }


# Failures


async def test_a_rollback_that_cannot_count_is_a_rollback(run, system):
    """State, exit code and message agree: the aliases are at the old collection again."""
    await _fill(system)
    assert (await run("migrate", "run", "docs", *OPTIONS)).code == 0
    assert (await run("migrate", "cutover", "docs")).code == 0

    async def act(request):
        return await answer(400, "no")(request) if request.path.endswith("scroll") else None

    system.qdrant.always = act
    done = await run("migrate", "rollback", "docs")
    assert done.code == 0
    assert "could not be counted" in done.out
    assert done.out.startswith("docs: rolled back")
    assert (await system.aliases())["live"] == "docs"
    system.qdrant.always = None
    done = await run("migrate", "status", "docs", "--json")
    assert done.json[0]["phase"] == "rolled back"


async def test_a_rollback_that_fails_says_how_far_it_is(run, system):
    """It does not say that nothing has changed where the aliases may have."""
    await _fill(system)
    assert (await run("migrate", "run", "docs", *OPTIONS)).code == 0
    assert (await run("migrate", "cutover", "docs")).code == 0

    async def act(request):
        is_switch = request.path == "/collections/aliases"
        return await answer(400, "no")(request) if is_switch else None

    system.qdrant.always = act
    done = await run("migrate", "rollback", "docs")
    assert done.code == 1
    assert "now: switching; interrupted: cutover goes on, rollback goes back" in done.err
    system.qdrant.always = None
    assert (await run("migrate", "rollback", "docs")).code == 0
    assert (await system.aliases())["live"] == "docs"


async def test_a_name_that_could_not_be_taken_is_taken_by_the_same_command(run, system):
    """The old collection is deleted then, which is said, and no way back is promised."""
    await _fill(system)
    assert (await run("migrate", "run", "docs", *OPTIONS)).code == 0
    assert (await run("migrate", "cutover", "docs")).code == 0

    async def act(request):
        is_switch = request.path == "/collections/aliases"
        return await answer(400, "no")(request) if is_switch else None

    system.qdrant.always = act
    take = ("migrate", "finalize", "docs", "--take-name", "--yes", "--yes")
    done = await run(*take)
    assert done.code == 1
    assert "docs is deleted, and its name is no alias yet: HTTP 400: no" in done.err
    system.qdrant.always = None
    assert (await run("migrate", "status", "docs", "--json")).json[0]["phase"] == "finalized"
    assert (await run(*take)).code == 0
    await _is_right(system, name="docs")


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_a_cutover_that_fails_after_the_switch_goes_on(run, system, after):
    """It says that the aliases may have moved; given again, it carries what is late."""
    await _fill(system)
    assert (await run("migrate", "run", "docs", *OPTIONS)).code == 0
    calls = None

    async def act(request):
        nonlocal calls
        if request.path == "/collections/aliases":
            point = models.PointStruct(id=500, payload={"content": "late"}, vector=[1.0] * 16)
            await system.connection.ask(lambda client: client.upsert("docs", [point]))
            calls = itertools.count()
        elif calls is not None and request.method == "POST" and next(calls) >= after:
            return await answer(400, "no")(request)
        return None

    system.qdrant.always = act
    done = await run("migrate", "cutover", "docs")
    assert done.code == 1
    assert "now: switching; interrupted: cutover goes on, rollback goes back" in done.err
    system.qdrant.always = None
    assert (await system.aliases())["live"] != "docs"
    done = await run("migrate", "cutover", "docs", "--json")
    late = done.json[0]["verified"]["late"]
    assert (done.code, late["written"], late["quiet"]) == (0, 1, True)
    assert (await system.qdrant.points("live"))[500]["payload"] == {"content": "late"}


@pytest.mark.parametrize("step", ["run", "cutover"])
async def test_a_failure_names_host_and_deed_and_what_is_kept(run, system, step, monkeypatch):
    """Never "ReadError" alone."""
    monkeypatch.setattr(collection_reader, "MAX_TRIES", 1)
    await _fill(system)
    if step == "cutover":
        assert (await run("migrate", "run", "docs", *OPTIONS)).code == 0

    scrolls = itertools.count()

    async def act(request):
        if request.path.endswith("docs/points/scroll") and next(scrolls):
            request.transport.abort()
            return web.Response()
        return None

    system.qdrant.always = act
    done = await run("migrate", step, "docs", *(OPTIONS if step == "run" else ()))
    assert done.code == 1
    host = f"127.0.0.1:{system.qdrant.port}"
    assert host in done.err
    assert f"while {'copying' if step == 'run' else 'verifying'} docs" in done.err
    kept = "what was written and bought stays" if step == "run" else "now: copied; next: cutover"
    assert kept in done.err
    (journal,) = states_in(system.folder / "cache" / "migrations")
    assert journal.load().phase == ("copying" if step == "run" else "copied")


# The configuration of a collection


async def test_the_whole_configuration_is_carried(run, system):
    """All but the width, the metadata of our own, and what counts points."""
    await _fill(
        system,
        20,
        hnsw_config=models.HnswConfigDiff(m=8, ef_construct=77),
        optimizers_config=models.OptimizersConfigDiff(indexing_threshold=12345),
        wal_config=models.WalConfigDiff(wal_capacity_mb=16, wal_segments_ahead=1),
        strict_mode_config=models.StrictModeConfig(enabled=True, max_query_limit=5000),
        quantization_config=models.ScalarQuantization(
            scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.9)
        ),
        on_disk_payload=False,
        metadata={"owner": "us"},
    )
    text = models.TextIndexParams(
        type="text", tokenizer=models.TokenizerType.WORD, lowercase=False, min_token_len=3
    )
    await system.connection.ask(lambda c: c.create_payload_index("docs", "content", text))
    assert (await run("migrate", "run", "docs", *OPTIONS)).code == 0

    async def described(name):
        info = await system.connection.ask(lambda client: client.get_collection(name))
        found = info.config.model_dump(mode="json")
        found["metadata"] = {k: v for k, v in found["metadata"].items() if k != "embedding_proxy"}
        schema = {
            field: one.model_dump(mode="json", exclude={"points"})
            for field, one in info.payload_schema.items()
        }
        return found, schema

    old, new = await described("docs"), await described(f"docs__{MISTRAL}-8")
    assert old[0]["params"]["vectors"].pop("size") == 16
    assert new[0]["params"]["vectors"].pop("size") == 8
    assert old == new
    assert old[0]["strict_mode_config"]["max_query_limit"] == 5000
    assert old[0]["wal_config"]["wal_capacity_mb"] == 16


async def test_halves_are_compared_as_halves(run, system):
    """Copies of float16 vectors are equal within what the type holds: nothing is written twice."""
    half = {"distance": models.Distance.COSINE, "datatype": models.Datatype.FLOAT16}
    params = {
        "text": models.VectorParams(size=16, **half),
        "image": models.VectorParams(size=16, **half),
    }
    await system.connection.ask(lambda client: client.create_collection("halves", params))
    points = [
        models.PointStruct(
            id=number,
            payload={"content": f"text {number}"},
            vector={
                "text": system.old_vector(f"text {number}"),
                "image": system.old_vector(f"image {number}"),
            },
        )
        for number in range(1, 21)
    ]
    await system.connection.ask(lambda client: client.upsert("halves", points))
    model = ("--to", f"openrouter/openai/{LARGE}", "--from", LARGE, "--vector", "text")
    done = await run("migrate", "run", "halves", *model, "--json")
    (state,) = done.json
    assert (done.code, state["regime"], state["counts"]["updated"]) == (0, "reuse", 0)
    done = await run("migrate", "cutover", "halves", "--alias", "live", "--json")
    assert (done.code, done.json[0]["verified"]["differing"]) == (0, 0)
    old, new = [await system.qdrant.points(name) for name in ("halves", "live")]
    for one, point in old.items():
        for name in ("text", "image"):
            assert new[one]["vector"][name] == pytest.approx(point["vector"][name], abs=1e-3)


async def test_whole_numbers_are_refused_by_the_plan(run, system):
    """No model gives vectors of uint8."""
    params = models.VectorParams(
        size=16, distance=models.Distance.DOT, datatype=models.Datatype.UINT8
    )
    await system.connection.ask(lambda client: client.create_collection("bytes", params))
    for step in ("plan", "run"):
        done = await run("migrate", step, "bytes", *OPTIONS)
        assert done.code == 1
        assert "stores its vectors as uint8" in done.err


# Imports


async def test_an_import_takes_smaller_pages(run, system):
    """Of a server that allows no larger ones."""
    await _fill(system)
    system.qdrant.always = _at_most(reads=20)
    source = f"qdrant://127.0.0.1:{system.qdrant.port}/docs"
    options = ("--model", LARGE, "--text-field", "content", "--json")
    done = await run("cache", "import", source, *options)
    assert (done.code, done.json["stored"]) == (0, COUNT)


@pytest.mark.parametrize(
    ("page", "kept"),
    [
        (1, "0 entries taken in before"),
        (4, "100 entries taken in before; the same command goes on"),
    ],
)
async def test_an_import_that_is_cut_says_what_it_has_kept(run, system, monkeypatch, page, kept):
    """Pages are read three times: at the beginning, by the survey, and to be stored."""
    monkeypatch.setattr(collection_reader, "MAX_TRIES", 1)
    monkeypatch.setattr("embedding_proxy.proxy.importers.qdrant.PAGE", 100)
    monkeypatch.setattr("embedding_proxy.proxy.cli.cache_import._BATCH", 50)
    await _fill(system)
    scrolls = itertools.count()

    async def act(request):
        if request.path.endswith("docs/points/scroll") and next(scrolls) >= page:
            request.transport.abort()
            return web.Response()
        return None

    system.qdrant.always = act
    source = f"qdrant://127.0.0.1:{system.qdrant.port}/docs"
    done = await run("cache", "import", source, "--model", LARGE, "--text-field", "content")
    assert done.code == 1
    assert f"127.0.0.1:{system.qdrant.port} was cut while reading points of docs" in done.err
    assert kept in done.err


async def test_an_import_reads_the_texts_of_other_tools(run, system):
    """By a ready reading, which is named where the field is not there."""
    params = models.VectorParams(size=system.width, distance=models.Distance.COSINE)
    await system.connection.ask(lambda client: client.create_collection("docs", params))
    point = models.PointStruct(
        id=1, payload={"page_content": "text 1"}, vector=system.old_vector("text 1")
    )
    await system.connection.ask(lambda client: client.upsert("docs", [point]))
    source = f"qdrant://127.0.0.1:{system.qdrant.port}/docs"
    done = await run("cache", "import", source, "--model", LARGE)
    assert (done.code, "--text-by langchain reads them" in done.err) == (1, True)
    done = await run("cache", "import", source, "--model", LARGE, "--text-by", "langchain")
    assert (done.code, done.out) == (0, "1 entry taken in, 0 were there already\n")


async def test_a_migration_tells_a_wrong_key_from_a_missing_one(run, system, monkeypatch):
    """The variable is named either way."""
    await _fill(system, 20)
    system.qdrant.api_key = "right"
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)
    done = await run("migrate", "plan", "docs", *OPTIONS)
    assert (done.code, "(QDRANT_API_KEY is not set)" in done.err) == (1, True)
    monkeypatch.setenv("QDRANT_API_KEY", "wrong")
    done = await run("migrate", "run", "docs", *OPTIONS)
    assert (done.code, "(the key is in QDRANT_API_KEY)" in done.err) == (1, True)


async def test_an_import_tells_a_wrong_key_from_a_missing_one(run, system, monkeypatch):
    """The variable is named either way."""
    await _fill(system, 20)
    system.qdrant.api_key = "right"
    source = f"qdrant://127.0.0.1:{system.qdrant.port}/docs"
    options = ("--model", LARGE, "--text-field", "content")
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)
    done = await run("cache", "import", source, *options)
    assert done.code == 1
    assert "QDRANT_API_KEY is not set" in done.err
    monkeypatch.setenv("QDRANT_API_KEY", "wrong")
    done = await run("cache", "import", source, *options)
    assert done.code == 1
    assert "the key is not accepted" in done.err
    assert "(the key is in QDRANT_API_KEY)" in done.err
    monkeypatch.setenv("QDRANT_API_KEY", "right")
    assert (await run("cache", "import", source, *options)).code == 0
