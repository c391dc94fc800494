"""The time limit and the breaker of one server, with a made-up time and a made-up connection."""

import asyncio

import virtual_loop
from embedding_proxy.cache.shared import node as nodes
from embedding_proxy.cache.shared.node import Node, Refused
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

LIMIT_S = 0.005


class Connection:
    """Answers each command with its last word after `delay` seconds."""

    def __init__(self, server):
        self.server = server
        self.waiting = []
        self.is_open = True

    def pack_commands(self, commands):
        return [b"".join(words) for words in commands]

    async def send_packed_command(self, packed, *, check_health):
        self.waiting += packed

    async def send_command(self, *words, check_health):
        self.waiting.append(words[-1].encode())

    async def read_response(self, *, disable_decoding, timeout):  # noqa: ASYNC109
        delay = self.server.delay
        if delay:
            await asyncio.sleep(delay)
        if self.server.failure is not None:
            raise self.server.failure
        assert self.is_open
        return self.waiting.pop(0)

    async def can_read(self):
        return bool(self.waiting)

    async def disconnect(self, *, nowait):
        self.is_open = False


class Server:
    """Makes connections, and says how they answer."""

    def __init__(self):
        self.delay = 0.0
        self.failure = None
        self.refuses = False
        self.connections = []

    async def connect(self):
        if self.refuses:
            raise RedisConnectionError("refused")
        self.connections.append(Connection(self))
        return self.connections[-1]

    @property
    def open(self):
        return sum(connection.is_open for connection in self.connections)


def node_of(server, **options):
    loop = asyncio.get_running_loop()
    given = {"limit_s": LIMIT_S, "max_connections": 4, **options}
    return Node("n", server.connect, clock=loop.time, **given)


def timed(test):
    """Run a test on a loop whose time is made up."""

    def run():
        virtual_loop.run(test())

    run.__doc__ = test.__doc__
    return run


async def ask(node, *words):
    return await node.exchange([[(word,) for word in words]])


@timed
async def test_an_exchange_is_given_up_after_the_limit_and_its_connection_is_closed():
    """The late reply meets nobody; the next exchange has another connection."""
    server = Server()
    node = node_of(server)
    server.delay = 1.0
    began = asyncio.get_running_loop().time()
    assert await ask(node, b"a") is None
    assert 0 < asyncio.get_running_loop().time() - began < 2 * LIMIT_S
    assert server.open == 0
    server.delay = 0.0
    assert await ask(node, b"b") == [b"b"]
    assert server.open == 1


@timed
async def test_each_reply_has_the_limit_of_its_own():
    """What takes long because it is much is not given up, as long as something comes."""
    server = Server()
    node = node_of(server)
    server.delay = LIMIT_S / 20
    words = [b"%d" % n for n in range(100)]
    assert await ask(node, *words) == words


@timed
async def test_the_breaker_opens_after_failures_in_a_row_and_a_probe_closes_it():
    """Open, nothing is asked or waited for; probes come ever less often, until one is answered."""
    server = Server()
    node = node_of(server)
    loop = asyncio.get_running_loop()
    assert await ask(node, b"a") == [b"a"]
    server.delay = 0.2
    for _ in range(nodes.MAX_FAILURES):
        assert node.is_available
        assert await ask(node, b"a") is None
    assert not node.is_available
    began = loop.time()
    assert await ask(node, b"a") is None
    assert loop.time() == began
    assert node.counters.refused == 1
    await asyncio.sleep(60)
    probes = len(server.connections)
    await asyncio.sleep(60)
    assert 11 <= len(server.connections) - probes <= 12
    server.delay = 0.0
    await asyncio.sleep(2 * nodes.MAX_OPEN_S)
    assert node.is_available
    assert await ask(node, b"a") == [b"a"]
    assert node.counters.times_opened == 1


@timed
async def test_one_success_forgives_the_failures_before_it():
    """Only failures in a row open the breaker."""
    server = Server()
    node = node_of(server)
    for _ in range(3):
        for _ in range(nodes.MAX_FAILURES - 1):
            server.failure = RedisConnectionError("gone")
            assert await ask(node, b"a") is None
        server.failure = None
        assert await ask(node, b"a") == [b"a"]
    assert node.is_available


@timed
async def test_a_refused_command_is_an_answer():
    """It fails no exchange, and says its reason with the code that the library takes away."""
    server = Server()
    node = node_of(server)
    server.failure = OutOfMemoryError("command not allowed", status_code="OOM")
    assert await ask(node, b"a") == [Refused("OOM command not allowed")]
    assert (node.counters.failures, server.open) == (0, 1)


@timed
async def test_a_cancelled_exchange_closes_its_connection_and_is_no_failure():
    """Who leaves says nothing of the server."""
    server = Server()
    node = node_of(server)
    server.delay = LIMIT_S / 2
    for _ in range(nodes.MAX_FAILURES + 1):
        task = asyncio.create_task(ask(node, b"a"))
        await asyncio.sleep(LIMIT_S / 4)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert server.open == 0
    assert node.is_available
    assert node.counters.failures == 0


@timed
async def test_no_more_connections_are_made_than_may_be():
    """Others wait for one, and have it in turn; a wait for one's own kind opens no breaker."""
    server = Server()
    node = node_of(server, max_connections=2)
    assert await node.open()
    server.delay = LIMIT_S / 2
    replies = await asyncio.gather(*(ask(node, b"%d" % n) for n in range(8)))
    assert replies == [[b"%d" % n] for n in range(8)]
    assert len(server.connections) == 2
    await asyncio.gather(*(ask(node, b"a") for _ in range(100)))
    assert node.is_available


@timed
async def test_a_server_that_refuses_connections_costs_no_time():
    """Who waits for a connection is told at once that there is none."""
    server = Server()
    server.refuses = True
    node = node_of(server)
    began = asyncio.get_running_loop().time()
    for _ in range(nodes.MAX_FAILURES):
        assert await ask(node, b"a") is None
    assert not node.is_available
    assert asyncio.get_running_loop().time() == began
    await node.aclose()


@timed
async def test_a_loop_that_was_busy_itself_gives_nothing_up():
    """What came while others had the loop is read before it is called late."""
    server = Server()
    node = node_of(server)
    loop = asyncio.get_running_loop()
    server.delay = 0.8 * LIMIT_S

    def work():
        loop._clock.now += 10 * LIMIT_S

    loop.call_later(LIMIT_S / 2, work)
    assert await ask(node, b"a") == [b"a"]
    assert node.counters.timeouts == 0


@timed
async def test_lots_overlap_once_the_first_is_answered():
    """A slow server is given one small lot; a quick one has the next while this one is read."""
    server = Server()
    node = node_of(server)
    lots = [[(b"%d%d" % (lot, n),) for n in range(3)] for lot in range(4)]
    assert await node.exchange(lots) == [words[0] for lot in lots for words in lot]
    server.delay = 1.0
    assert await node.exchange(lots) is None
    assert server.connections[0].waiting == [b"00", b"01", b"02"]
