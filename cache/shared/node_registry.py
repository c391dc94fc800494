"""The nodes that share a Redis: their names, whether they are alive, and the sums of their ledgers.

A node is a cache folder, whichever processes use it: its id is a file in that folder, its name is
for people. One process of a node beats: it says that the node is alive, tells the sums of its
ledger, and learns how many nodes there are. A row keeps the token of the process that wrote it. A
process that finds the token of another one in its own row, or its name in the row of another node
that is alive, knows that two nodes have one id or one name.

The sums are those of the node's own ledger, whole each time. Those of an earlier beat that arrives
late, say after the server was stopped, are refused by their number.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from embedding_proxy.cache import atomic_file
from embedding_proxy.cache.ledger import COLUMNS, Line, Usage

from .client import Command, RedisClient
from .script import Script, Word, ask

ID_FILE_NAME = "node-id"
BEAT_S = 1.0
ALIVE_S = 15.0
"""A node that has not been heard of for so long is taken for dead."""
_CONFLICT_S = 30
_KEPT_DAYS = 90
_READ_S = 1.0

_BEAT = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local id, token, name, is_first = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'
local alive, conflict, fresh = 1, '', tonumber(ARGV[6])
local since, stored = now, redis.call('HGET', KEYS[1], 'n:' .. id)
local rows = redis.call('HGETALL', KEYS[1])
if stored then
  local row = cjson.decode(stored)
  if row.token == token then
    since = row.since
  elseif not is_first and now - row.seen < fresh then
    redis.call('HSET', KEYS[1], 'c:' .. id, string.format('%.0f', now + tonumber(ARGV[7])))
  end
end
for i = 1, #rows, 2 do
  local field, value = rows[i], rows[i + 1]
  if string.sub(field, 1, 2) == 'n:' and field ~= 'n:' .. id then
    local row = cjson.decode(value)
    if not row.stopped and now - row.seen < fresh then
      alive = alive + 1
      if row.name == name and row.seen > since then conflict = 'name' end
    end
    if now - row.seen > tonumber(ARGV[8]) then redis.call('HDEL', KEYS[1], field) end
  end
end
local until_ms = tonumber(redis.call('HGET', KEYS[1], 'c:' .. id) or '0')
if until_ms > now then conflict = 'id' end
local row = {name = name, token = token, seen = now, since = since, info = ARGV[5]}
redis.call('HSET', KEYS[1], 'n:' .. id, cjson.encode(row))
return {alive, conflict, string.format('%.0f', now)}
""")
_LEAVE = Script("""
local stored = redis.call('HGET', KEYS[1], 'n:' .. ARGV[1])
if stored then
  local row = cjson.decode(stored)
  if row.token == ARGV[2] then
    row.stopped = true
    redis.call('HSET', KEYS[1], 'n:' .. ARGV[1], cjson.encode(row))
  end
end
return 1
""")
_TELL = Script("""
local known = redis.call('HMGET', KEYS[1], 'e:' .. ARGV[1], 'i:' .. ARGV[1])
local epoch, number = tonumber(known[1] or '0'), tonumber(known[2] or '0')
local mine = tonumber(ARGV[2])
if mine == 0 then mine = epoch + 1 end
if mine < epoch then return 0 end
if ARGV[4] == '' then
  redis.call('HSET', KEYS[1], 'e:' .. ARGV[1], mine, 'i:' .. ARGV[1], 0)
  return mine
end
if mine == epoch and tonumber(ARGV[3]) <= number then return mine end
redis.call('HSET', KEYS[1], 'e:' .. ARGV[1], mine, 'i:' .. ARGV[1], ARGV[3])
redis.call('HSET', KEYS[1], 's:' .. ARGV[1], ARGV[4])
return mine
""")


class NodeName(NamedTuple):
    """Which node this is."""

    id: str
    """Of its cache folder."""
    name: str


class Beat(NamedTuple):
    """What a node learns when it beats."""

    alive: int
    """Nodes that are alive, this one included."""
    conflict: str
    """"name" or "id" if another node that is alive has the same one; else empty."""
    now: float
    """The server's time, in seconds since 1970."""
    ahead_s: float
    """By how much this machine's clock is ahead of the server's."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node as the server knows it."""

    id: str
    name: str
    seen: float
    """When it was heard of last, in seconds since 1970."""
    is_alive: bool
    is_stopped: bool
    """Whether it said so at its end."""
    ahead_s: float
    """By how much its clock is ahead of the server's."""
    version: str
    sums: tuple[Line, ...] = ()
    """Of its ledger since ever, by COLUMNS."""
    days: tuple[Line, ...] = ()
    """The same by day."""


class Nodes(NamedTuple):
    """All nodes, by name, and the server's time."""

    now: float
    nodes: list[NodeState]

    def ahead_s(self, node: NodeState) -> float:
        """Return how far ahead of the server's time what a node has stored may be dated."""
        return node.ahead_s - (self.now - node.seen if node.is_stopped else 0.0)


def read_node_id(directory: Path) -> str:
    """Return the id of the node that a cache folder is; a folder without one gets it.

    Raises OSError.
    """
    path = directory / ID_FILE_NAME
    for _ in range(2):
        try:
            found = path.read_text(encoding="ascii").strip()
            if found.isalnum():
                return found
            path.unlink()
        except FileNotFoundError:
            pass
        except ValueError:
            path.unlink()
        directory.mkdir(parents=True, exist_ok=True)
        try:
            atomic_file.write(path, f"{secrets.token_hex(8)}\n".encode(), exclusive=True)
        except FileExistsError:
            continue
    return path.read_text(encoding="ascii").strip()


class Registry:
    """The rows of the nodes on a server. Nothing raises; None = it cannot be asked now."""

    def __init__(
        self,
        client: RedisClient,
        node: NodeName,
        version: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives seconds since 1970, as the ledger and the records have them."""
        self._client = client
        self._key = client.key("nodes")
        self._sums_key = client.key("ledger")
        self.node = node
        self._version = version
        self._clock = clock
        self._token = secrets.token_hex(8)
        self._is_first = True
        self._ahead_s = 0.0
        self._epoch = self._number = 0
        self._told: bytes = b""

    async def beat(self) -> Beat | None:
        """Say that this node is alive."""
        info = orjson.dumps({"version": self._version, "ahead_s": round(self._ahead_s, 3)})
        began = self._clock()
        reply = await _BEAT.run(
            self._client,
            [self._key],
            [
                *(self.node.id, self._token, self.node.name, int(self._is_first), info),
                *(int(ALIVE_S * 1000), _CONFLICT_S * 1000, _KEPT_DAYS * 86_400_000),
            ],
        )
        if reply is None:
            return None
        alive, conflict, now_ms = reply
        now = int(now_ms) / 1000
        self._is_first = False
        self._ahead_s = (began + self._clock()) / 2 - now
        return Beat(int(alive), conflict.decode(), now, self._ahead_s)

    async def leave(self) -> None:
        """Say that this node stops: nobody waits for it."""
        await _LEAVE.run(self._client, [self._key], [self.node.id, self._token])

    def forget_told(self) -> None:
        """Let the sums be told again: the server may have others by now."""
        self._told = b""

    async def tell_sums(self, sums: Sequence[Line], days: Sequence[Line]) -> bool:
        """Tell the sums of this node's ledger, if they are others than before; see NodeState."""
        fields = {"sums": list(map(_row, sums)), "days": list(map(_row, days))}
        content = orjson.dumps(fields)
        if content == self._told:
            # Unless the server was emptied, or has evicted it; and what is asked for is in use.
            words = ("HEXISTS", self._sums_key, f"s:{self.node.id}")
            if await ask(self._client, Command(self._sums_key, words)) != 0:
                return True
        if not self._epoch:
            # Without sums: if this arrives late, it changes none.
            self._epoch, self._number = await self._tell(0, b""), 0
        if self._epoch:
            self._number += 1
            # 0: another process tells by now, and this one was slow.
            self._epoch = await self._tell(self._number, content)
        self._told = content if self._epoch else b""
        return bool(self._epoch)

    async def _tell(self, number: int, content: bytes) -> int:
        """Return the epoch in which this was told; 0 if it was not, or that is not known."""
        arguments: list[Word] = [self.node.id, self._epoch, number, content]
        return int(await _TELL.run(self._client, [self._sums_key], arguments, _READ_S) or 0)

    async def read(self, *, has_sums: bool = True) -> Nodes | None:
        """Return what is known of all nodes; the sums of their ledgers only if they are wanted."""
        rows = await ask(self._client, _get_all(self._key), _READ_S)
        sums = await ask(self._client, _get_all(self._sums_key), _READ_S) if has_sums else []
        time_ = await ask(self._client, Command(self._key, ("TIME",)))
        if rows is None or sums is None or time_ is None:
            return None
        now = int(time_[0]) + int(time_[1]) / 1e6
        ledgers = _pairs(sums)
        nodes = []
        for field, content in _pairs(rows).items():
            kind, _, identity = field.decode().partition(":")
            if kind == "n":
                ledger = ledgers.get(f"s:{identity}".encode())
                nodes.append(_state(identity, orjson.loads(content), ledger, now))
        return Nodes(now, sorted(nodes, key=lambda node: (node.name, node.id)))


def _get_all(key: bytes) -> Command:
    return Command(key, ("HGETALL", key))


def _pairs(reply: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(reply[::2], reply[1::2], strict=True))


def _row(line: Line) -> list[Any]:
    names, usage = line
    return [*names, *usage]


def _state(identity: str, row: dict[str, Any], ledger: bytes | None, now: float) -> NodeState:
    info, told = orjson.loads(row["info"]), orjson.loads(ledger or b"{}")
    seen, is_stopped = row["seen"] / 1000, bool(row.get("stopped"))
    return NodeState(
        identity,
        row["name"],
        seen,
        not is_stopped and now - seen < ALIVE_S,
        is_stopped,
        info["ahead_s"],
        info["version"],
        _lines(told.get("sums", ()), len(COLUMNS)),
        _lines(told.get("days", ()), 1),
    )


def _lines(rows: Sequence[Sequence[Any]], columns: int) -> tuple[Line, ...]:
    return tuple((tuple(row[:columns]), Usage(*row[columns:])) for row in rows)
