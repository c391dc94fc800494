"""`embedding-proxy warm`: embed the texts of files ahead of time, after showing what that costs.

Everything is read twice: once to count what there is to buy, and once to buy it. What is bought is
in the cache at once, so that a run that was interrupted goes on where it ended, for nothing.
"""

import asyncio
import logging
import math
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from embedding_proxy.cache.ledger import Usage
from embedding_proxy.cache.maintenance.import_source import RejectedPair, SourceError
from embedding_proxy.index.migration.embedding import Rejection, RetryingEmbedder
from embedding_proxy.index.migration.plan import CALL_S
from embedding_proxy.providers.charge import NANO
from embedding_proxy.providers.errors import EmbeddingError, InvalidRequest
from embedding_proxy.providers.profile import Limits
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.errors import ConfigError
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.importers.texts import Split, Text, TextFiles
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from embedding_proxy.proxy.service.inputs import CostPreview

from .formatting import age, count, money
from .migrate_options import (
    NamedModel,
    NamespaceOption,
    Target,
    find_model,
    settings_for,
    width_of,
)
from .output import (
    ConfigOption,
    JsonOption,
    SetOption,
    WorkFailed,
    confirm,
    need_terminal,
    parse_settings,
    print_json,
    printable,
    progress,
    tell_store,
)

CLIENT = "warm"
"""The client in the ledger for the purchases."""
BATCH = 1024
"""Texts that are looked up and bought at a time."""
BESIDE = 4
"""Batches that are bought at the same time."""
_MAX_SHOWN = 5
_STREAM = "-"


@dataclass(slots=True)
class Preview:
    """The work of a run, before anything is bought."""

    inputs: int = 0
    distinct: int = 0
    cached: int = 0
    """Tokens of the distinct texts."""
    to_buy: int = 0
    tokens: int = 0
    """Tokens of the texts to buy."""
    dollars: float = 0.0
    seconds: float = 0.0
    """An estimate, within the limits of the first provider."""
    refused: int = 0
    first_refused: list[RejectedPair] = field(default_factory=list)

    def refuse(self, text: RejectedPair) -> None:
        """Count a text that cannot be embedded."""
        self.refused += 1
        if len(self.first_refused) < _MAX_SHOWN:
            self.first_refused.append(text)


class Warmer:
    """Embeds the texts of files with a model."""

    def __init__(self, texts: TextFiles, target: Target, price: float) -> None:
        """`price` is in US dollars for a million tokens."""
        self._texts = texts
        self._target = target
        self._price = price

    async def preview(self) -> Preview:
        """Return the preview; nothing is bought. Raises SourceError, EmbeddingError."""
        preview = Preview()
        with progress("reading") as tell:
            async for texts in self._missing(preview):
                preview.to_buy += len(texts)
                preview.tokens += sum(look.tokens for _, look in texts)
                tell(preview.inputs)
        preview.dollars = preview.tokens * self._price / 1e6
        preview.seconds = _seconds(preview, self._target.limits)
        return preview

    async def buy(self, planned: Preview, spending: "Spending") -> Preview:
        """Buy the missing texts; return a new preview of all texts. Raises as `preview` does."""
        preview = Preview()
        embedder = RetryingEmbedder(self._target)
        places = asyncio.Semaphore(BESIDE)
        count = 0
        with progress("embedding", planned.to_buy, spending.note) as tell:

            async def embed(batch: list[tuple[str, CostPreview]]) -> None:
                nonlocal count
                for answer in await embedder.embed([text for text, _ in batch]):
                    if isinstance(answer, Rejection):
                        preview.refuse(RejectedPair("a text", answer.why))
                places.release()
                count += len(batch)
                tell(count)

            try:
                async with asyncio.TaskGroup() as group:
                    async for batch in self._missing(preview):
                        spending.check_kept()
                        preview.to_buy += len(batch)
                        await places.acquire()
                        group.create_task(embed(batch))
            except* (EmbeddingError, WorkFailed) as failures:
                raise failures.exceptions[0] from None
        return preview

    async def _missing(self, preview: Preview) -> AsyncIterator[list[tuple[str, CostPreview]]]:
        """Yield the texts that are not cached, each once, in batches; count all in `preview`."""
        keys: set[bytes] = set()
        texts = iter(self._texts)
        while batch := await _read_batch(texts):
            preview.inputs += len(batch)
            usable = []
            for text in batch:
                if isinstance(text, RejectedPair):
                    preview.refuse(text)
                else:
                    usable.append(text)
            missing = []
            for text, look in await self._look(usable, preview):
                if look.key not in keys:
                    keys.add(look.key)
                    preview.cached += look.cached
                    if not look.cached:
                        missing.append((text, look))
            preview.distinct = len(keys)
            yield missing

    async def _look(self, texts: list[str], preview: Preview) -> list[tuple[str, CostPreview]]:
        """Return the preview of each text; a text that no request can hold is refused."""
        while texts:
            try:
                return list(zip(texts, await self._target.look(texts), strict=True))
            except InvalidRequest as error:
                if error.index is None:
                    raise
                preview.refuse(RejectedPair("a text", str(error)))
                texts = [*texts[: error.index], *texts[error.index + 1 :]]
        return []


async def _read_batch(texts: Iterator[Text]) -> list[Text]:
    """Return the next texts, read in a thread of their own.

    A query or a pipe may take for ever: at Ctrl-C the process does not wait for such a thread.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[Text]] = loop.create_future()

    def read() -> None:
        batch: list[Text] = []
        failure: Exception | None = None
        try:
            batch = list(islice(texts, BATCH))
        except Exception as error:  # noqa: BLE001 - raised where it is awaited
            failure = error
        # The loop is closed if nobody waits any more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(resolve, batch, failure)

    def resolve(batch: list[Text], failure: Exception | None) -> None:
        if future.done():
            return
        if failure is None:
            future.set_result(batch)
        else:
            future.set_exception(failure)

    threading.Thread(target=read, name="texts", daemon=True).start()
    return await future


def _seconds(preview: Preview, limits: Limits) -> float:
    """Return the approximate time of the purchases within the provider's limits.

    A call is assumed to need CALL_S: nothing is bought to measure it.
    """
    calls = math.ceil(preview.to_buy / min(BATCH, limits.inputs))
    if limits.tokens:
        calls = max(calls, math.ceil(preview.tokens / limits.tokens))
    minutes = max(
        calls / (limits.requests_per_minute or math.inf),
        preview.tokens / (limits.tokens_per_minute or math.inf),
    )
    return max(math.ceil(calls / limits.concurrency) * CALL_S, 60 * minutes)


class Spending:
    """The purchases of a service for this command."""

    def __init__(self, service: EmbeddingService) -> None:
        self._service = service

    @property
    def usage(self) -> Usage:
        """The sums of the ledger since the start."""
        counted = self._service.counted.items()
        return reduce(
            Usage.plus, (usage for key, usage in counted if key.client == CLIENT), Usage()
        )

    def check_kept(self) -> None:
        """Raise WorkFailed while the disk does not take what is bought: it would be lost."""
        if self._service.unwritten > BESIDE * BATCH:
            raise WorkFailed(
                "the disk does not take what is bought, so no more is; free some space, and start"
                " again to go on"
            )

    def note(self) -> str:
        """Return the money spent, for the progress line."""
        return f"({money(self.usage.nanodollars_billed / NANO)} spent)"


def warm(  # noqa: PLR0913 - its options
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Files or folders: text, Markdown, JSONL, CSV, Parquet, SQLite; - for lines of"
            " standard input.",
        ),
    ],
    *,
    model: Annotated[str, typer.Option(help="The model, as clients name it.")],
    namespace: NamespaceOption = "",
    split: Annotated[
        Split | None,
        typer.Option(help="What a text is in a text file. Default: line; paragraph in Markdown."),
    ] = None,
    text_field: Annotated[
        str, typer.Option("--field", help="Field of JSONL, or column of CSV and Parquet.")
    ] = "text",
    glob: Annotated[str, typer.Option(help="Names of the files of a folder.")] = "*",
    query: Annotated[
        str | None, typer.Option(help="What gives the texts of a SQLite database, as SQL.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Show what there is to buy; buy nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before buying.")] = False,
    config_file: ConfigOption = None,
    replaced: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Embed the texts of files ahead of time, after showing what that costs.

    A text is cached as it stands: byte for byte what your application sends later. A run that was
    interrupted goes on when it is started again; what was bought is not bought again.
    """
    # Of waits for a provider that fails, which may take minutes.
    logging.getLogger("embedding_proxy.migrate").setLevel(logging.WARNING)
    if not dry_run:
        need_terminal("warm", "--yes", is_sure=yes)
    settings = loader.load(config_file, overrides=parse_settings(replaced))
    named_model = find_model(settings, model, "--model")
    if settings.cache.mode != "normal":
        raise ConfigError(
            f"cache.mode: {settings.cache.mode}: what is embedded would not be bought, or not be"
            " kept; set normal"
        )
    tell_store(settings)
    with _spool(places) as paths:
        try:
            texts = TextFiles(paths, split=split, field=text_field, glob=glob, query=query)
        except SourceError as error:
            raise WorkFailed(str(error)) from error
        report = Report(as_json=as_json, is_exact=named_model.space.tokenizer is not None)
        run = Run(settings, named_model, texts, report, namespace)
        try:
            asyncio.run(run.preview())
            if run.planned.to_buy and not dry_run:
                if run.unusable_reason:
                    raise WorkFailed(f"nothing can be bought: {run.unusable_reason}")
                # Not amid an event loop, where Ctrl-C would wait for the answer.
                if not yes:
                    confirm("Buy them?")
                asyncio.run(run.buy())
            else:
                report.end(run.planned, Usage())
        except SourceError as error:
            raise WorkFailed(f"{error}{run.kept}") from error
    if run.stopped_by is not None:
        raise typer.Exit(128 + run.stopped_by)
    if report.has_refused:
        raise typer.Exit(1)


@contextmanager
def _spool(places: Sequence[str]) -> Iterator[list[Path]]:
    """Give the paths of all sources. Standard input is read twice, so it is saved in a file."""
    if _STREAM not in places:
        yield [Path(place) for place in places]
        return
    with tempfile.NamedTemporaryFile(prefix="embedding-proxy-warm-", suffix=".txt") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        yield [Path(file.name if place == _STREAM else place) for place in places]


class Run:
    """One run of the command: a preview, and then the purchase."""

    def __init__(
        self,
        settings: Settings,
        model: NamedModel,
        texts: TextFiles,
        report: "Report",
        namespace: str,
    ) -> None:
        self._settings = settings_for(settings, model)
        self._model = model
        self._texts = texts
        self._report = report
        self._namespace = namespace
        self.planned = Preview()
        self.kept = ""
        """What is said of purchases behind a failure."""
        self.unusable_reason: str | None = None
        """Why nothing can be bought; None if something can."""
        self.stopped_by: int | None = None
        """The signal that has ended the purchase."""

    async def preview(self) -> None:
        """Print the preview. Raises SourceError, EmbeddingError."""
        async with self._open() as (_, target, warmer):
            self.planned = await warmer.preview()
            self._report.plan(self.planned)
            self.unusable_reason = target.unusable_reason

    async def buy(self) -> None:
        """Buy the missing texts, and print the result; SIGTERM ends it as Ctrl-C does."""
        async with self._open() as (service, target, warmer):
            spending, preview = Spending(service), self.planned
            self.kept = "; what was bought before stays"
            self._end_at_signals()
            try:
                preview = await warmer.buy(self.planned, spending)
            except asyncio.CancelledError:
                if self.stopped_by is None:
                    raise
            finally:
                # Requested vectors are paid for, so they are kept, also after Ctrl-C.
                await target.finish()
                self._report.end(preview, spending.usage)

    def _end_at_signals(self) -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int) -> None:
            if task is not None and self.stopped_by is None:
                self.stopped_by = number
                task.cancel()

        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop, number)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[tuple[EmbeddingService, Target, Warmer]]:
        service, model = EmbeddingService(self._settings), self._model
        target = Target(service, model, width_of(model, None), self._namespace, CLIENT)
        async with service:
            yield service, target, Warmer(self._texts, target, model.entry.price)


class Report:
    """Prints the preview and the result, as lines or as JSON."""

    def __init__(self, *, as_json: bool, is_exact: bool) -> None:
        """`is_exact` says whether tokens are counted by the model's own tokenizer."""
        self._as_json = as_json
        self._about = "" if is_exact else "about "
        self._planned = Preview()
        self.has_refused = False

    def plan(self, preview: Preview) -> None:
        """Print the preview."""
        self._planned = preview
        if self._as_json:
            return
        typer.echo(
            f"{count(preview.inputs, 'input')}: {preview.distinct:,} distinct, {preview.cached:,}"
            f" cached, {preview.to_buy:,} to buy"
        )
        if preview.to_buy:
            typer.echo(
                f"{self._about}{count(preview.tokens, 'token')} to buy for"
                f" {self._about}{money(preview.dollars)}, in about {age(preview.seconds)}"
            )

    def end(self, preview: Preview, usage: Usage) -> None:
        """Print the result."""
        self.has_refused = bool(preview.refused)
        billed = usage.nanodollars_billed / NANO
        if self._as_json:
            planned = self._planned
            print_json(
                {
                    "inputs": planned.inputs,
                    "distinct": planned.distinct,
                    "cached": planned.cached,
                    "to_buy": planned.to_buy,
                    "tokens_to_buy": planned.tokens,
                    "usd_to_buy": planned.dollars,
                    "seconds": round(planned.seconds, 1),
                    "bought": usage.misses,
                    "tokens_billed": usage.tokens_billed,
                    "usd_billed": billed,
                    "refused": preview.refused,
                    "first_refused": [
                        {"where": r.where, "why": r.why} for r in preview.first_refused
                    ],
                }
            )
        elif usage.misses:
            typer.echo(
                f"{count(usage.misses, 'text')} bought for {money(billed)}"
                f" ({count(usage.tokens_billed, 'token')})"
            )
        for refused in () if self._as_json else preview.first_refused:
            typer.echo(printable(f"  refused: {refused.where}: {refused.why}"), err=True)
        if preview.refused and not self._as_json:
            typer.echo(f"  {preview.refused:,} refused in all", err=True)
