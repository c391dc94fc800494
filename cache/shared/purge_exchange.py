"""Purges in the shared Redis: what nodes tell one another of them, and which have made them.

One hash holds all purges by id, a number that grows with each, and the generation of the server's
memory. Beside it, each purge has a
hash of the nodes that have deleted what it is about.
"""

import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson

from .client import UNAVAILABLE, Command, RedisClient
from .node import Refused
from .purge_log import MAX_PURGES, LoggedPurge, decode
from .script import Script, ask

_DONE_S = 90 * 86_400
_PURGES_A_STEP = 500
_READ_S = 2.0
"""To read all purges may take so long; nobody waits for it."""

_ADD = Script("""
local added = 0
for i = 1, #ARGV - 1, 2 do
  if redis.call('HSETNX', KEYS[1], 'p:' .. ARGV[i], ARGV[i + 1]) == 1 then
    redis.call('HINCRBY', KEYS[1], 'number', 1)
    added = added + 1
  end
end
return added
""")
_POLL = Script("""
redis.call('HSETNX', KEYS[1], 'generation', ARGV[1])
local found = redis.call('HMGET', KEYS[1], 'generation', 'number')
return {found[1], found[2] or '0'}
""")
_FORGET = Script("""
local floor = tonumber(redis.call('HGET', KEYS[1], 'floor') or '0')
redis.call('HSET', KEYS[1], 'floor', string.format('%.6f', math.max(floor, tonumber(ARGV[1]))))
for i = 2, #ARGV do redis.call('HDEL', KEYS[1], 'p:' .. ARGV[i]) end
return 1
""")


class PurgeState(NamedTuple):
    """What changes when there is something to learn, or to tell."""

    generation: str
    """Another one after the server has lost its memory."""
    number: int
    """Grows with each purge."""


class SharedPurges(NamedTuple):
    """What the server holds."""

    floor: float
    """All purges up to this time may be forgotten, in seconds since 1970; 0 = none is."""
    purges: list[LoggedPurge]


class NodeReceipt(NamedTuple):
    """That a node has made a purge."""

    node: str
    """Its id."""
    name: str
    deleted: int


class PurgeExchange:
    """The purges of all nodes, on a server. Nothing raises; None = it cannot be asked now."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._key = client.key("purges")

    async def poll(self) -> PurgeState | None:
        """Return whether there may be something new."""
        reply = await _POLL.run(self._client, [self._key], [secrets.token_hex(8)])
        return None if reply is None else PurgeState(reply[0].decode(), int(reply[1]))

    async def read(self) -> SharedPurges | None:
        """Return all purges, the earliest first. What is damaged is left out."""
        reply = await ask(self._client, Command(self._key, ("HGETALL", self._key)), _READ_S)
        if reply is None:
            return None
        fields: dict[bytes, Any] = dict(zip(reply[::2], reply[1::2], strict=True))
        floor = float(fields.pop(b"floor", 0))
        purges = []
        for field, content in fields.items():
            try:
                purge = decode(content)
            except ValueError:
                continue
            if field == b"p:" + purge.id.encode():
                purges.append(purge)
        purges.sort(key=lambda one: one.at)
        return SharedPurges(floor, purges)

    async def add(self, purges: Iterable[LoggedPurge]) -> bool:
        """Tell purges, each once however often it is told; return whether all are there."""
        all_purges = list(purges)
        for start in range(0, len(all_purges), _PURGES_A_STEP):
            arguments: list[str | bytes] = []
            for one in all_purges[start : start + _PURGES_A_STEP]:
                arguments += one.id, one.encode()
            if await _ADD.run(self._client, [self._key], arguments, _READ_S) is None:
                return False
        return True

    async def compact(self, shared: SharedPurges) -> None:
        """Drop the earliest if there are more than MAX_PURGES."""
        if len(shared.purges) <= MAX_PURGES:
            return
        dropped = shared.purges[: len(shared.purges) - MAX_PURGES * 9 // 10]
        arguments = [f"{dropped[-1].at:.6f}", *(one.id for one in dropped)]
        await _FORGET.run(self._client, [self._key], arguments, _READ_S)

    async def acknowledge(self, purge: str, receipt: NodeReceipt) -> bool:
        """Tell that a node has made a purge; return whether that is told."""
        key = self._client.key("purged", purge.encode())
        content = orjson.dumps({"name": receipt.name, "deleted": receipt.deleted})
        answers = await self._client.exchange(
            [
                Command(key, ("HSET", key, receipt.node, content)),
                Command(key, ("EXPIRE", key, _DONE_S)),
            ]
        )
        return not any(one is UNAVAILABLE or isinstance(one, Refused) for one in answers)

    async def receipts(self, purge: str) -> list[NodeReceipt] | None:
        """Return which nodes have made a purge."""
        key = self._client.key("purged", purge.encode())
        reply = await ask(self._client, Command(key, ("HGETALL", key)))
        if reply is None:
            return None
        found = []
        for node, content in zip(reply[::2], reply[1::2], strict=True):
            fields = orjson.loads(content)
            found.append(NodeReceipt(node.decode(), fields["name"], fields["deleted"]))
        return found
