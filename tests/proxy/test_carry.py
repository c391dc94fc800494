"""`cache export` and `import`: what is carried arrives whole, and nothing wrong is taken in."""

import asyncio
import base64
import gzip
import io
import json
import os
import re
import struct
import sys
import time
from contextlib import closing
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from command import STORE
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.key import Namespace, Row, checksum, keyring
from embedding_proxy.cache.maintenance import archive
from embedding_proxy.cache.record import Entry, decode, encode
from embedding_proxy.providers.base import Space
from embedding_proxy.proxy.cli import main
from embedding_proxy.proxy.importers.langchain import _uuid
from fault_server import status, vector_of
from pyarrow import parquet
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

GIB = 1 << 30
WIDTH = 16
SPACE = Space("a/small", WIDTH, tokenizer="cl100k_base")
MODELS = {
    "small": {
        "space": SPACE.name,
        "dimensions": WIDTH,
        "tokenizer": "cl100k_base",
        "unit_norm": True,
        "routes": [{"provider": "openai", "model": "small"}],
    },
    "twin": {
        "space": "a/twin",
        "dimensions": WIDTH,
        "routes": [{"provider": "openai", "model": "twin"}],
    },
}
TEXTS = [f"text {i}" for i in range(40)]
# By cl100k: the word, the blank, the number.
TOKENS_OF_TEXTS = 3 * len(TEXTS)


class Done(NamedTuple):
    code: int
    raw: bytes
    err: str

    @property
    def out(self):
        return self.raw.decode()

    @property
    def json(self):
        return json.loads(self.raw)


@pytest.fixture
def run(tmp_path, monkeypatch, capsysbinary):
    """Give a function that runs `cache …` in this process, on the store in `cache` or another."""
    monkeypatch.setenv("COLUMNS", "200")

    def run_command(*arguments, store="cache", upstream=None, stdin=None) -> Done:
        config = tmp_path / f"{store}.yaml"
        url = upstream.url if upstream else "http://127.0.0.1:9/v1"
        sections = {
            "cache": {"directory": str(tmp_path / store)},
            "models": MODELS,
            "providers": {"openai": {"base_url": url}, "openrouter": None},
        }
        config.write_text(json.dumps(sections))
        arguments = ["embedding-proxy", "cache", *map(str, arguments), "--config", str(config)]
        monkeypatch.setattr(sys, "argv", arguments)
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as caught:
            main.main()
        out, err = capsysbinary.readouterr()
        return Done(caught.value.code or 0, out, STORE.sub("", err.decode()))

    return run_command


def _failed(done, code, *words):
    """Check that a command ended with one line on stderr, which holds the words."""
    assert (done.code, done.raw) == (code, b"")
    assert re.fullmatch(r"embedding-proxy: [^\n]+\n", done.err), done.err
    assert all(word in done.err for word in words), done.err


@cache
def _vector(text, model="small"):
    return vector_of(model, text, WIDTH).tobytes()


def _row(text, namespace="", space=SPACE, days=1.0, vector=None):
    ring = keyring(space, Namespace(namespace))
    key = ring.key(text)
    record = encode(Entry(vector or _vector(text), 3, True, key.digest))  # noqa: FBT003
    return Row(key.address, record, round(time.time()) - days * 86_400, ring.partition)


def _archive(*rows):
    file = io.BytesIO()
    archive.write(file, rows)
    return file.getvalue()


ROWS = [_row(text) for text in TEXTS]


@pytest.fixture
def fill(tmp_path):
    """Give a function that puts rows into a store."""

    def put(*rows, store="cache"):
        with connection.opened(tmp_path / store, GIB, create=True) as file:
            list(archive.import_rows(file, rows))

    return put


@pytest.fixture
def held(tmp_path):
    """Give a function that returns the rows of a store, by address; none if there is no store."""

    def read(store="cache"):
        if not (tmp_path / store).exists():
            return {}
        with connection.opened(tmp_path / store, GIB) as file:
            found = archive.export_rows(file, PurgeFilter(), archive.ExportReport())
            return {row.address: row for row in found}

    return read


def _by_address(rows):
    return {row.address: row for row in rows}


async def _post(proxy, texts=TEXTS, **fields):
    body = {"model": "small", "input": texts, "encoding_format": "base64", **fields}
    response = await proxy.post(body)
    assert response.status == 200
    return response.headers["x-cache"], await response.json()


async def test_a_cache_is_carried_to_an_empty_directory(run, start_proxy, upstream, tmp_path):
    """After export and import every request is a hit with the same reply; nothing is bought."""
    upstream.widths = {"small": WIDTH}
    asked = [{}, {"input_type": "query"}, {"texts": ["ü ☃", "US", "us", " us"]}]
    proxy = await start_proxy(upstream, models=MODELS)
    replies = [await _post(proxy, **one) for one in asked]
    assert {kind for kind, _ in replies} == {"miss"}
    # The proxy goes on serving meanwhile.
    done = await asyncio.to_thread(run, "export", tmp_path / "carried %s ü.emba")
    assert (done.code, done.out) == (0, f"{tmp_path / 'carried %s ü.emba'}: 84 entries\n")
    await start_proxy.stop()
    calls = len(upstream.calls)
    done = await asyncio.to_thread(run, "import", tmp_path / "carried %s ü.emba", store="new")
    assert done == (0, b"84 entries taken in, 0 were there already\n", "")
    directory = {"directory": str(tmp_path / "new")}
    proxy = await start_proxy(upstream, models=MODELS, cache=directory)
    again = [await _post(proxy, **one) for one in asked]
    assert again == [("hit", reply) for _, reply in replies]
    assert len(upstream.calls) == calls


async def test_a_running_proxy_serves_what_is_imported(run, start_proxy, upstream, tmp_path):
    """What is taken in under a running proxy is a hit at once."""
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(upstream, models=MODELS)
    assert (await _post(proxy, ["another"]))[0] == "miss"
    (tmp_path / "a.emba").write_bytes(_archive(*ROWS))
    done = await asyncio.to_thread(run, "import", tmp_path / "a.emba")
    assert done.out == "40 entries taken in, 0 were there already\n"
    kind, reply = await _post(proxy)
    assert kind == "hit"
    assert [base64.b64decode(one["embedding"]) for one in reply["data"]] == [*map(_vector, TEXTS)]


MIXED = [
    *ROWS[:5],
    _row("a", "tenant %ü", days=7),
    _row("a", "", SPACE.with_parameters({"task": "q"})),
    _row("a", "tenant %ü", Space("a/twin", WIDTH)),
    _row("b")._replace(partition=None),
]


def test_everything_of_an_entry_survives(run, fill, held, tmp_path):
    """Record, time, namespace and space arrive as they were; the sums by partition are equal."""
    fill(*MIXED)
    assert run("export", tmp_path / "a.emba").code == 0
    assert run("import", tmp_path / "a.emba", store="new").code == 0
    assert held("new") == held() == _by_address(MIXED)
    shown = [run("stats", "--json", store=store).json["partitions"] for store in ("cache", "new")]
    for one in (*shown[0], *shown[1]):
        del one["last_used"]
    assert sorted(shown[0], key=str) == sorted(shown[1], key=str)


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ([], MIXED),
        (["--namespace", ""], [*ROWS[:5], MIXED[6]]),
        (["--namespace", "tenant %ü"], [MIXED[5], MIXED[7]]),
        (["--space", "a/small"], MIXED[:7]),
        (["--space", "a/small?task=~12549ea7d2d841ef"], [MIXED[6]]),
        (["--space", "a/small", "--namespace", "tenant %ü"], [MIXED[5]]),
    ],
)
def test_only_what_is_chosen_is_exported(arguments, *, chosen, run, fill, held, tmp_path):
    """By namespace, by space with its parameters, or by both."""
    fill(*MIXED)
    done = run("export", tmp_path / "a.emba", *arguments, "--json")
    told = {"file": str(tmp_path / "a.emba"), "entries": len(chosen), "damaged": 0}
    assert (done.code, done.json, done.err) == (0, told, "")
    assert run("import", tmp_path / "a.emba", store="new").code == 0
    assert held("new") == _by_address(chosen)


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--namespace", "tenant", ["namespace 'tenant'; did you mean 'tenant %ü'?; known: ", "''"]),
        ("--space", "a/smal", ["space 'a/smal'; did you mean 'a/small'?; known: 'a/small', "]),
        ("--space", "small", ["did you mean 'a/small'?"]),
    ],
)
def test_an_export_of_what_is_not_there_is_refused(option, name, *, words, run, fill, tmp_path):
    """The known ones are named, the nearest first; no empty file is taken for a copy."""
    fill(*MIXED)
    _failed(run("export", tmp_path / "a.emba", option, name), 2, f"{option}: the store has", *words)
    assert not (tmp_path / "a.emba").exists()


def test_an_export_overwrites_nothing_unasked(run, fill, tmp_path, monkeypatch):
    """Without --force a file that is there stays, also one that comes while it is written."""
    fill(*ROWS)
    target = tmp_path / "a.emba"
    target.write_bytes(b"mine")
    _failed(run("export", target), 1, f"{target} exists; it is not overwritten without --force")
    assert target.read_bytes() == b"mine"
    assert run("export", target, "--force").code == 0
    assert target.read_bytes() != b"mine"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    _failed(run("export", tmp_path / "link"), 1, "link exists")
    late, real = tmp_path / "late.emba", archive.write

    def write(file, rows):
        late.write_bytes(b"theirs")
        return real(file, rows)

    monkeypatch.setattr(archive, "write", write)
    _failed(run("export", late), 1, "late.emba exists by now")
    assert late.read_bytes() == b"theirs"


@pytest.mark.parametrize("is_link", [True, False])
def test_no_device_gives_way_to_an_export(is_link, run, tmp_path):
    """Neither /dev/stdout nor a pipe of the file system is replaced by a file, --force or not."""
    target = pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if is_link:
        target = tmp_path / "link"
        target.symlink_to(pipe)
    for options in ([], ["--force"]):
        done = run("export", target, *options)
        _failed(done, 1, f"{target}: is no regular file; - is standard output")
    assert pipe.is_fifo()
    assert target.is_symlink() == is_link


def test_exports_can_be_joined(run, fill, held, tmp_path):
    """`cat` of two is one; what is in both is taken in once, and again nothing more comes."""
    fill(*ROWS[:25], store="one")
    fill(*ROWS[15:], store="two")
    for store in ("one", "two"):
        assert run("export", tmp_path / store / "a", store=store).code == 0
    joined = b"".join((tmp_path / store / "a").read_bytes() for store in ("one", "two"))
    (tmp_path / "joined").write_bytes(joined)
    done = run("import", tmp_path / "joined", "--json")
    assert (done.code, done.err) == (0, "")
    assert (done.json["entries"], done.json["complete"], done.json["stored"]) == (50, True, 40)
    assert held() == _by_address(ROWS)
    done = run("import", tmp_path / "joined")
    assert done.out.startswith("0 entries taken in, ")
    assert held() == _by_address(ROWS)


def test_an_import_replaces_nothing(run, fill, held, tmp_path):
    """What is there stays, whatever the file says of it."""
    mine = _row(TEXTS[0], days=9, vector=_vector("mine"))
    fill(mine)
    (tmp_path / "a.emba").write_bytes(_archive(*ROWS))
    done = run("import", tmp_path / "a.emba")
    assert done == (0, b"39 entries taken in, 1 was there already\n", "")
    assert held() == _by_address([*ROWS[1:], mine])


def test_a_pipe_carries_a_cache(run, fill, held):
    """`-` is standard output, with nothing else on it, and standard input."""
    fill(*ROWS)
    done = run("export", "-")
    assert (done.code, done.err) == (0, "-: 40 entries\n")
    assert done.raw == _archive(*ROWS)
    assert run("export", "-", "--json").raw == done.raw
    done = run("import", "-", store="new", stdin=done.raw)
    assert done == (0, b"40 entries taken in, 0 were there already\n", "")
    assert held("new") == held()


SMALL = _archive(*ROWS)
# Behind the start and the partition come entries of one size.
ENTRY = len(_archive(*ROWS[:2])) - len(_archive(*ROWS[:1]))
FIRST = len(_archive(ROWS[0])) - ENTRY - 25


@pytest.mark.parametrize(
    ("content", "whole", "places"),
    [
        pytest.param(SMALL[:-1], 40, 1, id="last byte"),
        pytest.param(SMALL[:-25], 40, 0, id="end"),
        pytest.param(SMALL[:-30], 39, 1, id="amid an entry"),
        pytest.param(SMALL[: FIRST + 7 * ENTRY], 7, 0, id="between entries"),
        pytest.param(SMALL[: FIRST + 7 * ENTRY + 1], 7, 1, id="just behind one"),
        pytest.param(SMALL[:FIRST], 0, 0, id="no entries"),
        pytest.param(SMALL[: FIRST + 60] + b"\xff" + SMALL[FIRST + 61 :], 39, 1, id="flipped"),
        pytest.param(SMALL[: FIRST + ENTRY] + b"x" * 500 + SMALL[FIRST + ENTRY :], 40, 1, id="in"),
        pytest.param(SMALL[:FIRST] + SMALL[FIRST + 3 * ENTRY :], 37, 0, id="entries cut out"),
        pytest.param(SMALL[3:], 40, 1, id="start"),
    ],
)
def test_of_a_broken_export_what_is_whole_is_taken_in(
    content, *, whole, places, run, held, tmp_path
):
    """All whole entries come, code 1 and one line say that some did not; a whole one mends it."""
    (tmp_path / "a.emba").write_bytes(content)
    done = run("import", tmp_path / "a.emba")
    assert (done.code, done.out) == (1, f"{whole} entries taken in, 0 were there already\n")
    assert re.fullmatch(r"embedding-proxy: [^\n]+: not all of it is whole: [^\n]+\n", done.err)
    assert f"{places} place{' is' if places == 1 else 's are'} damaged" in done.err
    assert set(held().items()) <= set(_by_address(ROWS).items()) or content == SMALL[3:]
    assert len(held()) == whole
    done = run("import", tmp_path / "a.emba", "--json")
    assert (done.code, done.json["complete"], done.json["present"]) == (1, False, whole)
    (tmp_path / "a.emba").write_bytes(SMALL)
    done = run("import", tmp_path / "a.emba")
    assert (done.code, done.err) == (0, "")
    assert held().keys() == _by_address(ROWS).keys()


def test_a_newer_archive_is_refused(run, held, tmp_path):
    """It says so, and takes in nothing."""
    start = b"EMBA\x01" + struct.pack("<II", 4, 2)
    newer = start + checksum(start) + SMALL[FIRST:]
    (tmp_path / "a").write_bytes(newer)
    _failed(run("import", tmp_path / "a"), 1, "format 2", "reads 1 only")
    assert held() == {}


@pytest.mark.parametrize("content", [b"", b"EMB", b"EMBA", b"garbage" * 100_000])
def test_what_is_no_archive_is_refused(content, run, held, tmp_path):
    """An empty file and garbage are named in one line, from a file and from standard input."""
    (tmp_path / "a.emba").write_bytes(content)
    _failed(run("import", tmp_path / "a.emba"), 1, "no archive of embeddings")
    _failed(run("import", "-", stdin=content), 1, "no archive of embeddings")
    assert held() == {}


def test_damaged_records_are_left_out_of_an_export(run, fill, held, tmp_path):
    """They are counted; the file holds the others and is whole."""
    fill(*ROWS)
    with connection.opened(tmp_path / "cache", GIB) as file:
        file.sql("UPDATE Cache SET value = zeroblob(80) WHERE rowid IN (3, 5)")
        file.sql("UPDATE Cache SET mode = 4 WHERE rowid = 7")
    done = run("export", tmp_path / "a.emba")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{tmp_path / 'a.emba'}: 37 entries, 3 damaged ones left out\n"
    assert run("export", tmp_path / "a.emba", "--force", "--json").json["damaged"] == 3
    assert run("import", tmp_path / "a.emba", store="new").code == 0
    assert len(held("new")) == 37


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)]
)
def test_an_export_that_ends_early_leaves_nothing(error, *, code, run, fill, tmp_path, monkeypatch):
    """Half an export stays under no name, and an earlier one of that name stays whole."""
    fill(*ROWS)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "a.emba"
    target.write_bytes(b"earlier")

    def write(file, rows):
        file.write(b"half")
        next(iter(rows))
        raise error

    monkeypatch.setattr(archive, "write", write)
    done = run("export", target, "--force")
    assert (done.code, done.raw) == (code, b"")
    assert "Traceback" not in done.err
    if code == 1:
        _failed(done, 1, f"{target}: No space left on device")
    assert [*(tmp_path / "out").iterdir()] == [target]
    assert target.read_bytes() == b"earlier"
    monkeypatch.undo()


def test_a_target_that_cannot_be_written_is_named(run, fill, tmp_path):
    """A folder, and a place in one that is missing, are one line about the target."""
    fill(*ROWS)
    (tmp_path / "folder").mkdir()
    for target, why in (
        (tmp_path / "folder", "is a directory"),
        (tmp_path / "nowhere" / "a", "there is no such folder"),
    ):
        _failed(run("export", target), 1, f"{target}: {why}")
    assert not [*tmp_path.glob("*.part")]
    assert not [*(tmp_path / "folder").iterdir()]


# What people own

PAIRS = [(text, _vector(text)) for text in TEXTS]


def _numbers(vector):
    return np.frombuffer(vector, "<f4").tolist()


def _jsonl(folder, pairs):
    lines = [json.dumps({"text": t, "embedding": _numbers(v)}) + "\n" for t, v in pairs]
    (folder / "pairs.jsonl").write_text("".join(lines))
    return [folder / "pairs.jsonl"]


def _base64(folder, pairs):
    lines = [json.dumps({"t": t, "v": base64.b64encode(v).decode()}) + "\n" for t, v in pairs]
    (folder / "pairs").write_bytes(gzip.compress("".join(lines).encode()))
    (folder / "pairs").rename(folder / "pairs.jsonl.gz")
    return [folder / "pairs.jsonl.gz", "--text-field", "t", "--vector-field", "v"]


def _parquet(folder, pairs):
    vectors = pa.array([_numbers(v) for _, v in pairs], pa.list_(pa.float32()))
    table = pa.table({"text": [t for t, _ in pairs], "embedding": vectors})
    parquet.write_table(table, folder / "pairs.parquet")
    return [folder / "pairs.parquet"]


def _langchain(folder, pairs):
    (folder / "store").mkdir()
    for text, vector in pairs:
        name = f"small{_uuid(text.encode())}"
        (folder / "store" / name).write_text(json.dumps(_numbers(vector)))
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text, _ in pairs))
    return [folder / "store", "--texts", folder / "texts.txt"]


def _qdrant(folder, pairs):
    with closing(QdrantClient(path=str(folder / "data"))) as client:
        client.create_collection("docs", VectorParams(size=WIDTH, distance=Distance.DOT))
        points = [
            PointStruct(id=i, vector=_numbers(v), payload={"text": t})
            for i, (t, v) in enumerate(pairs)
        ]
        client.upsert("docs", points)
    return [f"qdrant+path:{folder}/data/docs"]


SOURCES = [_jsonl, _base64, _parquet, _langchain, _qdrant]


@pytest.fixture
def key(monkeypatch):
    """Set the key of the provider, without which no sample can be embedded."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")


@pytest.mark.parametrize("source", SOURCES)
async def test_owned_vectors_are_served(source, *, run, start_proxy, upstream, tmp_path, key):
    """After a sample they are hits with these float32 numbers and exact tokens; none is bought."""
    upstream.widths = {"small": WIDTH}
    arguments = source(tmp_path, PAIRS)
    done = await asyncio.to_thread(
        run, "import", *arguments, "--model", "small", "--json", upstream=upstream
    )
    assert (done.code, done.err) == (0, "")
    assert done.json.pop("sample_cosine") == pytest.approx(1, abs=1e-6)
    assert {**done.json, "sample_cosine": None} == {
        "pairs": 40,
        "stored": 40,
        "present": 0,
        "refused": 0,
        "first_refused": [],
        "sample_cosine": None,
        "dry_run": False,
    }
    assert len(upstream.inputs) == 5
    assert set(upstream.inputs) <= set(TEXTS)
    proxy = await start_proxy(upstream, models=MODELS)
    kind, reply = await _post(proxy)
    assert kind == "hit"
    assert [base64.b64decode(one["embedding"]) for one in reply["data"]] == [v for _, v in PAIRS]
    assert reply["usage"] == {"prompt_tokens": TOKENS_OF_TEXTS, "total_tokens": TOKENS_OF_TEXTS}
    assert len(upstream.inputs) == 5


@pytest.mark.parametrize("source", SOURCES)
async def test_vectors_of_another_model_are_refused(source, *, run, held, upstream, tmp_path, key):
    """Of the same width and length they look right; the sample finds out, and none is taken in."""
    upstream.widths = {"twin": WIDTH}
    arguments = source(tmp_path, PAIRS)
    done = await asyncio.to_thread(run, "import", *arguments, "--model", "twin", upstream=upstream)
    _failed(done, 1, "5 of 5 sampled texts", "nothing was taken in")
    assert held() == {}


async def test_one_wrong_vector_in_the_sample_is_enough(run, held, upstream, tmp_path, key):
    """A sample of all finds the one text whose vector is another's."""
    upstream.widths = {"small": WIDTH}
    pairs = [*PAIRS[:-1], (TEXTS[-1], _vector(TEXTS[0]))]
    arguments = [*_jsonl(tmp_path, pairs), "--model", "small", "--sample", "1000"]
    done = await asyncio.to_thread(run, "import", *arguments, upstream=upstream)
    _failed(done, 1, "1 of 40 sampled texts")
    assert held() == {}


def test_a_source_may_be_trusted(run, held, tmp_path):
    """With --sample 0 nobody is asked, and no key is needed; a namespace of one's own is kept."""
    arguments = [*_jsonl(tmp_path, PAIRS), "--model", "small", "--sample", "0"]
    done = run("import", *arguments, "--namespace", "tenant %ü", "--json")
    assert (done.code, done.json["sample_cosine"], done.err) == (0, None, "")
    ring = keyring(SPACE, Namespace("tenant %ü"))
    rows = held()
    assert len(rows) == 40
    for text, vector in PAIRS:
        key = ring.key(text)
        row = rows[key.address]
        assert decode(row.record, key.digest, WIDTH) == Entry(vector, 3, True, key.digest)  # noqa: FBT003
        assert row.partition == ring.partition
        assert time.time() - 60 < row.stored <= time.time()


@pytest.mark.parametrize(
    ("answer", "word"), [(status(401), "openai"), (status(400), "made-up 400")]
)
async def test_without_an_answer_nothing_is_proved(
    answer, *, word, run, held, upstream, tmp_path, key
):
    """Where the model cannot be asked nothing is taken in."""
    upstream.always = answer
    arguments = [*_jsonl(tmp_path, PAIRS), "--model", "small"]
    done = await asyncio.to_thread(run, "import", *arguments, upstream=upstream)
    _failed(done, 1, word)
    assert held() == {}


def test_without_a_key_the_way_out_is_named(run, held, tmp_path):
    """Who has no key is told which to set, and how to go without."""
    done = run("import", *_jsonl(tmp_path, PAIRS), "--model", "small")
    assert (done.code, done.raw) == (1, b"")
    assert "OPENAI_API_KEY" in done.err
    assert "--sample 0" in done.err
    assert held() == {}


BAD = {
    "pair 2": ("short", _vector("a")[:-4], "15 dimensions instead of 16"),
    "pair 4": ("zero", bytes(4 * WIDTH), "all numbers are zero"),
    "pair 6": ("long", (2 * np.frombuffer(_vector("a"), "<f4")).tobytes(), "length is 2.000"),
}


@pytest.mark.parametrize("source", SOURCES[:4])
def test_refused_pairs_are_named_and_the_others_taken_in(source, run, held, tmp_path):
    """Code 1, and what is wrong with each by its place; the good ones are in."""
    pairs = [PAIRS[0], *[p for i, bad in enumerate(BAD.values(), 1) for p in (bad[:2], PAIRS[i])]]
    arguments = [*source(tmp_path, pairs), "--model", "small", "--sample", "0"]
    done = run("import", *arguments)
    assert (done.code, done.out) == (1, "4 entries taken in, 0 were there already\n")
    *lines, last = done.err.splitlines()
    assert last == "  3 refused in all"
    for line, (place, (_, _, why)) in zip(lines, BAD.items(), strict=True):
        assert line.startswith(f"  refused: {place}: the vector: ")
        assert why in line
    assert held().keys() == {keyring(SPACE).key(text).address for text in TEXTS[:4]}
    done = run("import", *arguments, "--json")
    assert (done.code, done.err) == (1, "")
    counts = {"pairs": 4, "stored": 0, "present": 4, "refused": 3}
    assert {name: done.json[name] for name in counts} == counts
    assert [one["where"] for one in done.json["first_refused"]] == list(BAD)


def test_lines_that_are_none_are_refused(run, held, tmp_path):
    """Garbage amid JSONL, a missing field and infinite numbers do not stop the rest."""
    (path, *_) = _jsonl(tmp_path, PAIRS[:3])
    infinite = json.dumps({"text": "i", "embedding": [1e39] * WIDTH})
    with path.open("ab") as file:
        file.write(b'\xff\xfe\x00 garbage\n{"text": "x"}\n' + infinite.encode() + b"\n")
    done = run("import", path, "--model", "small", "--sample", "0", "--json")
    assert (done.code, done.err) == (1, "")
    assert (done.json["stored"], done.json["refused"]) == (3, 3)
    assert len(held()) == 3


def test_a_dry_run_of_an_import_writes_no_entry(run, fill, held, tmp_path):
    """It says what would come of it, for an export and for what people own."""
    fill(*ROWS[:10])
    (tmp_path / "a.emba").write_bytes(SMALL)
    for source in ([tmp_path / "a.emba"], [*_jsonl(tmp_path, PAIRS), "--model", "small"]):
        done = run("import", *source, "--sample", "0", "--dry-run")
        assert done == (0, b"30 entries would be taken in, 10 were there already\n", "")
        done = run("import", *source, "--sample", "0", "--dry-run", "--json")
        assert [done.json[name] for name in ("stored", "present", "dry_run")] == [30, 10, True]
    assert held() == _by_address(ROWS[:10])


def test_what_one_owns_replaces_nothing(run, fill, held, tmp_path):
    """An entry that was bought stays, though the source has another vector for its text."""
    mine = _row(TEXTS[0], vector=_vector("mine"))
    fill(mine)
    done = run("import", *_jsonl(tmp_path, PAIRS), "--model", "small", "--sample", "0")
    assert done == (0, b"39 entries taken in, 1 was there already\n", "")
    assert held()[mine.address] == mine


def test_sources_that_hold_nothing_are_a_failure(run, held, tmp_path):
    """An empty file, one of garbage, a missing one and one that breaks off are one line each."""
    (path, *_) = _jsonl(tmp_path, PAIRS)
    torn = gzip.compress(path.read_bytes())[:-20]
    for name, content, word in (
        ("empty.jsonl", b"", "nothing that could be taken in"),
        ("garbage.jsonl", bytes(range(256)) * 100, "is not JSONL"),
        ("garbage.parquet", b"garbage" * 100, "cannot be read as Parquet"),
        ("empty.parquet", b"", "cannot be read as Parquet"),
        ("torn.jsonl.gz", torn, "cannot be read after line"),
        ("one.jsonl", b'{"text": "a", "embedding": [1]}', "1 dimensions instead of 16"),
        ("fields.jsonl", b'{"t": "a", "e": [1]}', "no field `text`; fields: `e`, `t`"),
    ):
        (tmp_path / name).write_bytes(content)
        done = run("import", tmp_path / name, "--model", "small", "--sample", "0")
        _failed(done, 1, str(tmp_path / name), word)
    for name in ("nowhere.jsonl", "nowhere.parquet", "nowhere.emba"):
        _failed(run("import", tmp_path / name, "--model", "small"), 1, name, "No such file")
        _failed(run("import", tmp_path / name), 1, name, "No such file")
    (tmp_path / "folder.emba").mkdir()
    _failed(run("import", tmp_path / "folder.emba"), 1, "Is a directory")
    assert held() == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--model", "known: ", "small"]),
        (["--model", "smal"], ["--model", "known: ", "small"]),
        (["--model", ""], ["--model", "known: "]),
    ],
)
def test_the_model_of_what_one_owns_must_be_named(arguments, words, run, held, tmp_path):
    """Without a known model the usage is wrong, and the line names those that are known."""
    _failed(run("import", *_jsonl(tmp_path, PAIRS), *arguments), 2, *words)
    assert held() == {}


def test_a_negative_sample_is_wrong_usage(run, tmp_path):
    """There is no sample of less than nothing."""
    done = run("import", *_jsonl(tmp_path, PAIRS), "--model", "small", "--sample", "-1")
    assert (done.code, done.raw) == (2, b"")
    assert "--sample" in done.err


def test_an_interrupted_import_keeps_whole_batches(run, held, tmp_path, monkeypatch):
    """Ctrl-C is code 130; what was written until then is whole, and a second run does the rest."""
    monkeypatch.setattr(archive, "ROWS_A_BATCH", 10)
    (tmp_path / "a.emba").write_bytes(SMALL)

    def interrupt(done):
        if done == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("embedding_proxy.proxy.cli.output._lines", lambda *_: interrupt)
        done = run("import", tmp_path / "a.emba")
    assert (done.code, done.raw) == (130, b"")
    assert "Traceback" not in done.err
    assert held() == _by_address(ROWS[:20])
    done = run("import", tmp_path / "a.emba")
    assert done.out == "20 entries taken in, 20 were there already\n"


def test_progress_of_a_long_work_is_told_on_stderr(run, fill, tmp_path, monkeypatch):
    """Without a terminal lines say how far it is; standard output stays JSON alone."""
    monkeypatch.setattr("embedding_proxy.proxy.cli.output.LINE_SECONDS", -1.0)
    fill(*ROWS)
    done = run("export", tmp_path / "a.emba", "--json")
    assert (done.json["entries"], done.err.splitlines()[-1]) == (40, "exporting: 100%")
    done = run("import", tmp_path / "a.emba", "--json", store="new")
    assert (done.json["stored"], done.err) == (40, "importing: 40\n")
    done = run("verify", "--json")
    assert (done.json["records"], done.err) == (40, "verifying: 100%\n")
    done = run("backup", tmp_path / "b.db", "--json")
    assert done.json["bytes"]
    assert done.err.startswith("copying: ")


def test_help_tells_what_can_be_imported(run):
    """The kinds of sources and the options for them are in the help."""
    done = run("import", "--help")
    assert done.code == 0
    for word in ("--model", "--sample", "--format", "jsonl", "qdrant", "langchain", "parquet"):
        assert word in done.out
