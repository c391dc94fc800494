"""`embedding-proxy cache warm-up`: the disk of a new node is filled from the shared tier."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.storage import DAY, MIB

from .cache import open_store
from .formatting import count, size
from .groups import cache_app
from .output import ConfigOption, JsonOption, WorkFailed, print_json, progress

if TYPE_CHECKING:
    from embedding_proxy.cache.shared.client import RedisClient
    from embedding_proxy.cache.shared.warmup import WarmUp


@cache_app.command(name="warm-up")
def warm_up(
    *,
    config_file: ConfigOption = None,
    rate_mib: Annotated[
        float, typer.Option("--rate", min=0.001, help="MiB a second that are copied at most.")
    ] = 32.0,
    is_restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, not where an interrupted one ended.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy the records of the shared tier to this node's disk, while proxies run.

    An interrupted one goes on where it was. It ends before the store would have to evict.
    """
    settings = loader.load(config_file, purpose="inspect")
    if settings.cache.shared is None:
        raise loader.ConfigError(
            settings.problem(("cache", "shared"), "is not set, so there is nothing to copy from")
        )
    # These need the extra `redis`.
    from embedding_proxy.cache.shared import warmup as copying  # noqa: PLC0415
    from embedding_proxy.cache.shared.sweep import Interrupted  # noqa: PLC0415

    with open_store(settings, create=True) as file:
        state = copying.WarmUp() if is_restart else copying.read_state(file.folder)
        try:
            _copy(settings, file, state, rate_mib * MIB)
        except Interrupted as error:
            raise WorkFailed(
                f"the shared tier does not answer ({error}); {_figures(state)} so far: call it"
                " again, and it goes on there"
            ) from error
    if as_json:
        fields = asdict(state)
        del fields["cursors"]
        print_json(fields)
        return
    typer.echo(_figures(state))
    if state.is_full:
        typer.echo("the store is full to its limit; the rest stays in the shared tier")


def _copy(settings: Settings, file: Database, state: "WarmUp", rate: float) -> None:
    from embedding_proxy.cache.shared.warmup import Copier  # noqa: PLC0415

    from .nodes import run_with_client  # noqa: PLC0415

    ttl_days = settings.cache.ttl_days

    async def copy(client: "RedisClient") -> None:
        copier = Copier(
            client, file, max_bytes_a_s=rate, ttl_s=None if ttl_days is None else ttl_days * DAY
        )
        with progress("copying") as tell:
            async for now in copier.run(state):
                tell(now.copied)

    run_with_client(settings, copy)


def _figures(state: "WarmUp") -> str:
    parts = [
        f"{count(state.copied, 'record', 'records')} copied ({size(state.copied_bytes)})",
        f"{state.present:,} were here already",
    ]
    if state.left_out:
        parts.append(f"{state.left_out:,} left out: damaged, purged or too old")
    return ", ".join(parts)
