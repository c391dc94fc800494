"""`embedding-proxy cache stats`: what is kept, how often it was used, and what that saved."""

import time
from typing import Any

from cache import stats
from proxy import config
from proxy.service import GIB
from proxy.settings import Settings

from .cache import app, opened
from .common import ConfigOption, JsonOption, age, path_text, print_json, size

WIDEST = 120
"""Characters of a table's line, beside the name of a space."""


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
        found.setdefault(model.as_space().label, model.price)
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
        "directory": path_text(settings.cache.directory),
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
    console = Console(highlight=False, markup=False, emoji=False)
    longest = max((len(one["space"]) for one in shown["partitions"]), default=0)
    console.width = max(console.width, WIDEST + longest)
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
