"""Texts without vectors, read one by one: of files, folders and a query. Nothing is held in memory.

A source can be read again and again, each time from the start. A text is taken as it stands, but
for the end of its line: it has to be, byte for byte, what an application asks for later.
"""

import csv
import fnmatch
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal, TextIO, TypeAlias

from embedding_proxy.cache.maintenance.import_source import (
    RejectedPair,
    SourceError,
    quote_names,
    to_text,
)

from . import parquet
from .jsonl import is_jsonl, objects

Split: TypeAlias = Literal["line", "paragraph", "file"]
Text: TypeAlias = str | RejectedPair

_MARKDOWN = (".md", ".markdown", ".rst")
_PLAIN = (".txt", ".text")
_TABLES = (".csv", ".tsv")
_DATABASES = (".db", ".sqlite", ".sqlite3")
_MAX_CELL = 16 << 20
"""The most characters of a CSV cell. The default of the library is below the longest context."""


class TextFiles:
    """The texts of files and folders, in this order; of a folder those of all files below it."""

    def __init__(
        self,
        places: Iterable[Path],
        *,
        split: Split | None = None,
        field: str = "text",
        glob: str = "*",
        query: str | None = None,
    ) -> None:
        """`split` divides text files: lines by default, paragraphs in Markdown.

        `field` is a field of JSONL, or a column of CSV and Parquet. `glob` chooses the files of a
        folder by name. `query` gives the texts of a SQLite database, in its first column. Raises
        SourceError for what cannot be read at all.
        """
        self._split = split
        self._field = field
        self._query = query
        self.files = [file for place in places for file in _files(place, glob)]
        if not self.files:
            raise SourceError("there is no file with texts in what was named")

    def __iter__(self) -> Iterator[Text]:
        """Yield the texts, and a RejectedPair for each that cannot be used."""
        for file in self.files:
            for text in self._read(file):
                if isinstance(text, RejectedPair):
                    yield RejectedPair(f"{file}: {text.where}", text.why)
                else:
                    yield text

    def _read(self, file: Path) -> Iterator[Text]:
        suffix = file.suffix.lower()
        if is_jsonl(file):
            return _of_json_lines(file, self._field)
        if suffix in _TABLES:
            return _of_table(file, self._field, "\t" if suffix == ".tsv" else ",")
        if suffix == ".parquet":
            return parquet.texts(file, self._field)
        if suffix in _DATABASES:
            return _of_database(file, self._query)
        split = self._split or ("paragraph" if suffix in _MARKDOWN else "line")
        return _of_text(file, split)


def _files(place: Path, glob: str) -> Iterator[Path]:
    """Yield the files of a place: the file itself, or those below a folder in a known form."""
    if not place.exists():
        raise SourceError(f"{place}: there is no such file")
    if not place.is_dir():
        yield place
        return
    suffixes = (*_MARKDOWN, *_PLAIN, *_TABLES, ".parquet")
    for file in sorted(place.rglob("*")):
        is_named = fnmatch.fnmatch(file.name, glob)
        is_known = glob != "*" or file.suffix.lower() in suffixes or is_jsonl(file)
        if is_named and is_known and file.is_file():
            yield file


def _of_text(file: Path, split: Split) -> Iterator[Text]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if split == "file":
                whole = lines.read()
                if whole.strip():
                    yield whole
            elif split == "line":
                for line in lines:
                    if line.strip():
                        yield line.rstrip("\r\n")
            else:
                yield from _paragraphs(lines)
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}") from error


def _paragraphs(lines: TextIO) -> Iterator[str]:
    """Yield the paragraphs, which blank lines separate."""
    paragraph: list[str] = []
    for line in (*lines, ""):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).rstrip("\r\n")
            paragraph = []


def _of_json_lines(file: Path, field: str) -> Iterator[Text]:
    """Yield the field of each line: a text, or a list of texts as in a request for embeddings."""
    for line in objects(file, field):
        if isinstance(line, RejectedPair):
            yield line
            continue
        where, content = line
        value = content[field]
        for item in value if isinstance(value, list) else [value]:
            yield to_text(where, item)


def _of_table(file: Path, column: str, delimiter: str) -> Iterator[Text]:
    csv.field_size_limit(min(_MAX_CELL, sys.maxsize))
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, delimiter=delimiter)
            names = rows.fieldnames or []
            if column not in names:
                raise SourceError(
                    f"{file} has no column `{column}`; columns: {quote_names(names)}; name one of"
                    " them with --field"
                )
            for row in rows:
                yield to_text(f"line {rows.line_num}", row[column])
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text; save it as UTF-8") from error
    except csv.Error as error:
        raise SourceError(f"{file} cannot be read as CSV: {error}") from error
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}") from error


def _of_database(file: Path, query: str | None) -> Iterator[Text]:
    if query is None:
        raise SourceError(f"{file} is a database: give with --query the SQL of its texts")
    try:
        # Read-only, because the query is the user's.
        with closing(
            sqlite3.connect(
                f"{file.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False
            )
        ) as database:
            database.execute("PRAGMA query_only = ON")
            for number, row in enumerate(database.execute(query), start=1):
                yield to_text(f"row {number}", row[0])
    except sqlite3.Error as error:
        raise SourceError(f"{file}: {error}") from error
