"""Scripts that a Redis runs as one step: what a node must read and change without another between.

A script is sent whole each time: a server that was emptied, restarted or replaced needs no loading,
and knows the compiled form by its digest. All keys of one script hash to one slot of a cluster.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from .client import UNAVAILABLE, Command, RedisClient
from .node import Refused

Word: TypeAlias = bytes | str | int | float
"""A part of a command."""


class Script:
    """A script in Lua, which never replies with nil."""

    def __init__(self, source: str) -> None:
        self._source = source

    async def run(
        self,
        client: RedisClient,
        keys: Sequence[bytes],
        arguments: Sequence[Word] = (),
        limit_s: float | None = None,
    ) -> Any:  # noqa: ANN401 - what the script returns
        """Return the reply; None if it is not had: then nobody knows whether the script has run.

        `limit_s` is another time limit than the client's. Never raises.
        """
        words = ("EVAL", self._source, len(keys), *keys, *arguments)
        return await ask(client, Command(keys[0], words), limit_s)


async def ask(client: RedisClient, command: Command, limit_s: float | None = None) -> Any:  # noqa: ANN401
    """Return the reply to one command; None if it is not had, or the server refuses."""
    (answer,) = await client.exchange([command], limit_s)
    return None if answer is UNAVAILABLE or isinstance(answer, Refused) else answer
