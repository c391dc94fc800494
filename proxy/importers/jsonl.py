"""Pairs from JSONL: one object a line, the text in one field and the vector in another."""

import gzip
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TypeAlias

import orjson
from embedding_proxy.cache.maintenance.import_source import (
    Pair,
    RejectedPair,
    SourceError,
    quote_names,
    to_pair,
)

Object: TypeAlias = dict[str, object]

_MAX_LINE_BYTES = 16 << 20
"""Bytes of a line. A text of the longest context with the widest vector takes a hundredth."""
TOO_LONG = f"longer than {_MAX_LINE_BYTES >> 20} MiB"
_LOOKED_AT = 100
"""Lines in which a field must show up at least once."""
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n" + _BOM


class JsonLines:
    """A file of JSONL, plain or gzipped. A vector is a list of numbers, or float32 in base64."""

    def __init__(self, path: Path, text: str = "text", vector: str = "embedding") -> None:
        self.name = str(path)
        self._path = path
        self._text = text
        self._vector = vector
        need_fields(path, text, vector)

    def __iter__(self) -> Iterator[Pair | RejectedPair]:
        for item in objects(self._path, self._text, self._vector):
            if isinstance(item, RejectedPair):
                yield item
            else:
                where, fields = item
                yield to_pair(where, fields[self._text], fields[self._vector])


def is_jsonl(path: Path) -> bool:
    """Whether a file is JSONL by its name."""
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def need_fields(path: Path, *fields: str) -> None:
    """Raise SourceError if the first lines are not JSON, or none of them has one of the fields."""
    bad = None
    names: set[str] = set()
    for item in islice(objects(path), _LOOKED_AT):
        if isinstance(item, RejectedPair):
            bad = bad or item
        else:
            names |= item[1].keys()
    if bad and not names:
        raise SourceError(f"{path} is not JSONL: {bad.where}: {bad.why}")
    for field in fields:
        if names and field not in names:
            raise SourceError(f"{path} has no field `{field}`; fields: {quote_names(names)}")


def objects(path: Path, *fields: str) -> Iterator[tuple[str, Object] | RejectedPair]:
    """Give where each line is, and its object, which has all the fields. Raises SourceError."""
    for number, line in lines(path):
        where = f"line {number}"
        result = _object(line, fields)
        yield RejectedPair(where, result) if isinstance(result, str) else (where, result)


def _object(line: bytes | None, fields: tuple[str, ...]) -> Object | str:
    """Return the object, or what is wrong with the line."""
    if line is None:
        return TOO_LONG
    try:
        item = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not JSON: {error}"
    if not isinstance(item, dict):
        return "not a JSON object"
    for field in fields:
        if field not in item:
            return f"there is no field `{field}`"
    return item


def lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Give the number and content of each line that is not blank; None for one too long.

    Raises SourceError when the file cannot be read, or not to its end.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES):
                number += 1
                if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                    _skip_line(file)
                    yield number, None
                elif line.strip(_BLANK):
                    start = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
                    yield number, line[start:].removesuffix(b"\n").removesuffix(b"\r")
    except (OSError, EOFError, zlib.error) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        after = f" after line {number}" if number else ""
        raise SourceError(f"{path} cannot be read{after}: {what}") from error


def _skip_line(file: IO[bytes] | gzip.GzipFile) -> None:
    while (piece := file.readline(_MAX_LINE_BYTES)) and not piece.endswith(b"\n"):
        pass
