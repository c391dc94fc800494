"""`embedding-proxy cache verify`: every record read, what is damaged mended or salvaged."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from cache.disk import connection
from cache.disk.connection import StoreError
from cache.disk.database import FILE_NAME, set_aside
from cache.maintenance import salvage, transfer, verify
from cache.maintenance.verify import Findings
from cache.row import Row
from proxy import config
from proxy.settings.schema import Settings

from .cache import app, opened
from .common import ConfigOption, JsonOption, WorkFailed, print_json, progress


@app.command(name="verify")
def verify_store(
    *,
    config_file: ConfigOption = None,
    mend: Annotated[
        bool,
        typer.Option(
            help="Delete what is damaged; save what is whole out of a file that cannot be read."
        ),
    ] = False,
    salvage_file: Annotated[
        Path | None,
        typer.Option(
            "--salvage", metavar="FILE", help="Take what is whole out of a damaged cache.db."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read every record and say what is damaged. Exit code 1 if something is left that is."""
    settings = config.load(config_file)
    if salvage_file is not None:
        _salvage(settings, salvage_file, as_json=as_json)
        return
    findings = _scan(settings)
    mended = False
    saved: transfer.Written | None = None
    if mend and findings.broken:
        saved = _start_anew(settings)
        mended = True
    elif mend and findings.is_mendable:
        with opened(settings) as database:
            verify.mend(database, findings)
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
                "salvaged": None if saved is None else saved.stored,
            }
        )
    else:
        _tell(findings, mended=mended, saved=saved)
    if not (findings.sound or mended) or (findings.unchecked and not findings.broken):
        raise typer.Exit(1)


def _scan(settings: Settings) -> Findings:
    findings = Findings()
    try:
        with opened(settings) as database:
            ((total,),) = database.sql("SELECT value FROM Settings WHERE key = 'count'")
            with progress("verifying", total) as tell:
                for seen in verify.scan(database, findings):
                    tell(seen)
    except StoreError as error:
        if not connection.is_damaged(error):
            raise
        findings.broken = str(error.__cause__)
    return findings


def _tell(findings: Findings, *, mended: bool, saved: transfer.Written | None) -> None:
    typer.echo(f"{findings.records:,} records are whole")
    if findings.damaged:
        verb = "deleted" if mended else "damaged; --mend deletes them"
        typer.echo(f"{findings.damaged:,} records {verb}")
    if findings.lost_sight_of:
        verb = "entered again" if mended else "not entered; --mend does it"
        typer.echo(f"{findings.lost_sight_of:,} records {verb}")
    if findings.wrong_partition:
        verb = "now have an unknown space" if mended else "have a space of another width"
        remedy = "" if mended else "; --mend keeps them, with their space unknown"
        typer.echo(f"{findings.wrong_partition:,} whole records {verb}{remedy}")
    if findings.orphans:
        verb = "deleted" if mended else "without a record; --mend deletes them"
        typer.echo(f"{findings.orphans:,} rows of the list of entries {verb}")
    if findings.unchecked and not findings.broken:
        typer.echo(
            f"not checked, because the proxy wrote too much meanwhile: {findings.unchecked};"
            " run it again when less is written"
        )
    if findings.broken:
        typer.echo(f"the file is damaged: {findings.broken}")
        if saved is None:
            typer.echo("--mend moves it aside and saves what is whole in it")
        else:
            typer.echo(f"it was moved aside; {saved.stored:,} records were saved out of it")


def _start_anew(settings: Settings) -> transfer.Written:
    """Move the damaged store aside, and what is whole in it into a fresh one."""
    directory = settings.cache.directory
    try:
        with contextlib.closing(connection.lock_of(directory)) as lock, lock:
            aside = set_aside(connection.folder_of(directory))
    except OSError as error:
        raise WorkFailed(f"{directory}: {error}") from error
    typer.echo(f"moved to {aside}", err=True)
    return _put(settings, aside / FILE_NAME)[0]


def _salvage(settings: Settings, path: Path, *, as_json: bool) -> None:
    own = connection.folder_of(settings.cache.directory) / FILE_NAME
    if not path.is_file():
        raise WorkFailed(f"{path}: there is no such file")
    if own.exists() and own.samefile(path):
        raise WorkFailed(f"{path} is the store itself: `cache verify --mend` mends it")
    sums, report = _put(settings, path)
    if not report.records:
        raise WorkFailed(f"{path}: there is no record in it that is whole")
    if as_json:
        print_json({"stored": sums.stored, "present": sums.present, "damaged": report.damaged})
    else:
        typer.echo(
            f"{sums.stored:,} records saved, {sums.present:,} were there already,"
            f" {report.damaged:,} are damaged"
        )


def _put(settings: Settings, path: Path) -> tuple[transfer.Written, salvage.Report]:
    report = salvage.Report()
    sums = transfer.Written()
    with (
        opened(settings, create=True) as database,
        progress("salvaging", path.stat().st_size) as tell,
    ):
        rows: Iterator[Row] = salvage.rows(path, report, tell)
        for sums in transfer.put(database, rows):  # noqa: B007 - the last one counts
            pass
    return sums, report
