"""`embedding-proxy warm`: texts of files, embedded ahead of time."""

import asyncio
import json
import os
import signal
import sqlite3
import sys
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_proxy.cache.disk import disk_full
from embedding_proxy.cache.maintenance.import_source import RejectedPair, SourceError
from embedding_proxy.providers import tokens
from embedding_proxy.proxy.cli import warm as warm_module
from embedding_proxy.proxy.importers.texts import TextFiles
from fault_server import status

SMALL = "text-embedding-3-small"
WORDS = [f"text number {i}" for i in range(3000)]


def test_a_mark_of_the_encoding_is_no_text(tmp_path):
    """As some editors write it before the first line."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\nsecond\n")
    assert list(TextFiles([tmp_path / "a.txt"])) == ["first", "second"]


@pytest.fixture
def files(tmp_path):
    """Give a folder with the same two texts in every form."""
    (tmp_path / "a.txt").write_text("first\nsecond\n\nfirst\r\n")
    (tmp_path / "b.md").write_text("# A title\nfirst line\n\n\nsecond  \n")
    (tmp_path / "c.jsonl").write_text('{"text": "first"}\n{"text": ["second", "third"]}\n')
    (tmp_path / "d.csv").write_text('id,text\n1,first\n2,"second\nline"\n')
    (tmp_path / "e.tsv").write_text("text\tid\nfirst\t1\n")
    pq.write_table(pa.table({"text": ["first", None, "second"]}), tmp_path / "f.parquet")
    with closing(sqlite3.connect(tmp_path / "g.db")) as database:
        database.execute("CREATE TABLE chunks (id INTEGER, body TEXT)")
        database.executemany("INSERT INTO chunks VALUES (?, ?)", [(1, "first"), (2, "second")])
        database.commit()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "texts"),
    [
        ("a.txt", {}, ["first", "second", "first"]),
        ("a.txt", {"split": "paragraph"}, ["first\nsecond", "first"]),
        ("a.txt", {"split": "file"}, ["first\nsecond\n\nfirst\r\n"]),
        ("b.md", {}, ["# A title\nfirst line", "second  "]),
        ("b.md", {"split": "line"}, ["# A title", "first line", "second  "]),
        ("c.jsonl", {}, ["first", "second", "third"]),
        ("d.csv", {}, ["first", "second\nline"]),
        ("d.csv", {"field": "id"}, ["1", "2"]),
        ("e.tsv", {}, ["first"]),
        ("f.parquet", {}, ["first", RejectedPair("row 2", "the text is missing"), "second"]),
        ("g.db", {"query": "SELECT body FROM chunks ORDER BY id DESC"}, ["second", "first"]),
    ],
)
def test_every_form_is_read(files, name, options, texts):
    """As it stands, but for the ends of lines; again and again from the start."""
    source = TextFiles([files / name], **options)
    expected = [
        RejectedPair(f"{files / name}: {text.where}", text.why)
        if isinstance(text, RejectedPair)
        else text
        for text in texts
    ]
    assert list(source) == expected
    assert list(source) == expected


def test_a_folder_is_read_whole_or_by_name(files):
    """Sorted, and without what is in no form that is known, or needs a query."""
    (files / "below").mkdir()
    (files / "below" / "z.txt").write_text("third")
    (files / "program.py").write_text("not this")
    names = [file.name for file in TextFiles([files]).files]
    assert names == ["a.txt", "b.md", "z.txt", "c.jsonl", "d.csv", "e.tsv", "f.parquet"]
    assert list(TextFiles([files], glob="*.py")) == ["not this"]


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("nowhere", {}, "there is no such file"),
        ("d.csv", {"field": "body"}, "has no column `body`; columns: `id`, `text`"),
        ("f.parquet", {"field": "body"}, "has no column `body`"),
        ("g.db", {}, "give with --query the SQL of its texts"),
        ("g.db", {"query": "SELECT other FROM chunks"}, "no such column"),
        ("g.db", {"query": "DELETE FROM chunks"}, "readonly"),
        ("g.db", {"query": "rubbish"}, "syntax error"),
        ("h.txt", {}, "is not UTF-8 text"),
        ("empty", {}, "no file with texts"),
    ],
)
def test_what_cannot_be_read_says_why(files, name, options, problem):
    """With the remedy where there is one."""
    (files / "h.txt").write_bytes(b"\xff\xfe")
    (files / "empty").mkdir()
    with pytest.raises(SourceError, match=problem):
        list(TextFiles([files / name], **options))


# The command.


@pytest.fixture
def warm(command, upstream, tmp_path, monkeypatch):
    """Give what runs the command with a file of texts and the upstream."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "cache": {"directory": str(tmp_path / "cache")},
                "providers": {"openai": {"base_url": upstream.url}},
            }
        )
    )

    async def warm(*options, texts=("a", "b", "a"), answer="--yes"):
        (tmp_path / "texts.txt").write_text("\n".join(texts))
        words = ["warm", tmp_path / "texts.txt", "--model", SMALL, "-c", config, *options]
        return await asyncio.to_thread(command, *words, *([answer] if answer else []))

    return warm


async def test_what_is_shown_before_is_what_it_comes_to(warm, upstream):
    """To the token; and a second time there is nothing to buy."""
    total = sum(tokens.count(WORDS))
    done = await warm("--json", answer="--dry-run", texts=WORDS + WORDS[:9])
    assert (done.code, upstream.calls) == (0, [])
    planned = done.json
    assert (planned["inputs"], planned["distinct"], planned["to_buy"]) == (3009, 3000, 3000)
    assert planned["tokens_to_buy"] == total
    assert planned["usd_to_buy"] == pytest.approx(total * 0.02 / 1e6)
    done = (await warm("--json", texts=WORDS + WORDS[:9])).json
    assert (done["bought"], done["refused"]) == (3000, 0)
    assert done["usd_billed"] > 0
    assert sorted(upstream.inputs) == sorted(WORDS)
    done = (await warm("--json", texts=WORDS)).json
    assert (done["cached"], done["to_buy"], done["bought"]) == (3000, 0, 0)
    assert len(upstream.inputs) == 3000


async def test_it_tells_in_lines(warm, upstream):
    """What there is to buy, and what it came to."""
    done = await warm()
    assert done.code == 0
    assert done.out.splitlines() == [
        "3 inputs: 2 distinct, 0 cached, 2 to buy",
        "2 tokens to buy for $0.00000004, in about 1 s",
        f"2 texts bought for $0.00000004 ({sum(len(item) for item in upstream.inputs)} tokens)",
    ]


async def test_only_what_is_missing_is_bought(warm, upstream):
    """After more texts were added."""
    await warm(texts=["a", "b"])
    done = await warm(texts=["a", "b", "c"])
    assert "3 inputs: 3 distinct, 2 cached, 1 to buy" in done.out
    assert sorted(upstream.inputs) == ["a", "b", "c"]


async def test_without_a_terminal_it_wants_a_yes(warm, upstream):
    """A script does not buy what nobody has agreed to."""
    done = await warm(answer=None)
    assert (done.code, "say --yes" in done.err, upstream.calls) == (2, True, [])


async def test_a_text_that_is_refused_is_named_and_the_rest_is_bought(warm, upstream):
    """Longer than the context; the exit code says that something is missing."""
    done = await warm(texts=["a", "long " * 9000, "b"])
    assert done.code == 1
    assert "1 refused in all" in done.err
    assert sorted(upstream.inputs) == ["a", "b"]


async def test_an_unknown_model_is_told(warm):
    """With the one that is meant."""
    done = await warm("--model", "text-embedding-3-smal")
    assert (done.code, "did you mean text-embedding-3-small?" in done.err) == (2, True)


async def test_a_provider_that_refuses_ends_it_with_its_reason(warm, upstream):
    """In one line."""
    upstream.always = status(401, '{"error": {"message": "bad key"}}')
    done = await warm()
    assert (done.code, done.err.count("\n")) == (1, 1), done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_an_interrupted_run_goes_on_for_nothing(number, upstream, tmp_path):
    """What was asked for when the signal came is kept; the next run buys the rest."""
    (tmp_path / "texts.txt").write_text("\n".join(WORDS))
    (tmp_path / "config.yaml").write_text(
        json.dumps(
            {
                "cache": {"directory": str(tmp_path / "cache")},
                "providers": {
                    "openai": {"base_url": upstream.url, "limits": {"inputs": 100}},
                },
            }
        )
    )

    async def start():
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "embedding_proxy", "warm", str(tmp_path / "texts.txt")),
            *("--model", SMALL, "--config", str(tmp_path / "config.yaml"), "--yes"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "OPENAI_API_KEY": "k"},
        )

    upstream.gate = asyncio.Event()
    first = await start()
    while len(upstream.calls) < 4:  # noqa: ASYNC110 - another process makes them
        await asyncio.sleep(0.01)
    first.send_signal(number)
    upstream.gate.set()
    out, err = await first.communicate()
    assert (first.returncode, b"Traceback" in err) == (128 + number, False), err
    assert b" texts bought for $" in out
    second = await start()
    out, err = await second.communicate()
    assert second.returncode == 0, err
    assert sorted(upstream.inputs) == sorted(WORDS)
    assert b"3000" not in out.splitlines()[-1]


async def test_a_full_disk_ends_the_purchase(warm, upstream, monkeypatch):
    """What cannot be kept is not bought; what was bought before is, with the last room."""
    monkeypatch.setattr(warm_module, "BATCH", 1)
    monkeypatch.setattr(warm_module, "BESIDE", 1)
    monkeypatch.setattr(disk_full, "FREE_BYTES", 1 << 60)
    done = await warm(texts=["a", "b", "c", "d", "e", "f"])
    assert (done.code, "free some space, and start again to go on" in done.err) == (1, True)
    bought = len(upstream.inputs)
    assert 1 < bought < 6
    monkeypatch.setattr(disk_full, "FREE_BYTES", 0)
    done = await warm(texts=["a", "b", "c", "d", "e", "f"])
    assert f"{bought} cached, {6 - bought} to buy" in done.out
    assert len(upstream.inputs) == 6


async def test_it_says_what_it_waits_for(upstream, tmp_path):
    """A provider that fails is asked again for minutes: each wait has a line."""
    (tmp_path / "texts.txt").write_text("a")
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "cache": {"directory": str(tmp_path / "cache")},
                "providers": {"openai": {"base_url": upstream.url}},
            }
        )
    )
    upstream.always = status(200, "rubbish")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "embedding_proxy", "warm", str(tmp_path / "texts.txt"), "--yes"),
        *("--model", SMALL, "--config", str(config)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OPENAI_API_KEY": "k"},
    )
    lines = b""
    while b"; trying again in " not in lines:
        line = await process.stderr.readline()
        assert line, lines
        lines += line
    process.terminate()
    _, err = await process.communicate()
    assert (process.returncode, b"Traceback" in err) == (128 + signal.SIGTERM, False)


async def test_a_query_without_end_is_interrupted(tmp_path):
    """Ctrl-C does not wait for who reads the texts."""
    sqlite3.connect(tmp_path / "k.db").close()
    (tmp_path / "config.yaml").write_text(f'cache: {{directory: "{tmp_path / "cache"}"}}')
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "embedding_proxy", "warm", str(tmp_path / "k.db"), "--dry-run"),
        *("--query", endless, "--model", SMALL, "--config", str(tmp_path / "config.yaml")),
        stderr=asyncio.subprocess.PIPE,
    )
    # It has said which store it works on before it reads.
    assert (await process.stderr.readline()).startswith(b"store: ")
    while not (tmp_path / "cache" / "v1" / "cache.db").exists():  # noqa: ASYNC110 - another process's
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert (process.returncode, b"Traceback" in err) == (130, False), err


def test_standard_input_is_read(command, monkeypatch, tmp_path):
    """Lines of it, kept in a file as they are read twice."""

    class Stream:
        buffer = tmp_path / "stream"

    (tmp_path / "stream").write_text("a\nb\n")
    (tmp_path / "config.yaml").write_text(f'cache: {{directory: "{tmp_path / "cache"}"}}')
    with (tmp_path / "stream").open("rb") as file:
        Stream.buffer = file
        Stream.isatty = staticmethod(lambda: False)
        Stream.encoding = "utf-8"
        monkeypatch.setattr(sys, "stdin", Stream)
        done = command(
            *("warm", "-", "--model", SMALL, "--dry-run", "-c", tmp_path / "config.yaml")
        )
    assert (done.code, "2 inputs: 2 distinct" in done.out) == (0, True), done.err
