"""Purges in the shared Redis: what nodes tell one another of them, and which have made them.

One hash holds all purges by id, which of them the shared tier holds nothing of any more, a number
that grows with each, and the generation of the server's memory. Beside it, each purge has a hash of
the nodes that have deleted what it is about.
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
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
    redis.call('HSET', KEYS[1], 'last', ARGV[i])
    added = added + 1
  end
end
return added
""")
_POLL = Script("""
redis.call('HSETNX', KEYS[1], 'generation', ARGV[1])
local found = redis.call('HMGET', KEYS[1], 'generation', 'number', 'last')
return {found[1], found[2] or '0', found[3] or ''}
""")
_MARK_SWEPT = Script("""
for i = 1, #ARGV do
  if redis.call('HEXISTS', KEYS[1], 'p:' .. ARGV[i]) == 1 then
    redis.call('HSET', KEYS[1], 's:' .. ARGV[i], 1)
  end
end
return 1
""")
_FORGET = Script("""
local floor = tonumber(redis.call('HGET', KEYS[1], 'floor') or '0')
redis.call('HSET', KEYS[1], 'floor', string.format('%.17g', math.max(floor, tonumber(ARGV[1]))))
for i = 2, #ARGV do redis.call('HDEL', KEYS[1], 'p:' .. ARGV[i], 's:' .. ARGV[i]) end
return 1
""")


class PurgeState(NamedTuple):
    """What changes when there is something to learn, or to tell."""

    generation: str
    """Another one after the server has lost its memory."""
    number: int
    """Grows with each purge; less than before after the server came back with older data."""
    last: str = ""
    """The id of the purge that was added last."""


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
        return (
            None
            if reply is None
            else PurgeState(reply[0].decode(), int(reply[1]), reply[2].decode())
        )

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
                is_swept = b"s:" + purge.id.encode() in fields
                purges.append(replace(purge, is_swept=is_swept))
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
        """Drop the earliest if there are more than MAX_PURGES, of those that are swept."""
        if len(shared.purges) <= MAX_PURGES:
            return
        early = shared.purges[: len(shared.purges) - MAX_PURGES * 9 // 10]
        dropped = [one for one in early if one.is_swept]
        for start in range(0, len(dropped), _PURGES_A_STEP):
            lot = dropped[start : start + _PURGES_A_STEP]
            arguments = [repr(lot[-1].at), *(one.id for one in lot)]
            await _FORGET.run(self._client, [self._key], arguments, _READ_S)

    async def mark_swept(self, purges: Iterable[LoggedPurge]) -> bool:
        """Tell that the shared tier holds nothing of some purges; return whether that is told."""
        ids = [one.id for one in purges]
        return await _MARK_SWEPT.run(self._client, [self._key], ids, _READ_S) is not None

    async def swept(self, purges: Sequence[LoggedPurge]) -> set[str] | None:
        """Return the ids of those of which that was told, or that were dropped."""
        fields = [f"{kind}:{one.id}" for one in purges for kind in "ps"]
        command = Command(self._key, ["HMGET", self._key, *fields])
        reply = await ask(self._client, command, _READ_S)
        if reply is None:
            return None
        states = zip(purges, reply[::2], reply[1::2], strict=True)
        return {one.id for one, purge, swept in states if purge is None or swept is not None}

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
