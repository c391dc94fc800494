"""Dimensions that no configuration tells: learned from the first answer, and pinned in a file.

`WidthLearner` buys one input before the cache is asked, in one task for all requests that come
meanwhile. It keeps that input like any other, under the dimensions that the answer tells; so the
cache knows no space without dimensions. A model that changes its dimensions afterwards is another
model; its answers are refused like all others of wrong dimensions.

`embed_one_first` asks for one input before the others. Client keys are proved with it, too.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import orjson
from embedding_proxy.cache import atomic_file
from embedding_proxy.cache.cached_hit import CountedEmbeddings
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.cache.embedder import MAX_ROUNDS_WITH_STRANGERS, CachingEmbedder
from embedding_proxy.cache.errors import NotCached, name_input
from embedding_proxy.cache.in_flight import InFlight, wait
from embedding_proxy.cache.key import Key, Namespace, keyring
from embedding_proxy.cache.leases import MIN_PAUSE_S, Leases, pauses
from embedding_proxy.cache.shared_task import SharedTask
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import Context, Embedded, Embedder, Input, Space, slices
from embedding_proxy.providers.charge import Bill, OnCharge
from embedding_proxy.providers.errors import DeadlineExceeded, EmbeddingError, InvalidAnswer
from embedding_proxy.providers.scheduling import assembly

EmbedSome: TypeAlias = Callable[[Sequence[Input]], Awaitable[CountedEmbeddings]]
WIDTHS_FILE = "widths.json"
"""The name of the file, in the folder of the store."""
MAX_WIDTHS = 10_000
"""Spaces whose width is pinned. Clients name the models; of further ones each process learns the
width for itself, from an input that it buys."""
LOCK_TIMEOUT_S = 2.0
"""The longest wait for another worker that writes the file."""
MAX_SPACES = 1000
"""Spaces with parameters whose width is remembered, where the model's own is not known."""
# By so many seconds a clock that is read later may be behind.
_CLOCK_S = 1.0

log = logging.getLogger("embedding_proxy.learned")


class LearnedDimensions:
    """The widths that were learned, by the name of the space. All workers share the file.

    The file is read and written in threads.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock_file = file.with_suffix(".lock")
        self._known: dict[str, int] = {}
        self._version: tuple[int, ...] | None = None
        self._is_full = False

    def get(self, space: str) -> int:
        """Return the width of a space, 0 where it has not been learned so far."""
        return self._known.get(space, 0)

    async def refresh(self) -> None:
        """Take over what other workers have learned, if the file is another one by now."""
        self._known |= await asyncio.to_thread(self._read_changed)

    async def pin(self, space: str, width: int) -> None:
        """Keep a width that was learned. Raises InvalidAnswer when the space has another one."""
        pinned_width = self.get(space)
        if not pinned_width:
            pinned_width = await asyncio.to_thread(self._pin, space, width)
            if len(self._known) < MAX_WIDTHS:
                pinned_width = self._known.setdefault(space, pinned_width)
        if pinned_width != width:
            raise InvalidAnswer(
                space, f"{width} dimensions instead of {pinned_width}, as it had before"
            )

    def _pin(self, space: str, width: int) -> int:
        """Add a width to the file; return the one of the file where another worker was first."""
        try:
            with closing(WriterLock(self._lock_file, LOCK_TIMEOUT_S)) as lock, lock:
                widths = self._read()
                if space in widths:
                    return widths[space]
                if len(widths) >= MAX_WIDTHS:
                    self._tell_full()
                    return width
                widths[space] = width
                atomic_file.write(self._file, orjson.dumps(widths, option=orjson.OPT_INDENT_2))
        except OSError as error:
            log.warning("%s: learned widths cannot be kept: %s", self._file, error)
        else:
            log.info("%s: its vectors have %d numbers; kept in %s", space, width, self._file)
        return width

    def _tell_full(self) -> None:
        """Say once that no further width is kept."""
        if not self._is_full:
            self._is_full = True
            log.warning(
                "%s: holds the widths of %d models that clients named; further ones are not kept:"
                " name the models in the configuration, or delete the file",
                *(self._file, MAX_WIDTHS),
            )

    def _read_changed(self) -> dict[str, int]:
        """Return what the file holds, if it is another one than at the last call."""
        try:
            status = self._file.stat()
        except OSError:
            return {}
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if version == self._version:
            return {}
        self._version = version
        return self._read(is_told=True)

    def _read(self, *, is_told: bool = False) -> dict[str, int]:
        """Return what the file holds: nothing where it cannot be read, or is not one of ours."""
        try:
            content = orjson.loads(self._file.read_bytes())
            return {str(space): int(width) for space, width in content.items() if int(width) > 0}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if is_told:
                log.warning(
                    "%s: is damaged or cannot be read (%s): widths are learned anew from the"
                    " next answers; to declare them, set `dimensions` of the models",
                    *(self._file, type(error).__name__),
                )
            return {}


_Learning: TypeAlias = SharedTask[Input, tuple[int, CountedEmbeddings]]
"""Buys one input of a space; gives the width, and the answer to that input and its equals."""


class WidthLearner:
    """Learns the widths of spaces from their first answers. For one event loop."""

    def __init__(self, learned: LearnedDimensions, tiers: Tiers, in_flight: InFlight) -> None:
        self._learned = learned
        self._tiers = tiers
        self._in_flight = in_flight
        self._widths: dict[str, int] = {}
        """By the label of a space with parameters, where the model's own width is not known."""
        self._learning: dict[str, _Learning] = {}
        """What is being bought to learn a width, by the label of the space."""

    async def embed(
        self,
        source: Embedder,
        embedder: CachingEmbedder,
        space: Space,
        inputs: Sequence[Input],
        context: Context,
    ) -> tuple[int, CountedEmbeddings]:
        """Embed in a space whose width may be unknown; return that, and the answer.

        The first request that comes buys its first input from the `source`, past the cache, and
        asks the `embedder` around it for the rest. Who asks meanwhile waits for the width. Raises
        EmbeddingError.
        """
        await self._learned.refresh()
        if context.check_tokens is not None:
            context = replace(context, counts=await context.check_tokens(None), check_tokens=None)
        width, rounds = self._width(space), 0
        while not width:
            if not context.terms.spend:
                raise NotCached(context.terms, range(len(inputs)), len(inputs))
            learning = self._learning.get(space.label)
            if learning is None or (learning.abandonment.done() and not learning.begun):
                return await self._lead(source, embedder, space, inputs, context)
            is_same_key = learning.context.credential == context.credential
            if rounds >= MAX_ROUNDS_WITH_STRANGERS and not is_same_key:
                return await self._lead(source, embedder, space, inputs, context)
            started = time.time()
            await _wait(learning, context)
            if context.terms.joins_same_key and is_same_key:
                # What was bought meanwhile will do: it is in the cache by now.
                terms = replace(context.terms, max_age=time.time() - started + _CLOCK_S)
                context = replace(context, terms=terms)
            try:
                width, _ = learning.task.result()
            except EmbeddingError as error:
                if not learning.is_leader_specific(error, inputs[:1], context):
                    raise
            rounds += 1
        space = replace(space, dimensions=width)
        return width, await embedder.embed(space, inputs, context)

    async def _lead(
        self,
        source: Embedder,
        embedder: CachingEmbedder,
        space: Space,
        inputs: Sequence[Input],
        context: Context,
    ) -> tuple[int, CountedEmbeddings]:
        """Learn the width of a space from the first input, then ask for the others."""
        item, copies = inputs[0], inputs.count(inputs[0])
        # What has no bytes is refused before anybody is asked.
        keyring(space, Namespace(context.namespace)).key(item)
        on_charge = embedder.on_charge(space, context)
        work = partial(
            self._buy_first, source=source, space=space, copies=copies, on_charge=on_charge
        )
        learning: _Learning = SharedTask([item], work, context)
        self._learning[space.label] = learning
        self._in_flight.add_task(learning.task)
        learning.task.add_done_callback(lambda _: self._forget(space.label, learning))

        width = 0

        async def embed_first(_: Sequence[Input]) -> CountedEmbeddings:
            nonlocal width
            await _wait(learning, context)
            width, answer = learning.task.result()
            return answer

        async def embed_others(some: Sequence[Input]) -> CountedEmbeddings:
            return await embedder.embed(replace(space, dimensions=width), some, context)

        answer = await embed_one_first(inputs, 0, embed_first, embed_others)
        return width, answer

    async def _buy_first(
        self,
        learning: _Learning,
        source: Embedder,
        space: Space,
        copies: int,
        on_charge: OnCharge,
    ) -> tuple[int, CountedEmbeddings]:
        """Buy one input of a space without a width, pin that, and keep the input."""
        context = learning.context

        def keep(bought: _Bought) -> asyncio.Task[CountedEmbeddings]:
            return self._in_flight.write(self._keep_first(space, bought, context, copies))

        lease = _Lease(self._in_flight.leases, learning, space)
        is_shared = self._tiers.shared is not None
        width = await lease.take(partial(self._find_width, space), looks_first=is_shared)
        if width:
            space = replace(space, dimensions=width)
            await self._note_width(space)
            embedder = CachingEmbedder(source, self._tiers, self._in_flight)
            return width, await embedder.embed(space, [*learning.keys] * copies, context)
        bought = _Bought(learning.keys[0], context.on_charge, keep)
        learning_context = replace(
            context,
            on_part=bought.take,
            on_charge=bought.charge,
            on_begin=learning.begin,
            abandoned=learning.abandonment,
        )
        try:
            try:
                await bought.take((0,), await source.embed(space, learning.keys, learning_context))
            except EmbeddingError:
                # What comes when nobody waits for it any more is told as a part.
                if bought.kept is None:
                    raise
            return await bought.result()
        except EmbeddingError as error:
            if error.index is not None:
                learning.failed_key = learning.keys[0]
            # What was charged for nothing is counted under no width.
            bought.tell_charges(on_charge)
            await asyncio.shield(self._in_flight.write(self._tiers.flush_counts()))
            raise
        finally:
            lease.release(is_written=bought.kept is not None)

    async def _find_width(self, space: Space, key: Key) -> int:
        """Return the width that another process has learned from the input of a key, 0 if none."""
        await self._learned.refresh()
        return self._width(space) or await self._tiers.find_width(key)

    async def _note_width(self, space: Space) -> None:
        """Note the width of a space. Raises InvalidAnswer when it has another one."""
        if space.parameters:
            # A client's own fields may change the width: it holds for the same fields alone.
            self._widths[space.label] = space.dimensions
            if len(self._widths) > MAX_SPACES:
                del self._widths[next(iter(self._widths))]
        else:
            await self._learned.pin(space.name, space.dimensions)

    async def _keep_first(
        self, space: Space, bought: "_Bought", context: Context, copies: int
    ) -> CountedEmbeddings:
        """Keep what was bought of a space, and pin its width. Raises InvalidAnswer.

        In this order: who knows the width asks the cache, and must find there what was bought.
        """
        space = replace(space, dimensions=bought.width)
        terms = replace(context.terms, max_age=0.0, joins_same_key=False)
        context = replace(context, terms=terms, deadline=None, on_charge=None)
        embedder = CachingEmbedder(bought, self._tiers, self._in_flight)
        answer = await embedder.embed(space, [bought.item] * copies, context)
        await self._note_width(space)
        return answer

    def _forget(self, label: str, learning: _Learning) -> None:
        if self._learning.get(label) is learning:
            del self._learning[label]

    def _width(self, space: Space) -> int:
        """Return the width of a space of a model whose own width was not known, 0 = not known."""
        if space.parameters:
            return self._widths.get(space.label, 0)
        return self._learned.get(space.name)


class _Lease:
    """The lease of the input that a width is learned from: one process buys it."""

    def __init__(self, leases: Leases | None, learning: _Learning, space: Space) -> None:
        context = learning.context
        self._learning = learning
        self._key = keyring(space, Namespace(context.namespace)).key(learning.keys[0])
        is_private = not context.terms.write or context.terms.max_age <= 0
        self._leases = None if is_private else leases
        self._is_held = False

    async def take(self, find_width: Callable[[Key], Awaitable[int]], *, looks_first: bool) -> int:
        """Wait for the lease, and return 0; or the width, if another process tells it before.

        `looks_first`: whether another one may have told it long ago, in a tier that both share.
        Raises DeadlineExceeded when the time is up, or nobody waits any more.
        """
        deadline, loop = self._learning.context.deadline, asyncio.get_running_loop()
        abandonment = self._learning.abandonment
        if self._leases is None:
            return 0
        for pause in pauses():
            if await self._leases.acquire([self._key.address]):
                self._is_held = True
                # Whoever had it has told before it was given back.
                is_first = pause == MIN_PAUSE_S and not looks_first
                width = 0 if is_first else await find_width(self._key)
            else:
                width = await find_width(self._key)
            if width:
                self.release(is_written=False)
            if width or self._is_held:
                return width
            left = math.inf if deadline is None else deadline - loop.time()
            await asyncio.wait((abandonment,), timeout=min(pause, left))
            if abandonment.done() or left <= 0:
                raise DeadlineExceeded("the time of the request was up")
        return 0

    def release(self, *, is_written: bool) -> None:
        """Give it back if it is held."""
        if self._leases is not None and self._is_held:
            self._is_held = False
            self._leases.release([self._key.address], is_written=is_written)


async def embed_one_first(
    inputs: Sequence[Input], index: int, first: EmbedSome, others: EmbedSome
) -> CountedEmbeddings:
    """Ask `first` for the input at a place, and its equals, then `others` for the rest, if any.

    Returns the answer to all of them. Raises EmbeddingError, with a place among all of them.
    """
    parts: list[tuple[Sequence[int], Embedded]] = []
    usages = []
    same: list[int] = []
    rest: list[int] = []
    others_inputs: list[Input] = []
    async for some in slices(range(len(inputs))):
        for at in some:
            if inputs[at] == inputs[index]:
                same.append(at)
            else:
                rest.append(at)
                others_inputs.append(inputs[at])
    for indices, items, ask in (
        (same, [inputs[index]] * len(same), first),
        (rest, others_inputs, others),
    ):
        if not indices:
            continue
        try:
            answer = await ask(items)
        except EmbeddingError as error:
            if error.index is None:
                raise
            raise name_input(error, indices[error.index], len(inputs)) from error
        parts.append((indices, answer))
        usages.append(answer.usage)
    if not rest:
        return answer
    whole = await assembly.assemble_in_steps(parts)
    return CountedEmbeddings(
        vectors=whole.vectors,
        tokens=whole.tokens,
        counted=whole.counted,
        providers=whole.providers,
        outcomes=whole.outcomes,
        usage=usages[0].plus(usages[1]),
    )


class _Bought:
    """One input that is bought past the cache; then the Embedder that gives the cache its answer.

    What was charged is told with the answer: by then it is known under which width it is counted.
    `keep` starts to keep the answer, which nothing ends early.
    """

    def __init__(
        self,
        item: Input,
        on_charge: OnCharge | None,
        keep: Callable[["_Bought"], asyncio.Task[CountedEmbeddings]],
    ) -> None:
        self.item = item
        self.kept: asyncio.Task[CountedEmbeddings] | None = None
        """Done when the answer, which has come, is kept."""
        self.width = 0
        self._keep = keep
        self._answer: Embedded | None = None
        self._on_charge = on_charge
        self._bills: list[Bill] = []
        self._count: OnCharge = self._bills.append

    async def take(self, indices: Sequence[int], part: Embedded) -> None:  # noqa: ARG002 - OnPart
        """Take the answer, and return when it is kept."""
        if self.kept is None:
            self._answer, self.width = part, len(part.vectors[0]) // 4
            self.kept = self._keep(self)
        await asyncio.wait([self.kept])

    async def result(self) -> tuple[int, CountedEmbeddings]:
        """Return the width, and the answer as the cache gives it. Raises InvalidAnswer."""
        if self.kept is None:
            raise RuntimeError("nothing was bought")
        return self.width, await asyncio.shield(self.kept)

    def charge(self, bill: Bill) -> None:
        """Take a charge, and tell the client's `on_charge`."""
        if self._on_charge is not None:
            self._on_charge(bill)
        self._count(bill)

    def tell_charges(self, count: OnCharge) -> None:
        """Tell all charges so far, and each that comes later."""
        bills, self._bills = self._bills, []
        self._count = count
        for bill in bills:
            count(bill)

    async def embed(
        self,
        space: Space,  # noqa: ARG002 - that of the answer
        inputs: Sequence[Input],  # noqa: ARG002
        context: Context,
    ) -> Embedded:
        """Return the answer."""
        if context.on_charge is not None:
            self.tell_charges(context.on_charge)
        if self._answer is None:
            raise RuntimeError("nothing was bought")
        return self._answer


async def _wait(learning: _Learning, context: Context) -> None:
    """Wait for a width, until the deadline of a request at most. Raises DeadlineExceeded."""
    try:
        async with asyncio.timeout_at(context.deadline):
            await wait([learning])
    except TimeoutError as error:
        raise DeadlineExceeded("the time of the request was up") from error
