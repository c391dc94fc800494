"""`embedding-proxy cache …`: look at the store, delete from it, copy it. Beside a running proxy."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cache import backup, disk, purge, stats
from cache.database import Database
from cache.key import Namespace, keyring
from proxy import config
from proxy.service import GIB
from proxy.settings import Settings

from . import spans
from .common import ConfigOption, JsonOption, WorkFailed, age, print_json, progress, size

app = typer.Typer(no_args_is_help=True, help="Look at the cache, mend it, copy it, delete from it.")

WIDEST = 140
"""Columns of a table, at least."""

NamespaceOption = Annotated[
    str | None, typer.Option(help='Only this namespace; "" is that of clients without one.')
]
SpaceOption = Annotated[
    str | None, typer.Option(help="Only this space, as `cache stats` shows it.")
]


@contextmanager
def opened(settings: Settings, *, create: bool = False) -> Iterator[Database]:
    """Give the store that a configuration names. Raises StoreError."""
    cache = settings.cache
    limit = int(cache.size_limit_gib * GIB)
    with disk.opened(cache.directory, limit, cache.pinned, create=create) as file:
        yield file


@app.command(name="stats")
def show_stats(*, config_file: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show what is kept, by namespace and space, how often it was used, and what that saved."""
    settings = config.load(config_file)
    with opened(settings) as file:
        held = stats.gather(file)
    shown = _as_dict(settings, held)
    if as_json:
        print_json(shown)
    else:
        _print_stats(settings, held, shown)


def prices(settings: Settings) -> dict[str, float]:
    """Return the price of each space, in USD per million tokens; the first model's that has it."""
    found: dict[str, float] = {}
    for model in settings.models.values():
        found.setdefault(model.space, model.price)
    return found


def _as_dict(settings: Settings, held: stats.Stats) -> dict[str, Any]:
    price = prices(settings)

    def usd(space: str, tokens: int) -> float:
        return round(price.get(space.partition("?")[0], 0.0) * tokens / 1e6, 6)

    partitions = []
    for one in held.held:
        namespace, space, dimensions = one.partition
        partitions.append(
            {
                "namespace": namespace,
                "space": space,
                "dimensions": dimensions,
                "entries": one.entries,
                "bytes": one.bytes,
                "oldest": one.oldest,
                "newest": one.newest,
                "last_used": one.last_used,
                **one.usage._asdict(),
                "hit_rate": round(one.usage.hit_rate, 4),
                "usd_saved": usd(space, one.usage.tokens_saved),
                "usd_billed": usd(space, one.usage.tokens_billed),
            }
        )
    total = held.usage
    return {
        "directory": str(settings.cache.directory),
        "file_bytes": held.file_bytes,
        "size_limit_bytes": int(settings.cache.size_limit_gib * GIB),
        "entries": held.entries,
        "counted_since": None if held.since_day is None else held.since_day * 86_400,
        **total._asdict(),
        "hit_rate": round(total.hit_rate, 4),
        "usd_saved": round(sum(one["usd_saved"] for one in partitions), 6),
        "usd_billed": round(sum(one["usd_billed"] for one in partitions), 6),
        "partitions": partitions,
    }


def _print_stats(settings: Settings, held: stats.Stats, shown: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415 - takes 50 ms, which `serve` is spared
    from rich.table import Table  # noqa: PLC0415

    now = time.time()
    table = Table(box=None, pad_edge=False)
    for title in ("namespace", "space"):
        table.add_column(title, no_wrap=True)
    for title in (
        "width",
        "entries",
        "size",
        "oldest",
        "used",
        "hit rate",
        "tokens saved",
        "saved",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for one in shown["partitions"]:
        spans_shown = (
            "" if one[name] is None else age(now - one[name]) for name in ("oldest", "last_used")
        )
        asked = one["hits"] + one["joins"] + one["misses"] + one["duplicates"]
        table.add_row(
            one["namespace"] or "-",
            one["space"],
            str(one["dimensions"] or ""),
            f"{one['entries']:,}",
            size(one["bytes"]),
            *spans_shown,
            f"{one['hit_rate']:.1%}" if asked else "",
            f"{one['tokens_saved']:,}",
            f"${one['usd_saved']:,.4f}",
        )
    # Too wide for a narrow terminal is better than a column of single letters.
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, WIDEST)
    console.print(
        f"{settings.cache.directory}: {held.entries:,} entries, {size(held.file_bytes)}"
        f" on disk of at most {size(shown['size_limit_bytes'])}",
        soft_wrap=True,
    )
    if shown["partitions"]:
        console.print(table)
    usage = held.usage
    if usage.inputs:
        console.print(
            f"{usage.inputs:,} inputs were asked for, {usage.misses:,} of them bought:"
            f" hit rate {usage.hit_rate:.1%}, ${shown['usd_saved']:,.4f} saved,"
            f" ${shown['usd_billed']:,.4f} spent.",
            soft_wrap=True,
        )


@app.command(name="purge")
def purge_entries(  # noqa: PLR0913 - one parameter an option
    *,
    config_file: ConfigOption = None,
    namespace: NamespaceOption = None,
    space: SpaceOption = None,
    older_than: Annotated[
        str | None, typer.Option(help="Only what was bought longer ago: 90d, 12h, 30min.")
    ] = None,
    unused_for: Annotated[
        str | None, typer.Option(help="Only what was used last longer ago: 90d, 12h, 30min.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--input", help="Only this input; needs --model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model of --input.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All entries.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be deleted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the entries for which all that is given holds; running proxies forget them soon."""
    settings = config.load(config_file)
    if text is not None:
        choice = _of_input(settings, text, model, namespace)
    else:
        now = time.time()
        choice = purge.Choice(
            namespace=namespace,
            space=space,
            stored_before=spans.before(now, older_than, "--older-than"),
            used_before=spans.before(now, unused_for, "--unused-for"),
        )
    if choice == purge.Choice() and not everything:
        raise config.ConfigError("cache purge: say what to delete, or --all; see --help")
    with opened(settings) as file:
        entries, held = purge.count(file, choice)
        deleted = 0
        if not dry_run:
            with progress("deleting", entries) as tell:
                for count in purge.delete(file, choice):
                    deleted += count
                    tell(deleted)
                purge.announce(file, deleted)
    if as_json:
        print_json({"chosen": entries, "bytes": held, "deleted": deleted, "dry_run": dry_run})
    elif dry_run:
        typer.echo(f"{entries:,} entries, {size(held)}, would be deleted")
    else:
        typer.echo(f"{deleted:,} entries deleted, {size(held)}")


def _of_input(
    settings: Settings, text: str, model: str | None, namespace: str | None
) -> purge.Choice:
    entry = settings.models.get(model or "")
    if entry is None:
        names = ", ".join(sorted(settings.models))
        raise config.ConfigError(f"--model: name the model of --input; known: {names}")
    ring = keyring(entry.as_space(), Namespace(namespace or ""))
    return purge.Choice(address=ring.key(text).address)


@app.command(name="backup")
def back_up(
    target: Annotated[Path, typer.Argument(metavar="FILE")],
    *,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the whole store, as it is at this moment, to FILE, while proxies go on."""
    if target.exists():
        raise WorkFailed(f"{target} exists; it is not overwritten")
    with opened(config.load(config_file)) as file, progress("copying") as tell:
        backup.copy(file, target, lambda done, _total: tell(done))
    written = target.stat().st_size
    if as_json:
        print_json({"file": str(target), "bytes": written})
    else:
        typer.echo(f"{target}: {size(written)}; to restore it, put it in the place of cache.db")
