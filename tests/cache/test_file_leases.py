"""Leases between processes of one machine: one holder each, freed with its process."""

import asyncio
import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys

import pytest
from clock import run_virtual as run
from embedding_proxy.cache.disk import file_leases
from embedding_proxy.cache.disk.file_leases import CHECK_S, LOT, FileLeases
from embedding_proxy.cache.leases import FRESH_S, GRACE_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="such locks are Linux's own")

ADDRESSES = [bytes([number]) * 16 for number in range(1, 9)]
ONE = ADDRESSES[:1]


def test_a_lease_has_one_holder(tmp_path):
    """Of two processes one gets it; the other one does, once it is given back."""

    async def work():
        one, other = FileLeases(tmp_path), FileLeases(tmp_path)
        assert [*await one.acquire(ADDRESSES[:3])] == ADDRESSES[:3]
        assert [*await other.acquire(ADDRESSES[2:5])] == ADDRESSES[3:5]
        one.release(ADDRESSES[:3], is_written=False)
        assert [*await other.acquire(ADDRESSES[:3])] == ADDRESSES[:3]
        assert not [*await one.acquire(ADDRESSES[:5])]
        other.close()
        assert [*await one.acquire(ADDRESSES[:5])] == ADDRESSES[:5]
        one.close()

    run(work())


def test_addresses_share_no_lease(tmp_path):
    """Every bit of the first 62, and the number of the file, tells two addresses apart."""

    async def work():
        one, other = FileLeases(tmp_path), FileLeases(tmp_path)
        numbers = [0, 1 << 66, 1 << 127, 1 << 100, 1 << 56, 1 << 61]
        addresses = [number.to_bytes(16) for number in numbers]
        assert [*await one.acquire(addresses[:1])] == addresses[:1]
        assert [*await other.acquire(addresses)] == addresses[1:]
        one.close()
        other.close()

    run(work())


def test_after_a_write_it_is_kept_for_longer_than_a_look_up_is_trusted(tmp_path):
    """So whoever has looked before the record was written gets no lease in time to trust that."""

    async def work():
        loop = asyncio.get_running_loop()
        one, other = FileLeases(tmp_path), FileLeases(tmp_path)
        await one.acquire(ADDRESSES)
        written = loop.time()
        one.release(ADDRESSES[:4], is_written=True)
        await asyncio.sleep(GRACE_S / 2)
        one.release(ADDRESSES[4:], is_written=True)
        while not [*await other.acquire(ONE)]:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
        assert loop.time() - written > 2 * FRESH_S
        assert not [*await other.acquire(ADDRESSES[4:])]
        await asyncio.sleep(GRACE_S)
        assert [*await other.acquire(ADDRESSES[4:])] == ADDRESSES[4:]
        one.close()
        other.close()

    run(work())


def test_what_is_granted_twice_is_given_back_twice(tmp_path):
    """Inside a process it is granted again; others get it when nobody here holds it any more."""

    async def work():
        one, other = FileLeases(tmp_path), FileLeases(tmp_path)
        for _ in range(2):
            assert [*await one.acquire(ONE)] == ONE
        one.release(ONE, is_written=False)
        assert not [*await other.acquire(ONE)]
        one.release(ONE, is_written=False)
        assert [*await other.acquire(ONE)] == ONE
        one.release(ONE, is_written=False)
        assert not [*await one.acquire(ONE)], "what it does not hold it cannot give back"
        one.close()
        other.close()

    run(work())


def test_a_cancelled_attempt_holds_nothing(tmp_path):
    """Of many leases that are taken in lots, those of the lots before are given back."""

    async def work():
        one, other = FileLeases(tmp_path), FileLeases(tmp_path)
        many = [number.to_bytes(16) for number in range(3 * LOT)]
        many = [address[8:] + address[:8] for address in many]
        attempt = asyncio.create_task(one.acquire(many))
        await asyncio.sleep(0)
        attempt.cancel()
        await asyncio.wait([attempt])
        assert attempt.cancelled()
        assert len(await other.acquire(many)) == len(many)
        one.close()
        other.close()

    run(work())


HOLDER = """
import asyncio, sys
from pathlib import Path
from embedding_proxy.cache.disk.file_leases import FileLeases

async def work():
    leases = FileLeases(Path(sys.argv[1]))
    print(len(await leases.acquire([bytes.fromhex(word) for word in sys.argv[2:]])), flush=True)
    sys.stdin.read()

asyncio.run(work())
"""


def test_a_process_that_is_killed_holds_nothing(tmp_path):
    """Nobody has to wait for what a dead process had leased."""
    words = [address.hex() for address in ADDRESSES]
    command = [sys.executable, "-c", HOLDER, str(tmp_path), *words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == f"{len(words)}\n"
        assert not [*asyncio.run(FileLeases(tmp_path).acquire(ADDRESSES))]
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert len(asyncio.run(FileLeases(tmp_path).acquire(ADDRESSES))) == len(words)


def test_a_folder_made_anew_is_noticed(tmp_path):
    """After it was deleted, or moved aside, both lock the files of the new one."""

    async def work():
        one, other = FileLeases(tmp_path / "v1"), FileLeases(tmp_path / "v1")
        await one.acquire(ONE)
        (tmp_path / "v1").rename(tmp_path / "aside")
        await asyncio.sleep(CHECK_S)
        assert [*await other.acquire(ADDRESSES)] == ADDRESSES
        one.release(ONE, is_written=False)
        assert not [*await one.acquire(ADDRESSES)]
        one.close()
        other.close()

    run(work())


def _fail(number):
    def set_lock(*_):
        raise OSError(number, os.strerror(number))

    return set_lock


@pytest.mark.parametrize("fault", ["no locks", "not a folder", "another system"])
def test_where_no_lock_can_be_had_all_are_granted(tmp_path, fault, monkeypatch, caplog):
    """Then it is as without leases, and the log says so once."""
    if fault == "no locks":
        monkeypatch.setattr(fcntl, "fcntl", _fail(errno.ENOLCK))
    elif fault == "not a folder":
        (tmp_path / file_leases.FOLDER_NAME).write_text("a file")
    else:
        monkeypatch.setattr(sys, "platform", "darwin")

    async def work():
        one, other = FileLeases(tmp_path), FileLeases(tmp_path)
        for _ in range(2):
            for leases in (one, other):
                assert [*await leases.acquire(ADDRESSES)] == ADDRESSES
                leases.release(ONE, is_written=True)
                leases.release(ADDRESSES[1:], is_written=False)
        one.close()
        other.close()

    with caplog.at_level(logging.WARNING):
        run(work())
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (0 if fault == "another system" else 2)
    assert all("may buy the same text" in warning for warning in warnings)
