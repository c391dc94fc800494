"""The official client, sync and async, and as Azure's; of all its major versions."""

import asyncio
import atexit

from cases import run
from openai import AsyncOpenAI, AzureOpenAI, OpenAI

MODEL = "text-embedding-3-small"
client = OpenAI()
async_client = AsyncOpenAI()
azure = AzureOpenAI(api_version="2024-10-21")
loop = asyncio.Runner()
atexit.register(loop.close)


def at_once(given: object, client: OpenAI = client, **options: str) -> list:
    """Embed with the client that waits."""
    reply = client.embeddings.create(model=MODEL, input=given, **options)
    return [item.embedding for item in reply.data]


def later(given: object) -> list:
    """Embed with the client that is awaited."""
    reply = loop.run(async_client.embeddings.create(model=MODEL, input=given))
    return [item.embedding for item in reply.data]


run(
    ["openai"],
    at_once=at_once,
    later=later,
    decimal=lambda given: at_once(given, encoding_format="float"),
    azure=lambda given: at_once(given, azure),
)
