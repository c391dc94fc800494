"""Dual writes: what is indexed into a collection that is being migrated goes to its partner, too.

See `index.migration.state` for when that is. The inputs of an answer are embedded again with
the model of the partner, through the cache and on the account of migrations, and indexed there
under the same ids. It happens behind the reply. Before the cutover nothing is lost where it fails:
the migration compares both collections.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from uuid import UUID

from embedding_proxy.cache.key import Namespace, keyring
from embedding_proxy.index.collection import CollectionNames
from embedding_proxy.index.migration.state import FOLDER, DualWrite, DualWriteStates
from embedding_proxy.index.point import PointId
from embedding_proxy.providers.base import Input
from embedding_proxy.providers.errors import EmbeddingError
from embedding_proxy.proxy.config.index import Qdrant
from embedding_proxy.proxy.config.schema import Settings

from .cache_policy import parse_cache_control
from .embedding_result import Result
from .index_options import IndexOptions
from .index_writes import collection_of, connection
from .request import Client

log = logging.getLogger("embedding_proxy.index")

ACCOUNT = "migrate"
"""On which the inputs are bought, as those of the commands are."""
REFRESH_S = 1.0
MAX_PENDING = 1000
"""Answers that wait to be written to a partner; what comes beyond is left to the migration."""
END_S = 10.0
"""How long the end of the service waits for them."""

Embed = Callable[[Sequence[Input], str, int | None, IndexOptions, Client], Awaitable[Result]]
"""Embeds inputs with a model at a width, None = its own, and indexes them."""


class DualWrites:
    """Writes answers to the partners of their collections. Close it."""

    def __init__(
        self,
        settings: Settings,
        qdrant: Qdrant,
        names: CollectionNames,
        embed: Embed,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._qdrant = qdrant
        self._names = names
        folder = settings.cache.directory / FOLDER
        self._states = DualWriteStates(folder, str(connection(qdrant)))
        self._embed = embed
        self._clock = clock
        self._current: Sequence[DualWrite] = ()
        self._next_refresh = -float("inf")
        self._tasks: set[asyncio.Task[None]] = set()

    async def take(
        self, options: IndexOptions, control: str, caller: Client, result: Result
    ) -> None:
        """Begin to write an answer that was indexed to a partner, if there is one. Never raises."""
        if not options.is_enabled or parse_cache_control(control).no_store:
            return
        if self._clock() >= self._next_refresh:
            self._next_refresh = self._clock() + REFRESH_S
            self._current = await asyncio.to_thread(self._states.read)
        for pair in self._current:
            if not self._is_for(pair, options, result):
                continue
            model = self._model_of(pair.partner_space)
            if model is None or len(self._tasks) >= MAX_PENDING:
                reason = "too many wait" if model else f"no model gives {pair.partner_space}"
                log.warning("not written to %s as well: %s", pair.partner, reason)
                continue
            task = asyncio.create_task(self._write(pair, model, options, caller, result))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for what was begun, for END_S at most."""
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=END_S)
            for task in pending:
                task.cancel()

    def _is_for(self, pair: DualWrite, options: IndexOptions, result: Result) -> bool:
        """Tell whether an answer was indexed into the collection of a pair."""
        named = options.collection or self._qdrant.collection
        if (result.space.label, result.dimensions) != (pair.space, pair.dimensions):
            return False
        if (self._qdrant.vector_name or "") != pair.vector:
            return False
        if named:
            return not result.fallback and (named == pair.collection or named in pair.aliases)
        name = collection_of(result.name, result.space, result.dimensions, self._qdrant)
        # A name of the proxy's own stands for what took the place of another.
        is_successor = pair.is_switched and self._names.is_own(pair.origin)
        return name == pair.collection or is_successor

    def _model_of(self, space: str) -> str | None:
        """Return a model whose vectors are of a space."""
        for name, entry in self._settings.models.items():
            if entry.as_space().label == space:
                return name
        return None

    async def _write(
        self, pair: DualWrite, model: str, options: IndexOptions, caller: Client, result: Result
    ) -> None:
        native = self._settings.models[model].as_space().dimensions
        try:
            await self._embed(
                result.inputs,
                model,
                None if pair.partner_dimensions == native else pair.partner_dimensions,
                replace(options, collection=pair.partner, ids=await _ids(options, result)),
                Client(result.namespace, ACCOUNT, caller.api_key),
            )
        except EmbeddingError as error:
            log.warning("not written to %s as well: %s", pair.partner, error)
        except Exception:
            log.exception("not written to %s as well", pair.partner)


async def _ids(options: IndexOptions, result: Result) -> Sequence[PointId]:
    """Return the ids of an answer's points."""
    if options.ids is not None:
        return options.ids
    keys = result.embedded.keys
    if not keys:
        keys = await keyring(result.space, Namespace(result.namespace)).keys(result.inputs)
    return [UUID(bytes=key.address) for key in keys]
