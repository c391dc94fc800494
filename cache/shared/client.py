"""The client of Redis, or of anything that speaks its protocol: one server, a cluster, sentinels.

The contract, for all who use it:

- `RedisClient.exchange` takes commands and returns as many replies, in their order. Each is what
  the server sent, or `Refused` (the server said no), or `UNAVAILABLE`: there is no server, it did
  not answer in time, or its circuit breaker is open. Nothing is raised but CancelledError.
- UNAVAILABLE says nothing about whether the command was carried out. A command that has to be
  carried out once needs a token of its own that says so.
- It waits at most `limit_s` for a connection, and as long for a reply (more for what is large), and
  not at all while the breaker is open. Commands of one exchange are written at once, in lots.
- Commands of one exchange that go to different servers of a cluster are carried out in no order.
- An exchange that was cancelled or timed out has closed its connection: its replies meet nobody.
- It does not retry, but where a cluster says that a key has moved.

Keys are made by `key`: all begin with the prefix and the version of the format.
"""

import asyncio
import enum
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, Final, Literal, NamedTuple, Self, TypeAlias

from embedding_proxy.cache.key import FORMAT
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from .address import RedisOptions, Topology
from .node import (
    CONNECT_S,
    MAX_OPEN_S,
    MIN_OPEN_S,
    Node,
    NodeCounters,
    Refused,
    Reply,
    Words,
    describe,
    warn_unavailable,
)

log = logging.getLogger("embedding_proxy.shared")

MAX_LOT_BYTES = 1 << 20
MAX_LOT_WORDS = 768
"""Of commands that are written before their replies are read."""
FIRST_LOT_WORDS = 64
"""The same of the first lot where there are several: a slow server shows before much is asked."""
MGET_KEYS = 32
"""Keys of one MGET."""
MAX_REDIRECTS = 2
REFRESH_S = 0.5
"""The cluster is not asked for its nodes more often."""


class Unavailable(enum.Enum):
    """The type of UNAVAILABLE."""

    UNAVAILABLE = "unavailable"


UNAVAILABLE: Final = Unavailable.UNAVAILABLE
"""In place of a reply: there was none in time. The command may have been carried out."""

Answer: TypeAlias = Reply | Literal[Unavailable.UNAVAILABLE]


class Command(NamedTuple):
    """A command, and the key that decides which server of a cluster it goes to."""

    key: bytes | None
    """None: any server will do."""
    words: Words
    """The command's name and its arguments, the key among them."""


class _Routed(NamedTuple):
    """A command of an exchange."""

    position: int
    is_asking: bool = False
    """Whether the server has to be told that it is asked for a key that is on its way there."""


class RedisClient:
    """Open it with `async with`: that waits at most a second, and does not fail. For one loop."""

    def __init__(self, options: RedisOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self.name = str(options.address)
        """The address, without secrets."""
        self._clock = clock
        self._prefix = f"{options.prefix}:{FORMAT}:".encode()
        self._ssl: ssl.SSLContext | None = None
        self._nodes: dict[str, Node] = {}
        self._slots: list[Node] = []
        """In a cluster: the server of each slot."""
        self._refreshing: asyncio.Task[bool] | None = None
        self._refreshed_at = float("-inf")
        self._is_closed = False
        self._reason = ""
        self._retired = NodeCounters()
        """Counts of servers that the cluster has no more."""

    async def __aenter__(self) -> Self:
        if self._is_cluster:
            if not await self._refresh():
                self._refreshing = asyncio.create_task(self._refresh_until_known())
                self._refreshing.add_done_callback(self._end_refresh)
        else:
            self._nodes[self.name] = self._node(self.name, self._connect)
            await self._nodes[self.name].open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closed = True
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])
        for node in self._nodes.values():
            await node.aclose()

    @property
    def _is_cluster(self) -> bool:
        return self.options.address.topology is Topology.CLUSTER

    @property
    def nodes(self) -> dict[str, Node]:
        """The servers by name: the one, or the masters of the cluster."""
        return self._nodes

    @property
    def is_available(self) -> bool:
        """Whether at least one server is asked: not every breaker is open."""
        return any(node.is_available for node in self._nodes.values())

    @property
    def reason(self) -> str:
        """Why a server is not asked, for people; nothing while all are."""
        reasons = [node.reason for node in self._nodes.values() if not node.is_available]
        return reasons[0] if reasons else "" if self._nodes else self._reason

    @property
    def counters(self) -> NodeCounters:
        """The sums of all servers since the start."""
        total = NodeCounters()
        for counters in (self._retired, *(node.counters for node in self._nodes.values())):
            _add(total, counters)
        return total

    def key(self, kind: str, name: bytes = b"") -> bytes:
        """Return the key of something of a kind: `PREFIX:FORMAT:KIND:NAME`."""
        return b"%b%b:%b" % (self._prefix, kind.encode(), name)

    async def exchange(
        self, commands: Sequence[Command], limit_s: float | None = None
    ) -> list[Answer]:
        """Return the reply to each command; see the module for what that may be.

        `limit_s` is another time limit than the client's, for who can wait: in the background.
        """
        if not self._is_cluster:
            (node,) = self._nodes.values()
            answers = await self.exchange_at(node, [c.words for c in commands], limit_s)
            if self.options.address.topology is Topology.SENTINEL and any(
                isinstance(answer, Refused) and answer.code == "READONLY" for answer in answers
            ):
                # A master that has become a replica: the next connection looks for the new one.
                node.reset()
            return answers
        answers = [UNAVAILABLE] * len(commands)
        if not self._slots:
            self._start_refresh()
            return answers
        routes: dict[Node, list[_Routed]] = {}
        for index, command in enumerate(commands):
            routes.setdefault(self._route(command.key), []).append(_Routed(index))
        for _ in range(1 + MAX_REDIRECTS):
            routes = await self._exchange_by_route(commands, routes, answers, limit_s)
            if not routes:
                break
        return answers

    async def _exchange_by_route(
        self,
        commands: Sequence[Command],
        routes: dict[Node, list["_Routed"]],
        answers: list[Answer],
        limit_s: float | None,
    ) -> dict[Node, list["_Routed"]]:
        """Fill in the answers to the commands at some places; return where to ask again."""
        parts = [
            self._exchange_at_places(node, commands, places, limit_s)
            for node, places in routes.items()
        ]
        together = [await parts[0]] if len(parts) == 1 else await asyncio.gather(*parts)
        again: dict[Node, list[_Routed]] = {}
        for places, found in zip(routes.values(), together, strict=True):
            for place, answer in zip(places, found, strict=True):
                answers[place.position] = answer
                if isinstance(answer, Refused) and (target := self._redirection(answer)):
                    node, is_asking = target
                    again.setdefault(node, []).append(_Routed(place.position, is_asking))
        return again

    async def exchange_at(
        self, node: Node, commands: Sequence[Words], limit_s: float | None = None
    ) -> list[Answer]:
        """Return the replies of one of `nodes`, for what each of them has to be asked, as SCAN."""
        replies = await node.exchange(_lots(commands), limit_s)
        return [UNAVAILABLE] * len(commands) if replies is None else [*replies]

    async def get_many(self, keys: Sequence[bytes], limit_s: float | None = None) -> list[Answer]:
        """Return the value of each key: bytes, or None if it has none, or as of `exchange`."""
        if self._is_cluster:
            return await self.exchange([Command(key, (b"GET", key)) for key in keys], limit_s)
        starts = range(0, len(keys), MGET_KEYS)
        lots = [keys[start : start + MGET_KEYS] for start in starts]
        answers = await self.exchange([Command(None, (b"MGET", *lot)) for lot in lots], limit_s)
        values: list[Answer] = []
        for lot, answer in zip(lots, answers, strict=True):
            values += answer if isinstance(answer, list) else [answer] * len(lot)
        return values

    async def _exchange_at_places(
        self,
        node: Node,
        commands: Sequence[Command],
        places: Sequence["_Routed"],
        limit_s: float | None,
    ) -> list[Answer]:
        words: list[Words] = []
        for place in places:
            if place.is_asking:
                words.append((b"ASKING",))
            words.append(commands[place.position].words)
        answers = await self.exchange_at(node, words, limit_s)
        if len(words) == len(places):
            return answers
        asking = (word == (b"ASKING",) for word in words)
        return [answer for answer, is_asking in zip(answers, asking, strict=True) if not is_asking]

    def _route(self, key: bytes | None) -> Node:
        return self._slots[0 if key is None else key_slot(key)]

    def _redirection(self, refused: Refused) -> tuple[Node, bool] | None:
        """Return the server that has the key, and whether it must be told so; None if not moved."""
        if refused.code in ("MOVED", "CLUSTERDOWN"):
            self._start_refresh()
        if refused.code not in ("MOVED", "ASK"):
            return None
        _, slot, place = refused.message.split(" ")[:3]
        host, _, port = place.rpartition(":")
        if not host:
            return None
        node = self._node_at(host, int(port))
        if refused.code == "MOVED":
            self._slots[int(slot)] = node
        return node, refused.code == "ASK"

    def _node(self, name: str, connect: Callable[[], Awaitable[AbstractConnection]]) -> Node:
        return Node(
            name,
            connect,
            limit_s=self.options.limit_s,
            max_connections=self.options.max_connections,
            on_failure=self._start_refresh if self._is_cluster else lambda: None,
            clock=self._clock,
        )

    def _node_at(self, host: str, port: int) -> Node:
        """Return the server of a cluster at an address."""
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = self._node(name, lambda: self._connect_to(host, port))
        return node

    async def _connect(self) -> AbstractConnection:
        """Return a connection to the one server, or to the master of the moment."""
        address = self.options.address
        if address.topology is Topology.SENTINEL:
            return await self._connect_to_master()
        if address.path:
            return await self._opened(
                UnixDomainSocketConnection(path=address.path, **self._credentials)
            )
        return await self._connect_to(*address.hosts[0])

    async def _connect_to(self, host: str, port: int) -> AbstractConnection:
        return await self._opened(self._connection(host, port, **self._credentials))

    async def _connect_to_master(self) -> AbstractConnection:
        """Return a connection to the master that the first sentinel that knows one names."""
        reason = "no sentinel answers"
        for host, port in self.options.address.hosts:
            try:
                master = await self._ask_sentinel(host, port)
                connection = await self._connect_to(*master)
            except (RedisError, OSError) as error:
                reason = f"sentinel {host}:{port}: {describe(error)}"
                continue
            try:
                await connection.send_command("ROLE", check_health=False)
                role = await connection.read_response(disable_decoding=True)
                if role[0] == b"master":
                    return connection
                reason = f"{master[0]}:{master[1]} is no master, though a sentinel says so"
            except (RedisError, OSError) as error:
                reason = describe(error)
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            await connection.disconnect(nowait=True)
        raise RedisConnectionError(reason)

    async def _ask_sentinel(self, host: str, port: int) -> tuple[str, int]:
        password = self.options.sentinel_password or None
        sentinel = self._connection(host, port, password=password)
        # One that is stopped does not take the time of all the others.
        async with asyncio.timeout(CONNECT_S / len(self.options.address.hosts)):
            await self._opened(sentinel)
            try:
                name = self.options.address.master
                await sentinel.send_command(
                    "SENTINEL", "GET-MASTER-ADDR-BY-NAME", name, check_health=False
                )
                found = await sentinel.read_response(disable_decoding=True)
            finally:
                await sentinel.disconnect(nowait=True)
        if not found:
            raise RedisConnectionError(f"it knows no master {self.options.address.master!r}")
        return found[0].decode(), int(found[1])

    @property
    def _credentials(self) -> dict[str, Any]:
        options, address = self.options, self.options.address
        return {
            "username": options.username or address.username or None,
            "password": options.password or address.password or None,
            "db": address.database,
        }

    def _connection(self, host: str, port: int, **credentials: Any) -> AbstractConnection:  # noqa: ANN401
        if not self.options.address.is_tls:
            return Connection(host=host, port=port, **_COMMON, **credentials)
        connection = SSLConnection(
            host=host, port=port, ssl_ca_certs=self.options.ca_file, **_COMMON, **credentials
        )
        # Each would read all certificates of the system again.
        connection.ssl_context.context = self._ssl
        self._ssl = connection.ssl_context.get()
        return connection

    async def _opened(self, connection: AbstractConnection) -> AbstractConnection:
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    def _start_refresh(self) -> None:
        """Ask the cluster for its servers, unless that was done a moment ago."""
        now = self._clock()
        is_due = now - self._refreshed_at >= REFRESH_S
        if self._refreshing is None and is_due and not self._is_closed:
            self._refreshing = asyncio.create_task(self._refresh())
            self._refreshing.add_done_callback(self._end_refresh)

    def _end_refresh(self, _: asyncio.Task[bool]) -> None:
        self._refreshing = None

    async def _refresh_until_known(self) -> bool:
        warn_unavailable(self.name, self._reason)
        wait_s = MIN_OPEN_S
        while not await self._refresh():
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, MAX_OPEN_S)
        log.info("the shared tier at %s answers", self.name)
        return True

    async def _refresh(self) -> bool:
        """Learn which server has which slots from the first that tells; return whether one did."""
        self._refreshed_at = self._clock()
        known = [node for node in self._nodes.values() if node.is_available]
        hosts = [_host_and_port(node.name) for node in known]
        for host, port in dict.fromkeys([*hosts, *self.options.address.hosts]):
            try:
                async with asyncio.timeout(CONNECT_S):
                    found = await self._ask_for_slots(host, port)
            except (RedisError, OSError) as error:
                self._reason = describe(error)
                continue
            if found:
                await self._take_slots(found, host)
                return True
        return False

    async def _ask_for_slots(self, host: str, port: int) -> list[list[object]]:
        connection = await self._connect_to(host, port)
        try:
            await connection.send_command("CLUSTER", "SLOTS", check_health=False)
            return list(await connection.read_response(disable_decoding=True))
        finally:
            await connection.disconnect(nowait=True)

    async def _take_slots(self, ranges: list[list[object]], asked: str) -> None:
        slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, master, *_ in ranges:
            if not (isinstance(first, int) and isinstance(last, int) and isinstance(master, list)):
                continue
            host = (master[0] or b"").decode() or asked
            node = self._node_at(host, int(master[1]))
            slots[first : last + 1] = [node] * (last + 1 - first)
        present = set(slots) - {None}
        if not present:
            return
        # A slot that nobody has is asked for anywhere: the server says CLUSTERDOWN.
        some = next(node for node in slots if node is not None)
        self._slots = [node or some for node in slots]
        for name, node in list(self._nodes.items()):
            if node not in present:
                del self._nodes[name]
                await node.aclose()
                _add(self._retired, node.counters)


_COMMON: dict[str, Any] = {
    "socket_timeout": None,
    "socket_connect_timeout": CONNECT_S,
    # The older form of the protocol: every server speaks it, and nothing comes unasked.
    "protocol": 2,
    "driver_info": None,
    # As much as the event loop's stream holds at most: each read takes all that has come.
    "socket_read_size": 1 << 17,
}


def _lots(commands: Iterable[Words]) -> list[list[Words]]:
    """Cut commands into lots that are written at once."""
    lots: list[list[Words]] = [[]]
    size = count = 0
    for words in commands:
        length = sum(len(word) for word in words if isinstance(word, bytes | str))
        max_words = MAX_LOT_WORDS if len(lots) > 1 else FIRST_LOT_WORDS
        if lots[-1] and (size + length > MAX_LOT_BYTES or count + len(words) > max_words):
            lots.append([])
            size = count = 0
        lots[-1].append(words)
        size, count = size + length, count + len(words)
    return lots


def _host_and_port(name: str) -> tuple[str, int]:
    host, _, port = name.rpartition(":")
    return host.strip("[]"), int(port)


def _add(total: NodeCounters, counters: NodeCounters) -> None:
    for each in fields(NodeCounters):
        setattr(total, each.name, getattr(total, each.name) + getattr(counters, each.name))
