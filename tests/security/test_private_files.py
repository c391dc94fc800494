"""The cache directory is its owner's alone: what is made in it, and what was there before."""

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from embedding_proxy.cache import private_files
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.maintenance import backup
from embedding_proxy.index.migration.snapshot import Snapshot
from embedding_proxy.index.migration.state import MigrationState
from qdrant_server import QdrantServer

MODEL = "text-embedding-3-small"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    """Set the umask that most systems have."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def _open_to_others(directory: Path) -> list[str]:
    """Return what others could enter, read or change."""
    paths = [directory, *directory.rglob("*")]
    return [
        f"{path.relative_to(directory)} {stat.S_IMODE(path.lstat().st_mode):o}"
        for path in paths
        if not path.is_symlink() and path.lstat().st_mode & 0o077
    ]


async def _use(start_proxy, upstream, **sections) -> None:
    proxy = await start_proxy(openai=upstream, **sections)
    response = await proxy.post(
        {"model": MODEL, "input": ["a", "b"]}, Authorization="Bearer sk-client"
    )
    assert response.status == 200


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("kind", ["plain", "indexed", "with clients' keys", "Qdrant in a folder"])
async def test_everything_in_the_directory_is_private(kind, umask, start_proxy, upstream, tmp_path):
    """Databases, their logs, the outbox, proofs of keys and locks: while open, and after."""
    os.umask(umask)
    async with QdrantServer() as qdrant:
        sections = {}
        if kind == "indexed":
            sections["index"] = {"qdrant": {"url": qdrant.url}}
        if kind == "Qdrant in a folder":
            sections["index"] = {"qdrant": {"path": str(tmp_path / "above" / "qdrant")}}
        if kind == "with clients' keys":
            sections["providers"] = {"openai": {"base_url": upstream.url, "auth": "client"}}
        await _use(start_proxy, upstream, **sections)
        files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        assert len(files) > 3
        assert _open_to_others(tmp_path / "cache") == []
        for folder in (tmp_path / "above", tmp_path / "above" / "qdrant"):
            assert not folder.exists() or folder.stat().st_mode & 0o077 == 0
        assert (tmp_path / "above").exists() == (kind == "Qdrant in a folder")
        await start_proxy.stop()
        assert _open_to_others(tmp_path / "cache") == []


async def test_what_was_there_before_is_mended(start_proxy, upstream, tmp_path, caplog):
    """Files of an earlier version are closed to others, with one line in the log.

    The directory and what else is in it may be the user's own: they stay as they are.
    """
    caplog.set_level(logging.INFO, "embedding_proxy.store")
    directory = tmp_path / "cache"
    await _use(start_proxy, upstream)
    await start_proxy.stop()
    aside = directory / "v1.damaged-20260101T000000-0"
    aside.mkdir()
    (aside / "cache.db").touch()
    (directory / "index-outbox.db").touch()
    foreign = directory / "notes.txt"
    foreign.touch()
    outside = tmp_path / "outside"
    outside.touch()
    (directory / "v1" / "link").symlink_to(outside)
    for path in directory.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    directory.chmod(0o755)
    assert len(_open_to_others(directory)) > 5
    caplog.clear()
    await _use(start_proxy, upstream)
    assert _open_to_others(directory) == [". 755", "notes.txt 644"]
    assert outside.stat().st_mode & 0o044
    lines = [one.getMessage() for one in caplog.records if "other users" in one.getMessage()]
    assert len(lines) == 1
    assert str(directory) in lines[0]
    await start_proxy.stop()
    caplog.clear()
    await _use(start_proxy, upstream)
    assert "other users" not in caplog.text


@pytest.mark.parametrize("why", ["not its owner", "a common folder", "a folder of the group"])
def test_what_cannot_be_mended_is_a_warning(why, tmp_path, monkeypatch, caplog):
    """Files of somebody else, or a folder in which others may write, are left and told."""
    modes = {"not its owner": 0o755, "a common folder": 0o1777, "a folder of the group": 0o770}
    tmp_path.chmod(modes[why])
    before = tmp_path.stat().st_mode

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if why == "not its owner":
        (tmp_path / "v1").mkdir(mode=0o755)
        monkeypatch.setattr(Path, "chmod", refuse)
    private_files.secure(tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(tmp_path) in record.getMessage()
    assert "chmod 700" in record.getMessage()
    assert tmp_path.stat().st_mode == before


async def test_a_folder_of_the_user_keeps_its_mode(start_proxy, upstream, tmp_path, caplog):
    """`cache: {directory: .}` beside other files: nothing of theirs changes, or is warned of."""
    caplog.set_level(logging.INFO, "embedding_proxy.store")
    directory = tmp_path / "cache"
    (directory / "mine").mkdir(parents=True)
    (directory / "notes.txt").touch()
    await _use(start_proxy, upstream)
    await start_proxy.stop()
    assert sorted(_open_to_others(directory)) == [". 755", "mine 755", "notes.txt 644"]
    assert "other users" not in caplog.text


def test_folders_above_are_private_too(tmp_path):
    """Those that had to be made; one that was there stays as it is."""
    os.umask(0)
    tmp_path.chmod(0o755)
    folder = tmp_path / "share" / "embedding-proxy" / "v1"
    private_files.make_folder(folder)
    private_files.make_folder(folder)
    assert _open_to_others(tmp_path / "share") == []
    assert tmp_path.stat().st_mode & 0o077 == 0o055


async def test_files_of_migrations_and_copies_are_private(start_proxy, upstream, tmp_path):
    """State, dead letters and vectors that are copied hold what the cache holds."""
    folder = tmp_path / "migrations"
    journal = MigrationState(folder, "http://localhost:6333", "docs")
    journal.append_dead_letters([{"id": 1}])
    Snapshot(journal.snapshot).reset()
    assert len(list(folder.iterdir())) >= 2
    await _use(start_proxy, upstream)
    await start_proxy.stop()
    target = tmp_path / "copy.db"
    with opened(tmp_path / "cache", 1 << 30) as database:
        backup.copy(database, target, lambda *_: None)
    assert _open_to_others(folder) == []
    assert target.stat().st_mode & 0o077 == 0
