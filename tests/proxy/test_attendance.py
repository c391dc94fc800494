"""How long a call is stayed with: as long as something moves, and somebody waits for it."""

import asyncio

import pytest
from embedding_proxy.proxy.http.app_runner import CONNECTION
from embedding_proxy.proxy.http.connection import Connection
from embedding_proxy.proxy.http.idle_timeout import ClientGone, IdleTimeout, IdleTooLong


@pytest.fixture
def connection():
    """Give a connection to nowhere."""
    made = Connection.__new__(Connection)
    made.has_left, made.on_leave = False, None
    return made


def _of(connection, idle_s=60.0) -> IdleTimeout:
    return IdleTimeout({CONNECTION: connection}, idle_s)


async def test_who_left_before_it_began_is_not_waited_for(connection):
    """A client may be gone by the time its call is taken up."""
    connection.has_left = True
    with pytest.raises(ClientGone):
        async with asyncio.timeout(60), _of(connection):
            await asyncio.Event().wait()


async def test_who_leaves_ends_it(connection):
    """The connection's word is enough, even if it comes twice; afterwards it is not listened to."""
    attendance = _of(connection)

    async def wait() -> None:
        connection.on_leave()
        connection.on_leave()
        attendance.note_progress()
        await asyncio.Event().wait()

    with pytest.raises(ClientGone):
        async with asyncio.timeout(60), attendance:
            await wait()
    assert connection.on_leave is None
    attendance.note_progress()


async def test_what_moves_puts_the_end_off(connection):
    """The time without movement is counted from the last one."""
    now = asyncio.get_running_loop().time()
    async with _of(connection) as attendance:
        assert attendance._scope.when() == pytest.approx(now + 60, abs=5)
        attendance._idle_s = 1000.0
        attendance.note_progress()
        assert attendance._scope.when() == pytest.approx(now + 1000, abs=5)


async def test_nothing_that_moves_ends_it(connection):
    """Without movement it is over after the time that was given."""
    with pytest.raises(IdleTooLong, match=r"nothing moved for 0\.01 s"):
        async with _of(connection, 0.01):
            await asyncio.Event().wait()


async def test_what_fails_inside_stays_what_it_is(connection):
    """Only its own end is told as such."""
    with pytest.raises(TimeoutError) as caught:
        async with _of(connection):
            raise TimeoutError("another")
    assert type(caught.value) is TimeoutError
