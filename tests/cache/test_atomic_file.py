"""Files that are written as a whole: by many at a time, over others or not, and failing."""

import errno
import os
import stat
import threading

import pytest
from embedding_proxy.cache import atomic_file

LENGTH = 1 << 16


def test_many_writers_leave_one_whole_file(tmp_path):
    """Writers of one file at the same time do not meet in one temporary file."""
    path = tmp_path / "file.json"
    writers = 8
    barrier = threading.Barrier(writers)
    failures = []

    def write(content):
        try:
            with atomic_file.opened(path) as file:
                file.write(content[: LENGTH // 2])
                barrier.wait()
                file.write(content[LENGTH // 2 :])
        except OSError as error:
            failures.append(error)

    threads = [
        threading.Thread(target=write, args=(bytes([i]) * LENGTH,)) for i in range(1, writers + 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    content = path.read_bytes()
    assert len(content) == LENGTH
    assert len(set(content)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    """An error on the way, whatever it is, costs neither the old content nor room on disk."""
    path = tmp_path / "file"
    atomic_file.write(path, b"old")

    def interrupted():
        with atomic_file.opened(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(FileExistsError):
        atomic_file.write(path, b"new", exclusive=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        atomic_file.write(tmp_path / "no folder" / "file", b"new")


def test_it_is_replaced_and_for_the_owner_only(tmp_path):
    """The new content takes the place of the old one, with the permissions that are asked for."""
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        atomic_file.write(path, content)
        assert path.read_bytes() == content
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut after the rename finds the content: it is flushed before."""
    path, synced = tmp_path / "file", []
    fsync = os.fsync

    def note(handle):
        synced.append(path.exists())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    atomic_file.write(path, b"content")
    assert synced[0] is False


def test_a_file_system_without_links(tmp_path, monkeypatch):
    """Where no link can be made, a file that is there stays all the same."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    atomic_file.write(path, b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        atomic_file.write(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_costs_nothing_of_what_was_there(tmp_path, monkeypatch):
    """Whether the content or the flush of it finds no room, the old file stays, alone."""
    path = tmp_path / "file"
    atomic_file.write(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_half():
        with atomic_file.opened(path) as file:
            file.write(b"half")
            full(None)

    with pytest.raises(OSError, match="No space left"):
        write_half()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_file.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def synced(monkeypatch):
    """Give a list of what is flushed to disk: each file or folder, by its inode."""
    inodes, fsync = [], os.fsync

    def note(handle):
        inodes.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    return inodes


def test_a_new_name_outlives_a_power_cut(tmp_path, synced):
    """After the content of a file its folder is flushed; after a move both of the folders are."""
    path, folder = tmp_path / "file", tmp_path / "folder"
    folder.mkdir()
    atomic_file.write(path, b"content")
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
    synced.clear()
    atomic_file.move(path, folder / "moved")
    assert set(synced) == {tmp_path.stat().st_ino, folder.stat().st_ino}
    assert (folder / "moved").read_bytes() == b"content"


def test_what_is_added_is_on_disk_and_private(tmp_path, synced):
    """The content of a file that grows is flushed each time, its folder when it is made."""
    path = tmp_path / "file"
    atomic_file.append(path, b"a")
    atomic_file.append(path, b"b")
    inode = path.stat().st_ino
    assert synced == [inode, tmp_path.stat().st_ino, inode]
    assert path.read_bytes() == b"ab"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_whole_file_of_anothers_making(tmp_path, synced):
    """It is flushed before it gets its name, and takes no other's place unless it may."""
    part, path = tmp_path / "part", tmp_path / "file"
    part.write_bytes(b"new")
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        atomic_file.publish(part, path, exclusive=True)
    assert (part.read_bytes(), path.read_bytes()) == (b"new", b"old")
    synced.clear()
    atomic_file.publish(part, path)
    assert path.read_bytes() == b"new"
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
