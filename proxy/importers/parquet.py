"""Pairs from Parquet: a column of text, one of lists of numbers. The only importer of pyarrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from embedding_proxy.cache.maintenance.import_source import (
    Pair,
    RejectedPair,
    SourceError,
    listed,
    to_pair,
    to_text,
)

if TYPE_CHECKING:
    from pyarrow import Array, DataType
    from pyarrow.parquet import ParquetFile

_ROWS = 256
"""Rows held at a time: some megabytes, even of the widest vectors in float64."""
_READ_AHEAD = 1 << 20
"""Bytes read ahead of each column; without a limit, all of a row group is read at once."""


class Parquet:
    """A Parquet file. Numbers of any width are rounded to float32, as those of JSON are."""

    def __init__(self, path: Path, text: str = "text", vector: str = "embedding") -> None:
        self.name = str(path)
        self._path = path
        self._text = text
        self._vector = vector
        with _open(path) as file:
            _check_text(path, file, text)
            kind = _type(path, file, vector)
            if not _is_vector(kind):
                raise SourceError(f"{path}: column `{vector}` holds {kind}, not lists of numbers")

    def __iter__(self) -> Iterator[Pair | RejectedPair]:
        row = 0
        with _open(self._path) as file:
            columns = [self._text, self._vector]
            for batch in file.iter_batches(_ROWS, columns=columns, use_threads=False):
                texts = _texts(batch.column(self._text))
                vectors = _vectors(batch.column(self._vector))
                for text, vector in zip(texts, vectors, strict=True):
                    row += 1
                    yield _pair(f"row {row}", text, vector)


def _check_text(path: Path, file: "ParquetFile", column: str) -> None:
    """Raise SourceError for a column that holds no texts."""
    kind = _type(path, file, column)
    if not _is_text(kind):
        raise SourceError(f"{path}: column `{column}` holds {kind}, not text")


def _type(path: Path, file: "ParquetFile", column: str) -> "DataType":
    names = file.schema_arrow.names
    if column not in names:
        raise SourceError(f"{path} has no column `{column}`; columns: {listed(names)}")
    if names.count(column) > 1:
        raise SourceError(f"{path} has more than one column `{column}`")
    return file.schema_arrow.field(column).type


@contextmanager
def _open(path: Path) -> Iterator["ParquetFile"]:
    """Open a file; what the library raises meanwhile becomes a SourceError."""
    try:
        from pyarrow.lib import ArrowException  # noqa: PLC0415 - an extra, and slow to import
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415
    except ImportError as error:
        remedy = "pip install 'pyarrow>=21'"
        raise SourceError(f"Parquet needs more: {remedy}") from error
    try:
        with ParquetFile(
            path,
            buffer_size=_READ_AHEAD,
            pre_buffer=False,
            page_checksum_verification=True,
        ) as file:
            yield file
    except (ArrowException, OSError) as error:
        what = " ".join(str(error).split())
        raise SourceError(f"{path} cannot be read as Parquet: {what}") from error


def texts(path: Path, column: str) -> Iterator[str | RejectedPair]:
    """Yield the texts of a column. Raises SourceError."""
    row = 0
    with _open(path) as file:
        _check_text(path, file, column)
        for batch in file.iter_batches(_ROWS, columns=[column], use_threads=False):
            for text in _texts(batch.column(column)):
                row += 1
                yield _text(f"row {row}", text)


def _is_text(kind: "DataType") -> bool:
    from pyarrow import types  # noqa: PLC0415

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_vector(kind: "DataType") -> bool:
    from pyarrow import types  # noqa: PLC0415

    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(lists and (types.is_floating(kind.value_type) or types.is_integer(kind.value_type)))


def _texts(column: "Array") -> list[bytes | None]:
    """Return the texts undecoded: Arrow does not promise that they are UTF-8."""
    from pyarrow import large_binary, types  # noqa: PLC0415

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    texts: list[bytes | None] = column.cast(large_binary()).to_pylist()
    return texts


def _vectors(column: "Array") -> Iterator[bytes | str]:
    """Give each list as float32 bytes, or say why it cannot be."""
    from pyarrow import float32, types  # noqa: PLC0415

    if types.is_fixed_size_list(column.type):
        size, first = column.type.list_size, column.offset
        ends = [size * row for row in range(first, first + len(column) + 1)]
    else:
        ends = column.offsets.to_pylist()
    # Only the numbers of this batch: what lies under it may be longer.
    numbers = column.values.slice(ends[0], ends[-1] - ends[0]).cast(float32(), safe=False)
    data = memoryview(numbers.buffers()[1] or b"")[4 * numbers.offset :]
    for there, begin, end in zip(column.is_valid().to_pylist(), ends, ends[1:], strict=False):
        start, length = begin - ends[0], end - begin
        if not there:
            yield "the vector: is missing"
        elif numbers.null_count and numbers.slice(start, length).null_count:
            yield "the vector: holds something that is not a number"
        else:
            yield bytes(data[4 * start : 4 * (start + length)])


def _text(where: str, text: bytes | None) -> str | RejectedPair:
    try:
        return to_text(where, None if text is None else text.decode())
    except UnicodeDecodeError:
        return RejectedPair(where, "the text is not UTF-8")


def _pair(where: str, text: bytes | None, vector: bytes | str) -> Pair | RejectedPair:
    words = _text(where, text)
    if isinstance(words, RejectedPair):
        return words
    pair = to_pair(where, words, b"" if isinstance(vector, str) else vector)
    if isinstance(pair, Pair) and isinstance(vector, str):
        return RejectedPair(where, vector)
    return pair
