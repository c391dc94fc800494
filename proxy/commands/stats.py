"""`embedding-proxy cache stats`: what is kept, how often it was used, and what that saved."""

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from embedding_proxy.cache import ledger
from embedding_proxy.cache.disk import ledger_reader
from embedding_proxy.cache.maintenance import stats
from embedding_proxy.proxy import config
from embedding_proxy.proxy.formatting import age, count, money, saved, share, size
from embedding_proxy.proxy.http import sums
from embedding_proxy.proxy.service import GIB
from embedding_proxy.proxy.settings.schema import Settings

from .cache import opened_for_reading
from .common import ConfigOption, JsonOption, console, path_text, print_json
from .groups import cache_app as app

WIDEST = 120
"""Characters of a table's line, beside the name of a space."""


@app.command(name="stats")
def show_stats(
    *,
    config_file: ConfigOption = None,
    by: Annotated[
        list[ledger.By] | None,
        typer.Option(help="Show the bill instead, summed by this; may be given several times."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is kept, by namespace and space, how often it was used, and what that saved."""
    settings = config.load(config_file, purpose="inspect")
    columns = list(dict.fromkeys(by or ()))
    with opened_for_reading(settings) as file:
        if columns:
            bill = [sums.line(columns, *line) for line in ledger_reader.read(file.sql, columns)]
        else:
            held = stats.gather(file)
    if columns:
        if as_json:
            print_json(bill)
        else:
            _print_bill(columns, bill)
        return
    shown = _as_dict(settings, held)
    if as_json:
        print_json(shown)
    else:
        _print_stats(held, shown)


def _as_dict(settings: Settings, held: stats.Stats) -> dict[str, Any]:
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
                **sums.shown(one.usage),
            }
        )
    return {
        "directory": path_text(settings.cache.directory.absolute()),
        "file_bytes": held.file_bytes,
        "data_bytes": held.data_bytes,
        "wal_bytes": held.log_bytes,
        "size_limit_bytes": int(settings.cache.size_limit_gib * GIB),
        "entries": held.entries,
        "counted_since": None if held.since_day is None else held.since_day * 86_400,
        **sums.shown(held.usage),
        "partitions": partitions,
    }


def _print_stats(held: stats.Stats, shown: dict[str, Any]) -> None:
    from rich.table import Table  # noqa: PLC0415 - takes 50 ms, which `serve` is spared

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
        "share",
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
            share(asked - one["misses"], asked),
            f"{one['tokens_saved']:,}",
            money(one["usd_saved"]),
            share(one["usd_saved"], one["usd_saved"] + one["usd_billed"]),
        )
    longest = max((len(one["space"]) for one in shown["partitions"]), default=0)
    out = console(WIDEST + longest)
    out.print(
        f"{count(held.entries, 'entry', 'entries')}: {size(held.data_bytes)} of data and"
        f" {size(held.log_bytes)} of write-ahead log, of at most"
        f" {size(shown['size_limit_bytes'])}",
        soft_wrap=True,
    )
    if shown["partitions"]:
        out.print(table)
    usage = held.usage
    if usage.inputs:
        out.print(
            f"{count(usage.inputs, 'input was', 'inputs were')} asked for,"
            f" {usage.misses:,} of them bought:"
            f" hit rate {share(usage.inputs - usage.misses, usage.inputs)},"
            f" {saved(shown['usd_saved'], shown['usd_billed'])},"
            f" {money(shown['usd_billed'])} spent.",
            soft_wrap=True,
        )


def _print_bill(columns: Sequence[str], bill: list[dict[str, Any]]) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False)
    for title in columns:
        table.add_column(title, no_wrap=True)
    for title in ("inputs", "bought", "tokens billed", "billed", "tokens saved", "saved", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in bill:
        inputs = one["hits"] + one["joins"] + one["misses"] + one["duplicates"]
        table.add_row(
            *(str(one[name] or "-") for name in columns),
            f"{inputs:,}",
            f"{one['misses']:,}",
            f"{one['tokens_billed']:,}",
            money(one["usd_billed"]),
            f"{one['tokens_saved']:,}",
            money(one["usd_saved"]),
            share(one["usd_saved"], one["usd_saved"] + one["usd_billed"]),
        )
    longest = max((sum(len(str(one[name])) for name in columns) for one in bill), default=0)
    console(WIDEST + longest).print(table)
