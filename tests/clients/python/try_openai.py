"""The official client, sync and async; of all its major versions."""

import asyncio

from cases import run
from openai import AsyncOpenAI, OpenAI

client = OpenAI()
MODEL = "text-embedding-3-small"


def at_once(given: object, **options: str) -> list:
    """Embed with the client that waits."""
    reply = client.embeddings.create(model=MODEL, input=given, **options)
    return [item.embedding for item in reply.data]


def later(given: object) -> list:
    """Embed with the client that is awaited."""

    async def embed() -> list:
        async with AsyncOpenAI() as client:
            reply = await client.embeddings.create(model=MODEL, input=given)
        return [item.embedding for item in reply.data]

    return asyncio.run(embed())


def in_decimal(given: object) -> list:
    """Embed with numbers in the reply in place of base64."""
    return at_once(given, encoding_format="float")


run(["openai"], at_once=at_once, later=later, in_decimal=in_decimal)
