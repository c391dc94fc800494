"""The owner's system as a migration finds it: seven collections, and who sells vectors for them.

Unnamed cosine vectors of text-embedding-3-large, the text in `content`; tickets have no such field,
their text is made of title, description and tags. As wide as a test wants: narrow is quick.
"""

import asyncio
import json
import os
import sys
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from command import Done
from embedding_proxy.index.client import Connection
from embedding_proxy.index.migration.text_template import Rule
from fault_server import FaultServer, vector_of
from qdrant_client import models
from qdrant_server import QdrantServer

LARGE = "text-embedding-3-large"
MISTRAL = "mistral-embed"
TICKETS = "hephaestus_ticket_embeddings"
TICKET_TEXT = "{title} {title} {description} {tags} {tags}"
SIZES = {
    "hephaestus_agent_memories": 700,
    "hephaestus_static_docs": 400,
    "hephaestus_task_completions": 300,
    "hephaestus_error_solutions": 200,
    "hephaestus_domain_knowledge": 150,
    "hephaestus_project_context": 100,
    TICKETS: 150,
}
"""2,000 points in all."""
_NAMESPACE = uuid.UUID(int=0)
_PAGE = 200


def id_of(collection: str, number: int) -> int | str:
    """Return the id of a point: every tenth is a number, as some of its tools gave them."""
    return number if number % 10 == 0 else str(uuid.uuid5(_NAMESPACE, f"{collection}/{number}"))


def payload_of(collection: str, number: int) -> dict[str, Any]:
    """Return the payload of a point; one text in fifty is that of another point."""
    if collection == TICKETS:
        return {
            "ticket_id": f"ticket-{number}",
            "workflow_id": f"workflow-{number % 7}",
            "title": f"Ticket {number}: the build fails on Fridays",
            "description": f"It says error {number * 31} and stops.\nEvery time.",
            "tags": ["build", f"week-{number % 52}"],
            "priority": ["low", "medium", "high"][number % 3],
            "is_archived": number % 5 == 0,
        }
    kind = collection.removeprefix("hephaestus_")
    text = f"{kind} {number - number % 50 if number % 50 == 1 else number}: what we learned"
    return {
        "content": text,
        "memory_id": f"{kind}-{number}",
        "agent_id": f"agent-{number % 9}",
        "memory_type": kind,
        "created_at": f"2025-06-{1 + number % 28:02d}T12:00:00Z",
        "tags": [kind, "learned"],
        "metadata": {"confidence": number / 1000, "files": [f"src/{number}.py"]},
    }


def text_of(collection: str, payload: dict[str, Any]) -> str | None:
    """Return the text that a point stands for."""
    rule = Rule.template(TICKET_TEXT) if collection == TICKETS else Rule.field("content")
    return rule.text(payload)


@dataclass
class OldSystem:
    """Use it with `async with`; `folder` gets the configuration and the cache."""

    folder: Path
    width: int = 16
    new_width: int = 8
    qdrant: QdrantServer = field(default_factory=QdrantServer)
    openai: FaultServer = field(default_factory=FaultServer)
    openrouter: FaultServer = field(default_factory=FaultServer)
    mistral: FaultServer = field(default_factory=FaultServer)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Self:
        widths = {LARGE: self.width, f"openai/{LARGE}": self.width, MISTRAL: self.new_width}
        for server in (self.openai, self.openrouter, self.mistral):
            server.widths.update(widths)
            await self._stack.enter_async_context(server)
        await self._stack.enter_async_context(self.qdrant)
        connection = Connection(url=self.qdrant.url)
        self.connection = await self._stack.enter_async_context(connection)
        content = {
            "cache": {"directory": str(self.folder / "cache")},
            "providers": {
                "openai": {"base_url": self.openai.url},
                "openrouter": {"base_url": self.openrouter.url},
                "mistral": {"base_url": self.mistral.url},
            },
            "models": {
                LARGE: {"dimensions": self.width},
                f"openai/{LARGE}": {"dimensions": self.width},
                MISTRAL: {"dimensions": self.new_width},
            },
        }
        self.config.write_text(json.dumps(content))
        self.mapping.write_text(
            json.dumps(
                {name: {"template": TICKET_TEXT} if name == TICKETS else {} for name in SIZES}
            )
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def config(self) -> Path:
        """The configuration: three providers, at the widths of this system."""
        return self.folder / "config.yaml"

    @property
    def mapping(self) -> Path:
        """What `--file` takes: the collections, and where their texts are."""
        return self.folder / "collections.yaml"

    @property
    def bought(self) -> list[object]:
        """All inputs that anybody was asked for."""
        return [*self.openai.inputs, *self.openrouter.inputs, *self.mistral.inputs]

    def old_vector(self, text: str) -> list[float]:
        """Return what OpenAI gave for a text."""
        numbers: list[float] = vector_of(LARGE, text, self.width).tolist()
        return numbers

    async def fill(self, share: float = 1.0, *, alias: bool = True) -> None:
        """Make the collections and their points, or a share of them, each with its alias."""
        params = models.VectorParams(size=self.width, distance=models.Distance.COSINE)
        for name, size in SIZES.items():
            await self.connection.ask(lambda client, n=name: client.create_collection(n, params))
            await self.connection.ask(
                lambda client, n=name: client.create_payload_index(n, "agent_id", "keyword")
            )
            numbers = range(1, 1 + round(size * share))
            for start in range(0, len(numbers), _PAGE):
                await self.put(name, numbers[start : start + _PAGE])
            if alias:
                await self.alias(f"live_{name}", name)

    async def put(self, name: str, numbers: Any) -> None:
        """Write points as the old system does."""
        points = []
        for number in numbers:
            payload = payload_of(name, number)
            vector = self.old_vector(text_of(name, payload) or "")
            points.append(
                models.PointStruct(id=id_of(name, number), payload=payload, vector=vector)
            )
        await self.connection.ask(lambda client: client.upsert(name, points))

    async def alias(self, alias: str, name: str) -> None:
        """Let an alias point to a collection."""
        new = models.CreateAlias(collection_name=name, alias_name=alias)
        operations = [models.CreateAliasOperation(create_alias=new)]
        await self.connection.ask(lambda client: client.update_collection_aliases(operations))

    async def aliases(self) -> dict[str, str]:
        """Return the collection of each alias."""
        found = (await self.connection.ask(lambda client: client.get_aliases())).aliases
        return {one.alias_name: one.collection_name for one in found}

    async def collections(self) -> set[str]:
        """Return the names of all collections."""
        found = (await self.connection.ask(lambda client: client.get_collections())).collections
        return {one.name for one in found}

    def command(self, step: str, *arguments: str) -> list[str]:
        """Return the command line of a step, for a process of its own."""
        place = ("--qdrant", self.qdrant.url, "--config", str(self.config))
        return [sys.executable, "-m", "embedding_proxy", "migrate", step, *arguments, *place]

    @property
    def environment(self) -> dict[str, str]:
        """What such a process finds: a key for each provider."""
        keys = {f"{name}_API_KEY": "k" for name in ("OPENAI", "OPENROUTER", "MISTRAL")}
        return {**os.environ, **keys}

    async def migrate(self, step: str, *arguments: str) -> Done:
        """Run a step in a process of its own, until it ends."""
        process = await asyncio.create_subprocess_exec(
            *self.command(step, *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
        )
        out, err = await process.communicate()
        return Done(process.returncode or 0, out.decode(), err.decode())
