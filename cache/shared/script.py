"""Scripts that a Redis runs as one step: what a node must read and change without another between.

A script is sent whole each time: a server that was emptied, restarted or replaced needs no loading,
and knows the compiled form by its digest. All keys of one script hash to one slot of a cluster.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

Word: TypeAlias = bytes | str | int | float
"""A part of a command."""


class Exchanger(Protocol):
    """What sends commands to the shared Redis, within its time limit. Never raises."""

    def key(self, name: str) -> bytes:
        """Return the key of that name, with the prefix of this format version."""

    async def exchange(self, commands: Sequence[Sequence[Word]]) -> list[Any] | None:
        """Return the replies to some commands for one slot; None if they are not had in time."""


class Script:
    """A script in Lua, which never replies with nil."""

    def __init__(self, source: str) -> None:
        self._source = source

    async def run(
        self, client: Exchanger, keys: Sequence[bytes], arguments: Sequence[Word] = ()
    ) -> Any:  # noqa: ANN401 - what the script returns
        """Return the reply; None if it is not had: then nobody knows whether the script has run."""
        command = ("EVAL", self._source, len(keys), *keys, *arguments)
        replies = await client.exchange([command])
        return None if replies is None or is_refusal(replies[0]) else replies[0]


def is_refusal(reply: object) -> bool:
    """Tell whether a reply is the server's refusal, and no value."""
    return not isinstance(reply, bytes | int | list | None)
