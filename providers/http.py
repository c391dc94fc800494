"""A provider that speaks OpenAI's embeddings over HTTP; its subclasses say only how they differ."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import orjson

from . import answer, tokens
from .base import Context, Embedded, Input, InputRefused, Outcome, Space
from .transport import Transport

# A JSON float takes at most 25 bytes; the rest of a reply is small.
_BYTES_A_NUMBER = 32
_BYTES_A_REPLY = 1 << 20

# Below this many bytes of input, counting tokens is quicker than handing it to a thread.
_COUNT_INLINE = 16_384


class HttpProvider:
    """Asks one upstream for embeddings. Open it with `async with`."""

    kind: ClassVar[str]
    """The name by which a configuration chooses this provider."""
    base_url: ClassVar[str]
    api_key_env: ClassVar[str]
    encoding_format: ClassVar[Literal["base64", "float"]] = "float"
    """The one wire format ever asked of this upstream: two may differ in the last bits."""
    accepts_tokens: ClassVar[bool] = True
    """Whether token arrays may be sent as they are."""

    def __init__(self, name: str, *, api_key: str, base_url: str, timeout_s: float = 60.0) -> None:
        self.name = name
        headers = {"Authorization": f"Bearer {api_key}", **self.extra_headers()}
        self._transport = Transport(name, base_url, headers, timeout_s)

    def extra_headers(self) -> Mapping[str, str]:
        """Return the headers this upstream wants besides the key."""
        return {}

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._transport.__aexit__(*exc)

    async def ask(
        self, model: str, space: Space, inputs: Sequence[Input], context: Context
    ) -> Embedded:
        """Make one attempt at the upstream's `model`; vectors come back checked, in input order.

        Asks for the native width, whatever width the client wants. Raises EmbeddingError.
        """
        try:
            payload = orjson.dumps(self._payload(model, space, inputs, context))
        except orjson.JSONEncodeError as error:
            raise InputRefused(f"The request cannot be sent on: {error}.") from error
        limit = _BYTES_A_REPLY + len(inputs) * space.dimensions * _BYTES_A_NUMBER
        reply = await self._transport.post("/embeddings", payload, limit, context)
        if reply.status != 200:
            raise answer.refusal(self.name, reply.status, reply.headers, reply.body)
        checked = answer.read(self.name, space, len(inputs), reply.headers, reply.body)
        counts, exact = await _count(space, inputs, checked.prompt_tokens)
        return Embedded(
            vectors=checked.vectors,
            tokens=counts,
            counted=exact,
            providers=(self.name,),
            outcomes=[Outcome.MISS] * len(inputs),
        )

    def _payload(
        self, model: str, space: Space, inputs: Sequence[Input], context: Context
    ) -> dict[str, object]:
        """Return the request body; what decides the numbers comes from the space alone."""
        payload: dict[str, object] = {
            "model": model,
            "input": inputs,
            "encoding_format": self.encoding_format,
        }
        if context.user is not None:
            payload["user"] = context.user
        for name, value in space.parameters:
            payload[name] = orjson.Fragment(value)
        return payload


async def _count(
    space: Space, inputs: Sequence[Input], total: int | None
) -> tuple[list[int], bool]:
    """Return the tokens of each input, and whether they are counted rather than apportioned."""
    if space.tokenizer is None and total is not None:
        return tokens.apportion(total, inputs), False
    encoding = space.tokenizer or tokens.CL100K
    if sum(map(len, inputs)) <= _COUNT_INLINE:
        return tokens.count(inputs, encoding), space.tokenizer is not None
    counts = await asyncio.to_thread(tokens.count, inputs, encoding)
    return counts, space.tokenizer is not None
