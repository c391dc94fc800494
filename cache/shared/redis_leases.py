"""Leases between machines: short ones in Redis, for whoever has the lease of its own machine.

A lease is a key that holds a token of its own and expires by itself. It is set if nobody has it,
renewed while the record is being bought, and deleted by a script that compares the token: what
another node holds by now is left alone. Records reach the shared tier in the background: the lease
of one that was written on its machine is kept until it is there, and for up to WRITTEN_S more.

While Redis cannot be reached, or refuses, the lease of the machine alone decides.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from embedding_proxy.cache.leases import Leases

from .client import Answer, Command
from .node import Refused
from .tier import SharedTier

log = logging.getLogger("embedding_proxy.shared")

KIND = "lease"
TTL_S = 3.0
"""How long a lease lasts that is not renewed: its buyer has died, or is stopped."""
RENEW_S = 1.0
"""How often the leases that are held are renewed, in seconds."""
WRITTEN_S = 2.0
"""How long a lease lasts that is not renewed after its record was written on its machine."""
TAKE_LIMIT_S = 0.05
"""The time limit of what takes leases: less than a purchase takes, and long enough for a server
that is merely busy. Without an answer each node buys for itself."""
LIMIT_S = 0.25
"""The time limit of what nobody waits for."""
KEEP = b"""\
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then return redis.call('DEL', KEYS[1]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])"""
"""Lets a lease last for so many milliseconds from now, if the token is still its own."""


@dataclass(slots=True)
class _Held:
    """A lease of this process."""

    token: bytes
    lapses: float
    """When it does unless it is renewed, on the clock of the event loop."""
    grants: int = 1


class RedisLeases:
    """Leases as `leases.Leases`, of a machine and of all machines. For one event loop."""

    def __init__(self, local: Leases, tier: SharedTier) -> None:
        """`tier` is open as long as leases are asked for, and until `aclose` has returned."""
        self._local = local
        self._tier = tier
        self._redis = tier.redis
        self._node = secrets.token_bytes(8)
        self._tokens = 0
        self._held: dict[bytes, _Held] = {}
        self._written: dict[bytes, bytes] = {}
        """Tokens of leases that are left to expire, by address, the oldest first."""
        self._has_warned = False
        self._renewal: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.Event()

    async def acquire(self, addresses: Sequence[bytes]) -> Collection[bytes]:
        """Take the leases that nobody else holds, on any machine; return their addresses."""
        local = await self._local.acquire(addresses)
        new = [address for address in local if address not in self._held]
        for address in local:
            if address in self._held:
                self._held[address].grants += 1
        if not new or not self._redis.is_available:
            return local
        token = self._new_token()
        try:
            refused = await self._take(new, token)
        except asyncio.CancelledError:
            self._start(self._keep(dict.fromkeys(new, token), 0.0))
            self._local.release(new, is_written=False)
            self.release([address for address in local if address not in new], is_written=False)
            raise
        if not refused:
            return local
        self._local.release(refused, is_written=False)
        return [address for address in local if address not in refused]

    async def _take(self, addresses: Sequence[bytes], token: bytes) -> Collection[bytes]:
        """Take leases in Redis; return those that another node holds."""
        lapses = asyncio.get_running_loop().time() + TTL_S
        words = (b"NX", b"PX", round(1000 * TTL_S))
        keys = [self._redis.key(KIND, address) for address in addresses]
        answers = await self._redis.exchange(
            [Command(key, (b"SET", key, token, *words)) for key in keys],
            max(TAKE_LIMIT_S, self._redis.options.limit_s),
        )
        both = zip(addresses, answers, strict=True)
        taken = {address: token for address, answer in both if answer is not None}
        # Of those that are taken, some may be this process's own: written a moment ago.
        own = {a: self._written[a] for a in addresses if a not in taken and a in self._written}
        if own:
            for (address, old), answer in zip(
                own.items(), await self._keep(own, TTL_S), strict=True
            ):
                if answer == 1:
                    taken[address] = old
        for address, one in taken.items():
            self._written.pop(address, None)
            # Without an answer it may have been taken: then it is given back like any other.
            self._held[address] = _Held(one, lapses)
        if self._held and self._renewal is None:
            self._renewal = self._start(self._renew())
        return {address for address in addresses if address not in taken}

    def lapsed_s(self, addresses: Collection[bytes]) -> float:
        """Return for how long one of the leases held here may have been another node's."""
        now = asyncio.get_running_loop().time()
        lapses = (self._held[address].lapses for address in addresses if address in self._held)
        return max(0.0, now - min(lapses, default=now))

    def release(self, addresses: Collection[bytes], *, is_written: bool) -> None:
        """Give leases back: soon, or after a while if their records were written."""
        tokens: dict[bytes, bytes] = {}
        for address in addresses:
            held = self._held.get(address)
            if held is not None:
                held.grants -= 1
                if not held.grants:
                    tokens[address] = held.token
                    del self._held[address]
        if tokens:
            if is_written:
                self._written.update(tokens)
                self._start(self._keep_written(tokens, self._tier.put_count))
            else:
                self._start(self._keep(tokens, 0.0))
        self._local.release(addresses, is_written=is_written)

    async def _keep_written(self, tokens: dict[bytes, bytes], put_count: int) -> None:
        """Keep leases until the first so many records were written to the shared tier."""
        await self._keep(tokens, WRITTEN_S)
        while self._tier.is_queued(put_count) and not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._closing.wait()
            # Those that this process holds again are renewed like others.
            still = {a: token for a, token in tokens.items() if self._written.get(a) == token}
            await self._keep(still, WRITTEN_S)
        asyncio.get_running_loop().call_later(WRITTEN_S, self._forget, tokens)

    def _forget(self, tokens: dict[bytes, bytes]) -> None:
        for address, token in tokens.items():
            if self._written.get(address) == token:
                del self._written[address]

    async def aclose(self) -> None:
        """Give everything back that is held, and wait until that was sent."""
        self._closing.set()
        if self._renewal is not None:
            self._renewal.cancel()
        if self._held:
            self._start(self._keep({a: held.token for a, held in self._held.items()}, 0.0))
            self._held.clear()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _new_token(self) -> bytes:
        self._tokens += 1
        return b"%b:%d" % (self._node.hex().encode(), self._tokens)

    async def _keep(self, tokens: dict[bytes, bytes], seconds: float) -> list[Answer]:
        """Let leases last for so long from now, as far as they are still held."""
        commands: list[Command] = []
        for address, token in tokens.items():
            key = self._redis.key(KIND, address)
            commands.append(Command(key, (b"EVAL", KEEP, 1, key, token, round(1000 * seconds))))
        limit_s = max(LIMIT_S, self._redis.options.limit_s)
        answers = await self._redis.exchange(commands, limit_s)
        refused = next((answer for answer in answers if isinstance(answer, Refused)), None)
        if refused is not None and not self._has_warned:
            self._has_warned = True
            log.warning(
                "leases at %s cannot be renewed or given back, and lapse after %g s: %s",
                *(self._redis.name, TTL_S, refused.message),
            )
        return answers

    async def _renew(self) -> None:
        """Renew what is held, again and again, until nothing is."""
        loop = asyncio.get_running_loop()
        try:
            while self._held:
                await asyncio.sleep(RENEW_S)
                tokens = {address: held.token for address, held in self._held.items()}
                lapses = loop.time() + TTL_S
                answers = await self._keep(tokens, TTL_S) if tokens else []
                for (address, token), answer in zip(tokens.items(), answers, strict=True):
                    held = self._held.get(address)
                    if held is not None and held.token == token and answer == 1:
                        held.lapses = lapses
        finally:
            self._renewal = None

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
