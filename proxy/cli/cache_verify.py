"""`embedding-proxy cache verify`: every record read, what is damaged mended or salvaged."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from embedding_proxy.cache.disk import connection, quarantine, salvage
from embedding_proxy.cache.disk.carver import CarveReport
from embedding_proxy.cache.disk.connection import StoreError
from embedding_proxy.cache.disk.database import FILE_NAME
from embedding_proxy.cache.disk.salvage import Outcome
from embedding_proxy.cache.maintenance import verify
from embedding_proxy.cache.maintenance.verify import Findings
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.storage import GIB

from .cache import open_store, open_store_for_reading
from .formatting import count
from .groups import cache_app
from .output import ConfigOption, JsonOption, WorkFailed, print_json, progress


@cache_app.command(name="verify")
def verify_store(
    *,
    config_file: ConfigOption = None,
    mend: Annotated[
        bool,
        typer.Option(help="Delete damaged records; save whole records from an unreadable file."),
    ] = False,
    salvage_file: Annotated[
        Path | None,
        typer.Option(
            "--salvage", metavar="FILE", help="Save whole records from a damaged cache.db."
        ),
    ] = None,
    add_sums: Annotated[
        bool,
        typer.Option(
            help="Add the sums of FILE to the ledger, once. Not for a copy of this store."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every record and report damage. Exit code 1 if damage is left."""
    settings = loader.load(config_file, purpose="inspect")
    if add_sums and salvage_file is None:
        raise loader.ConfigError("--add-sums: is about the FILE of --salvage")
    if salvage_file is not None:
        _salvage(settings, salvage_file, add_sums=add_sums, as_json=as_json)
        return
    findings = _scan(settings, for_writing=mend)
    mended = False
    outcome: Outcome | None = None
    if mend and findings.broken:
        outcome = _start_anew(settings)
        mended = True
    elif mend and findings.is_repairable:
        with open_store(settings) as database:
            verify.repair(database, findings)
        mended = True
    if as_json:
        print_json(
            {
                "records": findings.records,
                "damaged": findings.damaged,
                "lost_sight_of": findings.lost_sight_of,
                "wrong_partition": findings.wrong_partition,
                "orphans": findings.orphans,
                "broken": findings.broken,
                "unchecked": findings.unchecked,
                "mended": mended,
                "salvaged": None if outcome is None else outcome.records,
            }
        )
    else:
        _tell(findings, mended=mended, outcome=outcome)
    if not (findings.sound or mended) or (findings.unchecked and not findings.broken):
        raise typer.Exit(1)


def _scan(settings: Settings, *, for_writing: bool) -> Findings:
    findings = Findings()
    # A command that mends learns at once that the store cannot be written.
    opener = open_store if for_writing else open_store_for_reading
    try:
        with opener(settings) as database:
            ((total,),) = database.sql("SELECT value FROM Settings WHERE key = 'count'")
            with progress("verifying", total) as tell:
                for checked in verify.scan(database, findings):
                    tell(checked)
    except StoreError as error:
        if not connection.is_damaged(error):
            raise
        findings.broken = str(error.__cause__)
    return findings


def _tell(findings: Findings, *, mended: bool, outcome: Outcome | None) -> None:
    typer.echo(f"{count(findings.records, 'record is', 'records are')} whole")
    if findings.damaged:
        verb = "deleted" if mended else "damaged; --mend deletes them"
        typer.echo(f"{count(findings.damaged, 'record')} {verb}")
    if findings.lost_sight_of:
        verb = "entered again" if mended else "not entered; --mend does it"
        typer.echo(f"{count(findings.lost_sight_of, 'record')} {verb}")
    if findings.wrong_partition:
        whole = count(findings.wrong_partition, "whole record has", "whole records have")
        now = "an unknown space now" if mended else "a space of another width"
        remedy = "" if mended else "; --mend keeps what is whole, with its space unknown"
        typer.echo(f"{whole} {now}{remedy}")
    if findings.orphans:
        verb = "deleted" if mended else "without a record; --mend deletes them"
        typer.echo(f"{count(findings.orphans, 'row')} of the list of entries {verb}")
    if findings.unchecked and not findings.broken:
        typer.echo(
            f"not checked, because the proxy wrote too much meanwhile: {findings.unchecked};"
            " run it again when less is written"
        )
    if findings.broken:
        typer.echo(f"the file is damaged: {findings.broken}")
        if outcome is None:
            typer.echo("--mend moves it aside and saves what is whole in it")
        else:
            records = count(outcome.records, "record was", "records were")
            typer.echo(f"it was moved aside; {records} saved out of it")


def _start_anew(settings: Settings) -> Outcome:
    """Move the damaged file aside, and salvage it into a new one."""
    cache = settings.cache
    path = connection.folder_of(cache.directory) / FILE_NAME
    limit = int(cache.size_limit_gib * GIB)
    try:
        inode = quarantine.inode_of(path)
        with contextlib.closing(connection.lock_of(cache.directory)) as lock, lock:
            quarantined = quarantine.move(path, inode)
        if quarantined is not None:
            typer.echo(f"moved to {quarantined.folder}", err=True)
        size = 0 if quarantined is None else quarantined.path.stat().st_size
        with progress("salvaging", size) as tell:
            outcomes = salvage.salvage_pending(
                cache.directory, limit, cache.pinned_namespaces, tell
            )
    except OSError as error:
        raise WorkFailed(f"{cache.directory}: {error}") from error
    return outcomes[0] if outcomes else Outcome()


def _salvage(settings: Settings, path: Path, *, add_sums: bool, as_json: bool) -> None:
    own = connection.folder_of(settings.cache.directory) / FILE_NAME
    if not path.is_file():
        raise WorkFailed(f"{path}: there is no such file")
    if own.exists() and own.samefile(path):
        raise WorkFailed(f"{path} is the store itself: `cache verify --mend` mends it")
    add_sums = add_sums or quarantine.is_in_folder(path)
    outcome, report = _put(settings, path, add_sums=add_sums)
    left_out = "" if add_sums else f"the sums of {path} are not added; --add-sums adds them"
    if not (report.records or outcome.sums):
        raise WorkFailed(
            f"{path}: there is no record in it that is whole{left_out and '; '}{left_out}"
        )
    if as_json:
        print_json(
            {
                "stored": outcome.records,
                "present": outcome.present,
                "damaged": report.damaged,
                "sums": outcome.sums,
                "sums_left_out": not add_sums,
            }
        )
    else:
        typer.echo(
            f"{count(outcome.records, 'record')} saved,"
            f" {count(outcome.present, 'was', 'were')} there already,"
            f" {count(report.damaged, 'is', 'are')} damaged;"
            f" {count(outcome.sums, 'sum')} added to the ledger"
        )
        if left_out:
            typer.echo(left_out)


def _put(settings: Settings, path: Path, *, add_sums: bool) -> tuple[Outcome, CarveReport]:
    with (
        open_store(settings, create=True) as database,
        progress("salvaging", path.stat().st_size) as tell,
    ):
        return salvage.salvage_file(path, database, tell, add_sums=add_sums)
