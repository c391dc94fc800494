"""All records of the shared tier, one server after the other: to find them, and to delete some.

A scan is a loop of SCAN, which Redis answers in short steps; its cursor is a number that holds over
restarts of the reader. Every key that is there from the beginning to the end is found, some twice.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.key import Partition

from .client import UNAVAILABLE, Command, RedisClient
from .node import Refused
from .purge_log import LoggedPurge, PurgeRules
from .script import ask
from .value import KIND, read_head

SCAN_KEYS = 500
"""Keys that a server is asked to look at in one step."""
LIMIT_S = 2.0
"""The time limit of a step; nobody waits for it."""
CLAIM_S = 600
_HEAD_BYTES = 512

_DELETE = (
    "if redis.call('GETRANGE', KEYS[1], 0, 7) == ARGV[1] then return redis.call('UNLINK', KEYS[1])"
    " end return 0"
)


class Interrupted(Exception):
    """A server has not answered: the scan can go on from the cursors that were yielded last."""


class ScanStep(NamedTuple):
    """Some keys of one server."""

    server: str
    cursor: int
    """Where the next step begins; 0 = this server has no more."""
    keys: list[bytes]


async def scan(
    client: RedisClient, cursors: Mapping[str, int | None] | None = None
) -> AsyncIterator[ScanStep]:
    """Yield the keys of all records, in steps.

    `cursors` are those of an earlier scan by server, None for a server that had no more. Raises
    Interrupted.
    """
    known = cursors or {}
    pattern = client.key(KIND, b"*")
    if not client.nodes:
        raise Interrupted(client.name)
    for name, server in list(client.nodes.items()):
        cursor = known.get(name, 0)
        while cursor is not None:
            words = ("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_KEYS)
            (answer,) = await client.exchange_at(server, [words], LIMIT_S)
            if not isinstance(answer, list):
                raise Interrupted(name)
            cursor = int(answer[0])
            yield ScanStep(name, cursor, answer[1])
            cursor = cursor or None


async def claim(client: RedisClient, purge: LoggedPurge, node: str) -> bool:
    """Return whether this node is the one that deletes what a purge is about in the shared tier."""
    key = client.key("sweep", purge.id.encode())
    words = ("SET", key, node, "NX", "EX", CLAIM_S)
    return await ask(client, Command(key, words), LIMIT_S) is not None


async def release(client: RedisClient, purges: Iterable[LoggedPurge]) -> None:
    """Give back what was claimed: whoever finds that it is not deleted may do it."""
    keys = [client.key("sweep", one.id.encode()) for one in purges]
    await client.exchange([Command(key, ("DEL", key)) for key in keys], LIMIT_S)


async def delete(
    client: RedisClient,
    purges: Iterable[LoggedPurge],
    is_stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Delete the records that purges are about, in one scan; return how many.

    A record that was replaced meanwhile stays. When an entry was used last is not known here, so a
    purge by that deletes nothing. `is_stopped` is asked before each step. Raises Interrupted.
    """
    deleted, others = 0, []
    for one in purges:
        if one.choice.address is None:
            others.append(one)
        elif one.before is not None:
            if is_stopped():
                raise Interrupted(client.name)
            keys = [client.key(KIND, one.choice.address)]
            deleted += await _delete_chosen(client, keys, _rules_at(one))
    rules = PurgeRules(others)
    if rules:
        async for step in scan(client):
            if is_stopped():
                raise Interrupted(client.name)
            if step.keys:
                deleted += await _delete_chosen(client, step.keys, rules)
    return deleted


def _rules_at(purge: LoggedPurge) -> PurgeRules:
    """Return rules for a record that is known to be at the address of a purge."""
    choice = PurgeFilter(stored_before=purge.choice.stored_before)
    return PurgeRules([replace(purge, choice=choice)])


async def _delete_chosen(client: RedisClient, keys: list[bytes], rules: PurgeRules) -> int:
    heads = await client.exchange(
        [Command(key, ("GETRANGE", key, 0, _HEAD_BYTES - 1)) for key in keys], LIMIT_S
    )
    commands = []
    for key, value in zip(keys, heads, strict=True):
        if not isinstance(value, bytes):
            raise Interrupted(client.name)
        head = read_head(value)
        if head is None and len(value) == _HEAD_BYTES:
            # Its names are longer than most.
            whole = await ask(client, Command(key, ("GET", key)), LIMIT_S)
            head = read_head(whole) if isinstance(whole, bytes) else None
        partition = Partition("", "", 0) if head is None else head.partition
        # What cannot be read is damaged: nobody misses it.
        if value and (
            head is None or rules.is_purged(partition, key[len(client.key(KIND)) :], head.stored)
        ):
            commands.append(Command(key, ("EVAL", _DELETE, 1, key, value[:8])))
    answers = await client.exchange(commands, LIMIT_S) if commands else []
    if any(answer is UNAVAILABLE or isinstance(answer, Refused) for answer in answers):
        raise Interrupted(client.name)
    return sum(answer for answer in answers if isinstance(answer, int))
