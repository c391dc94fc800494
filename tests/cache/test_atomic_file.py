"""Files that are written as a whole: by many at a time, over others or not, and failing."""

import errno
import os
import stat
import threading

import pytest

from cache import atomic_file

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
