"""`cache stats`, `purge`, `backup` and `verify`: what they print, what they leave, how they end."""

import asyncio
import base64
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from command import Done
from disk_faults import CannotMount, file_system, full
from embedding_proxy.cache.disk import (
    bounds,
    connection,
    database,
    disk_full,
    exclusive_file,
    purge,
    quarantine,
)
from embedding_proxy.cache.disk.schema import PAGE_BYTES
from embedding_proxy.cache.disk.store import TICK_SECONDS
from embedding_proxy.cache.disk.write_batch import PendingRecord, WriteBatch
from embedding_proxy.cache.key import OTHER_NAMESPACE, Namespace, Partition, Row, keyring
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.cache.maintenance import archive, backup, short_reads, verify
from embedding_proxy.cache.record import Entry, encode
from embedding_proxy.index.outbox import Outbox, select_entries
from embedding_proxy.index.outbox_db import FILE_NAME, OutboxFile
from embedding_proxy.index.point import Point, Target, id_bytes
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.charge import NANO
from embedding_proxy.proxy.cli import cache_purge, main
from fault_server import vector_of

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
DAY = 86_400
WIDTH = 64
SPACE = Space("a/small", WIDTH)
OTHER = Space("b/wide & round", 2 * WIDTH)
MODELS = {
    "small": {
        "space": SPACE.name,
        "dimensions": WIDTH,
        "price": 2.0,
        "unit_norm": True,
        "routes": [{"provider": "openai", "model": "small"}],
    },
    "wide": {
        "space": OTHER.name,
        "dimensions": 2 * WIDTH,
        "routes": [{"provider": "openai", "model": "wide"}],
    },
}
TEXTS = [f"text {i}" for i in range(500)]


@pytest.fixture
def run(tmp_path, monkeypatch, command):
    """Give a function that runs `cache …` on the store in `cache`, in this process."""
    config = tmp_path / "config.yaml"
    sections = {"cache": {"directory": str(tmp_path / "cache")}, "models": MODELS}
    config.write_text(json.dumps(sections))
    # Wide enough that no message is broken into lines.
    monkeypatch.setenv("COLUMNS", "200")

    def run_command(*arguments: str, sure: bool = True) -> Done:
        """Purges are not asked for, unless a test says that nobody is `sure`."""
        yes = ["--yes"] if sure and arguments[0] == "purge" else []
        return command("cache", *arguments, *yes, "--config", config)

    return run_command


def _failed(done, code, *words):
    """Check that a command ended with one line on stderr, which holds the words."""
    assert (done.code, done.out) == (code, "")
    assert re.fullmatch(r"embedding-proxy: [^\n]+\n", done.err)
    assert all(word in done.err for word in words), done.err


@cache
def _vector(text, width):
    return vector_of("small", text, width).tobytes()


def _row(text, space=SPACE, namespace="", days=1.0):
    ring = keyring(space, Namespace(namespace))
    key = ring.key(text)
    vector = _vector(text, space.dimensions)
    record = encode(Entry(vector, len(text.split()), True, key.digest))  # noqa: FBT003
    return Row(key.address, record, time.time() - days * DAY, ring.partition)


@pytest.fixture
def fill(tmp_path):
    """Give a function that puts rows into the store in `cache` and returns the file's path."""

    def put(*rows):
        with connection.opened(tmp_path / "cache", GIB, create=True) as file:
            list(archive.import_rows(file, rows))
            return file.path

    return put


@pytest.fixture
def rows(tmp_path):
    """Give a function that returns what the store in `cache` holds."""

    def read():
        with connection.opened(tmp_path / "cache", GIB) as file:
            return list(archive.export_rows(file, purge.PurgeFilter(), archive.ExportReport()))

    return read


def _sql(path, statement, *values):
    """Run a statement on the file as somebody else would."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


async def _texts_served(proxy, model="small", texts=TEXTS):
    """Ask for texts; return how many came from the cache. Each has its right vector."""
    response = await proxy.post({"model": model, "input": texts, "encoding_format": "base64"})
    assert response.status == 200
    got = [base64.b64decode(one["embedding"]) for one in (await response.json())["data"]]
    if model == "small":
        assert got == [_vector(text, WIDTH) for text in texts]
    return int(response.headers["x-cache-hits"])


# stats


def test_without_a_store_there_is_nothing_to_do(run, tmp_path):
    """Each command says that there is no store yet, and makes none."""
    for command in (["stats"], ["verify"], ["purge", "--all"], ["backup", str(tmp_path / "b")]):
        _failed(run(*command), 1, "there is no store yet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_stats_as_json(run, fill, tmp_path):
    """Entries, bytes, ages, hit rate and money, by partition and in all; nothing but JSON."""
    task = SPACE.with_parameters({"task": "q"})
    path = fill(
        *(_row(text, days=3) for text in TEXTS[:3]),
        _row("a", task),
        _row("a", OTHER, "tenant %ü"),
    )
    small, tasked = keyring(SPACE).partition, keyring(task).partition
    with connection.opened(tmp_path / "cache", GIB) as file:
        usage = {
            (20_000, LedgerKey(small)): Usage(5, 1, 3, 1, 1_500_000, 500_000, 3 * NANO, NANO),
            (20_001, LedgerKey(tasked)): Usage(
                hits=1, tokens_saved=250_000, nanodollars_saved=NANO // 2
            ),
        }
        file.write(WriteBatch(usage=usage))
    done = run("stats", "--json")
    assert (done.code, done.err) == (0, "")
    shown = done.json
    partitions = {(one["namespace"], one["space"]): one for one in shown.pop("partitions")}
    assert set(partitions) == {
        ("", "a/small"),
        ("", "a/small?task=~12549ea7d2d841ef"),
        ("tenant %ü", "b/wide%20%26%20round"),
    }
    one = partitions["", "a/small"]
    now = time.time()
    assert now - 3 * DAY - 60 < one.pop("oldest") <= one.pop("newest") <= now - 3 * DAY
    assert now - 60 < one.pop("last_used") <= now
    assert one == {
        "namespace": "",
        "space": "a/small",
        "dimensions": WIDTH,
        "entries": 3,
        "bytes": 3 * (40 + 4 * WIDTH),
        "hits": 5,
        "joins": 1,
        "misses": 3,
        "duplicates": 1,
        "tokens_saved": 1_500_000,
        "tokens_billed": 500_000,
        "hit_rate": 0.7,
        "usd_saved": 3.0,
        "usd_billed": 1.0,
    }
    assert partitions["", "a/small?task=~12549ea7d2d841ef"]["usd_saved"] == 0.5
    assert shown.pop("file_bytes") >= path.stat().st_size
    assert shown == {
        "directory": str(tmp_path / "cache"),
        "data_bytes": path.stat().st_size,
        "wal_bytes": 0,
        "size_limit_bytes": 50 * GIB,
        "entries": 5,
        "counted_since": 20_000 * DAY,
        "hits": 6,
        "joins": 1,
        "misses": 3,
        "duplicates": 1,
        "tokens_saved": 1_750_000,
        "tokens_billed": 500_000,
        "hit_rate": 0.7273,
        "usd_saved": 3.5,
        "usd_billed": 1.0,
    }


def test_stats_for_people(run, fill, tmp_path):
    """A line for each partition, none of it cut or taken for markup, and a sum in words."""
    fill(*(_row(text, days=3) for text in TEXTS), _row("a", OTHER, "[red]tenant %s"))
    with connection.opened(tmp_path / "cache", GIB) as file:
        usage = {
            (20_000, LedgerKey(keyring(SPACE).partition)): Usage(
                3, 0, 1, 0, 600_000, 200_000, 6 * NANO // 5, 2 * NANO // 5
            )
        }
        file.write(WriteBatch(usage=usage))
    done = run("stats")
    assert (done.code, done.err) == (0, "")
    first, _, *lines, last = done.out.splitlines()
    assert re.fullmatch(r"501 entries: .* of data and 0 B of write-ahead log, of at most .*", first)
    small = (
        r"-\s+a/small\s+64\s+500\s+148\.0 kB\s+3 d\s+\d s\s+75\.0%\s+600,000\s+\$1\.20\s+75\.0%\s*"
    )
    assert any(re.fullmatch(small, line) for line in lines)
    assert any(line.startswith("[red]tenant %s") for line in lines)
    assert last == (
        "4 inputs were asked for, 1 of them bought: hit rate 75.0%, $1.20 saved (75.0%),"
        " $0.40 spent."
    )


async def test_stats_of_what_a_proxy_did(run, start_proxy, upstream):
    """Hits, duplicates and purchases of real requests are told once the proxy has written them."""
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(upstream, models=MODELS)
    for texts in (["a b", "c"], ["a b", "d d d", "a b"]):
        await _texts_served(proxy, texts=texts)
    await start_proxy.stop()
    (one,) = (await asyncio.to_thread(run, "stats", "--json")).json["partitions"]
    assert [one[name] for name in ("entries", "hits", "misses", "duplicates")] == [3, 1, 3, 1]
    assert (one["tokens_billed"], one["tokens_saved"]) == (6, 4)
    assert (one["usd_billed"], one["usd_saved"]) == (12e-6, 8e-6)


BILL = {
    (20_000, LedgerKey(keyring(SPACE).partition, "small", "shop", "ci")): Usage(
        misses=3, tokens_billed=500_000, nanodollars_billed=2 * NANO // 3
    ),
    (20_001, LedgerKey(keyring(SPACE).partition, "small", "", "ci")): Usage(
        hits=5, tokens_saved=1_500_000, nanodollars_saved=3 * NANO
    ),
    (20_001, LedgerKey(keyring(OTHER, Namespace("[red]t")).partition, "b", "", "")): Usage(joins=7),
}


def _write_bill(tmp_path):
    with connection.opened(tmp_path / "cache", GIB, create=True) as file:
        file.write(WriteBatch(usage=BILL))


def test_the_bill_as_json(run, tmp_path):
    """Lines by what was asked for, in that order, with dollars and a day that people can read."""
    _write_bill(tmp_path)
    done = run("stats", "--by", "day", "--by", "provider", "--by", "day", "--json")
    assert (done.code, done.err) == (0, "")
    assert [(list(one)[:2], one["day"], one["provider"]) for one in done.json] == [
        (["day", "provider"], "2024-10-04", "shop"),
        (["day", "provider"], "2024-10-05", ""),
    ]
    assert done.json[0]["usd_billed"] == 0.666666666
    assert {name: done.json[1][name] for name in ("hits", "joins", "misses", "usd_saved")} == {
        "hits": 5,
        "joins": 7,
        "misses": 0,
        "usd_saved": 3.0,
    }


def test_the_bill_for_people(run, tmp_path):
    """A line for each, none of it taken for markup."""
    _write_bill(tmp_path)
    done = run("stats", "--by", "namespace", "--by", "client")
    assert (done.code, done.err) == (0, "")
    title, *lines = (line.split() for line in done.out.splitlines())
    assert title == [
        "namespace",
        "client",
        "inputs",
        "bought",
        "tokens",
        "billed",
        "billed",
        "tokens",
        "saved",
        "saved",
        "share",
    ]
    assert lines == [
        ["-", "ci", "8", "3", "500,000", "$0.67", "1,500,000", "$3.00", "81.8%"],
        ["[red]t", "-", "7", "0", "0", "$0.00", "0", "$0.00"],
    ]


def test_the_bill_by_something_unknown_is_refused(run, tmp_path):
    """The message says what there is."""
    _write_bill(tmp_path)
    done = run("stats", "--by", "colour")
    assert done.code == 2
    assert "colour" in done.err


# purge


@pytest.fixture
def mixed(fill):
    """Fill the store with eight entries that differ in all that a purge can choose by."""
    task = SPACE.with_parameters({"task": "q"})
    path = fill(
        _row("old", days=40),
        _row("new"),
        _row("old", task, days=40),
        _row("new", task),
        _row("old", SPACE, "tenant", days=40),
        _row("new", SPACE, "tenant"),
        _row("old", OTHER, "tenant", days=40),
        _row("new", OTHER),
    )
    # Of each pair, the new one was used ten days ago and the old one now.
    _sql(path, "UPDATE Entries SET used = used - 864000000 WHERE id % 2 = 0")
    return path


@pytest.fixture
def waiting(mixed, tmp_path):
    """Let a point wait for Qdrant of each of these entries; give a function that tells of which.

    Those of odd numbers have ids of their own, and the last was put aside.
    """
    numbers = dict(_sql(mixed, "SELECT key, rowid FROM Cache"))
    places = _sql(
        mixed,
        "SELECT key, space, namespace FROM Cache JOIN Entries ON Entries.id = Cache.rowid"
        " JOIN Partitions ON Partitions.id = partition",
    )
    with closing(Outbox(tmp_path / "cache", GIB)) as outbox:
        for address, space, namespace in places:
            own = numbers[address] % 2 == 1
            one = id_bytes(numbers[address]) if own else address
            target = Target("docs", space, WIDTH)
            outbox.add(target, [Point(one, bytes(4), b"{}", True, False, address, namespace)])  # noqa: FBT003
        outbox.move_to_dead_letters(outbox.batch(target, GIB, 1), "refused", 0.0)

    def left():
        with closing(OutboxFile(tmp_path / "cache")) as file:
            return {numbers[one.address] for one in select_entries(file)}

    return left


@pytest.mark.parametrize(
    ("arguments", "gone"),
    [
        (["--all"], {1, 2, 3, 4, 5, 6, 7, 8}),
        (["--namespace", "tenant"], {5, 6, 7}),
        (["--namespace", ""], {1, 2, 3, 4, 8}),
        (["--space", "a/small"], {1, 2, 3, 4, 5, 6}),
        (["--space", "a/small?task=~12549ea7d2d841ef"], {3, 4}),
        (["--space", "b/wide%20%26%20round"], {7, 8}),
        (["--older-than", "30d"], {1, 3, 5, 7}),
        (["--older-than", "41d"], set()),
        (["--older-than", "0s"], {1, 2, 3, 4, 5, 6, 7, 8}),
        (["--unused-for", "1w"], {2, 4, 6, 8}),
        (["--unused-for", "11d"], set()),
        (["--older-than", "30d", "--unused-for", "1w"], set()),
        (["--older-than", "12h", "--unused-for", "9.9d", "--space", "a/small"], {2, 4, 6}),
        (["--namespace", "tenant", "--space", "a/small", "--older-than", "30d"], {5}),
        (["--input", "new", "--model", "small"], {2}),
        (["--input", "new", "--model", "small", "--namespace", "tenant"], {6}),
        (["--input", "new", "--model", "wide"], {8}),
        (["--input", "NEW", "--model", "small"], set()),
        (["--input", "", "--model", "small"], set()),
        (["--input", "' OR 1 --", "--model", "small"], set()),
    ],
)
def test_exactly_the_chosen_entries_are_deleted(arguments, gone, run, mixed, waiting):
    """A dry run counts them and deletes none; then they go, and a second run finds none.

    With them go the points of them that wait for Qdrant.
    """
    before = dict(_sql(mixed, "SELECT rowid, key FROM Cache"))
    done = run("purge", *arguments, "--dry-run", "--json")
    size = sum(40 + 4 * WIDTH * (1 + (number > 6)) for number in gone)
    counts = {"chosen": len(gone), "bytes": size, "deleted": 0, "waiting": len(gone)}
    # Nothing of them was bought here.
    counts["usd_value"] = None if gone else 0.0
    assert (done.code, done.json, done.err) == (0, counts | {"dry_run": True}, "")
    assert waiting() == {1, 2, 3, 4, 5, 6, 7, 8}
    assert dict(_sql(mixed, "SELECT rowid, key FROM Cache")) == before
    done = run("purge", *arguments, "--json")
    assert waiting() == {1, 2, 3, 4, 5, 6, 7, 8} - gone
    counts |= {"deleted": len(gone), "dry_run": False}
    assert (done.code, done.json, done.err) == (0, counts, "")
    left = {number: key for number, key in before.items() if number not in gone}
    assert dict(_sql(mixed, "SELECT rowid, key FROM Cache")) == left
    assert {number for (number,) in _sql(mixed, "SELECT id FROM Entries")} == set(left)
    if "--namespace" in arguments or "--space" in arguments:
        return
    done = run("purge", *arguments)
    nothing = "0 points that wait for Qdrant deleted; those in Qdrant stay\n"
    assert (done.code, done.out, done.err) == (
        0,
        f"0 entries, 0 B, worth about $0.00: deleted\n{nothing}",
        "",
    )


@pytest.fixture
def crowded(tmp_path, monkeypatch):
    """Give the file of a store with more namespaces and spaces than have a partition each."""
    monkeypatch.setattr(bounds, "MAX_PARAMETER_SETS", 1)
    monkeypatch.setattr(bounds, "MAX_PARTITIONS", 4)
    rows = [("", f"{SPACE.name}?task=~{str(i) * 16}") for i in (1, 3)]
    rows += [(f"team {i}", SPACE.name) for i in range(4)]
    with connection.opened(tmp_path / "cache", GIB, create=True) as file:
        for number, (namespace, space) in enumerate(rows):
            key = keyring(SPACE, Namespace(namespace)).key(str(number - 2))
            partition = Partition(namespace, space, WIDTH)
            file.write(WriteBatch(records={key.address: PendingRecord(b"record", partition)}))
        return file.path


@pytest.mark.parametrize(
    ("arguments", "shared", "left"),
    [
        (["--namespace", "team 0"], 2, {"team 1", "?", "?!"}),
        (["--namespace", "team 3"], 2, {"team 0", "team 1", "?", "?!"}),
        (["--namespace", "team 3", "--older-than", "30d"], 0, None),
        (["--space", SPACE.name], 2, set()),
        (["--space", f"{SPACE.name}?task=~3333333333333333"], 3, {"team 0", "team 1", "?"}),
        (["--input", "3", "--model", "small", "--namespace", "team 3"], 1, None),
        (["--namespace", OTHER_NAMESPACE], 0, {"team 0", "team 1", "?", "?!"}),
        (["--all"], 0, set()),
    ],
)
def test_what_shares_a_partition_goes_with_what_is_purged(arguments, shared, left, run, crowded):
    """Nothing of a namespace, or of a space, is left: what cannot be told from it goes as well."""
    places = (
        "SELECT CASE WHEN namespace != '' THEN namespace WHEN space LIKE '%?other' THEN '?!'"
        " ELSE '?' END FROM Entries JOIN Partitions ON Partitions.id = partition"
    )
    before = [place for (place,) in _sql(crowded, places)]
    assert sorted(before) == sorted(["?", "?!", "team 0", "team 1", *[OTHER_NAMESPACE] * 2])
    told = run("purge", *arguments, "--dry-run", "--json").json
    assert told.get("of_shared_partitions", 0) == shared
    assert [place for (place,) in _sql(crowded, places)] == before
    done = run("purge", *arguments)
    assert ("cannot be told apart, so all of them go" in done.out) == (shared > 0)
    if left is not None:
        assert {place for (place,) in _sql(crowded, places)} == left
    else:
        assert len(_sql(crowded, places)) == len(before) - shared


def test_purge_says_what_it_would_and_what_it_did(run, mixed):
    """People are told the number and the bytes, before and after."""
    what = "8 entries, 2.9 kB, of unknown value"
    assert run("purge", "--all", "--dry-run").out == f"{what}: would be deleted\n"
    assert run("purge", "--all").out == f"{what}: deleted\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--space", "a/smal"], ["--space: the store has no space 'a/smal'", "mean 'a/small'?"]),
        (["--space", "small"], ["did you mean 'a/small'?"]),
        (["--space", ""], ["known: 'a/small', 'a/small?task=~12549ea7d2d841ef', 'b/wide%20%26"]),
        (["--namespace", "tenan_"], ["has no namespace 'tenan_'; did you mean 'tenant'?"]),
        (["--namespace", "%", "--dry-run"], ["known: '', 'tenant'"]),
    ],
)
def test_a_purge_of_what_is_not_there_names_what_is(arguments, words, run, mixed, waiting):
    """A misspelt name is wrong usage, not a purge of nothing."""
    _failed(run("purge", *arguments), 2, *words)
    assert len(_sql(mixed, "SELECT 1 FROM Cache")) == 8


def test_a_space_that_only_waits_for_qdrant_can_be_purged(run, mixed, waiting, tmp_path):
    """What has no entry any more may still have points in the outbox."""
    target = Target("docs", "gone/space", WIDTH)
    with closing(Outbox(tmp_path / "cache", GIB)) as outbox:
        outbox.add(target, [Point(bytes(16), bytes(4), b"{}", plain=True, new=False)])
    assert run("purge", "--space", "gone/space", "--json").json["waiting"] == 1


async def test_a_purge_tells_what_the_entries_cost(run, start_proxy, upstream, fill):
    """What was billed for a space, by the share of its entries; of others it is not known."""
    upstream.widths = {"small": WIDTH}
    fill(_row("imported", OTHER))
    proxy = await start_proxy(upstream, models=MODELS)
    await _texts_served(proxy, texts=["a b c", "d"])
    await _texts_served(proxy, texts=["a b c"])
    await start_proxy.stop()
    tell = partial(asyncio.to_thread, run, "purge", "--dry-run")
    worth = "worth about $0.000008 and 1 of unknown value"
    assert (await tell("--all")).out == f"3 entries, 1.1 kB, {worth}: would be deleted\n"
    assert (await tell("--all", "--json")).json["usd_value"] == 8e-6
    assert (await tell("--space", "a/small", "--json")).json["usd_value"] == 8e-6
    one = await tell("--input", "d", "--model", "small", "--json")
    assert one.json["usd_value"] == 4e-6
    assert (await tell("--space", OTHER.label, "--json")).json["usd_value"] is None


@pytest.mark.parametrize(
    ("says", "code", "left"), [("y\n", 0, 0), ("n\n", 1, 8), ("\n", 1, 8), ("", 1, 8)]
)
def test_a_purge_asks_on_a_terminal(says, *, code, left, run, mixed, monkeypatch):
    """The question has entries, size and value; anything but yes deletes nothing."""
    monkeypatch.setattr("embedding_proxy.proxy.cli.output.has_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(says))
    done = run("purge", "--all", "--json", sure=False)
    assert "Delete 8 entries, 2.9 kB, of unknown value for good?" in done.err
    assert (done.code, len(_sql(mixed, "SELECT 1 FROM Cache"))) == (code, left)
    assert (done.out.strip() == "") == (code != 0)


def test_where_there_is_nothing_to_delete_nothing_is_asked(run, mixed, monkeypatch):
    """A purge of nothing ends well."""
    monkeypatch.setattr("embedding_proxy.proxy.cli.output.has_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run("purge", "--older-than", "41d", sure=False).code == 0


def test_ctrl_c_at_the_question_is_130(run, mixed, monkeypatch):
    """It is an interruption, and no answer; nothing is deleted."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("embedding_proxy.proxy.cli.output.has_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("builtins.input", interrupt)
    monkeypatch.setattr("typer._click.termui.visible_prompt_func", interrupt)
    done = run("purge", "--all", sure=False)
    assert (done.code, len(_sql(mixed, "SELECT 1 FROM Cache"))) == (130, 8)


def test_without_a_terminal_a_purge_needs_yes(run, mixed):
    """A script neither hangs nor deletes what nobody agreed to; a dry run needs nothing."""
    _failed(run("purge", "--all", sure=False), 2, "there is no terminal to ask on; say --yes")
    assert len(_sql(mixed, "SELECT 1 FROM Cache")) == 8
    assert run("purge", "--all", "--dry-run", sure=False).code == 0


def test_a_dry_run_leaves_a_damaged_outbox_where_it_is(run, mixed, tmp_path):
    """It says what is wrong; to begin a new file is for who deletes, or for the proxy."""
    path = tmp_path / "cache" / "index-outbox.db"
    path.write_bytes(b"no database" * 1000)
    _failed(run("purge", "--all", "--dry-run"), 1, "index-outbox.db: file is not a database")
    assert path.read_bytes() == b"no database" * 1000
    assert list(path.parent.glob("*.damaged-*")) == []


def test_points_wait_whose_entry_is_gone(run, mixed, waiting):
    """What waits is deleted also where the cache holds nothing of it any more."""
    _sql(mixed, "DELETE FROM Cache WHERE rowid IN (5, 6)")
    _sql(mixed, "DELETE FROM Entries WHERE id IN (5, 6)")
    done = run("purge", "--namespace", "tenant", "--dry-run")
    assert done.out == (
        "1 entry, 552 B, of unknown value: would be deleted\n"
        "3 points that wait for Qdrant would be deleted; those in Qdrant stay\n"
    )
    assert run("purge", "--namespace", "tenant", "--json").json["waiting"] == 3


def test_nothing_of_a_purged_point_is_left_on_disk(run, mixed, waiting, tmp_path):
    """Neither its text nor that it was ever there; the file is overwritten."""
    target = Target("docs", "a/small", WIDTH)
    with closing(Outbox(tmp_path / "cache", GIB)) as outbox:
        outbox.add(
            target, [Point(bytes(16), bytes(4), b'{"text": "a secret"}', plain=True, new=False)]
        )
        before = outbox.forgotten
    path = tmp_path / "cache" / FILE_NAME
    assert b"a secret" in path.read_bytes()
    assert run("purge", "--all").code == 0
    assert b"a secret" not in path.read_bytes()
    assert not _sql(path, "SELECT * FROM known")
    with closing(Outbox(tmp_path / "cache", GIB)) as outbox:
        assert outbox.forgotten == before + 1


def test_an_outbox_that_cannot_be_used_is_one_line(run, mixed, tmp_path):
    """Nothing is deleted then, so that it can be done again."""
    with closing(sqlite3.connect(tmp_path / "cache" / FILE_NAME)) as sql:
        sql.execute("PRAGMA user_version = 99")
    _failed(run("purge", "--all"), 1, "index-outbox.db", "is of a later version")
    assert len(_sql(mixed, "SELECT 1 FROM Cache")) == 8


def test_many_entries_go_and_the_file_shrinks(run, fill, monkeypatch):
    """They go some at a time, and what they took is given back to the file system."""
    monkeypatch.setattr(purge, "ROWS_A_TRANSACTION", 100)
    monkeypatch.setattr(purge, "PAGES_A_STEP", 1)
    path = fill(*(_row(text) for text in TEXTS), _row("kept", OTHER))
    size = path.stat().st_size
    assert run("purge", "--space", "a/small", "--json").json["deleted"] == len(TEXTS)
    assert path.stat().st_size <= size - 4 * PAGE_BYTES
    assert len(_sql(path, "SELECT 1 FROM Cache")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["say what to delete", "--all"]),
        (["--dry-run"], ["say what to delete"]),
        (["--model", "small"], ["--model", "--space"]),
        (["--older-than", "old"], ["--older-than", "as in 90d"]),
        (["--older-than", "-5d"], ["--older-than", "as in 90d"]),
        (["--unused-for", ""], ["--unused-for", "as in 90d"]),
        (["--input", "a"], ["--model", "known: ", "small"]),
        (["--input", "a", "--model", "smal"], ["--model", "known: ", "small"]),
    ],
)
def test_a_purge_that_is_not_clear_is_wrong_usage(arguments, words, run, mixed):
    """Nothing is deleted for want of a choice; the line names what was expected."""
    _failed(run("purge", *arguments), 2, *words)
    assert len(_sql(mixed, "SELECT 1 FROM Cache")) == 8


async def test_a_running_proxy_forgets_what_was_purged(run, start_proxy, upstream):
    """Once the command says "deleted", purged texts are bought, others hit: nobody waits."""
    upstream.widths = {"small": WIDTH, "wide": 2 * WIDTH}
    proxy = await start_proxy(upstream, models=MODELS)
    for model in ("small", "wide"):
        await _texts_served(proxy, model, ["a", "b"])
    done = await asyncio.to_thread(run, "purge", "--input", "a", "--model", "small")
    assert done.out == "1 entry, 296 B, worth about $0.000002: deleted\n"
    asked = len(upstream.calls)
    assert await _texts_served(proxy, "wide", ["a", "b"]) == 2
    assert await _texts_served(proxy, "small", ["a", "b"]) == 1
    assert [call.inputs for call in upstream.calls[asked:]] == [["a"]]
    await asyncio.to_thread(run, "purge", "--all")
    assert await _texts_served(proxy, "wide", ["a", "b"]) == 0


async def test_a_running_proxy_gives_no_reply_again_that_was_purged(run, start_proxy, upstream):
    """The same bytes are asked before and after a purge: the kept reply is not given any more."""
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(upstream, models=MODELS)
    body = b'{"model": "small", "input": "a"}'
    said = [(await proxy.post(body)).headers["x-cache"] for _ in range(3)]
    await asyncio.to_thread(run, "purge", "--all")
    said.append((await proxy.post(body)).headers["x-cache"])
    assert said == ["miss", "hit", "hit", "miss"]


async def test_without_a_signal_a_purge_waits_for_running_proxies(
    run, start_proxy, upstream, monkeypatch
):
    """Where the signal cannot be given, the command ends when each proxy had its tick."""
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(upstream, models=MODELS)
    await _texts_served(proxy, texts=["a"])
    waited = []
    monkeypatch.setattr(purge, "SIGNAL_NAME", "no-such-folder/purges")
    monkeypatch.setattr(cache_purge, "wait", waited.append)
    await asyncio.to_thread(run, "purge", "--all")
    assert waited == [2 * TICK_SECONDS]
    await proxy.service._storage.tiers._store._tick(1)
    assert await _texts_served(proxy, texts=["a"]) == 0


async def test_a_dry_run_is_not_told_to_proxies(run, start_proxy, upstream):
    """Where nothing was deleted the memory stays as it is."""
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(upstream, models=MODELS)
    await _texts_served(proxy, texts=["a"])
    await asyncio.to_thread(run, "purge", "--all", "--dry-run")
    await proxy.service._storage.tiers._store._tick(1)
    assert len(proxy.service._storage.tiers.memory) == 1
    assert await _texts_served(proxy, texts=["a"]) == 1


async def test_a_proxy_writes_while_a_purge_deletes(run, start_proxy, upstream, monkeypatch, fill):
    """Requests amid a purge are answered, and what they bought is not purged with the rest."""
    monkeypatch.setattr(purge, "ROWS_A_TRANSACTION", 25)
    upstream.widths = {"small": WIDTH, "wide": 2 * WIDTH}
    fill(*(_row(text) for text in TEXTS))
    proxy = await start_proxy(upstream, models=MODELS)
    purging = asyncio.create_task(asyncio.to_thread(run, "purge", "--space", "a/small", "--json"))
    count = 0
    while not purging.done():
        assert await _texts_served(proxy, "wide", [f"new {count}"]) == 0
        count += 1
    assert purging.result().json["deleted"] == len(TEXTS)
    assert await _texts_served(proxy, "wide", [f"new {i}" for i in range(count)]) == count > 0


# purge on a full disk


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """Have the cache lie on a small file system of its own; skip where none can be mounted."""
    monkeypatch.setattr(disk_full, "FREE_BYTES", 0)
    monkeypatch.setattr(exclusive_file, "BUSY_SECONDS", 0.01)
    try:
        with file_system(tmp_path / "cache", 8 << 20):
            yield tmp_path / "cache"
    except CannotMount as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("arguments", [["--all"], ["--older-than", "30d"], ["--space", "a/small"]])
def test_a_full_disk_can_be_purged(arguments, run, small_disk, waiting, rows, fill):  # noqa: PLR0917
    """With not a byte free a purge deletes what is chosen, and gives the room back."""
    fill(*(_row(text, days=40) for text in TEXTS))
    chosen = run("purge", *arguments, "--dry-run", "--json").json
    left = set(rows()) - {row for row in rows() if _is_chosen(row, arguments)}
    with full(small_disk):
        assert shutil.disk_usage(small_disk).free == 0
        done = run("purge", *arguments, "--json")
        assert done.code == 0
        assert "the disk is full: the store is changed in place" in done.err
        assert done.json == {**chosen, "deleted": chosen["chosen"], "dry_run": False}
        assert shutil.disk_usage(small_disk).free > 0
    assert set(rows()) == left
    assert len(waiting()) == 8 - chosen["waiting"]
    for pragma, value in (("integrity_check", "ok"), ("journal_mode", "wal")):
        assert _sql(small_disk / "v1" / "cache.db", f"PRAGMA {pragma}") == [(value,)]


def _is_chosen(row, arguments):
    if "--older-than" in arguments:
        return row.stored < time.time() - 30 * DAY
    return "--all" in arguments or row.partition.space.startswith("a/small")


def test_a_full_disk_with_a_proxy_on_it_says_what_to_do(run, small_disk, mixed):
    """A file that another process has open is not changed in place; the line says the way out."""
    with closing(sqlite3.connect(mixed)) as other:
        other.execute("SELECT count(*) FROM Cache").fetchall()
        with full(small_disk):
            done = run("purge", "--all")
    assert done.code == 1
    assert done.err.splitlines()[-1].endswith(
        "stop all proxies and commands that use it and purge again, or free some space on the disk"
    )


def test_a_full_disk_with_a_log_says_how_much_to_free(run, small_disk, fill, rows):
    """What a killed process has left in the log needs room in the file; nothing is lost of it."""
    path = fill(*(_row(text) for text in TEXTS[:50]))
    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE Cache SET value = zeroblob(20000)")
        other.commit()
        for rest in ("", "-wal"):
            shutil.copy(f"{path}{rest}", f"{path}{rest}.kept")
    for rest in ("", "-wal"):
        Path(f"{path}{rest}.kept").replace(f"{path}{rest}")
    with full(small_disk):
        done = run("purge", "--all")
        assert done.code == 1
        assert (
            f"free some space on the disk, as much as {path}-wal takes, and purge again" in done.err
        )
    assert run("purge", "--all", "--json").json["deleted"] == 50
    assert rows() == []


# backup


async def test_a_backup_of_a_busy_store_is_served_from(
    run, start_proxy, upstream, tmp_path, monkeypatch
):
    """While requests come in the copy is made; in another directory all it holds are hits."""
    monkeypatch.setattr(backup, "MAX_ROWS_A_STEP", 20)
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(upstream, models=MODELS)
    await _texts_served(proxy)
    target = tmp_path / "copy %20 ü.db"
    copying = asyncio.create_task(asyncio.to_thread(run, "backup", str(target)))
    more = 0
    while not copying.done():
        assert await _texts_served(proxy, texts=[f"more {more}"]) == 0
        more += 1
    done = copying.result()
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{target}: ")
    assert "to restore it, stop all proxies, remove cache.db-wal and cache.db-shm" in done.out
    await start_proxy.stop()
    restored = tmp_path / "restored"
    (restored / "v1").mkdir(parents=True)
    target.rename(restored / "v1" / "cache.db")
    asked = len(upstream.calls)
    proxy = await start_proxy(upstream, models=MODELS, cache={"directory": str(restored)})
    assert await _texts_served(proxy) == len(TEXTS)
    assert (len(upstream.calls), more > 0) == (asked, True)


def test_a_backup_as_json(run, fill, tmp_path):
    """Scripts are told the file and its size."""
    fill(_row("a"))
    target = tmp_path / "b.db"
    done = run("backup", str(target), "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json == {"file": str(target), "bytes": target.stat().st_size}


def test_a_backup_overwrites_nothing(run, fill, tmp_path):
    """A file or folder that is there is named, and stays as it is."""
    fill(_row("a"))
    (tmp_path / "b.db").write_bytes(b"mine")
    _failed(run("backup", str(tmp_path / "b.db")), 1, "b.db exists")
    _failed(run("backup", str(tmp_path)), 1, "exists")
    assert (tmp_path / "b.db").read_bytes() == b"mine"


@pytest.mark.parametrize(("error", "code"), [(sqlite3.OperationalError("full"), 1), (None, 130)])
def test_a_backup_that_ends_early_leaves_nothing(error, *, code, run, fill, tmp_path, monkeypatch):
    """A failure is one line and code 1, Ctrl-C code 130; no part of a copy is left."""
    fill(*(_row(text) for text in TEXTS))
    folder = tmp_path / "copies"
    folder.mkdir()
    monkeypatch.setattr(backup, "MAX_ROWS_A_STEP", 20)

    def end(*_):
        assert list(folder.iterdir())
        assert not (folder / "b.db").exists()
        raise error or KeyboardInterrupt

    monkeypatch.setattr("embedding_proxy.proxy.cli.output._lines", lambda *_: end)
    done = run("backup", str(folder / "b.db"))
    assert (done.code, done.out) == (code, "")
    assert "Traceback" not in done.err
    assert list(folder.iterdir()) == []


# verify

DAMAGES = [
    "value = zeroblob(length(value))",
    "value = CAST(substr(value, 1, 100) || x'00' || substr(value, 102) AS BLOB)",
    "value = x'80054e2e', mode = 4",
    "mode = 3",
    "raw = 0",
]


def test_a_sound_store_verifies(run, fill):
    """Code 0, the number of records, and nothing on stderr."""
    fill(*(_row(text) for text in TEXTS))
    assert run("verify") == (0, "500 records are whole\n", "")
    assert run("verify", "--mend").out == "500 records are whole\n"
    assert run("verify", "--json").json == {
        "records": 500,
        "damaged": 0,
        "lost_sight_of": 0,
        "wrong_partition": 0,
        "orphans": 0,
        "broken": None,
        "unchecked": None,
        "mended": False,
        "salvaged": None,
    }


@pytest.mark.parametrize("damage", DAMAGES)
async def test_damaged_records_are_reported_and_mended(damage, run, fill, start_proxy, upstream):
    """Code 1 until they are mended; then the others hit, and only those are bought again."""
    path = fill(*(_row(text) for text in TEXTS))
    changed = _sql(path, f"UPDATE Cache SET {damage} WHERE rowid % 100 = 7 RETURNING rowid")
    assert len(changed) == 5
    _sql(path, "DELETE FROM Entries WHERE id = 20")
    done = await asyncio.to_thread(run, "verify", "--json")
    found = {
        "records": 495,
        "damaged": 5,
        "lost_sight_of": 1,
        "wrong_partition": 0,
        "orphans": 0,
        "broken": None,
        "unchecked": None,
        "salvaged": None,
    }
    assert (done.code, done.json, done.err) == (1, {**found, "mended": False}, "")
    done = await asyncio.to_thread(run, "verify")
    assert done == (
        1,
        (
            "495 records are whole\n5 records damaged; --mend deletes them\n"
            "1 record not entered; --mend does it\n"
        ),
        "",
    )
    done = await asyncio.to_thread(run, "verify", "--mend")
    lines = "495 records are whole\n5 records deleted\n1 record entered again\n"
    assert done == (0, lines, "")
    assert (await asyncio.to_thread(run, "verify")).code == 0
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(upstream, models=MODELS)
    assert await _texts_served(proxy) == 495
    assert len(upstream.inputs) == 5


async def test_whole_records_in_a_wrong_space_are_kept(run, fill, tmp_path, start_proxy, upstream):
    """What was entered under another width was paid for: --mend keeps it, and it is served."""
    path = fill(*(_row(text) for text in TEXTS))
    _sql(path, "UPDATE Partitions SET dimensions = dimensions + 1")
    done = await asyncio.to_thread(run, "verify")
    assert done == (
        1,
        (
            "500 records are whole\n500 whole records have a space of another width;"
            " --mend keeps what is whole, with its space unknown\n"
        ),
        "",
    )
    done = await asyncio.to_thread(run, "verify", "--mend", "--json")
    assert (done.code, done.json["damaged"], done.json["wrong_partition"]) == (0, 0, 500)
    assert (await asyncio.to_thread(run, "verify")).out == "500 records are whole\n"
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(upstream, models=MODELS, cache={"directory": str(tmp_path / "cache")})
    assert await _texts_served(proxy) == 500
    assert not upstream.calls


@pytest.mark.parametrize("mend", [[], ["--mend"]])
def test_what_was_not_checked_is_said(mend, run, fill, monkeypatch):
    """A check that had to be given up is code 1, whatever else was found or mended."""
    path = fill(*(_row(text) for text in TEXTS))
    _sql(path, "DELETE FROM Entries WHERE id = 20")
    monkeypatch.setattr(short_reads.LogWatch, "fetch", lambda *_: None)
    done = run("verify", *mend)
    assert (done.code, done.err) == (1, "")
    assert "not checked, because the proxy wrote too much meanwhile: the structure" in done.out
    assert run("verify", "--json").json["unchecked"] == "the structure of the file"


def _header_zeroed(path):
    with path.open("r+b") as file:
        file.write(bytes(100))


def _page_zeroed(path):
    data = path.read_bytes()
    leaves = [i for i in range(1, len(data) // PAGE_BYTES) if data[i * PAGE_BYTES] == 0x0D]
    with path.open("r+b") as file:
        file.seek(leaves[len(leaves) // 2] * PAGE_BYTES)
        file.write(bytes(PAGE_BYTES))


def _cut(path):
    os.truncate(path, path.stat().st_size - PAGE_BYTES - 5)


def _schema_gone(path):
    with path.open("r+b") as file:
        file.seek(100)
        file.write(bytes(PAGE_BYTES - 100))


# How many of the 500 texts are saved at least.
BROKEN = {_header_zeroed: 500, _page_zeroed: 350, _cut: 300, _schema_gone: 500}


@pytest.mark.parametrize(("harm", "least"), BROKEN.items(), ids=lambda v: getattr(v, "__name__", v))
async def test_a_broken_file_is_moved_aside_and_what_is_whole_saved(
    harm, *, least, run, fill, tmp_path, start_proxy, upstream
):
    """Code 1 and nothing touched without --mend; with it a sound store of all that was whole."""
    path = fill(*(_row(text) for text in TEXTS))
    harm(path)
    done = await asyncio.to_thread(run, "verify")
    assert (done.code, done.err) == (1, "")
    assert "the file is damaged: " in done.out
    assert "--mend moves it aside" in done.out
    damaged = path.read_bytes()
    assert not list((tmp_path / "cache").glob("v1.damaged-*"))
    done = await asyncio.to_thread(run, "verify", "--mend", "--json")
    (quarantined,) = (tmp_path / "cache").glob("v1.damaged-*")
    assert (done.code, done.err) == (0, f"moved to {quarantined}\n")
    assert (done.json["mended"], bool(done.json["broken"])) == (True, True)
    assert least <= done.json["salvaged"] <= 500
    assert (quarantined / "cache.db").stat().st_size == len(damaged)
    assert (await asyncio.to_thread(run, "verify")).code == 0
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(upstream, models=MODELS)
    assert await _texts_served(proxy) == done.json["salvaged"]


def test_a_file_of_garbage_is_moved_aside(run, fill, tmp_path):
    """Where nothing is left to save the store is new and empty."""
    path = fill(_row("a"))
    path.write_bytes(b"garbage" * 20_000)
    done = run("verify")
    assert (done.code, done.err) == (1, "")
    assert "the file is damaged" in done.out
    done = run("verify", "--mend")
    assert done.code == 0
    assert "it was moved aside; 0 records were saved out of it" in done.out
    assert len(list((tmp_path / "cache").glob("v1.damaged-*"))) == 1
    assert run("verify").out == "0 records are whole\n"


def test_what_is_whole_is_taken_out_of_another_file(run, fill, tmp_path, rows):
    """--salvage adds what the store lacks, with its partition; both files stay what they were."""
    path = fill(*(_row(text) for text in TEXTS), _row("t", OTHER, "tenant"))
    damaged = tmp_path / "damaged %s ü.db"
    path.rename(damaged)
    _header_zeroed(damaged)
    before = damaged.read_bytes()
    fill(*(_row(text) for text in TEXTS[:100]))
    done = run("verify", "--salvage", str(damaged), "--json")
    assert (done.code, done.err) == (0, "")
    told = {"stored": 401, "present": 100, "damaged": 0, "sums": 0, "sums_left_out": True}
    assert done.json == told
    assert damaged.read_bytes() == before
    assert {row.partition for row in rows()} == {
        keyring(SPACE).partition,
        keyring(OTHER, Namespace("tenant")).partition,
    }
    done = run("verify", "--salvage", str(damaged))
    assert done.out == (
        "0 records saved, 501 were there already, 0 are damaged; 0 sums added to the ledger\n"
        f"the sums of {damaged} are not added; --add-sums adds them\n"
    )


def _billed(run):
    return [line["usd_billed"] for line in run("stats", "--by", "model", "--json").json]


@pytest.mark.parametrize("of", ["backup", "copy", "renamed folder"])
def test_sums_that_are_in_the_ledger_already_are_not_added(of, run, tmp_path):
    """A file of this store has them, too: they are left out, and it is said how to add them."""
    _write_bill(tmp_path)
    path = tmp_path / "cache" / "v1" / "cache.db"
    file = tmp_path / "file.db"
    if of == "backup":
        assert run("backup", file).code == 0
    elif of == "copy":
        shutil.copy(path, file)
    else:
        quarantined = quarantine.move(path, path.stat().st_ino)
        assert run("verify", "--salvage", quarantined.path).code == 0
        file = quarantined.folder.rename(tmp_path / "kept") / "cache.db"
    before = _billed(run)
    assert before
    left_out = f"the sums of {file} are not added; --add-sums adds them"
    _failed(run("verify", "--salvage", file), 1, "no record in it that is whole", left_out)
    assert _billed(run) == before
    for _ in range(2):
        run("verify", "--salvage", file, "--add-sums")
        assert _billed(run) == [2 * usd for usd in before]


def test_sums_of_a_file_that_was_set_aside_are_added(run, tmp_path):
    """They are in no other file, and are known by the folder's name: added once, unasked."""
    _write_bill(tmp_path)
    before = _billed(run)
    path = tmp_path / "cache" / "v1" / "cache.db"
    quarantined = quarantine.move(path, path.stat().st_ino)
    done = run("verify", "--salvage", quarantined.path, "--json")
    assert (done.json["sums"] > 0, done.json["sums_left_out"]) == (True, False)
    run("verify", "--salvage", quarantined.path)
    assert _billed(run) == before


def test_sums_are_those_of_a_file_to_be_salvaged(run):
    """--add-sums without --salvage is wrong usage."""
    _failed(run("verify", "--add-sums"), 2, "--add-sums", "--salvage")


def test_a_purge_deletes_what_is_not_salvaged_yet_as_well(run, fill, tmp_path, rows):
    """What lies in a file that was set aside is saved first, and does not come back later."""
    path = fill(*(_row(text) for text in TEXTS[:50]), _row("t", OTHER, "tenant"))
    assert quarantine.move(path, path.stat().st_ino) is not None
    done = run("purge", "--namespace", "tenant", "--json")
    assert (done.code, done.err, done.json["deleted"]) == (0, "", 1)
    assert not quarantine.pending(path)
    assert {row.partition for row in rows()} == {keyring(SPACE).partition}


def test_salvage_needs_another_file(run, fill, tmp_path):
    """The store itself, by whatever name, a folder and a missing file are refused."""
    path = fill(_row("a"))
    (tmp_path / "link.db").symlink_to(path)
    for name in (str(path), str(tmp_path / "link.db")):
        _failed(run("verify", "--salvage", name), 1, "is the store itself", "--mend")
    for name in (str(tmp_path), str(tmp_path / "nowhere"), ""):
        _failed(run("verify", "--salvage", name), 1, "there is no such file")


async def test_no_request_fails_while_a_store_is_verified_and_mended(
    run, start_proxy, upstream, tmp_path, monkeypatch
):
    """A proxy answers all the while, rightly; what was damaged is bought anew."""
    monkeypatch.setattr(verify, "ROWS_A_BATCH", 5)
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(
        upstream,
        models=MODELS,
        cache={
            "directory": str(tmp_path / "cache"),
            "memory_mib": 0,
        },
    )
    await _texts_served(proxy)
    path = tmp_path / "cache" / "v1" / "cache.db"
    _sql(path, "UPDATE Cache SET value = x'00' WHERE rowid % 10 = 0")
    working = asyncio.create_task(asyncio.to_thread(run, "verify", "--mend"))
    asked = 0
    while not working.done():
        texts = [TEXTS[asked % 500], f"more {asked}"]
        response = await proxy.post({"model": "small", "input": texts})
        assert response.status == 200
        got = np.float32([one["embedding"] for one in (await response.json())["data"]])
        assert np.array_equal(got, [vector_of("small", text, WIDTH) for text in texts])
        asked += 1
    assert (working.result().code, asked > 0) == (0, True)
    assert "records deleted" in working.result().out
    assert await _texts_served(proxy) >= 450
    assert await _texts_served(proxy) == 500
    assert (await asyncio.to_thread(run, "verify")).code == 0


# in all


def _files(folder):
    """Return size, content and time of change of each file; of the index of a log, nothing."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".db-shm"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


READING = {
    "stats": ["stats"],
    "bill": ["stats", "--by", "model", "--json"],
    "verify": ["verify"],
    "export": ["export", "{folder}/a.emba"],
    "backup": ["backup", "{folder}/b.db"],
    "purge": ["purge", "--all", "--dry-run"],
    "import": ["import", "{folder}/c.emba", "--dry-run"],
}


async def test_what_only_reads_writes_nothing_beside_a_proxy(run, start_proxy, upstream, tmp_path):
    """Neither the database nor its write-ahead log changes by a byte; and afterwards as before."""
    upstream.widths = {"small": WIDTH}
    proxy = await start_proxy(upstream, models=MODELS)
    await _texts_served(proxy)
    (tmp_path / "out").mkdir()
    assert (await asyncio.to_thread(run, "export", str(tmp_path / "out/c.emba"))).code == 0
    store = tmp_path / "cache" / "v1"
    for is_running in (True, False):
        if not is_running:
            await start_proxy.stop()
        before = _files(store)
        assert (store / "cache.db-wal" in before) == is_running
        for name, arguments in READING.items():
            words = [word.format(folder=tmp_path / "out") for word in arguments]
            words += ["--force"] if name == "export" else []
            done = await asyncio.to_thread(run, *words)
            assert done.code == 0, done.err
            assert _files(store) == before, name
            (tmp_path / "out" / "b.db").unlink(missing_ok=True)
        shown = (await asyncio.to_thread(run, "stats", "--json")).json
        sizes = [len(before.get(store / file, (b"",))[0]) for file in ("cache.db", "cache.db-wal")]
        assert [shown["data_bytes"], shown["wal_bytes"]] == sizes
        assert shown["file_bytes"] == sum(sizes)


def test_every_command_says_which_store_it_works_on(fill, tmp_path, monkeypatch, capsys):
    """On stderr, by its absolute path, once; what is printed on stdout is not touched by it."""
    fill(_row("a"))
    (tmp_path / "config.yaml").write_text("cache: {directory: cache}")
    monkeypatch.chdir(tmp_path)
    commands = [*READING.values(), ["purge", "--all", "--yes"], ["verify", "--mend"]]
    monkeypatch.setattr(sys, "argv", [])
    with (tmp_path / "c.emba").open("wb") as file:
        archive.write(file, [_row("a")])
    for arguments in [*commands, ["import", "c.emba"]]:
        words = [word.format(folder=".") for word in arguments]
        words = ["embedding-proxy", "cache", *words, "--config", "config.yaml"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            main.main()
        assert not caught.value.code, words
        out, err = capsys.readouterr()
        assert err.count(f"store: {tmp_path / 'cache'}\n") == 1, words
        assert "store: " not in out


@pytest.mark.parametrize("name", ["stats", "purge", "backup", "export", "import", "verify"])
def test_help_and_wrong_usage(name, run):
    """--help tells the options; an option that there is not is code 2, without a traceback."""
    done = run(name, "--help")
    assert done.code == 0
    assert "--config" in done.out
    assert "--json" in done.out
    done = run(name, "--nope")
    assert (done.code, done.out) == (2, "")
    assert "No such option" in done.err


def test_a_configuration_that_cannot_be_read_is_code_2(run, tmp_path):
    """Every command names the file and the key, in one line."""
    (tmp_path / "config.yaml").write_text("cache: {directry: x}")
    for command in (["stats"], ["purge", "--all"], ["verify"], ["backup", "x"], ["export", "x"]):
        _failed(run(*command), 2, "config.yaml:1: cache.directry: unknown key")


def test_a_newer_store_is_left_alone(run, fill, tmp_path):
    """A file of a later layout is no damaged one: it is named, and neither read nor moved."""
    path = fill(_row("a"))
    _sql(path, "PRAGMA user_version = 99")
    before = path.read_bytes()
    for command in (["stats"], ["purge", "--all"], ["verify", "--mend"], ["backup", "x.db"]):
        _failed(run(*command), 1, "has layout 99")
    assert path.read_bytes() == before
    assert not list((tmp_path / "cache").glob("v1.damaged-*"))


def test_a_store_that_is_locked_is_one_line(run, fill, monkeypatch):
    """Where another process does not let go, that is said, and nothing is moved aside."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    path = fill(_row("a"))
    with connection.lock_of(path.parents[1]):
        for command in (["purge", "--all"], ["verify", "--mend"]):
            _failed(run(*command), 1, "another process keeps writing", "end or continue")
    assert run("verify").code == 0


def test_the_command_as_a_process(fill, tmp_path):
    """As a process of its own: JSON on standard output, one line on stderr, the code."""
    path = fill(_row("a"))
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"cache": {"directory": str(tmp_path / "cache")}}))

    def process(*arguments):
        command = [sys.executable, "-W", "error", "-m", "embedding_proxy", "cache", *arguments]
        done = subprocess.run(
            [*command, "--config", str(config)],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    done = process("stats", "--json")
    assert (done.code, done.json["entries"], done.err) == (0, 1, f"store: {tmp_path / 'cache'}\n")
    shutil.rmtree(path.parent)
    _failed(process("verify"), 1, "there is no store yet")
