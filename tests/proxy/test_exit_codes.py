"""Every command ends with one of the exit codes that docs/troubleshooting.md tells of."""

import json
import re
import socket
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
import typer
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.key import Namespace, Row, keyring
from embedding_proxy.cache.maintenance import archive
from embedding_proxy.cache.record import Entry, encode
from embedding_proxy.providers.base import Space
from embedding_proxy.proxy.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GIB = 1 << 30
SPACE = Space("a/small", 2)
QDRANT = ("--qdrant", "http://127.0.0.1:1")
MODEL = ("--to", "mistral-embed")

# What is asked for, in a folder with a store of one entry; and the code. {port} is taken.
ENDS = [
    ("--version", 0),
    ("serve --port {port}", 1),
    ("serve --port x", 2),
    ("serve --workers 0", 2),
    ("check --offline --nope", 2),
    ("check --config nowhere.yaml", 2),
    ("compare", 2),
    ("compare --model nothing", 2),
    ("config show", 0),
    ("config show --set cache.mode", 2),
    ("config init", 0),
    ("config init old.yaml", 1),
    ("config schema", 0),
    ("config show --config nowhere.yaml", 2),
    ("config convert nowhere.yaml", 2),
    ("config convert old.yaml --output there", 1),
    ("config convert old.yaml --output new.yaml", 0),
    ("keys list", 0),
    ("keys list --config bad_keys.yaml", 2),
    ("keys add alice", 0),
    ("keys add alice --budget 5/week", 2),
    ("keys add alice --expires 2020-01-01", 2),
    ("keys add alice --expires soon", 2),
    ("keys add alice --namespace embedding-proxy/x", 2),
    ("keys add there", 2),
    ("keys add", 2),
    ("keys rotate there --grace 1", 0),
    ("keys rotate there --grace -1", 2),
    ("keys rotate nobody", 2),
    ("keys revoke there", 0),
    ("keys revoke nobody", 2),
    ("keys add alice --config no_folder.yaml", 1),
    ("cache stats", 0),
    ("cache stats --json --by day", 0),
    ("cache stats --config empty.yaml", 1),
    ("cache stats --by colour", 2),
    ("cache verify", 0),
    ("cache verify --config damaged.yaml", 1),
    ("cache verify --config damaged.yaml --mend", 0),
    ("cache verify --salvage nowhere", 1),
    ("cache verify --add-sums", 2),
    ("cache purge --all --dry-run", 0),
    ("cache purge --all --yes", 0),
    ("cache purge --all --yes --config empty.yaml", 1),
    ("cache purge --all", 2),
    ("cache purge --space nothing --yes", 2),
    ("cache purge", 2),
    ("cache backup b.db", 0),
    ("cache backup there", 1),
    ("cache backup", 2),
    ("cache export a.emba", 0),
    ("cache export there --force", 0),
    ("cache export there", 1),
    ("cache export a.emba --space nothing", 2),
    ("cache import whole.emba", 0),
    ("cache import cut.emba", 1),
    ("cache import nowhere.emba", 1),
    ("cache import pairs.jsonl", 2),
    ("index status", 2),
    ("index status --config index.yaml", 0),
    ("index retry --config index.yaml", 0),
    ("index resync --config index.yaml", 0),
    ("index resync nothing --config index.yaml", 1),
    ("migrate plan docs {qdrant}", 2),
    ("migrate plan docs {model} {qdrant}", 1),
    ("migrate run docs {model} {qdrant}", 1),
    ("migrate run {model} {qdrant}", 2),
    ("migrate status", 0),
    ("migrate status docs {qdrant}", 1),
    ("migrate status docs", 2),
    ("migrate cutover docs {qdrant}", 1),
    ("migrate cutover {qdrant}", 2),
    ("migrate rollback docs {qdrant}", 1),
    ("migrate rollback {qdrant}", 2),
    ("migrate finalize docs --yes --yes {qdrant}", 1),
    ("migrate finalize docs {qdrant}", 2),
]
WITHOUT_CONFIGURATION = [["config", name] for name in ("convert", "init", "schema")]
ELSEWHERE = {"demo", "reload", "run", "warm"}
"""Whose tests say with which code it ends."""


def _put(folder):
    key = keyring(SPACE, Namespace("")).key("a")
    record = encode(Entry(bytes(8), 1, True, key.digest))  # noqa: FBT003
    with connection.opened(folder, GIB, create=True) as file:
        list(
            archive.import_rows(
                file, [Row(key.address, record, time.time(), keyring(SPACE).partition)]
            )
        )
        return file.path


@pytest.fixture
def folder(tmp_path, monkeypatch, command):
    """Give a folder with stores, files and configurations, in which commands run."""
    monkeypatch.chdir(tmp_path)
    for name in ("good", "empty", "damaged"):
        content = {"cache": {"directory": str(tmp_path / name)}, "providers": {"openrouter": None}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    content = {"cache": {"directory": str(tmp_path / "good")}}
    index = {"index": {"qdrant": {"url": QDRANT[1]}}}
    (tmp_path / "index.yaml").write_text(json.dumps(content | index))
    _put(tmp_path / "good")
    with closing(sqlite3.connect(_put(tmp_path / "damaged"), isolation_level=None)) as file:
        file.execute("UPDATE Cache SET value = x'00'")
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "wrong_keys.yaml").write_text("keys: 5")
    (tmp_path / "bad_keys.yaml").write_text("server: {keys_file: wrong_keys.yaml}")
    (tmp_path / "no_folder.yaml").write_text("cache: {directory: there}")
    assert command("keys", "add", "there", "--config", "good.yaml").code == 0
    (tmp_path / "pairs.jsonl").write_text('{"text": "a", "embedding": [1, 0]}\n')
    (tmp_path / "old.yaml").write_text("llm: {embedding_model: text-embedding-3-small}\n")
    export = ("cache", "export", "whole.emba", "--config", "good.yaml")
    assert command(*export).code == 0
    (tmp_path / "cut.emba").write_bytes((tmp_path / "whole.emba").read_bytes()[:-3])
    return tmp_path


@pytest.mark.parametrize(("words", "code"), ENDS, ids=[words for words, _ in ENDS])
def test_every_command_ends_with_the_code_of_the_page(words, code, folder, command, monkeypatch):
    """Done, failed or wrong usage; wrong usage is told on stderr, and nothing on stdout."""
    monkeypatch.setenv("MISTRAL_API_KEY", "k")
    # It would go on in a second process.
    monkeypatch.setattr("embedding_proxy.proxy.cli.migrate.run_detached", lambda: None)
    # A Qdrant that is not there would be waited for.
    monkeypatch.setattr("embedding_proxy.index.collection_reader.MAX_TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = words.format(
            port=taken.getsockname()[1], qdrant=" ".join(QDRANT), model=" ".join(MODEL)
        ).split()
        has_option = said[0] != "--version" and said[:2] not in WITHOUT_CONFIGURATION
        if "--config" not in said and has_option:
            said += ["--config", "good.yaml"]
        done = command(*said)
    assert done.code == code, done.err
    assert bool(done.out or done.err)
    if code == 2:
        assert (done.out, done.err != "") == ("", True)
    assert f"\n| {code} |" in PAGE


def test_all_commands_are_tried():
    """Each command of the command line stands in the table above, or is named beside it."""
    root = typer.main.get_command(main.app)
    names = set()
    for name in root.list_commands(None):
        root.load(name)
        command = root.commands[name]
        below = command.list_commands(None) if hasattr(command, "list_commands") else [""]
        names |= {f"{name} {one}".strip() for one in below}
    tried = {name for words, _ in ENDS for name in names if f"{words} ".startswith(f"{name} ")}
    assert names == tried | ELSEWHERE


def test_the_page_tells_of_no_other_code():
    """The table has the codes that the command line says it has, and no more."""
    codes = re.findall(r"^\| (\d+) \|", PAGE.partition("## Exit codes\n")[2], re.MULTILINE)
    assert codes == ["0", "1", "2", "130"]
    assert [code for code in codes if code not in main.__doc__] == []
