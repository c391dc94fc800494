"""Where a store lies: found out without making one, and whether it can be used there."""

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from disk_faults import CannotMount, read_only
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.maintenance import location

GIB = 1 << 30
MOUNTS = """\
/dev/sda1 / ext4 rw,relatime 0 0
systemd-1 /srv/share autofs rw 0 0
host:/export /srv/share nfs4 rw,vers=4.2 0 0
//host/c /srv/with\\040blank cifs rw 0 0
tmpfs /srv/share/fast tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/a", "ext4"),
        ("/srv/share", "nfs4"),
        ("/srv/share/cache/v1", "nfs4"),
        ("/srv/shared", "ext4"),
        ("/srv/share/fast/v1", "tmpfs"),
        ("/srv/with blank/v1", "cifs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(path, kind):
    """The longest mount point above a path counts, and of two at one point the later."""
    assert location.file_system_of(Path(path), MOUNTS) == kind


def test_where_the_kernel_tells_nothing_nothing_is_known(tmp_path, monkeypatch):
    """Without the list of mounts the place is looked at all the same."""
    monkeypatch.setattr(location, "_MOUNTS", tmp_path / "none")
    found = location.look(tmp_path)
    assert (found.file_system, found.is_remote) == (None, False)
    assert found.free_bytes > 0


def test_a_link_leads_to_another_file_system(tmp_path, monkeypatch):
    """What counts is where the folder really is."""
    mounts = tmp_path / "mounts"
    (tmp_path / "share").mkdir()
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path}/share nfs rw 0 0\n")
    monkeypatch.setattr(location, "_MOUNTS", mounts)
    (tmp_path / "link").symlink_to(tmp_path / "share")
    assert location.look(tmp_path / "link").is_remote
    assert not location.look(tmp_path).is_remote


def test_where_a_store_can_be_made_none_is_made(tmp_path):
    """A folder that is not there yet is no problem, and is not there afterwards."""
    found = location.inspect(tmp_path / "a" / "b", GIB)
    assert (found.problem, found.exists, found.held) == ("", False, None)
    assert found.location.nearest == tmp_path
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["", "v1", "above"])
def test_a_file_in_the_way_is_a_problem(where, tmp_path):
    """Where a file or a link to nowhere stands, no folder can be made."""
    directory = tmp_path / "above" / "cache" if where == "above" else tmp_path / "cache"
    in_the_way = tmp_path / "above" if where == "above" else directory / where
    in_the_way.parent.mkdir(exist_ok=True)
    in_the_way.write_text("")
    assert location.inspect(directory, GIB).problem.startswith(f"{in_the_way} is no folder")
    in_the_way.unlink()
    in_the_way.symlink_to(tmp_path / "nowhere")
    assert location.inspect(directory, GIB).problem.startswith(f"{in_the_way} is no folder")


@pytest.mark.parametrize("there", [True, False])
def test_a_place_that_takes_no_writes(there, tmp_path):
    """A store there is only read, and none can be made; it is said what that means."""
    if there:
        with connection.opened(tmp_path, GIB, create=True):
            pass
    try:
        with read_only(tmp_path):
            found = location.inspect(tmp_path, GIB)
    except CannotMount as error:
        pytest.skip(str(error))
    assert (found.exists, found.held is not None) == (there, there)
    assert str(tmp_path) in found.problem
    says = "nothing is kept" if there else "takes no writes, and the store would be made there"
    assert says in found.problem


@pytest.mark.parametrize("there", [True, False])
def test_free_space_is_compared_with_the_limit(there, tmp_path, monkeypatch):
    """A disk smaller than the limit is told, and is a problem once nothing would be written."""
    if there:
        with connection.opened(tmp_path, GIB, create=True):
            pass
    disk_of = SimpleNamespace(free=100_000_000)
    monkeypatch.setattr(location.shutil, "disk_usage", lambda _: disk_of)
    found = location.inspect(tmp_path, GIB)
    kept = found.held.file_bytes if there else 0
    assert (found.lacking_bytes, found.problem) == (GIB - kept - 100_000_000, "")
    assert location.inspect(tmp_path, 90_000_000).lacking_bytes == 0
    disk_of.free = 67_000_000
    assert "67 MB are free" in location.inspect(tmp_path, GIB).problem


def test_a_store_is_looked_at_as_it_is(tmp_path):
    """Its entries are counted; one that is damaged is left where it is, with the remedy."""
    with connection.opened(tmp_path, GIB, create=True) as file:
        path = file.path
    found = location.inspect(tmp_path, GIB)
    assert (found.exists, found.held.entries, found.problem) == (True, 0, "")
    path.write_bytes(damaged := b"no database" * 10_000)
    found = location.inspect(tmp_path, GIB)
    assert (found.exists, found.held) == (True, None)
    assert "cache verify --mend" in found.problem
    assert path.read_bytes() == damaged


def test_a_store_that_is_locked_is_a_problem_of_the_moment(tmp_path, monkeypatch):
    """Who keeps the lock is waited for with a limit, and then told of."""
    with connection.opened(tmp_path, GIB, create=True):
        pass
    monkeypatch.setattr("embedding_proxy.cache.disk.database.BUSY_SECONDS", 0.0)
    with closing(connection.lock_of(tmp_path)) as lock, lock:
        found = location.inspect(tmp_path, GIB)
    assert "another process keeps writing" in found.problem
    assert found.held.entries == 0


@pytest.mark.parametrize("name", ["writer.lock", "v1/cache.db", "v1/cache.db-wal"])
def test_what_is_in_the_place_of_a_file_is_a_problem(name, tmp_path):
    """A directory there is named, with the remedy: no store can be opened or made."""
    (tmp_path / name).mkdir(parents=True)
    found = location.inspect(tmp_path, GIB)
    assert found.problem.endswith(
        f"{tmp_path / name} is a directory, and the store needs a file there: move it away"
    )
