"""`embedding-proxy check`: whether what a configuration names works, before the first request."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any

import typer
from embedding_proxy.cache.maintenance import location
from embedding_proxy.cache.maintenance.location import Inspection
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.loader import Configuration
from embedding_proxy.proxy.config.own_address import check_own_address
from embedding_proxy.proxy.config.schema import Cache
from embedding_proxy.proxy.diagnostics import check as index_check
from embedding_proxy.proxy.diagnostics.check import Checkup, examine, provider_problems
from embedding_proxy.proxy.diagnostics.routes import ModelSelection, RouteResult
from embedding_proxy.proxy.service.storage import GIB

from .formatting import count, size
from .output import (
    ConfigOption,
    JsonOption,
    SetOption,
    parse_settings,
    path_text,
    print_json,
    printable,
    progress,
)


def check(  # noqa: PLR0913 - its options
    *,
    config_file: ConfigOption = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Check only this model. Can be given several times."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Check every model that has a usable route.")
    ] = False,
    offline: Annotated[bool, typer.Option(help="Call no provider.")] = False,
    replaced: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Test the cache, Qdrant and every provider with a real embedding; compare the routes.

    It tests the models that the configuration names, and one model of each other provider. Exit
    code 1 if something does not work, or if the configuration names a provider that is not usable.
    """
    configuration = loader.read_configuration(config_file, overrides=parse_settings(replaced))
    settings = configuration.settings
    check_own_address(configuration)
    choice = ModelSelection(
        model or configuration.models,
        # The built-in configuration names a model, too, but nobody asked for it.
        must_work=bool(model or config_file),
        also="all" if everything else "nothing" if model else "each provider",
    )
    cache = settings.cache
    limit = int(cache.size_limit_gib * GIB)
    store = location.inspect(cache.directory, limit, cache.pinned_namespaces)
    with progress("asking") as tell:
        checkup = asyncio.run(examine(settings, choice, offline=offline, tell=tell))
    qdrant = asyncio.run(index_check.check_qdrant(settings, offline=offline))
    problems = [*_unset(configuration), *checkup.problems]
    if not model:
        problems += provider_problems(configuration, checkup.providers)
    if qdrant is not None and qdrant.problem:
        problems = [path_text(qdrant.problem), *problems]
    if store.problem:
        problems = [f"cache: {path_text(store.problem)}", *problems]
    if as_json:
        shown = {
            "config": None if config_file is None else path_text(config_file),
            "cache": _cache_dict(cache, store),
            "index": qdrant and {**qdrant.as_json(), "place": path_text(qdrant.place)},
            **_found_dict(checkup),
            "problems": problems,
            "ok": not problems,
        }
        print_json(shown)
    else:
        typer.echo(printable(f"configuration: {config_file or 'built in'}"))
        index_lines = [] if qdrant is None else [path_text(qdrant.line)]
        for line in (*_cache_lines(cache, store), *index_lines, *_found_lines(checkup)):
            typer.echo(printable(line))
        _tell_problems(problems, offline=offline)
    if problems:
        raise typer.Exit(1)


def _unset(configuration: Configuration) -> Iterator[str]:
    """Yield the variables that the proxy needs to start, and a check does not."""
    for line in configuration.unresolved:
        yield f"{line}; without it `serve` does not start"


def _cache_dict(cache: Cache, store: Inspection) -> dict[str, Any]:
    return {
        "directory": path_text(cache.directory),
        "exists": store.exists,
        "entries": store.held and store.held.entries,
        "file_bytes": store.held and store.held.file_bytes,
        "size_limit_bytes": int(cache.size_limit_gib * GIB),
        "free_bytes": store.location.free_bytes,
        "file_system": store.location.file_system,
        "network": store.location.is_remote,
        "ok": not store.problem,
        "error": path_text(store.problem) or None,
    }


def _cache_lines(cache: Cache, store: Inspection) -> Iterator[str]:
    limit = size(cache.size_limit_gib * GIB)
    if store.held is not None:
        entries = count(store.held.entries, "entry", "entries")
        says = f"{entries}, {size(store.held.file_bytes)} of at most {limit}"
    elif store.problem:
        says = "cannot be used"
    else:
        says = f"no store yet, the proxy makes it at its first start; at most {limit}"
    free = size(store.location.free_bytes)
    yield f"cache: {path_text(cache.directory)}: {says}; {free} are free on the disk"
    if store.lacking_bytes:
        yield (
            f"  the disk has {size(store.lacking_bytes)} less room than cache.size_limit_gib"
            " allows: free some, or lower the limit"
        )
    if store.location.is_remote:
        yield (
            f"  {store.location.file_system} is a network file system, on which SQLite's locks do"
            " not hold: the store may be damaged there, use a disk of this machine"
        )


def _found_dict(checkup: Checkup) -> dict[str, Any]:
    return {
        "providers": {
            name: {"state": status.state, "kind": status.kind, "why": status.why or None}
            for name, status in checkup.providers.items()
        },
        "routes": [_route_dict(result) for result in checkup.results],
        "pairs": [
            {
                "space": pair.one.space.name,
                "one": str(pair.one),
                "other": str(pair.other),
                "cosine": round(pair.cosine, 9),
                "ok": pair.ok,
            }
            for pair in checkup.comparisons
        ],
    }


def _route_dict(result: RouteResult) -> dict[str, Any]:
    probe = result.probe
    return {
        "model": result.models[0],
        "also": result.models[1:],
        "space": result.space.name,
        "provider": result.provider,
        "upstream_model": result.upstream_model,
        "ok": result.ok,
        "latency_ms": probe and round(1000 * probe.seconds, 1),
        "dimensions": result.width or None,
        "tokens": probe.tokens if probe and result.ok else None,
        "error": result.why or None,
    }


def _found_lines(checkup: Checkup) -> Iterator[str]:
    yield ""
    yield from _align(
        (status.state, name, status.why or f"kind {status.kind}")
        for name, status in checkup.providers.items()
    )
    rows = iter(list(_align(_cells(result) for result in checkup.results)))
    for space, group in groupby(checkup.results, key=lambda result: result.space.name):
        here = list(group)
        names = dict.fromkeys(name for result in here for name in result.models)
        yield ""
        yield f"{', '.join(names)}: space {space}"
        for _ in here:
            yield f"  {next(rows)}"
        for pair in checkup.comparisons:
            if pair.one.space.name == space:
                verdict = "agree" if pair.ok else "DISAGREE"
                yield f"  {pair.one} and {pair.other} {verdict}: cosine {pair.cosine:.6f}"


def _cells(result: RouteResult) -> tuple[str, ...]:
    where = (result.provider, result.upstream_model)
    if result.probe is None:
        return "-", *where, result.why
    time = f"{1000 * result.probe.seconds:.0f} ms"
    if not result.ok:
        return "FAILED", *where, time
    return "ok", *where, time, f"width {result.width}", f"{result.probe.tokens} tokens"


def _align(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the rows as lines whose cells stand below one another; the last of a row is free."""
    rows = list(rows)
    widths: dict[int, int] = {}
    for row in rows:
        for i, cell in enumerate(row[:-1]):
            widths[i] = max(widths.get(i, 0), len(cell))
    for row in rows:
        cells = [cell.ljust(widths[i]) for i, cell in enumerate(row[:-1])]
        yield "  ".join([*cells, row[-1]])


def _tell_problems(problems: Sequence[str], *, offline: bool) -> None:
    typer.echo()
    if not problems:
        typer.echo("No problem found; no provider was asked." if offline else "No problem found.")
        return
    typer.echo(f"{count(len(problems), 'problem')}:")
    for problem in problems:
        typer.echo(printable(f"  {problem}"))
