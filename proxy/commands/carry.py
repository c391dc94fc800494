"""`embedding-proxy cache export` and `import`: a cache carried elsewhere, and what people own."""

import asyncio
import random
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from cache import archive, transfer
from cache.archive import ArchiveError
from cache.key import Namespace, keyring
from cache.pairs import Source
from cache.purge import Choice, count
from cache.row import Row
from proxy import config
from proxy.adopt import Adoption, SampleDiffers, Survey
from proxy.opening import make_router, open_providers
from proxy.settings import Settings
from proxy.sources import FORMATS, open_source

from .cache import NamespaceOption, SpaceOption, app, opened
from .common import ConfigOption, JsonOption, WorkFailed, print_json, progress

_MAGIC = b"EMBA"
_STREAM = "-"


@app.command(name="export")
def export(
    target: Annotated[str, typer.Argument(metavar="FILE", help="- is standard output.")],
    *,
    config_file: ConfigOption = None,
    namespace: NamespaceOption = None,
    space: SpaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write entries to one file, to be carried elsewhere; such files can be joined with cat."""
    settings = config.load(config_file)
    choice = Choice(namespace=namespace, space=space)
    report = transfer.Read()
    with opened(settings) as database:
        total, _ = count(database, choice)
        with _written(target) as file, progress("exporting", total) as tell:
            rows = _told(transfer.rows(database, choice, report), tell)
            written = archive.write(file, rows)
    left_out = f", {report.damaged} damaged ones left out" if report.damaged else ""
    if as_json and target != _STREAM:
        print_json({"file": target, "entries": written, "damaged": report.damaged})
    else:
        typer.echo(f"{target}: {written:,} entries{left_out}", err=target == _STREAM)


@contextmanager
def _written(target: str) -> Iterator[BinaryIO]:
    """Give a file that is there under its name only once it is whole. Raises WorkFailed."""
    if target == _STREAM:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(target)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise WorkFailed(f"{target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _told(rows: Iterator[Row], tell: Any) -> Iterator[Row]:  # noqa: ANN401 - a function
    for number, row in enumerate(rows, start=1):
        tell(number)
        yield row


@app.command(name="import")
def take_in(  # noqa: PLR0913 - one parameter an option
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file of `cache export` (- is standard input), or text and embeddings:"
            " JSONL, Parquet, a folder of LangChain, qdrant://host/collection.",
        ),
    ],
    *,
    config_file: ConfigOption = None,
    model: Annotated[
        str | None, typer.Option(help="The model of the embeddings, if SOURCE is no export.")
    ] = None,
    namespace: Annotated[str, typer.Option(help="Where they go, if SOURCE is no export.")] = "",
    sample: Annotated[
        int,
        typer.Option(min=0, help="Embed so many texts anew to prove the model; 0 = trust SOURCE."),
    ] = 5,
    kind: Annotated[
        str | None, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column of the text.")] = "text",
    vector_field: Annotated[
        str | None, typer.Option(help="Field or column of the embedding; a named vector.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="File of the texts, for LangChain's folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take in entries of an export, or embeddings you already own; what is there stays."""
    settings = config.load(config_file)
    if _is_archive(source):
        with _read(source) as file:
            _take_archive(settings, source, file, dry_run=dry_run, as_json=as_json)
        return
    if model not in settings.models:
        names = ", ".join(sorted(settings.models))
        raise config.ConfigError(f"--model: name the model of the embeddings; known: {names}")
    pairs = open_source(
        source, format=kind, text_field=text_field, vector_field=vector_field, texts=texts
    )
    entry = settings.models[model]
    ring = keyring(entry.as_space(), Namespace(namespace))
    adoption = Adoption(ring, unit_norm=entry.unit_norm)
    survey = _survey(adoption, pairs, sample)
    cosine = None
    if sample and survey.sample:
        cosine = asyncio.run(_compare(settings, model, adoption, survey))
    sums = _put(settings, adoption.rows(pairs), survey.pairs, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "pairs": survey.pairs,
                "stored": sums.stored,
                "present": sums.present,
                "refused": survey.refused,
                "first_refused": [{"where": r.where, "why": r.why} for r in survey.first_refused],
                "sample_cosine": cosine,
                "dry_run": dry_run,
            }
        )
    else:
        _tell_sums(sums, dry_run=dry_run)
        for refused in survey.first_refused:
            typer.echo(f"  refused: {refused.where}: {refused.why}", err=True)
        if survey.refused:
            typer.echo(f"  {survey.refused:,} refused in all", err=True)
    if survey.refused:
        raise typer.Exit(1)


def _is_archive(source: str) -> bool:
    if source == _STREAM or source.endswith(".emba"):
        return True
    try:
        with Path(source).open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


@contextmanager
def _read(source: str) -> Iterator[BinaryIO]:
    if source == _STREAM:
        yield sys.stdin.buffer
        return
    try:
        with Path(source).open("rb") as file:
            yield file
    except OSError as error:
        raise WorkFailed(f"{source}: {error.strerror or error}") from error


def _take_archive(
    settings: Settings, source: str, file: BinaryIO, *, dry_run: bool, as_json: bool
) -> None:
    report = archive.Report()
    try:
        sums = _put(settings, archive.read(file, report), None, dry_run=dry_run)
    except ArchiveError as error:
        raise WorkFailed(f"{source}: {error}") from error
    if as_json:
        print_json(
            {
                "entries": report.entries,
                "stored": sums.stored,
                "present": sums.present,
                "complete": report.complete,
                "missing": report.missing,
                "damaged_places": report.damaged_places,
                "damaged_bytes": report.damaged_bytes,
                "dry_run": dry_run,
            }
        )
    else:
        _tell_sums(sums, dry_run=dry_run)
    if not report.complete:
        raise WorkFailed(
            f"{source}: not all of it is whole: {report.damaged_places} places are damaged"
            f" ({report.damaged_bytes:,} bytes), {report.missing:,} entries are known to be missing"
        )


def _put(
    settings: Settings, rows: Iterator[Row], total: int | None, *, dry_run: bool
) -> transfer.Written:
    sums = transfer.Written()
    with opened(settings, create=True) as database, progress("importing", total) as tell:
        for sums in transfer.put(database, rows, dry_run=dry_run):
            tell(sums.stored + sums.present)
    return sums


def _tell_sums(sums: transfer.Written, *, dry_run: bool) -> None:
    verb = "would be taken in" if dry_run else "taken in"
    typer.echo(f"{sums.stored:,} entries {verb}, {sums.present:,} were there already")


def _survey(adoption: Adoption, source: Source, sample: int) -> Survey:
    found = Survey()
    # The sample is drawn anew each time: nobody can prepare for it.
    with progress("reading") as tell:
        for found in adoption.survey(source, sample, random.SystemRandom()):
            tell(found.pairs + found.refused)
    if not found.pairs:
        why = f": {found.first_refused[0].why}" if found.first_refused else ""
        raise WorkFailed(f"{source.name}: there is nothing that could be taken in{why}")
    return found


async def _compare(settings: Settings, model: str, adoption: Adoption, survey: Survey) -> float:
    async with AsyncExitStack() as stack:
        providers = await open_providers(settings, stack)
        router = make_router(settings, model, providers, asyncio.sleep)
        if not router.routes:
            raise WorkFailed(
                f"{router.unavailable} Or trust the source without a sample: --sample 0"
            )
        try:
            return await adoption.compare(survey.sample, router)
        except SampleDiffers as error:
            raise WorkFailed(str(error)) from error
