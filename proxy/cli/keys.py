"""`embedding-proxy keys …`: the keys that clients send. A running proxy heeds each change.

A key is printed once, alone on stdout; the file of keys has its digest.
"""

import time
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated

import typer
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.database import FAILURES, FILE_NAME
from embedding_proxy.cache.disk.read_only import read_ledger
from embedding_proxy.cache.ledger import LedgerFilter
from embedding_proxy.providers.charge import NANO
from embedding_proxy.proxy.config import keys_file, loader
from embedding_proxy.proxy.config.keys_file import KeysFile, StoredKey
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.auth import read_keys

from .groups import keys_app
from .output import (
    MAX_TABLE_WIDTH,
    ConfigOption,
    JsonOption,
    WorkFailed,
    WrongUsage,
    console,
    path_text,
    print_json,
    printable,
    say,
)

GRACE_HOURS = 24.0
MAX_DAYS = 36_500
_ID = 8
"""Hexadecimal digits of a digest that a list shows, to tell keys of one name apart."""
_TIME = "%Y-%m-%dT%H:%M:%SZ"

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Who sends the key.")]


@keys_app.command(name="add")
def add_key(  # noqa: PLR0913 - the settings of a key
    name: NameArgument,
    *,
    namespace: Annotated[
        str, typer.Option(help="The part of the cache that its clients have to themselves.")
    ] = "",
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="USD[/day|/month]", help="Beyond it nothing is bought; hits are still served."
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="DATE|DAYS", help="From that moment on (UTC) it lets nobody in."),
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may read /metrics, and /status of everybody.")
    ] = False,
    config_file: ConfigOption = None,
) -> None:
    """Make a key for a client, and print it: it is not shown a second time."""
    settings = loader.load(config_file, purpose="inspect")
    now = datetime.now(UTC).replace(microsecond=0)
    for option, mistake in (
        ("NAME", keys_file.name_mistake(name)),
        ("--namespace", keys_file.namespace_mistake(namespace)),
    ):
        if mistake:
            raise WrongUsage(f"{option}: {mistake}")
    try:
        limit = None if budget is None else keys_file.parse_limit(budget)
    except ValueError as error:
        raise WrongUsage(f"--budget: {error}") from error
    if any(entry.name == name for entry in settings.server.keys):
        raise WrongUsage(f"server.keys has a key of the name {name}; choose another name")
    key = keys_file.new_key()
    stored_key = StoredKey(
        name,
        keys_file.digest(key),
        now,
        namespace,
        admin,
        limit,
        None if expires is None else _expiry(expires, now),
    )

    def edit(keys: tuple[StoredKey, ...]) -> Sequence[StoredKey]:
        if any(item.name == name for item in keys):
            raise WrongUsage(
                f"there is a key of the name {name}; `keys rotate` makes a new one, and `keys"
                " revoke` removes it"
            )
        return [*keys, stored_key]

    is_first = not settings.server.keys and not settings.keys_path.exists()
    _change(settings, edit)
    _print_key(settings, key)
    if is_first:
        say("it is the first key: from now on the proxy lets in nobody without a key")


@keys_app.command(name="list")
def list_keys(config_file: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Show the keys of the file, and what of their budgets is spent."""
    settings = loader.load(config_file, purpose="inspect")
    now = datetime.now(UTC)
    keys = read_keys(KeysFile(settings.keys_path)) or ()
    spent = _all_spent(keys, settings)
    rows = [_row(key, billed, now) for key, billed in zip(keys, spent, strict=True)]
    if as_json:
        print_json({"file": path_text(settings.keys_path), "keys": rows})
        return
    from rich.table import Table  # noqa: PLC0415 - takes 50 ms, which `serve` is spared

    table = Table(box=None, pad_edge=False)
    titles = ("name", "id", "namespace", "admin", "budget", "spent", "created", "expires", "state")
    for title in titles:
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*(printable(_cell(row[title])) for title in titles))
    names = max((len(key.name) + len(key.namespace) for key in keys), default=0)
    console(MAX_TABLE_WIDTH + names).print(table)


@keys_app.command(name="revoke")
def revoke_keys(name: NameArgument, *, config_file: ConfigOption = None) -> None:
    """Revoke the keys of a name: clients with them are refused from now on."""
    settings = loader.load(config_file, purpose="inspect")

    def edit(keys: tuple[StoredKey, ...]) -> Sequence[StoredKey]:
        rest = [key for key in keys if key.name != name]
        if len(rest) == len(keys):
            raise _unknown(name, settings)
        return rest

    _change(settings, edit)
    say(f"the keys of {name} are revoked; a proxy that runs lets them in no longer")


@keys_app.command(name="rotate")
def rotate_key(
    name: NameArgument,
    *,
    grace: Annotated[
        float, typer.Option(metavar="HOURS", min=0, max=24 * MAX_DAYS, help="For the old key.")
    ] = GRACE_HOURS,
    config_file: ConfigOption = None,
) -> None:
    """Make a new key for a name, and print it; the old one is valid for a while."""
    settings = loader.load(config_file, purpose="inspect")
    key, now = keys_file.new_key(), datetime.now(UTC)

    def edit(keys: tuple[StoredKey, ...]) -> Sequence[StoredKey]:
        try:
            return keys_file.rotate(keys, name, key, now, timedelta(hours=grace))
        except KeyError as error:
            raise _unknown(name, settings) from error
        except ValueError as error:
            raise WrongUsage(
                f"the key of {name} has expired; revoke it, and add another"
            ) from error

    _change(settings, edit)
    _print_key(settings, key)
    say(f"the former key of {name} is valid for {grace:g} hours at most")


def _change(settings: Settings, edit: keys_file.Edit) -> None:
    try:
        KeysFile(settings.keys_path).change(edit)
    except TimeoutError as error:
        where = path_text(settings.keys_path)
        raise WorkFailed(f"{where}: another process keeps changing it") from error


def _unknown(name: str, settings: Settings) -> WrongUsage:
    return WrongUsage(f"{path_text(settings.keys_path)} has no key of the name {name}")


def _print_key(settings: Settings, key: str) -> None:
    typer.echo(key)
    say(f"it is shown this once: {path_text(settings.keys_path)} has its digest only")


def _expiry(text: str, now: datetime) -> datetime:
    """Return the time of an option: a number of days, a date or a time."""
    days = text.removesuffix("d")
    try:
        if days.replace(".", "", 1).isdecimal():
            moment = now + timedelta(days=min(float(days), MAX_DAYS))
        else:
            is_date = len(text) == len("2027-01-31")
            moment = keys_file.to_time(
                date.fromisoformat(text) if is_date else datetime.fromisoformat(text)
            )
    except ValueError as error:
        raise WrongUsage("--expires: expected a date like 2027-01-31, or days like 30") from error
    if moment <= now:
        raise WrongUsage(f"--expires: {moment.strftime(_TIME)} has passed")
    return moment


def _row(key: StoredKey, spent: int | None, now: datetime) -> dict[str, object]:
    return {
        "name": key.name,
        "id": key.digest.hex()[:_ID],
        "namespace": key.namespace,
        "admin": key.is_admin,
        "budget": key.limit and keys_file.limit_text(key.limit),
        "spent": None if spent is None else spent / NANO,
        "created": key.created.strftime(_TIME),
        "expires": key.expires and key.expires.strftime(_TIME),
        "state": "valid" if key.is_valid(now) else "expired",
    }


def _all_spent(keys: Sequence[StoredKey], settings: Settings) -> list[int | None]:
    """Return the nanodollars of the present period of each key, those of all nodes.

    None for a key without a budget, or where nobody knows.
    """
    now = time.time()
    spent = [_spent(key, settings) for key in keys]
    limited = [
        (index, (key.name, key.limit.first_day(now), here))
        for index, (key, here) in enumerate(zip(keys, spent, strict=True))
        if key.limit is not None and here is not None
    ]
    if settings.cache.shared is None or not limited:
        return spent
    from .nodes import read_others_billed  # noqa: PLC0415 - needs the extra `redis`

    others = read_others_billed(settings, [client for _, client in limited])
    if others is None:
        say("the shared Redis does not answer: what is spent is that of this node")
        return spent
    for (index, (_, _, here)), billed in zip(limited, others, strict=True):
        spent[index] = here + billed
    return spent


def _spent(key: StoredKey, settings: Settings) -> int | None:
    """Return the nanodollars of the present period on this node, or None."""
    if key.limit is None:
        return None
    path = connection.folder_of(settings.cache.directory) / FILE_NAME
    lines = LedgerFilter(key.name, key.limit.first_day(time.time()))
    try:
        sums = read_ledger(path, [], lines=lines) if path.exists() else []
    except FAILURES:
        return None
    return sum(usage.nanodollars_billed for _, usage in sums)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else str(value)
