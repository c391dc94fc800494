"""The file of the outbox: its tables, and how it is opened."""

import logging
import sqlite3
import time
from pathlib import Path

log = logging.getLogger("embedding_proxy.index")

_LAYOUT = """
CREATE TABLE IF NOT EXISTS target (
    id INTEGER PRIMARY KEY, collection TEXT, space TEXT, dimensions INTEGER,
    UNIQUE (collection, space, dimensions));
CREATE TABLE IF NOT EXISTS waiting (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, target INTEGER, point BLOB, bytes INTEGER, at REAL,
    payload BLOB, vector BLOB, UNIQUE (target, point));
CREATE INDEX IF NOT EXISTS line ON waiting (target, seq, bytes, at);
CREATE TABLE IF NOT EXISTS known (
    target INTEGER, point BLOB, mark INTEGER, PRIMARY KEY (target, point)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dead (
    target INTEGER, point BLOB, bytes INTEGER, at REAL, died REAL, reason TEXT,
    payload BLOB, vector BLOB, PRIMARY KEY (target, point));
CREATE TABLE IF NOT EXISTS state (forgotten INTEGER);
INSERT INTO state SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM state);
PRAGMA user_version = 1;
"""
_VERSION = 1


def opened(path: Path, patience_s: float) -> sqlite3.Connection:
    """Open the file, and make what it lacks; one that is damaged is moved aside.

    Whoever calls holds the lock. Raises sqlite3.Error and OSError.
    """
    try:
        return _prepared(path, patience_s)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
        path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
        for tail in ("-wal", "-shm"):
            path.with_name(path.name + tail).unlink(missing_ok=True)
        log.error("%s is damaged: moved aside, what waited in it is not indexed", path)  # noqa: TRY400
        return _prepared(path, patience_s)


def _prepared(path: Path, patience_s: float) -> sqlite3.Connection:
    sql = sqlite3.connect(path, isolation_level=None, timeout=patience_s)
    try:
        # Vectors leave gaps of whole pages, and the file shrinks again.
        sql.execute("PRAGMA auto_vacuum = INCREMENTAL")
        sql.execute("PRAGMA journal_mode = WAL")
        sql.execute("PRAGMA synchronous = NORMAL")
        (version,) = sql.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise sqlite3.OperationalError(f"{path} is of a later version")  # noqa: TRY301
        if version < _VERSION:
            sql.executescript(_LAYOUT)
    except BaseException:
        sql.close()
        raise
    return sql
